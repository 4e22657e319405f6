"""Calls of a soak that are captured in CUDA graphs and replayed between eager ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from expertlink import DispatchHandle, DispatchLayout, DispatchOutput
from support.soak.items import Item, finish
from support.soak.lines import Line
from support.soak.low_latency import LlLine
from support.soak.training import RecordedStep, is_trainable


class Recorded:
    """Calls that are captured in a graph and replayed, or, hosted, made anew each time."""

    def __init__(self, line: Line, call: Callable[[], Any], *, capture: bool) -> None:
        self._call = call
        self._graph = torch.cuda.CUDAGraph() if capture else None
        if self._graph is None:
            self.results = call()
            return
        with torch.cuda.graph(self._graph, stream=line.stream, capture_error_mode="thread_local"):
            self.results = call()

    def run(self) -> None:
        if self._graph is None:
            self.results = self._call()
        else:
            self._graph.replay()

    def poison(self, *tensors: Tensor | None) -> None:
        """Results of the last replay, where the next one writes to the same memory."""
        if self._graph is not None:
            for tensor in tensors:
                if tensor is not None:
                    tensor.fill_(float("nan") if tensor.is_floating_point() else -7)


class Graphs:
    """A dispatch, a dispatch with its combine, and a cached dispatch with its combine; FLAT also a
    training step, where it can be captured."""

    def __init__(self, line: Line, *, capture: bool) -> None:
        self.line, self._item = line, line.items[0]
        comm, first = line.comm, line.items[0]
        self._x_TH = first.x_TH.clone()
        self._ids_TK = first.ids_TK.clone()
        self._weights_TK = first.weights_TK.clone()
        self._cached_x_TH = first.x_TH.clone()
        out, handle = comm.dispatch(self._x_TH, self._ids_TK, self._weights_TK)
        self._rows = first.rows(handle.rows_shape).clone()
        comm.combine(self._rows, handle)
        finish(comm.device)
        del out

        def dispatch() -> tuple[DispatchOutput, DispatchHandle]:
            return comm.dispatch(self._x_TH, self._ids_TK, self._weights_TK)

        def pair() -> tuple[DispatchOutput, Tensor]:
            out, handle = dispatch()
            return out, comm.combine(self._rows, handle)

        def cached() -> tuple[DispatchOutput, Tensor]:
            _, previous = self._dispatch.results
            out, handle = comm.dispatch(self._cached_x_TH, None, previous_handle=previous)
            return out, comm.combine(self._rows, handle)

        def halves() -> tuple[DispatchOutput, Tensor]:
            out, handle, hook = comm.dispatch(
                self._x_TH, self._ids_TK, self._weights_TK, return_recv_hook=True
            )
            hook()
            result, hook = comm.combine(self._rows, handle, return_recv_hook=True)
            hook()
            return out, result

        self._halves: Recorded | None = None
        if isinstance(line, LlLine):
            self._halves = Recorded(line, halves, capture=capture)
        self._capture, self._call = capture, pair
        self._dispatch = Recorded(line, dispatch, capture=capture)
        self._pair = Recorded(line, pair, capture=capture)
        self._cached = Recorded(line, cached, capture=capture)
        self._step: RecordedStep | None = None
        if capture and comm.config.layout is DispatchLayout.FLAT and is_trainable(line):
            self._step = RecordedStep(line)
        if capture:
            self.dispatch(first, "first replay")

    @property
    def has_steps(self) -> bool:
        """Whether a training step was captured."""
        return self._step is not None

    def step(self, item: Item, what: str) -> None:
        """Replays the graph of a training step, forward and backward."""
        assert self._step is not None
        self._step.replay(item, what)

    def _load(self, item: Item) -> None:
        self._x_TH.copy_(item.x_TH)
        self._ids_TK.copy_(item.ids_TK)
        self._weights_TK.copy_(item.weights_TK)

    def dispatch(self, item: Item, what: str) -> None:
        """Replays the graph with exactly one dispatch."""
        self._load(item)
        out, _ = self._dispatch.results
        self._dispatch.poison(out.tokens, out.topk_ids, out.topk_weights)
        self._dispatch.run()
        self._item = item
        self.line.check_dispatch(item, self._dispatch.results[0], what)

    def pair(self, item: Item, what: str) -> None:
        """Replays the graph of a dispatch and its combine."""
        self._both(self._pair, item, what)

    def halves(self, item: Item, what: str) -> None:
        """Replays the graph of a dispatch and its combine in halves."""
        assert self._halves is not None
        self._both(self._halves, item, what)

    def _both(self, recorded: Recorded, item: Item, what: str) -> None:
        self._load(item)
        self._rows.copy_(item.rows(tuple(self._rows.shape)))
        out, result = recorded.results
        recorded.poison(out.tokens, out.topk_ids, out.topk_weights, result)
        recorded.run()
        out, result = recorded.results
        self.line.check_dispatch(item, out, what)
        self.line.check_combine(item, result, what)

    def stray(self, rank: int) -> None:
        """One rank captures a graph that nobody replays."""
        if self._capture and self.line.comm.rank == rank:
            Recorded(self.line, self._call, capture=True)

    def cached(self, what: str) -> None:
        """Replays the graph that reuses the routing of the last replayed dispatch."""
        item = self._item
        self._cached_x_TH.copy_(item.x_TH)
        self._rows.copy_(item.rows(tuple(self._rows.shape)))
        out, result = self._cached.results
        self._cached.poison(out.tokens, out.topk_ids, out.topk_weights, result)
        self._cached.run()
        out, result = self._cached.results
        self.line.check_dispatch(item, out, what)
        self.line.check_combine(item, result, what)
