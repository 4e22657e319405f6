"""Dispatch and combine captured in CUDA graphs: one graph each, and one with both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertlink.communicator import MoECommunicator
from expertlink.types import QuantScales


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
    rows: Tensor,
    scales: QuantScales | None,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    expert_out: Tensor,
) -> CapturedCalls:
    """Captures the calls of an input on every rank; nothing runs before the first replay.

    Args:
        comm: has static shapes, and has served such calls before.
        rows: what is dispatched.
        scales: its scales, if it is quantized.
        topk_ids_TK: their experts.
        topk_weights_TK: their weights.
        expert_out: what the experts return, in the maximal shape.
    """
    dispatch, combine, pair = (torch.cuda.CUDAGraph() for _ in range(3))
    y_TH, pair_y_TH = (
        expert_out.new_empty((rows.shape[0], expert_out.shape[-1])) for _ in range(2)
    )
    # Other threads, such as those of NCCL, may use the device while this one captures.
    with torch.cuda.graph(dispatch, capture_error_mode="thread_local"):
        dispatched = comm.dispatch(rows, topk_ids_TK, topk_weights_TK, scales)
    with torch.cuda.graph(combine, capture_error_mode="thread_local"):
        comm.combine(expert_out, dispatched[1], out=y_TH)
    with torch.cuda.graph(pair, capture_error_mode="thread_local"):
        both = comm.dispatch(rows, topk_ids_TK, topk_weights_TK, scales)
        comm.combine(expert_out, both[1], out=pair_y_TH)
    return CapturedCalls(dispatch, combine, pair, y_TH, pair_y_TH, (dispatched, both))
