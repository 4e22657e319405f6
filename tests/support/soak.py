"""Long mixed runs of the nvlink engine: everything that may follow each other does.

All ranks draw the same calls from a shared seed, and each its own delays. Results are compared on
the GPU and looked at in intervals, so that the host runs ahead as it does in a model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expertlink import BlockFormat, DispatchHandle, DispatchLayout, DispatchOutput, MoECommunicator
from expertlink.launch import RankContext
from expertlink.quantization import quantize
from support.cases import LL, Shape, exact, long_spans, usual
from support.jobs import config_of, filled_up
from support.oracle import Case, combined_of, expert_rows, inputs_of, received_of, without_rank

# -- what is compared with what -------------------------------------------------------------------


class Ledger:
    """Differences that the GPU has found, by check."""

    def __init__(self, device: torch.device) -> None:
        self._bad = torch.zeros(4096, dtype=torch.bool, device=device)
        self._names: list[str] = []

    def compare(self, actual: Tensor, expected: Tensor, what: str) -> None:
        """Notes whether the bits differ; does not wait."""
        assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
        assert actual.dtype is expected.dtype, f"{what}: {actual.dtype}"
        if actual.numel() == 0:
            return
        if len(self._names) == len(self._bad):
            self.settle()
        same = actual.contiguous().view(torch.uint8) == expected.view(torch.uint8)
        self._bad[len(self._names)] = ~same.all()
        self._names.append(what)

    def settle(self) -> None:
        """Waits and raises the first difference."""
        torch.cuda.synchronize(self._bad.device)
        bad = self._bad[: len(self._names)].tolist()
        wrong = [name for name, flag in zip(self._names, bad, strict=True) if flag]
        assert not wrong, f"{len(wrong)} of {len(bad)} comparisons failed, first: {wrong[0]}"
        self._names.clear()


@dataclass(frozen=True)
class Item:
    """An input of the pool with everything that must come of it on this rank."""

    number: int
    case: Case
    x_TH: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    other_weights_TK: Tensor
    slots: Tensor  # filled slots, flat
    tokens: Tensor  # their rows; bytes where they arrive quantized
    scales: Tensor | None  # scales of those
    choices: tuple[Tensor, Tensor, Tensor] | None  # their ids, weights and other weights
    combined: Tensor
    other_combined: Tensor
    whole_TH: Tensor  # rows and weights of whole numbers, and what comes back of unchanged rows
    whole_weights_TK: Tensor
    whole_result: Tensor
    _rows: Tensor
    _padded: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @staticmethod
    def of(
        number: int,
        case: Case,
        rank: int,
        device: torch.device,
        block_format: BlockFormat | None = None,
    ) -> Item:
        """The item of a case whose rows, with a format, are quantized on the way."""
        # The other weights are those of the same case with another seed for them.
        other = dataclasses.replace(case, weight_seed=case.seed + 100)
        own, changed = inputs_of(case, rank), inputs_of(other, rank)
        assert own.weights_TK is not None
        assert changed.weights_TK is not None
        received, again = received_of(case, rank), received_of(other, rank)
        choices = None
        if received.ids is not None:
            assert received.weights is not None
            assert again.weights is not None
            filled = received.filled
            parts = (received.ids[filled], received.weights[filled], again.weights[filled])
            choices = (parts[0].to(device), parts[1].to(device), parts[2].to(device))
        sources = [inputs_of(case, source).x_TH for source in range(case.ranks)]
        drawn = torch.Generator().manual_seed(case.seed * 1000 + rank)
        whole_TH = torch.randint(-4, 5, own.x_TH.shape, generator=drawn)
        whole_weights_TK = torch.randint(1, 3, own.ids_TK.shape, generator=drawn)
        times = (whole_weights_TK * (own.ids_TK >= 0)).sum(1)
        if not case.layout.expanded:
            owner = case.rank_of_expert()
            ranks = [{owner[e] for e in token if e >= 0} for token in own.ids_TK.tolist()]
            times = torch.tensor([len(hit) for hit in ranks], dtype=torch.int64)
        scales = None
        if block_format is not None:
            packed = [quantize(x_TH, block_format) for x_TH in sources]
            sources = [q.view(torch.uint8) for q, _ in packed]
            scales = received.gather([theirs for _, theirs in packed]).to(device)
        return Item(
            number=number,
            case=case,
            x_TH=own.x_TH.to(device),
            ids_TK=own.ids_TK.to(device),
            weights_TK=own.weights_TK.to(device),
            other_weights_TK=changed.weights_TK.to(device),
            slots=received.filled.reshape(-1).nonzero()[:, 0].to(device),
            tokens=received.gather(sources).to(device),
            scales=scales,
            choices=choices,
            combined=combined_of(case, rank).to(device),
            other_combined=combined_of(other, rank).to(device),
            whole_TH=whole_TH.to(own.x_TH.dtype).to(device),
            whole_weights_TK=whole_weights_TK.float().to(device),
            # Of integers: a token without choices gets no -0.
            whole_result=(whole_TH * times[:, None]).to(own.x_TH.dtype).to(device),
            _rows=expert_rows(case, rank),
        )

    def rows(self, shape: tuple[int, ...]) -> Tensor:
        """Expert outputs in the shape of a handle; made once."""
        if shape not in self._padded:
            self._padded[shape] = filled_up(self._rows, shape[:-1], self.x_TH.device)
        return self._padded[shape]

    def forget(self) -> None:
        """Lets the expert outputs be made again."""
        self._padded.clear()


# -- a communicator, and every kind of call that it can make --------------------------------------


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
        self,
        item: Item,
        handle: DispatchHandle,
        what: str,
        *,
        other: bool = False,
        late: bool = False,
    ) -> None:
        """A combine, half of the time into a tensor of ours; `late`: it is given other weights."""
        out = torch.full_like(item.x_TH, float("nan")) if item.number % 2 else None
        self.poison(item)
        weights_TK = item.other_weights_TK if late else None
        rows = item.rows(handle.rows_shape)
        result = self.comm.combine(rows, handle, out=out, topk_weights=weights_TK)
        self.check_combine(item, result, what, other=other or late)

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


class LlLine(Line):
    """A communicator in mode "ll"."""

    def __init__(
        self, comm: MoECommunicator, cases: list[Case], stream: torch.cuda.Stream, ledger: Ledger
    ) -> None:
        super().__init__(comm, cases, stream, ledger)
        self._buffers = [comm.create_buffers() for _ in range(2)]
        # What the others receive where a rank is left out.
        self._without = [
            [self._item(number, without_rank(case, gone)) for gone in range(comm.num_ranks)]
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
        if comm.config.combine_precision == "exact" and not comm.config.mask_lost_peers:
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
        if isinstance(line, LlLine):
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


# -- runs -----------------------------------------------------------------------------------------

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
    host: int | None = None  # the setting before this one whose communicator's memory it uses

    @property
    def mode(self) -> str:
        return self.fields.get("mode", "ht")


def settings(ranks: int, seed: int) -> list[Setting]:
    """Mode "ht": caller-owned outputs, views, static shapes. Mode "ll": plain, in graphs
    with sums as exact as they can be, and with rows that are quantized on the way. One more of each
    mode that uses the memory of another one, in mode "ht" with fewer experts."""
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

    fewer = dataclasses.replace(usual(ranks, LAYOUTS[(seed + 3) % 4]), experts=24)

    def drawn(shape: Shape, tokens: list[tuple[int, ...]]) -> list[Case]:
        kinds: list[dict[str, Any]] = [{}, {"masked": 0.4}, {"skew": 3.0}, {"only_rank": 1}]
        return [shape.case(t, seed=seed + i, **kinds[i % 4]) for i, t in enumerate(tokens)]

    return [
        Setting({}, drawn(long_spans(plain), many)),
        Setting({"zero_copy": True}, drawn(usual(ranks, views), few)),
        Setting({"static_shapes": True}, drawn(usual(ranks, static), [steady] * 6), steady=True),
        Setting(LL, drawn(swift, few)),
        Setting(LL, drawn(replayed, [steady] * 6), steady=True),
        Setting({**LL, **formats}, drawn(packed, few)),
        Setting({}, drawn(fewer, few), host=1),
        Setting(LL, drawn(usual(ranks, LAYOUTS[seed % 4]), few), host=3),
    ]


def streams_for(chosen: list[Setting], device: torch.device) -> list[torch.cuda.Stream]:
    """Two streams that the communicators take in turn."""
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    return [streams[index % 2] for index in range(len(chosen))]


def config_for(setting: Setting, device: Any) -> Any:
    """Configuration of a setting's communicator."""
    return config_of(setting.cases[0], device, **{"engine": "nvlink", **SMS, **setting.fields})


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
        (LlLine if setting.mode == "ll" else Line)(comm, setting.cases, stream, ledger)
        for comm, setting, stream in zip(comms, chosen, streams, strict=True)
    ]
    torch.cuda.synchronize(device)
    graphs: dict[Line, Graphs] = {}
    for line, setting in zip(lines, chosen, strict=True):
        if setting.steady:
            with torch.cuda.stream(line.stream):
                graphs[line] = Graphs(line, capture=capture)
    common, own = random.Random(seed), random.Random(seed * 1000 + rank)
    kinds = {line: _kinds_of(line, graphs, processes=capture) for line in lines}
    # Every kind once, so that later memory is compared with what the calls need at most.
    plan = [(line, kind, item) for line in lines for kind in kinds[line] for item in line.items]
    warm, step = len(plan), 0
    made, baseline = 0, 0
    while made < calls or step < warm:  # stray captures make no call
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
            baseline = _allocated(lines, device)
    ledger.settle()
    for comm in comms:
        comm.check_health()
    # Threads of hosted ranks allocate from one account; there the caller looks at it.
    if capture:
        held = _allocated(lines, device)
        assert held <= baseline, f"{held} bytes, {baseline} before"


def _kinds_of(line: Line, graphs: dict[Line, Graphs], *, processes: bool) -> list[str]:
    """Steps that a line can make."""
    kinds = ["dispatch", "pair", "cached", "two", "several"]
    config = line.comm.config
    # Threads of hosted ranks would wait for each other in autograd's one thread of their GPU.
    if processes and not config.zero_copy and config.quantization is None:
        kinds.append("gradients")
    if config.layout.expanded:
        kinds.append("late weights")
    if line in graphs:
        kinds += ["graph dispatch", "graph pair", "graph cached", "stray capture"]
        if isinstance(line, LlLine):
            kinds.append("graph halves")
    if isinstance(line, LlLine):
        kinds += ["buffered", "halves", "turns", "turns", "masks"]
    return kinds


def _make(
    line: Line, graphs: Graphs | None, kind: str, item: Item, common: random.Random, what: str
) -> int:
    """One step; returns how many calls it made."""
    if isinstance(line, LlLine):
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
    if kind == "gradients":
        line.gradients(item, what)
        return 4
    if kind == "several":
        line.several([common.choice(line.items) for _ in range(3)], what, common)
        return 6
    if graphs is not None and kind == "stray capture":
        graphs.stray(common.randrange(line.comm.num_ranks))
        return 0
    if graphs is not None and kind.startswith("graph"):
        if kind == "graph halves":
            graphs.halves(item, what)
            return 2
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
    if kind == "late weights":
        line.combine(item, handle, f"{what}, given", late=True)
        line.combine(item, handle, f"{what}, those of the dispatch")
        return 3
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


def _allocated(lines: list[Line], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    for line in lines:
        line.forget()
    gc.collect()
    return torch.cuda.memory_allocated(device)


def soak(ctx: RankContext, calls: int, seed: int) -> int:
    """A rank's part in a soak of processes, with graphs."""
    chosen = settings(ctx.num_ranks, seed)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        comms: list[MoECommunicator] = []
        for setting in chosen:
            host = None if setting.host is None else comms[setting.host]
            config = config_for(setting, ctx.device)
            comms.append(stack.enter_context(MoECommunicator(config, share_with=host)))
        run_lines(
            comms,
            chosen,
            streams_for(chosen, ctx.device),
            calls=calls,
            seed=seed,
            capture=True,
        )
    return calls
