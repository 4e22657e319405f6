"""The calls of layers without anything in between, which the variant `micro_batches` of
`expertlink bench --layer` is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from expertlink.bench.layer_model import Call, Parts
from expertlink.communicator import MoECommunicator


def calls_alone(
    comm: MoECommunicator,
    x_TH: Tensor,
    ids_LTK: Sequence[Tensor],
    weights_LTK: Sequence[Tensor],
) -> Parts:
    """The calls of the layers: what a dispatch received goes straight back."""
    for ids_TK, weights_TK in zip(ids_LTK, weights_LTK, strict=True):
        received, handle = yield Call(comm, "dispatch", (x_TH, ids_TK, weights_TK))
        x_TH = yield Call(comm, "combine", (received.tokens, handle))
    return x_TH
