"""Dispatch and combine captured in CUDA graphs: one graph each, and one with both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertlink.communicator import MoECommunicator


@dataclass(frozen=True)
class CapturedCalls:
    """The graphs of one input. Replays read the tensors that were captured and write these.

    Attributes:
        dispatch: one dispatch.
        combine: the combine of that dispatch.
        pair: a dispatch and its combine.
        y_TH: result of `combine`.
        pair_y_TH: result of `pair`.
        kept: outputs and handles whose memory the graphs use.
    """

    dispatch: torch.cuda.CUDAGraph
    combine: torch.cuda.CUDAGraph
    pair: torch.cuda.CUDAGraph
    y_TH: Tensor
    pair_y_TH: Tensor
    kept: tuple[Any, ...]


def capture_calls(
    comm: MoECommunicator,
    x_TH: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    expert_out: Tensor,
) -> CapturedCalls:
    """Captures the calls of an input on every rank; nothing runs before the first replay.

    Args:
        comm: has static shapes, and has served such calls before.
        x_TH: rows to dispatch.
        topk_ids_TK: their experts.
        topk_weights_TK: their weights.
        expert_out: what the experts return, in the maximal shape.
    """
    dispatch, combine, pair = (torch.cuda.CUDAGraph() for _ in range(3))
    y_TH, pair_y_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
    # Other threads, such as those of NCCL, may use the device while this one captures.
    with torch.cuda.graph(dispatch, capture_error_mode="thread_local"):
        dispatched = comm.dispatch(x_TH, topk_ids_TK, topk_weights_TK)
    with torch.cuda.graph(combine, capture_error_mode="thread_local"):
        comm.combine(expert_out, dispatched[1], out=y_TH)
    with torch.cuda.graph(pair, capture_error_mode="thread_local"):
        both = comm.dispatch(x_TH, topk_ids_TK, topk_weights_TK)
        comm.combine(expert_out, both[1], out=pair_y_TH)
    return CapturedCalls(dispatch, combine, pair, y_TH, pair_y_TH, (dispatched, both))
