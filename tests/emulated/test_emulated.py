"""Kernels of both modes on CPUs, on one host and on several, bit for bit against the oracle.

What each case is like is drawn; small sizes keep compiling and running short.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from expertlink import BlockFormat, DispatchLayout, InputError, MoECommunicator
from expertlink.engines.hybrid.rail import CopyRail, Marked
from expertlink.engines.hybrid.words import Mark, Marks
from expertlink.engines.nvlink.launch import KernelName, Launch
from support import decode, emulator, hosted_hosts, jobs, payloads
from support.cases import Shape
from support.depth import deep
from support.hosted import fleet_of, run_cases, run_hosted
from support.hosted_hosts import hosts_fleet_of
from support.oracle import Case, inputs_of

pytestmark = emulator.needs_compiler()
SMS = {"num_sms_dispatch": 2, "num_sms_combine": 2}
HOSTS = [(0, 0, 1, 1), (0, 1), (0, 1, 0, 1), (0, 0, 1, 1, 2, 2)]


@pytest.fixture(autouse=True)
def on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    emulator.emulate(monkeypatch)


def drawn(number: int, layout: DispatchLayout, domains: tuple[int, ...] | None) -> list[Case]:
    """Cases of one shape that differ in their routings; the same for one number."""
    draw = random.Random(number)
    ranks = draw.choice([2, 3]) if domains is None else len(domains)
    shape = Shape(
        ranks,
        layout,
        hidden=draw.choice([8, 64, 272]),
        experts=ranks * draw.choice([2, 3, 5]),
        topk=draw.choice([1, 2, 4]),
        max_tokens=12,
        dtype=draw.choice([torch.bfloat16, torch.float16]),
        alignment=draw.choice([1, 4]) if layout is DispatchLayout.FLAT else 1,
    )
    cases = [
        shape.case(
            tuple(draw.choice([0, 1, 5, 12]) for _ in range(ranks)),
            masked=draw.choice([0.0, 0.3, 1.0]),
            skew=draw.choice([0.0, 1.5]),
            weighted=draw.random() < 0.7,
            domains=domains,
            seed=draw.randrange(1000),
        )
        for _ in range(2)
    ]
    return [shape.case((5, *(12,) * (ranks - 1)), domains=domains, seed=number), *cases]


def layout_of(number: int) -> DispatchLayout:
    layouts = list(DispatchLayout)
    return layouts[number % len(layouts)]


@pytest.mark.parametrize("number", range(deep(2)))
@pytest.mark.parametrize("mode", ["ht", "ll"])
def test_one_host(mode: str, number: int) -> None:
    layout = layout_of(number + (2 if mode == "ll" else 0))
    cases = drawn(number, layout, None)
    fields: dict[str, Any] = {**SMS}
    if mode == "ht" and number % 3 == 2:
        fields["static_shapes"] = True
    run_hosted(fleet_of(mode, cases[0], warps=3, **fields), jobs.contracts, cases)


@pytest.mark.parametrize("domains", [None, HOSTS[0]])
def test_statistics(domains: tuple[int, ...] | None) -> None:
    """In mode "ht"; with the kernels of the tests of contracts, which take time to compile."""
    if domains is None:
        case = drawn(0, layout_of(0), None)[0]
        fleet = fleet_of("ht", case, warps=3, **SMS)
    else:
        case = drawn(0, layout_of(1), domains)[0]
        fleet = hosts_fleet_of(case, mode="ht", chunk_rows=5, warps=3, **SMS)
    run_cases(fleet, decode.statistics, [case])


@pytest.mark.parametrize("number", range(deep(1)))
def test_rows_quantized_on_the_way(number: int) -> None:
    draw = random.Random(number)
    layout = layout_of(number + 3)
    case = Shape(2, layout, hidden=draw.choice([272, 512]), experts=6, topk=2, max_tokens=12).case()
    fleet = fleet_of("ll", case, warps=3, quantization=draw.choice(list(BlockFormat)), **SMS)
    run_cases(fleet, payloads.quantized, [case])


class MarkedRail(CopyRail):
    """Counts steps as a watched rail does, and looks at the words when rows move."""

    def __init__(self, *connection: Any) -> None:
        super().__init__(*connection)
        self.counters, self.words = (torch.zeros(2, dtype=torch.int32) for _ in range(2))
        at = [Mark(self.counters[i:].data_ptr(), self.words[i:].data_ptr()) for i in range(2)]
        self.steps, self.marks = 0, Marks(*at)

    def exchange(self, *move: Any, marked: Marked = Marked.NOT, **options: Any) -> None:
        for index, mark in enumerate((Marked.BEGUN, Marked.DONE)):
            if not marked & mark:
                self.counters[index] += 1
                self.words[index] = self.counters[index]
            if mark is Marked.BEGUN:
                assert self.words.tolist() == [self.steps + 1, self.steps]
                super().exchange(*move, **options)
        self.steps += 1
        if marked & Marked.DONE:
            assert self.words.tolist() == [self.steps, self.steps - 1]


def marks_of_calls(comm: MoECommunicator, case: Case) -> None:
    """Whole calls, and halves, whose hook may come late: when it does, no step is open."""
    mode: Any = comm._engine._mode  # type: ignore[union-attr]
    rail = mode._messages._rail
    _, handle = jobs.dispatch_case(comm, case)
    assert rail.words.tolist() == [rail.steps] * 2
    comm.combine(jobs.rows_for(case, comm.rank, handle), handle)
    assert rail.words.tolist() == rail.counters.tolist() == [rail.steps] * 2
    own = inputs_of(case, comm.rank)
    out = comm.dispatch(own.x_TH, own.ids_TK, own.weights_TK, return_recv_hook=True)
    assert rail.words.tolist() == [rail.steps] * 2
    out[-1]()
    assert rail.words.tolist() == [rail.steps] * 2


def launches_of_calls(comm: MoECommunicator, case: Case) -> None:
    """Each is made once, for runners keep what they prepare for it; behind the rail, which may
    leave more than a kernel there, none of a capture has a programmatic dependency."""
    mode: Any = comm._engine._mode  # type: ignore[union-attr]
    dispatcher, combiner = mode._dispatcher, mode._combiner
    launched: list[tuple[KernelName, Launch]] = []

    def launches() -> list[tuple[KernelName, Launch]]:
        launched.clear()
        _, handle = jobs.dispatch_case(comm, case)
        comm.combine(jobs.rows_for(case, comm.rank, handle), handle)
        return launched.copy()

    run = dispatcher._run

    def recorded(name: KernelName, a: Any, launch: Launch) -> None:
        launched.append((name, launch))
        run(name, a, launch)

    callers = (dispatcher, dispatcher._launch, combiner, combiner._launch)
    for caller in callers:
        caller._run = recorded
    eager = launches()
    assert launches() == eager
    assert all(launch.follows for _, launch in eager)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mode._arena, "capture", lambda: 1)
        captured = launches()
        assert launches() == captured
    behind = (KernelName.DISPATCH, KernelName.SUM_HOSTS)
    for (name, launch), (other, usual) in zip(captured, eager, strict=True):
        assert (name, launch.grid, launch.block) == (other, usual.grid, usual.block)
        assert launch.follows == (name not in behind)
    for caller in callers:
        caller._run = run


def message_sizes(comm: MoECommunicator, case: Case) -> list[int]:
    """Bytes of the messages of a dispatch, and of one that this rank refuses."""
    mode: Any = comm._engine._mode  # type: ignore[union-attr]
    sizes: list[int] = []
    mode._messages.exchange = lambda at, nbytes, marked: sizes.append(nbytes)
    with torch.no_grad():
        jobs.dispatch_case(comm, case)
    mode.refuse(0, InputError("no such rows"))
    return sizes


@pytest.mark.parametrize("fmt", [None, *BlockFormat])
def test_refusals_have_the_size_of_messages(
    fmt: BlockFormat | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks of a rail exchange messages of one size, whether or not one refuses. Nothing runs."""
    layout = DispatchLayout.EXPERT_MAJOR
    case = Shape(2, layout, hidden=512, experts=4, topk=2, max_tokens=12).case(domains=(0, 1))
    fields: dict[str, Any] = {"quantization": fmt, **SMS}
    fleet = hosts_fleet_of(case, **fields)
    monkeypatch.setattr(fleet, "_launch", lambda *_: None)
    for called, refused in run_hosted(fleet, message_sizes, case):
        assert refused == called


@pytest.mark.parametrize("number", range(deep(1)))
@pytest.mark.parametrize("mode", ["ht", "ll"])
def test_several_hosts(mode: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosted_hosts, "CopyRail", MarkedRail)
    layout = layout_of(number + (3 if mode == "ll" else 1))
    cases = drawn(number, layout, HOSTS[number % len(HOSTS)])
    chunk_rows = 5 if mode == "ht" else None
    fleet = hosts_fleet_of(cases[0], mode=mode, chunk_rows=chunk_rows, warps=3, **SMS)
    run_hosted(fleet, jobs.contracts, cases)
    if mode == "ht":
        run_cases(fleet, jobs.without_memory, cases[:1])
    if mode == "ll":
        run_cases(fleet, marks_of_calls, cases)
        run_cases(fleet, launches_of_calls, cases[:1])
        run_cases(fleet, decode.rail_statistics, cases)
