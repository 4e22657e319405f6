"""Calls captured in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertlink.communicator import MoECommunicator
from expertlink.types import QuantScales


@dataclass(frozen=True)
class CapturedCalls:
    """The graphs of one input: one dispatch, one combine, and one of both.

    Replays read the tensors that were captured and write these.

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


def capture_repeated(call: Callable[[], Any], times: int = 1) -> torch.cuda.CUDAGraph:
    """A graph of a call, several times in a row. What it uses has to live as long as the graph."""
    graph = torch.cuda.CUDAGraph()
    # Not `torch.cuda.graph`, which gives all cached memory back every time.
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(times):
                call()
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    return graph
