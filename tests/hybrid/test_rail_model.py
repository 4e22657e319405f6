"""Messages on rails and transfers inside hosts, in all interleavings: docs/protocol/model.md.

First the protocol as it is, where nothing must be found. Then protocols that are broken in one
place each, where something must.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from expertlink.engines.hybrid.ht.plan import RING
from support.depth import depth
from support.model.explorer import Found, explore
from support.model.rails import AS_IT_IS, Program, Protocol, build, ht_program, ll_program

DEEP = depth() >= 10
HOSTS = {"2x1": (0, 1), "2x2": (0, 0, 1, 1), "3x1": (0, 1, 2)}
WHOLE = ll_program("d0", "D0", "c1", "C1", "d2", "D2", "c3", "C3")
HALVES = ll_program("d0", "d1", "D0", "D1", "c2", "c3", "C2", "C3")
HT: dict[str, Program] = {
    "a dispatch": ht_program("dispatch", chunks=4),
    "a combine": ht_program("combine", chunks=4),
    "two calls": ht_program("dispatch", "combine", chunks=2),
}
SHORT = ht_program("dispatch", chunks=2)
LL: dict[str, Program] = {"whole calls": WHOLE, "halves": HALVES}


def walk(
    program: Program | list[Program], hosts: tuple[int, ...], protocol: Protocol, **options: Any
) -> Found:
    programs = program if isinstance(program[0], list) else [program] * len(hosts)
    return explore(build(programs, hosts, protocol, **options))  # type: ignore[arg-type]


def test_the_ring_is_the_engines() -> None:
    assert AS_IT_IS.ring == RING


@pytest.mark.parametrize(
    ("name", "hosts"),
    [pair for pair in itertools.product(HT, HOSTS) if DEEP or pair[1] != "2x2" or "two" in pair[0]],
)
def test_ht(name: str, hosts: str) -> None:
    found = walk(HT[name], HOSTS[hosts], AS_IT_IS)
    assert found.flaw is None, found
    assert found.ends == 1


@pytest.mark.parametrize("hosts", HOSTS.values(), ids=HOSTS)
@pytest.mark.parametrize("program", LL.values(), ids=LL)
def test_ll(program: Program, hosts: tuple[int, ...]) -> None:
    """Two sets of messages; a replay may be as far ahead of its peers as its stream allows."""
    found = walk(program, hosts, Protocol(ring=2), beside=False)
    assert found.flaw is None, found


@pytest.mark.parametrize("stops", range(4) if DEEP else [1])
@pytest.mark.parametrize("beside", [True, False], ids=["ht", "ll"])
def test_a_rank_that_stops_is_found(beside: bool, stops: int) -> None:
    """Whoever waits for another host notices, and what it knows leads to that rank."""
    program = HT["two calls"] if beside and DEEP else SHORT if beside else WHOLE[:4]
    found = walk(program, HOSTS["2x2"], AS_IT_IS, beside=beside, stops=stops)
    assert found.flaw is None, found


def test_ranks_in_different_calls_do_not_pass_messages_on() -> None:
    """All messages have one size; heads tell calls apart."""
    mine, theirs = ll_program("d0", "D0"), ll_program("d1", "D1")
    found = walk([mine, theirs], HOSTS["2x1"], AS_IT_IS, beside=False)
    assert found.flaw is None, found
    broken = Protocol(compares_heads=False)
    found = walk([mine, theirs], HOSTS["2x1"], broken, beside=False)
    assert found.flaw is not None
    assert found.flaw.kind == "wrong message"


BROKEN: dict[str, tuple[Protocol, Program, str, str, dict[str, Any]]] = {
    "the ring is too short": (Protocol(ring=1), HT["a dispatch"], "2x1", "wrong message", {}),
    "rows do not wait for credit": (
        Protocol(waits_for_credit=False),
        HT["two calls"],
        "2x2",
        "wrong row",
        {},
    ),
    "a slot has the rows of several sources": (
        Protocol(one_writer=False),
        HT["a dispatch"],
        "3x1",
        "wrong row",
        {},
    ),
    "the rail does not wait for the kernel that packs": (
        Protocol(exchange_waits=False),
        HT["a dispatch"],
        "2x1",
        "wrong message",
        {},
    ),
    "the reader does not wait for the rail": (
        Protocol(reader_waits=False),
        HT["a dispatch"],
        "2x1",
        "wrong message",
        {},
    ),
    "halves share a set": (Protocol(ring=1), HALVES, "2x1", "false alarm", {"beside": False}),
    "steps are marked as begun when they are done": (
        Protocol(begun_before=False),
        WHOLE[:2],
        "2x1",
        "unnoticed",
        {"beside": False, "stops": 1},
    ),
    "steps are marked as done before they are": (
        Protocol(done_behind=False),
        WHOLE[:2],
        "2x1",
        "unnoticed",
        {"beside": False, "stops": 1},
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_every_rule_is_needed(name: str) -> None:
    protocol, program, hosts, kind, options = BROKEN[name]
    found = walk(program, HOSTS[hosts], protocol, **options)
    assert found.flaw is not None, "the broken protocol does no harm"
    assert found.flaw.kind == kind, found
    assert found.trace


@pytest.mark.skipif(not DEEP, reason="minutes: EXPERTLINK_TEST_DEPTH=10")
@pytest.mark.parametrize("program", [*HT.values(), *LL.values()], ids=[*HT, *LL])
def test_three_hosts_of_two(program: Program) -> None:
    found = walk(program, (0, 0, 1, 1, 2, 2), AS_IT_IS, beside=program in list(HT.values()))
    assert found.flaw is None, found
