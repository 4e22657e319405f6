"""The experts' own forward on rows of all ranks, between a dispatch and a combine.

Rows arrive once per (token, local expert), grouped by expert: the forward gets one choice per row,
with weight 1. Routing weights are applied by combine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from expertlink.integrations.growing import Communicators
from expertlink.types import DispatchOutput


class DispatchedExperts:
    """The forward of an experts module, on rows of all ranks. Collective, differentiable.

    Args:
        forward: the module's own, on local expert ids.
        communicators: those of the model.
    """

    def __init__(self, forward: Callable[..., Tensor], communicators: Communicators) -> None:
        self._forward = forward
        self._communicators = communicators

    def __call__(self, x_TH: Tensor, topk_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        received, handle, comm = self._communicators.dispatch(x_TH, topk_ids_TK, weights_TK)
        return comm.combine(self._outputs(received), handle)

    def _outputs(self, received: DispatchOutput) -> Tensor:
        rows_NH, count = received.tokens, received.tokens.shape[0]
        if count == 0:  # one row of zeros keeps the parameters in the graph, which FSDP needs
            rows_NH = rows_NH.new_zeros(1, rows_NH.shape[1])
            experts_N = torch.zeros(1, dtype=torch.int64, device=rows_NH.device)
        else:
            experts_N = torch.repeat_interleave(
                received.num_tokens_per_expert.long(), output_size=count
            )
        ones_N = rows_NH.new_ones(rows_NH.shape[0])
        return self._forward(rows_NH, experts_N[:, None], ones_N[:, None])[:count]


def slice_of(tensor: Tensor, mesh: Any) -> Tensor:
    """This rank's rows of a tensor that all ranks of a mesh hold; backward gathers gradients."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    held = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    return held.redistribute(mesh, [Shard(0)]).to_local()


def whole(rows: Tensor, mesh: Any, shape: torch.Size) -> Tensor:
    """All rows, of which every rank of a mesh holds a slice; backward slices gradients."""
    from torch.distributed.tensor import DTensor, Shard

    rows = rows.contiguous()
    cut = DTensor.from_local(rows, mesh, [Shard(0)], shape=shape, stride=(shape[1], 1))
    return cut.full_tensor()
