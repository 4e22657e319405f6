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
from dataclasses import dataclass
from typing import Any

import torch

from expertlink import BlockFormat, DispatchLayout, MoECommunicator
from expertlink.launch import RankContext
from support.nvlink_cases import LATENCY, Shape, exact, long_spans, usual
from support.oracle import Case
from support.rank_jobs import config_of
from support.soak_items import Item, Ledger
from support.soak_lines import Graphs, Line, SwiftLine

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
    def latency(self) -> bool:
        return self.fields.get("mode") == "ll"


def settings(ranks: int, seed: int) -> list[Setting]:
    """High throughput: caller-owned outputs, views, static shapes. Low latency: plain, in graphs
    with sums as exact as they can be, and with rows that are quantized on the way. One more of each
    mode that uses the memory of another one, in high throughput with fewer experts."""
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
        Setting(LATENCY, drawn(swift, few)),
        Setting(LATENCY, drawn(replayed, [steady] * 6), steady=True),
        Setting({**LATENCY, **formats}, drawn(packed, few)),
        Setting({}, drawn(fewer, few), host=1),
        Setting(LATENCY, drawn(usual(ranks, LAYOUTS[seed % 4]), few), host=3),
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
    if line in graphs:
        kinds += ["graph dispatch", "graph pair", "graph cached", "stray capture"]
        if isinstance(line, SwiftLine):
            kinds.append("graph halves")
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
