"""A communicator of a soak: every kind of call that it can make, and what each is compared with."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from expertlink import DispatchHandle, DispatchOutput, MoECommunicator
from support.ll_lost_jobs import lost
from support.oracle import Case
from support.soak_items import Item, Ledger


class Line:
    """One communicator on its stream, and its calls with their checks."""

    def __init__(
        self, comm: MoECommunicator, cases: list[Case], stream: torch.cuda.Stream, ledger: Ledger
    ) -> None:
        self.comm, self.stream, self.ledger = comm, stream, ledger
        self.items = [self._item(number, case) for number, case in enumerate(cases)]
        self._view: tuple[Item, DispatchOutput] | None = None

    def forget(self) -> None:
        """Lets go of what is made again when it is needed."""
        self._view = None
        for item in self.items:
            item.forget()

    def _item(self, number: int, case: Case) -> Item:
        comm = self.comm
        return Item.of(number, case, comm.rank, comm.device, comm.config.block_format)

    def check_dispatch(
        self, item: Item, out: DispatchOutput, what: str, *, other: bool = False
    ) -> None:
        """`other`: the call had the item's other weights."""
        # A view is as it was after the dispatch that follows it.
        if self._view is not None:
            self._check_tokens(*self._view, f"{what}: view of the dispatch before")
        self._check_tokens(item, out, what)
        self._view = (item, out) if self.comm.config.zero_copy else None
        if item.choices is None:
            return
        ids, weights, other_weights = item.choices
        assert out.topk_ids is not None
        assert out.topk_weights is not None
        self.ledger.compare(out.topk_ids.flatten(0, -2)[item.slots], ids, f"{what}: ids")
        self.ledger.compare(
            out.topk_weights.flatten(0, -2)[item.slots],
            other_weights if other else weights,
            f"{what}: weights",
        )

    def _check_tokens(self, item: Item, out: DispatchOutput, what: str) -> None:
        tokens = out.tokens
        if item.scales is not None:
            assert out.scales is not None
            tokens = tokens.view(torch.uint8)
            scales = out.scales.tensor.flatten(0, -2)[item.slots]
            self.ledger.compare(scales, item.scales, f"{what}: scales")
        self.ledger.compare(tokens.flatten(0, -2)[item.slots], item.tokens, f"{what}: tokens")

    def poison(self, item: Item) -> None:
        """Leaves NaN in the memory that the next outputs are likely to be given."""
        elements = (len(item.slots) + 1) * item.case.hidden
        held = [
            torch.full((elements,), float("nan"), dtype=item.case.dtype, device=self.comm.device),
            torch.full_like(item.x_TH, float("nan")),
        ]
        del held

    def dispatch(self, item: Item, what: str) -> DispatchHandle:
        """An uncached dispatch."""
        self.poison(item)
        out, handle = self.comm.dispatch(item.x_TH, item.ids_TK, item.weights_TK)
        self.check_dispatch(item, out, what)
        return handle

    def cached(
        self, item: Item, handle: DispatchHandle, what: str, *, other: bool
    ) -> DispatchHandle:
        """A cached dispatch, with other weights or those of the handle."""
        self.poison(item)
        weights_TK = item.other_weights_TK if other else None
        out, again = self.comm.dispatch(item.x_TH, None, weights_TK, previous_handle=handle)
        self.check_dispatch(item, out, what, other=other)
        return again

    def combine(
        self, item: Item, handle: DispatchHandle, what: str, *, other: bool = False
    ) -> None:
        """A combine, half of the time into a tensor of ours."""
        out = torch.full_like(item.x_TH, float("nan")) if item.number % 2 else None
        self.poison(item)
        result = self.comm.combine(item.rows(handle.rows_shape), handle, out=out)
        self.check_combine(item, result, what, other=other)

    def several(self, items: list[Item], what: str, drawn: random.Random) -> None:
        """Dispatches, then their combines in another order, the same on all ranks."""
        handles = [self.dispatch(item, f"{what}, {i}") for i, item in enumerate(items)]
        for i in drawn.sample(range(len(items)), len(items)):
            self.combine(items[i], handles[i], f"{what}, {i} of {len(items)}")

    def gradients(self, item: Item, what: str) -> None:
        """Forward and backward of experts that return their rows, on ranks without rows as well.

        Whole numbers, so that every sum is exact: the gradient of a row is that of its token times
        the weights of its choices, or times the ranks that it goes to.
        """
        comm = self.comm
        with torch.enable_grad():
            x_TH = item.whole_TH.clone().requires_grad_()
            out, handle = comm.dispatch(x_TH, item.ids_TK, item.whole_weights_TK)
            rows = out.tokens * 1 if len(item.slots) else torch.zeros_like(out.tokens)
            y_TH = comm.combine(rows, handle)
            y_TH.backward(item.whole_TH)
        assert x_TH.grad is not None
        self.ledger.compare(y_TH.detach(), item.whole_result, f"{what}: result")
        self.ledger.compare(x_TH.grad, item.whole_result, f"{what}: gradient")

    def check_combine(self, item: Item, result: Tensor, what: str, *, other: bool = False) -> None:
        expected = item.combined
        if other and item.case.layout.expanded:
            expected = item.other_combined
        self.ledger.compare(result, expected, f"{what}: combine")


class SwiftLine(Line):
    """A communicator in low-latency mode."""

    def __init__(
        self, comm: MoECommunicator, cases: list[Case], stream: torch.cuda.Stream, ledger: Ledger
    ) -> None:
        super().__init__(comm, cases, stream, ledger)
        self._buffers = [comm.create_buffers() for _ in range(2)]
        # What the others receive where a rank is left out.
        self._without = [
            [self._item(number, lost(case, gone)) for gone in range(comm.num_ranks)]
            for number, case in enumerate(cases[:2])
        ]

    def forget(self) -> None:
        super().forget()
        for fewer in self._without:
            for item in fewer:
                item.forget()

    def buffered(self, item: Item, what: str, *, which: int) -> None:
        """A pair whose outputs are ours."""
        one = self._buffers[which]
        out, handle = self.comm.dispatch(item.x_TH, item.ids_TK, item.weights_TK, output_buffer=one)
        self.check_dispatch(item, out, what)
        self.combine(item, handle, what)

    def halves(self, item: Item, what: str, drawn: random.Random) -> None:
        """A pair in halves, of which some are left to later calls."""
        out, handle, hook = self._send(item, drawn)
        if drawn.random() < 0.5:
            hook()
        result, hook = self.comm.combine(
            item.rows(handle.rows_shape), handle, return_recv_hook=True
        )
        self.check_dispatch(item, out, what)
        if drawn.random() < 0.3:  # finished by the next call
            self.combine(item, self.dispatch(item, f"{what}, between"), f"{what}, between")
        hook()
        self.check_combine(item, result, what)

    def turns(self, first: Item, second: Item, what: str, drawn: random.Random) -> None:
        """Two micro-batches under way at once."""
        items = (first, second)
        sent = [self._send(item, drawn) for item in items]
        back = []
        for item, (out, handle, hook) in zip(items, sent, strict=True):
            hook()
            self.check_dispatch(item, out, what)
            rows = item.rows(handle.rows_shape)
            back.append(self.comm.combine(rows, handle, return_recv_hook=True))
        if drawn.random() < 0.5:
            back[1][1]()  # the first one's is launched before it
        for item, (result, hook) in zip(items, back, strict=True):
            hook()
            self.check_combine(item, result, what)

    def _send(
        self, item: Item, drawn: random.Random
    ) -> tuple[DispatchOutput, DispatchHandle, Callable[[], None]]:
        self.poison(item)
        return self.comm.dispatch(
            item.x_TH,
            item.ids_TK.to(torch.int32) if drawn.random() < 0.3 else item.ids_TK,
            item.weights_TK,
            return_recv_hook=True,
        )

    def without(self, item: Item, gone: int, what: str) -> None:
        """Some calls that leave a rank out, which goes on alone meanwhile; then all are back."""
        comm, rank = self.comm, self.comm.rank
        if comm.config.combine_precision == "exact":
            return  # cannot do without a rank
        for other in range(comm.num_ranks):
            if other != rank and gone in (rank, other):
                comm.mask_peer(other)
        fewer = self._without[item.number][gone]
        for call in range(2):
            out, handle = comm.dispatch(item.x_TH, item.ids_TK, item.weights_TK)
            result = comm.combine(fewer.rows(handle.rows_shape), handle)
            if rank != gone:
                self.check_dispatch(fewer, out, f"{what}, call {call} without rank {gone}")
                self.check_combine(fewer, result, f"{what}, call {call} without rank {gone}")
        comm.clear_mask()


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
    """A dispatch, a dispatch with its combine, and a cached dispatch with its combine."""

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
        torch.cuda.synchronize(comm.device)
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
        if isinstance(line, SwiftLine):
            self._halves = Recorded(line, halves, capture=capture)
        self._capture, self._call = capture, pair
        self._dispatch = Recorded(line, dispatch, capture=capture)
        self._pair = Recorded(line, pair, capture=capture)
        self._cached = Recorded(line, cached, capture=capture)
        if capture:
            self.dispatch(first, "first replay")

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
