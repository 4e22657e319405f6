"""Calls that ranks make, and programs of them.

A program is what the host of one rank does in order. Ranks that behave have the same program; the
protocol has to notice those that do not.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

Routing = tuple[tuple[int, ...], ...]
"""`[R, R]`: how many rows (0 or 1) each rank sends to each other one."""


class Kind(enum.Enum):
    """What a call is."""

    DISPATCH = "dispatch"
    CACHED = "cached dispatch"
    COMBINE = "combine"
    CAPTURE = "capture"
    """Of a graph that holds one dispatch. Launches nothing."""
    HOOK = "hook"
    """Low latency: queues the oldest receiving half that is left."""
    MASK = "mask"
    """Low latency: this rank leaves all others out from now on."""
    CLEAR = "clear mask"
    """Low latency: all ranks begin anew."""

    @property
    def dispatches(self) -> bool:
        """Whether rows go to the ranks of experts."""
        return self in (Kind.DISPATCH, Kind.CACHED)


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        kind: what it does.
        comm: communicator, 0 or 1; both use one arena.
        of: place in the program of the dispatch whose handle it takes.
        captured: replay of a graph that holds this call, the one that was captured last.
        halves: low latency: only the sending half is queued at once.
    """

    kind: Kind
    comm: int = 0
    of: int | None = None
    captured: bool = False
    halves: bool = False

    def __str__(self) -> str:
        text = f"{self.kind.value} {'XY'[self.comm]}"
        if self.of is not None:
            text += f" of #{self.of}"
        return text + " (replay)" * self.captured + " in halves" * self.halves


class Identity(NamedTuple):
    """Which call a rank is in: its kind, its communicator, the dispatch that it refers to."""

    kind: Kind
    comm: int
    subject: int

    def __str__(self) -> str:
        of = f" of {self.subject}" if self.subject else ""
        return f"{self.kind.value} {'XY'[self.comm]}{of}"


class Row(NamedTuple):
    """A row on its way, or where it is read."""

    author: int
    transfer: int
    call: Identity

    def __str__(self) -> str:
        return f"a row of rank {self.author} in transfer {self.transfer} ({self.call})"


class Fate(enum.Enum):
    """What has to become of a transfer."""

    AGREED = "all ranks are in it"
    SURVIVED = "refused on all ranks, which go on"
    KILLED = "reported on all ranks, which are dead"
    MISSED = "some ranks never come"


Program = tuple[Call | None, ...]
"""None: the rank leaves that place out."""


def describe(programs: Sequence[Program]) -> str:
    """Programs of all ranks, one line each."""
    return "\n".join(
        f"rank {rank}: " + "; ".join("nothing" if call is None else str(call) for call in program)
        for rank, program in enumerate(programs)
    )


def dispatch(comm: int = 0, *, captured: bool = False) -> Call:
    """A dispatch that counts."""
    return Call(Kind.DISPATCH, comm, captured=captured)


def cached(of: int, comm: int = 0) -> Call:
    """A cached dispatch with the handle of an earlier dispatch."""
    return Call(Kind.CACHED, comm, of)


def combine(of: int, comm: int = 0) -> Call:
    """A combine with the handle of an earlier dispatch."""
    return Call(Kind.COMBINE, comm, of)


def halves(call: Call) -> Call:
    """The same call in halves."""
    return replace(call, halves=True)


def capture(comm: int = 0) -> Call:
    """A capture of one dispatch."""
    return Call(Kind.CAPTURE, comm)


HOOK, MASK, CLEAR = Call(Kind.HOOK), Call(Kind.MASK), Call(Kind.CLEAR)


def routings(num_ranks: int) -> dict[str, Routing]:
    """Few routings that differ in who has to wait for whom."""
    ranks = range(num_ranks)
    full = tuple(tuple(1 for _ in ranks) for _ in ranks)
    return {
        "all to all": full,
        "rank 0 sends nothing": ((0,) * num_ranks, *full[1:]),
        "rank 0 gets nothing": tuple((0, *row[1:]) for row in full),
        "nothing leaves its rank": tuple(tuple(int(s == d) for d in ranks) for s in ranks),
    }


def next_calls(program: Program, comms: int) -> Iterator[Call]:
    """Every call that may come after a program; up to two combines for each dispatch."""
    for comm in range(comms):
        yield dispatch(comm)
        for at, call in enumerate(program):
            if call is None or call.comm != comm or not call.kind.dispatches:
                continue
            yield cached(at, comm)
            if program.count(combine(at, comm)) < 2:
                yield combine(at, comm)


def all_programs(length: int, *, comms: int) -> Iterator[Program]:
    """Every program of some calls."""
    programs: list[Program] = [(dispatch(comm),) for comm in range(comms)]
    for _ in range(length - 1):
        programs = [(*program, call) for program in programs for call in next_calls(program, comms)]
    yield from programs


def drawn_program(draw: random.Random, length: int, *, comms: int) -> Program:
    """A drawn program."""
    program: Program = (dispatch(draw.randrange(comms)),)
    while len(program) < length:
        program = (*program, draw.choice(list(next_calls(program, comms))))
    return program


def inserted(program: Program, at: int, call: Call) -> Program:
    """A program with one more call, before what is #at now."""

    def moved(call: Call | None) -> Call | None:
        if call is None or call.of is None or call.of < at:
            return call
        return replace(call, of=call.of + 1)

    return (*program[:at], call, *map(moved, program[at:]))


def with_captures(draw: random.Random, program: Program) -> Program:
    """A program with a capture or two somewhere, which is one rank's own business."""
    for _ in range(draw.randint(1, 2)):
        program = inserted(program, draw.randint(0, len(program)), capture())
    return program


def with_halves(draw: random.Random, program: Program) -> Program:
    """A program with some calls in halves, and hooks somewhere, likewise."""
    program = tuple(
        halves(call) if call is not None and draw.random() < 0.7 else call for call in program
    )
    for _ in range(draw.randint(0, 2)):
        program = inserted(program, draw.randint(0, len(program)), HOOK)
    return program


def gone_astray(draw: random.Random, program: Program, *, comms: int) -> Program:
    """A program with one call left out, or another one in its place."""
    at = draw.randrange(len(program))
    others: list[Call | None] = [None]
    others += [call for call in next_calls(program[:at], comms) if call != program[at]]
    return without_handles_of((*program[:at], draw.choice(others), *program[at + 1 :]), at)


def without_handles_of(program: Program, at: int) -> Program:
    """A program in which calls that lack their handle, since #at is no dispatch, are left out."""
    calls = list(program)
    lost = {at}
    here = calls[at]
    for later in range(at + 1, len(calls)):
        call = calls[later]
        if call is None or call.of not in lost:
            continue
        if here is not None and here.kind.dispatches and here.comm == call.comm:
            continue
        calls[later] = None
        lost.add(later)
    return tuple(calls)
