"""The order of the calls of a soak, which a seed draws."""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Iterator, Sequence

import torch

from expertlink import MoECommunicator
from expertlink.launch import RankContext
from support.across_hosts import hosts_of
from support.soak.graphs import Graphs
from support.soak.items import Item, Ledger, finish
from support.soak.lines import Line
from support.soak.low_latency import LlLine
from support.soak.settings import Setting, config_for, settings, settings_across
from support.soak.training import KINDS as TRAINING_KINDS
from support.soak.training import is_trainable
from support.soak.training import make as make_training_step

_INTERVAL = 50  # steps between looks at the results
_DELAY_CYCLES = 1_000_000


def streams_for(chosen: list[Setting], device: torch.device) -> list[torch.cuda.Stream | None]:
    """Two streams that the communicators take in turn; CPUs have none."""
    if device.type != "cuda":
        return [None] * len(chosen)
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    return [streams[index % 2] for index in range(len(chosen))]


def run_lines(
    comms: list[MoECommunicator],
    chosen: list[Setting],
    streams: Sequence[torch.cuda.Stream | None],
    *,
    calls: int,
    seed: int,
    capture: bool,
    training: bool = True,
) -> None:
    """`calls` dispatches and combines in an order that the seed draws.

    Args:
        comms: one for each setting.
        chosen: the settings.
        streams: of `streams_for`.
        calls: how many at least; every kind is made once, whatever the number.
        seed: draws them, the same on all ranks.
        capture: some calls are captured in CUDA graphs.
        training: gradients are among the kinds. Not where ranks are threads that share a GPU: they
            would wait for each other in autograd's one thread for it.
    """
    device, rank = comms[0].device, comms[0].rank
    ledger = Ledger(device)
    lines = [
        (LlLine if setting.mode == "ll" else Line)(comm, setting.cases, stream, ledger)
        for comm, setting, stream in zip(comms, chosen, streams, strict=True)
    ]
    finish(device)
    graphs: dict[Line, Graphs] = {}
    for line, setting in zip(lines, chosen, strict=True):
        if setting.steady:
            with on(line.stream):
                graphs[line] = Graphs(line, capture=capture)
    common, own = random.Random(seed), random.Random(seed * 1000 + rank)
    kinds = {line: _kinds_of(line, graphs, training=training) for line in lines}
    # Every kind on every input once, so that later memory is compared with what the calls need at
    # most. On CPUs, where nobody compares it, on one input.
    plan = [
        (line, kind, item)
        for line in lines
        for kind in kinds[line]
        for item in (line.items if device.type == "cuda" else [common.choice(line.items)])
    ]
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
        with on(line.stream):
            _delay(own, device)
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
    if capture and device.type == "cuda":
        held = _allocated(lines, device)
        assert held <= baseline, f"{held} bytes, {baseline} before"


def _kinds_of(line: Line, graphs: dict[Line, Graphs], *, training: bool) -> list[str]:
    """Steps that a line can make."""
    kinds = ["dispatch", "pair", "cached", "two", "several"]
    config = line.comm.config
    if training and is_trainable(line):
        kinds += TRAINING_KINDS
    if config.layout.expanded:
        kinds.append("late weights")
    if line in graphs:
        kinds += ["graph dispatch", "graph pair", "graph cached", "stray capture"]
        if isinstance(line, LlLine):
            kinds.append("graph halves")
        if graphs[line].has_steps:
            kinds.append("graph step")
    if isinstance(line, LlLine):
        kinds += ["buffered", "halves", "turns", "turns"]
        kinds += ["masks"] if line.has_masks else []
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
    if kind in TRAINING_KINDS:
        return make_training_step(line, kind, item, what)
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
        if kind == "graph step":
            graphs.step(item, what)
            return 4
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


@contextlib.contextmanager
def on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """With that stream as the current one; CPUs have none."""
    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        yield


def _delay(own: random.Random, device: torch.device) -> None:
    """Now and then this rank is late, on the GPU or on the host."""
    if own.random() < 0.1 and device.type == "cuda":
        torch.cuda._sleep(int(own.random() * _DELAY_CYCLES))
    if own.random() < 0.05:
        time.sleep(own.random() * 0.002)


def _allocated(lines: list[Line], device: torch.device) -> int:
    finish(device)
    for line in lines:
        line.forget()
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def soak(ctx: RankContext, calls: int, seed: int, hosts: int = 1) -> int:
    """A rank's part in a soak of processes: on GPUs with graphs, on CPUs with `collective`.

    `hosts`: of equally many ranks. Several, on GPUs, need ranks of `across_hosts.pool_on`.
    """
    on_gpus = ctx.device.type == "cuda"
    if on_gpus and hosts == 1:
        chosen = settings(ctx.num_ranks, seed)
    else:
        engine = "hybrid" if on_gpus else "collective"
        chosen = settings_across(hosts_of(hosts, ctx.num_ranks), seed, engine=engine)
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
            capture=on_gpus,
        )
    return calls
