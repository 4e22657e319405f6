"""What the variant `micro_batches` of `expertlink bench --layer` is measured with: products that
leave SMs to the calls beside them, and the calls of layers without anything in between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from expertlink.bench.layer_model import Call, Parts
from expertlink.communicator import MoECommunicator


@contextmanager
def limited_products(comm: MoECommunicator) -> Iterator[int | None]:
    """Products of this process leave those SMs free that a call of `comm` may occupy.

    With torch's carve-out, which not all products heed; it is as before in the end. Yields the
    number of SMs that products may use. None: no limit, because tensors live on the CPU, the engine
    does not say how many SMs it takes, it takes all, or this torch has no carve-out.
    """
    total, left = 0, 0
    if comm.device.type == "cuda" and hasattr(torch._C, "_set_sm_carveout_experimental"):
        total = torch.cuda.get_device_properties(comm.device).multi_processor_count
        left = min(comm.compute_sms(name) for name in ("dispatch", "combine"))
    if not 0 < left < total:
        yield None
        return
    torch_C: Any = torch._C
    before = torch_C._get_sm_carveout_experimental()
    torch_C._set_sm_carveout_experimental(total - left)
    try:
        yield left
    finally:
        torch_C._set_sm_carveout_experimental(before)


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
