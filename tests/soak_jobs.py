"""Long mixed runs of the nvlink engine: everything that may follow each other does.

All ranks draw the same calls from a shared seed, and each its own delays. Results are compared on
the GPU and looked at in intervals, so that the host runs ahead as it does in a model.
"""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from latency_jobs import lost
from nvlink_cases import LATENCY, Shape, exact, long_spans, usual
from oracle import Case
from rank_jobs import config_of
from soak_items import Item, Ledger
from torch import Tensor

from expertlink import (
    BlockFormat,
    DispatchHandle,
    DispatchLayout,
    DispatchOutput,
    MoECommunicator,
)
from expertlink.launch import RankContext

LAYOUTS = tuple(DispatchLayout)
VIEWS = (DispatchLayout.TOKEN_MAJOR, DispatchLayout.RANK_MAJOR)
SMS = {"num_sms_dispatch": 4, "num_sms_combine": 4}
_INTERVAL = 50  # steps between looks at the results
_DELAY_CYCLES = 1_000_000


@dataclass(frozen=True)
class Setting:
    """One communicator of a soak: its configuration and the inputs that its calls draw from."""

    fields: dict[str, Any]
    cases: list[Case]
    steady: bool = False  # graphs may refer to its calls: T of a rank stays the same

    @property
    def latency(self) -> bool:
        return self.fields.get("mode") == "ll"


def settings(ranks: int, seed: int) -> list[Setting]:
    """High throughput: caller-owned outputs, views, static shapes. Low latency: plain, in graphs
    with sums as exact as they can be, and with rows that are quantized on the way."""
    # Tokens of a rank stay the same where graphs refer to them.
    few = [tuple((i * 7 + r * 5) % 41 for r in range(ranks)) for i in range(5)]
    few.append((0,) * ranks)
    many = [tuple((300, 0, 65, 129)[(r + i) % 4] for r in range(ranks)) for i in range(3)]
    steady = tuple((40, 0, 23, 38)[r % 4] for r in range(ranks))
    plain, static = LAYOUTS[seed % 4], LAYOUTS[(seed + 1) % 4]
    views = VIEWS[seed % 2]
    swift, replayed, packed = (usual(ranks, LAYOUTS[(seed + i) % 4]) for i in (2, 3, 0))
    if replayed.layout.expanded:
        replayed = exact(replayed)
    formats = {
        "quantization": list(BlockFormat)[seed % 3],
        "scale_order": ("row_major", "column_major")[seed // 2 % 2],
    }

    def drawn(shape: Shape, tokens: list[tuple[int, ...]]) -> list[Case]:
        kinds: list[dict[str, Any]] = [{}, {"masked": 0.4}, {"skew": 3.0}, {"only_rank": 1}]
        return [shape.case(t, seed=seed + i, **kinds[i % 4]) for i, t in enumerate(tokens)]

    return [
        Setting({}, drawn(long_spans(plain), many)),
        Setting({"zero_copy": True}, drawn(usual(ranks, views), few)),
        Setting({"static_shapes": True}, drawn(usual(ranks, static), [steady] * 6), steady=True),
        Setting(LATENCY, drawn(swift, few)),
        Setting(LATENCY, drawn(replayed, [steady] * 6), steady=True),
        Setting({**LATENCY, **formats}, drawn(packed, few)),
    ]


def streams_for(chosen: list[Setting], device: torch.device) -> list[torch.cuda.Stream]:
    """Two streams that the communicators take in turn."""
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    return [streams[index % 2] for index in range(len(chosen))]


def config_for(setting: Setting, device: Any) -> Any:
    """Configuration of a setting's communicator."""
    return config_of(setting.cases[0], device, **{"engine": "nvlink", **SMS, **setting.fields})


class Line:
    """One communicator on its stream, and its calls with their checks."""

    def __init__(
        self, comm: MoECommunicator, cases: list[Case], stream: torch.cuda.Stream, ledger: Ledger
    ) -> None:
        self.comm, self.stream, self.ledger = comm, stream, ledger
        self.items = [self._item(number, case) for number, case in enumerate(cases)]
        self._view: tuple[Item, DispatchOutput] | None = None

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
        self._load(item)
        self._rows.copy_(item.rows(tuple(self._rows.shape)))
        out, result = self._pair.results
        self._pair.poison(out.tokens, out.topk_ids, out.topk_weights, result)
        self._pair.run()
        out, result = self._pair.results
        self.line.check_dispatch(item, out, what)
        self.line.check_combine(item, result, what)

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


def run_lines(
    comms: list[MoECommunicator],
    chosen: list[Setting],
    streams: list[torch.cuda.Stream],
    *,
    calls: int,
    seed: int,
    capture: bool,
) -> None:
    """`calls` dispatches and combines in an order that the seed draws."""
    device, rank = comms[0].device, comms[0].rank
    ledger = Ledger(device)
    lines = [
        (SwiftLine if setting.latency else Line)(comm, setting.cases, stream, ledger)
        for comm, setting, stream in zip(comms, chosen, streams, strict=True)
    ]
    torch.cuda.synchronize(device)
    graphs: dict[Line, Graphs] = {}
    for line, setting in zip(lines, chosen, strict=True):
        if setting.steady:
            with torch.cuda.stream(line.stream):
                graphs[line] = Graphs(line, capture=capture)
    common, own = random.Random(seed), random.Random(seed * 1000 + rank)
    kinds = {line: _kinds_of(line, graphs) for line in lines}
    # Every kind once, so that later memory is compared with what the calls need at most.
    plan = [(line, kind, item) for line in lines for kind in kinds[line] for item in line.items]
    warm, step = len(plan), 0
    made, baseline = 0, 0
    while made < calls or step < warm:
        if step < warm:
            line, kind, item = plan[step]
        else:
            line = common.choice(lines)
            kind = common.choice(kinds[line])
            item = common.choice(line.items)
        what = f"step {step}: {kind} of item {item.number} ({item.case.layout.value})"
        with torch.cuda.stream(line.stream):
            _delay(own)
            made += _make(line, graphs.get(line), kind, item, common, what)
        step += 1
        if step % _INTERVAL == 0 or step == warm:
            ledger.settle()
        if step == warm:
            baseline = _allocated(device)
    ledger.settle()
    for comm in comms:
        comm.check_health()
    # Threads of hosted ranks allocate from one account; there the caller looks at it.
    if capture:
        for line in lines:
            line._view = None
        assert _allocated(device) <= baseline, f"{_allocated(device)} bytes, {baseline} before"


def _kinds_of(line: Line, graphs: dict[Line, Graphs]) -> list[str]:
    """Steps that a line can make."""
    kinds = ["dispatch", "pair", "cached", "two"]
    if line in graphs:
        kinds += ["graph dispatch", "graph pair", "graph cached"]
    if isinstance(line, SwiftLine):
        kinds += ["buffered", "halves", "turns", "turns", "masks"]
    return kinds


def _make(
    line: Line, graphs: Graphs | None, kind: str, item: Item, common: random.Random, what: str
) -> int:
    """One step; returns how many calls it made."""
    if isinstance(line, SwiftLine):
        if kind == "buffered":
            line.buffered(item, what, which=common.randrange(2))
            return 2
        if kind == "halves":
            line.halves(item, what, common)
            return 2
        if kind == "turns":
            line.turns(item, common.choice(line.items), what, common)
            return 4
        if kind == "masks":
            line.without(line.items[item.number % 2], common.randrange(line.comm.num_ranks), what)
            return 4
    if graphs is not None and kind.startswith("graph"):
        if kind == "graph cached":
            graphs.cached(what)
            return 2
        if kind == "graph pair":
            graphs.pair(item, what)
            return 2
        graphs.dispatch(item, what)
        return 1
    handle = line.dispatch(item, what)
    if kind.endswith("dispatch"):
        return 1
    if kind.endswith("cached"):
        other = common.random() < 0.5
        again = line.cached(item, handle, what, other=other)
        line.combine(item, again, f"{what}, cached", other=other)
        if common.random() < 0.5:
            return 3
        line.combine(item, handle, f"{what}, after the cached one")
        return 4
    if kind == "two":
        second = common.choice(line.items)
        later = line.dispatch(second, f"{what}, second")
        line.combine(second, later, f"{what}, second")
        line.combine(item, handle, f"{what}, first")
        return 4
    line.combine(item, handle, what)
    return 2


def _delay(own: random.Random) -> None:
    """Now and then this rank is late, on the GPU or on the host."""
    if own.random() < 0.1:
        torch.cuda._sleep(int(own.random() * _DELAY_CYCLES))
    if own.random() < 0.05:
        time.sleep(own.random() * 0.002)


def _allocated(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    gc.collect()
    return torch.cuda.memory_allocated(device)


def soak(ctx: RankContext, calls: int, seed: int) -> int:
    """A rank's part in a soak of processes, with graphs."""
    chosen = settings(ctx.num_ranks, seed)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        comms = [
            stack.enter_context(MoECommunicator(config_for(setting, ctx.device)))
            for setting in chosen
        ]
        run_lines(
            comms,
            chosen,
            streams_for(chosen, ctx.device),
            calls=calls,
            seed=seed,
            capture=True,
        )
    return calls
