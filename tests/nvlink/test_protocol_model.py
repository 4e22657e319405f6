"""The device protocol, walked in all interleavings; docs/protocol/model.md has what is modelled.

First the explorer itself, then the protocol as it is, where nothing must be found, then protocols
that are broken in one place each, where something must.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.depth import deep, depth
from support.model import ht, ll
from support.model.calls import (
    CLEAR,
    HOOK,
    MASK,
    Call,
    Kind,
    Program,
    Routing,
    all_programs,
    cached,
    capture,
    combine,
    describe,
    dispatch,
    drawn_program,
    gone_astray,
    halves,
    routings,
    with_captures,
    with_halves,
)
from support.model.explorer import Flaw, Found, Machine, Memory, Step, explore
from support.model.ll_host import WITH_WEIGHTS

DEEP = depth() >= 10  # longer programs, and three ranks in full
LENGTH = 4 if DEEP else 3
FULL, COLD = routings(2)["all to all"], routings(2)["nothing leaves its rank"]
ROUTINGS = pytest.mark.parametrize("routing", list(routings(2)))
MODES = pytest.mark.parametrize(
    ("zero_copy", "mails"),
    [(False, True), (False, False), (True, True), (True, False)],
    ids=["staged", "staged static", "zero copy", "zero copy static"],
)

# What a rank runs, for each of them.
Programs = Sequence[Program]


def same(program: Program, num_ranks: int = 2) -> Programs:
    """All ranks run the same program."""
    return (program,) * num_ranks


def sharers(routing: Routing, zero_copy: bool = False, mails: bool = True) -> list[ht.Comm]:
    """X and Y in one arena, one of them with more experts."""
    return [
        ht.Comm(experts, routing, zero_copy, mails) for experts in ((2, 1) if mails else (1, 2))
    ]


def x_first(length: int) -> list[Program]:
    """All programs that begin with a dispatch of X: communicators may change names."""
    programs = all_programs(length, comms=2)
    return [program for program in programs if program[0] == dispatch()]


def check_ht(
    cases: Iterable[tuple[Programs, Sequence[ht.Comm]]], *, stops: int | None = None
) -> None:
    """Nothing is found in any of some high-throughput cases."""
    for programs, comms in cases:
        found = explore(ht.build(programs, comms, stops=stops))
        assert found.flaw is None, f"{comms}\n{describe(programs)}\n{found}"


def check_ll(
    cases: Iterable[tuple[Programs, Sequence[Routing]]],
    protocol: ll.Protocol = ll.AS_IT_IS,
    *,
    stops: int | None = None,
) -> None:
    """Nothing is found in any of some low-latency cases."""
    for programs, between in cases:
        found = explore(ll.build(programs, between, protocol, stops=stops))
        assert found.flaw is None, f"{between}\n{describe(programs)}\n{found}"


# -- the explorer ---------------------------------------------------------------------------------


@st.composite
def machines(draw: st.DrawFn) -> Callable[[], Machine]:
    """Some processes with a few counters and cells in common, of which some reads are flaws."""
    words = st.integers(0, 2)
    step = st.tuples(
        st.lists(st.tuples(words, st.integers(1, 2)), max_size=1),  # waits
        st.none() | words,  # cell that has to be even
        st.none() | words,  # cell that is read
        st.none() | words,  # cell that is written
        st.lists(st.tuples(words, st.integers(1, 2)), max_size=1),  # raises
    )
    processes = draw(st.lists(st.lists(step, min_size=1, max_size=3), min_size=2, max_size=4))
    bad = draw(st.integers(0, 40))

    def build() -> Machine:
        machine = Machine()
        counters = [machine.word(f"counter {i}") for i in range(3)]
        cells = [machine.word(f"cell {i}") for i in range(3)]
        for number, steps in enumerate(processes):
            process = machine.process(str(number), number)
            mark = machine.word(f"seen by {number}")  # its own
            for at, (waits, even, read, write, raises) in enumerate(steps):
                value = number * 5 + at + 1

                def act(
                    memory: Memory,
                    mark: int = mark,
                    read: int | None = read,
                    write: int | None = write,
                    value: int = value,
                ) -> None:
                    if read is not None:
                        memory[mark] = memory[mark] * 31 + memory[cells[read]]
                        if memory[mark] % 41 == bad and memory[mark]:
                            raise Flaw("bad", str(memory[mark]))
                    if write is not None:
                        memory[cells[write]] = value

                process.steps.append(
                    Step(
                        f"step {at}",
                        waits=tuple((counters[word], least) for word, least in waits),
                        when=None
                        if even is None
                        else lambda memory, even=even: memory[cells[even]] % 2 == 0,
                        reads=(mark, *(cells[word] for word in (even, read) if word is not None)),
                        writes=(mark,) if write is None else (mark, cells[write]),
                        raises=tuple((counters[word], least) for word, least in raises),
                        act=act,
                    )
                )
        return machine

    return build


@settings(max_examples=deep(100))
@given(build=machines())
def test_orders_that_are_left_out_make_no_difference(build: Callable[[], Machine]) -> None:
    few, every = explore(build()), explore(build(), every_order=True)
    assert (few.flaw is None) == (every.flaw is None)
    if few.flaw is None:
        assert few.ends == every.ends
        assert few.states <= every.states


def test_a_whole_transfer_in_every_order() -> None:
    programs, comms = same((dispatch(),)), sharers(FULL)
    few = explore(ht.build(programs, comms))
    every = explore(ht.build(programs, comms), every_order=True)
    assert few.flaw is None
    assert every.flaw is None
    assert few.ends == every.ends == 1


def test_a_deadlock_is_found() -> None:
    machine = Machine()
    words = machine.word("one"), machine.word("other")
    for rank in range(2):
        wait = Step("waits", waits=((words[1 - rank], 1),), raises=((words[rank], 1),))
        machine.process("role", rank).steps.append(wait)

    def judge(end: Any) -> None:
        if end.left():
            raise Flaw("deadlock", f"{len(end.left())} wait")

    machine.judge = judge
    found = explore(machine)
    assert str(found.flaw) == "deadlock: 2 wait"


# -- high throughput, as it is --------------------------------------------------------------------


@ROUTINGS
@MODES
def test_ht_ranks_that_make_the_same_calls(routing: str, zero_copy: bool, mails: bool) -> None:
    comms = sharers(routings(2)[routing], zero_copy, mails)
    check_ht((same(program), comms) for program in x_first(LENGTH))


@MODES
def test_ht_ranks_that_make_different_calls(zero_copy: bool, mails: bool) -> None:
    comms = sharers(FULL, zero_copy, mails)
    programs = list(all_programs(2, comms=2))
    check_ht((pair, comms) for pair in itertools.product(programs, programs))


def drawn_comms(draw: random.Random, num_ranks: int) -> list[ht.Comm]:
    """Communicators that differ in experts, routing and shapes, but not in where rows go."""
    between, zero_copy = list(routings(num_ranks).values()), draw.random() < 0.5
    return [
        ht.Comm(draw.randint(1, 2), draw.choice(between), zero_copy, draw.random() < 0.5)
        for _ in range(2)
    ]


def strays(num_ranks: int, length: int, cases: int) -> Iterator[tuple[Programs, list[ht.Comm]]]:
    """One rank leaves a call out, or makes another one."""
    draw = random.Random(num_ranks * 10 + length)
    for _ in range(cases):
        program = drawn_program(draw, length, comms=2)
        programs = [program] * num_ranks
        programs[draw.randrange(num_ranks)] = gone_astray(draw, program, comms=2)
        yield programs, drawn_comms(draw, num_ranks)


@pytest.mark.parametrize(("num_ranks", "length", "cases"), [(2, 3, 100), (2, 4, 50), (3, 3, 5)])
def test_ht_a_rank_that_goes_astray(num_ranks: int, length: int, cases: int) -> None:
    check_ht(strays(num_ranks, length, deep(cases)))


def captured(draw: random.Random, length: int) -> Programs:
    """Two ranks with the same transfers, some of them replays, and captures of their own."""
    program = drawn_program(draw, length, comms=1)
    program = tuple(
        replace(call, captured=draw.random() < 0.4) if call == dispatch() else call
        for call in program
        if call is not None
    )
    ranks = [with_captures(draw, program) for _ in range(2)]
    return [(capture(), *(shifted(call) for call in rank)) for rank in ranks]


def shifted(call: Call | None) -> Call | None:
    """The call in a program with one more place before it."""
    if call is None or call.of is None:
        return call
    return replace(call, of=call.of + 1)


def test_ht_captures_on_some_ranks() -> None:
    draw, comms = random.Random(5), sharers(FULL, zero_copy=True)
    check_ht((captured(draw, 4), comms) for _ in range(deep(30)))


@pytest.mark.parametrize("stops", [0, 1])
@pytest.mark.parametrize("second", [dispatch(), cached(0), combine(0)], ids=str)
def test_ht_a_rank_that_stops(stops: int, second: Call) -> None:
    for zero_copy in (False, True):
        check_ht([(same((dispatch(), second)), sharers(FULL, zero_copy))], stops=stops)


@pytest.mark.parametrize("routing", list(routings(3)))
def test_ht_three_ranks(routing: str) -> None:
    between = routings(3)[routing]
    programs = x_first(3) if DEEP else list(all_programs(2, comms=1))
    for zero_copy in (False, True):
        check_ht((same(program, 3), sharers(between, zero_copy)) for program in programs)


@pytest.mark.skipif(not DEEP, reason="takes minutes; EXPERTLINK_TEST_DEPTH=10 walks it")
@pytest.mark.parametrize("second", [dispatch(), cached(0), combine(0)], ids=str)
def test_ht_one_of_three_ranks_stops(second: Call) -> None:
    comms = sharers(routings(3)["all to all"])
    check_ht([(same((dispatch(), second), 3), comms)], stops=0)


# -- high throughput, broken ----------------------------------------------------------------------

NO_HEADS = replace(ht.AS_IT_IS, all_compare_heads=False)


def ht_flaw(programs: Programs, comms: Sequence[ht.Comm], protocol: ht.Protocol) -> Found:
    """What is found where the protocol is broken, and that nothing is found where it is not."""
    assert explore(ht.build(programs, comms)).flaw is None
    found = explore(ht.build(programs, comms, protocol))
    assert found.trace or found.flaw is None
    return found


def kind_of(found: Found) -> str | None:
    """Which invariant is broken, if one is."""
    return None if found.flaw is None else found.flaw.kind


def test_ht_count_rows_of_unequal_stride() -> None:
    """A late head of one communicator lies in another rank's counts of the other one."""
    fewer, more = ht.Comm(1, COLD), ht.Comm(2, FULL)
    programs = same((dispatch(0), combine(0, 0), dispatch(1)))
    broken = replace(NO_HEADS, one_stride=False)
    found = ht_flaw(programs, [fewer, more], broken)
    assert kind_of(found) == "wrong counts"
    assert "count 3 of rank 0 is: rank 1 is in transfer 2, combine X of 1" in str(found)
    # Either of what has been changed since is enough.
    assert kind_of(ht_flaw(programs, [fewer, more], NO_HEADS)) is None
    assert kind_of(ht_flaw(programs, [fewer, more], replace(ht.AS_IT_IS, one_stride=False))) is None


@pytest.mark.parametrize("replay", [False, True], ids=["eager", "replays"])
def test_ht_a_pool_that_the_sender_chooses(replay: bool) -> None:
    """A capture on one rank alone moves the turn of its pools."""
    if replay:
        programs = [
            (*[capture()] * captures, dispatch(), dispatch(captured=True)) for captures in (1, 2)
        ]
    else:
        programs = [(dispatch(), capture(), dispatch()), (dispatch(), dispatch())]
    broken = replace(ht.AS_IT_IS, receiver_names_pool=False, captures_move_pool=True)
    found = ht_flaw(programs, sharers(FULL, zero_copy=True), broken)
    assert kind_of(found) == "wrong view"


@pytest.mark.parametrize(
    "programs",
    [[(dispatch(0),), (dispatch(1),)], [(dispatch(), dispatch()), (dispatch(), combine(0))]],
    ids=["another communicator", "a combine"],
)
def test_ht_rows_placed_after_a_disagreement(programs: Programs) -> None:
    """Static shapes: tables of counts that do not belong together lead to rows of another call."""
    comms = sharers(FULL, mails=False)
    assert (
        kind_of(ht_flaw(programs, comms, replace(ht.AS_IT_IS, places_disagreed=True))) == "placed"
    )


COMBINES = [(dispatch(), dispatch(), combine(at)) for at in range(2)]


@pytest.mark.parametrize(
    ("broken", "programs", "zero_copy", "kind"),
    [
        pytest.param({"all_compare_heads": False}, COMBINES, False, "wrong row", id="no heads"),
        pytest.param(
            {"origin_is_shared": True},
            [(dispatch(), cached(0), combine(at)) for at in range(2)],
            False,
            "wrong row",
            id="cached dispatches rename their origin",
        ),
        pytest.param(
            {"looks_once_more": False}, COMBINES, False, "unequal verdicts", id="waits give up"
        ),
        pytest.param(
            {"sends_disagreed": True},
            [(dispatch(), dispatch(), call) for call in (cached(0), combine(0))],
            True,
            "wrong view",
            id="rows for those who do not want them",
        ),
        pytest.param(
            {"rows_wait_for_credit": False},
            same((dispatch(), cached(0))),
            False,
            "wrong row",
            id="rows without credit",
        ),
        pytest.param(
            {"heads_wait_for_credit": False},
            same((dispatch(), dispatch())),
            False,
            "wrong counts",
            id="counts without credit",
        ),
    ],
)
def test_ht_broken(broken: dict[str, bool], programs: Programs, zero_copy: bool, kind: str) -> None:
    assert (
        kind_of(ht_flaw(programs, sharers(FULL, zero_copy), replace(ht.AS_IT_IS, **broken))) == kind
    )


def test_ht_a_disagreement_that_one_rank_survives() -> None:
    """Sharers of which one has static shapes: both have to die, or none."""
    comms = [ht.Comm(2, FULL, mails=mails) for mails in (True, False)]
    programs = [(dispatch(first), dispatch(0)) for first in range(2)]
    found = ht_flaw(programs, comms, replace(ht.AS_IT_IS, form_decides=False))
    assert kind_of(found) == "unequal verdicts"


@ROUTINGS
def test_ht_without_heads_one_communicator_is_safe(routing: str) -> None:
    """Comparing heads is for ranks in different calls: the words of those that agree need none."""
    comms = sharers(routings(2)[routing])
    for program in all_programs(3, comms=1):
        assert kind_of(ht_flaw(same(program), comms, NO_HEADS)) is None


def test_a_trace_reads_as_a_story() -> None:
    broken = replace(ht.AS_IT_IS, rows_wait_for_credit=False)
    lines = str(ht_flaw(same((dispatch(), cached(0))), sharers(FULL), broken)).splitlines()
    assert lines[0].startswith("wrong row: transfer 1 ends well on rank")
    assert "rank 0 judge: reads the heads of transfer 1 (dispatch X)" in "\n".join(lines)


# -- low latency, as it is ------------------------------------------------------------------------


def in_halves(program: Program) -> Iterator[Program]:
    """A program with each of its calls whole or in halves."""
    for choice in itertools.product((False, True), repeat=len(program)):
        yield tuple(
            halves(call) if half and call is not None else call
            for call, half in zip(program, choice, strict=True)
        )


PROTOCOLS = pytest.mark.parametrize(
    "protocol", [ll.AS_IT_IS, WITH_WEIGHTS], ids=["plain", "with weights"]
)


@PROTOCOLS
@ROUTINGS
def test_ll_ranks_that_make_the_same_calls(routing: str, protocol: ll.Protocol) -> None:
    between = [routings(2)[routing]] * 2
    programs = [
        variant
        for program in all_programs(LENGTH, comms=1)
        if not protocol.brings_weights
        or any(call and call.kind is Kind.COMBINE for call in program)
        for variant in in_halves(program)
    ]
    check_ll(((same(program), between) for program in programs), protocol)


def ll_cases(
    num_ranks: int, length: int, cases: int, *, astray: bool, whole: bool = False
) -> Iterator[tuple[Programs, list[Routing]]]:
    """Halves and hooks as each rank likes, or whole calls, of the same calls or not."""
    draw = random.Random(num_ranks * 10 + length)
    for _ in range(cases):
        program = drawn_program(draw, length, comms=2)
        programs = [program] * num_ranks
        if astray:
            programs[draw.randrange(num_ranks)] = gone_astray(draw, program, comms=2)
        between = [draw.choice(list(routings(num_ranks).values())) for _ in range(2)]
        yield [program if whole else with_halves(draw, program) for program in programs], between


@PROTOCOLS
@pytest.mark.parametrize("astray", [False, True], ids=["same calls", "astray"])
@pytest.mark.parametrize(("num_ranks", "length", "cases"), [(2, 4, 40), (2, 6, 15), (3, 3, 3)])
def test_ll_halves_as_each_rank_likes(
    num_ranks: int, length: int, cases: int, astray: bool, protocol: ll.Protocol
) -> None:
    # Weights: where a call before is left in halves, ranks that go astray may end in a time-out.
    whole = astray and protocol.brings_weights
    check_ll(ll_cases(num_ranks, length, deep(cases), astray=astray, whole=whole), protocol)


MASKED = (MASK, dispatch(), CLEAR, dispatch(), combine(1), combine(3))
REPLAYS = (halves(dispatch()), replace(dispatch(), captured=True), HOOK)


def test_ll_masks_and_epochs() -> None:
    programs = [MASKED, (dispatch(), *map(shifted, MASKED)), (*MASKED, dispatch(), combine(6))]
    check_ll((same(program), [FULL, FULL]) for program in programs)


def test_ll_a_replay_between_halves_is_reported() -> None:
    check_ll([(same(REPLAYS), [FULL, FULL])])


@PROTOCOLS
@pytest.mark.parametrize("stops", [0, 1])
@pytest.mark.parametrize(
    "program",
    [
        (dispatch(), combine(0)),
        (dispatch(), cached(0)),
        (halves(dispatch()), halves(dispatch())),
        (dispatch(), halves(combine(0)), HOOK),
    ],
    ids=["combine", "cached dispatch", "halves", "combine in halves"],
)
def test_ll_a_rank_that_stops(stops: int, program: Program, protocol: ll.Protocol) -> None:
    check_ll([(same(program), [FULL, FULL])], protocol, stops=stops)


# -- low latency, broken --------------------------------------------------------------------------

HALVES = (halves(dispatch()),) * 4


@pytest.mark.parametrize(
    ("broken", "programs", "kind"),
    [
        pytest.param(
            {"sends_wait_for_credit": False}, same(HALVES), "overwritten", id="without credit"
        ),
        pytest.param({"sets": 2}, same(HALVES), "overwritten", id="two sets"),
        pytest.param(
            {"credit_follows_put_back": False}, same(HALVES), "overwritten", id="early credit"
        ),
        pytest.param({"combines_compare_heads": False}, COMBINES, "wrong row", id="no heads"),
        pytest.param({"heads_name_dispatch": False}, COMBINES, "wrong row", id="no subject"),
        pytest.param({"hears_own_head": False}, COMBINES, "unequal verdicts", id="late blocks"),
        pytest.param(
            {"whole_calls_check": False}, same(REPLAYS), "deadlock", id="replay between halves"
        ),
        pytest.param({"handles_have_epochs": False}, same(MASKED), "deadlock", id="old handles"),
    ],
)
def test_ll_broken(broken: dict[str, Any], programs: Programs, kind: str) -> None:
    assert explore(ll.build(programs, [FULL, FULL])).flaw is None
    found = explore(ll.build(programs, [FULL, FULL], replace(ll.AS_IT_IS, **broken)))
    assert kind_of(found) == kind, str(found)


STRAYS = [(dispatch(), halves(combine(0)), HOOK), (dispatch(), dispatch())]


@pytest.mark.parametrize(
    ("broken", "programs", "kind"),
    [
        pytest.param(
            {"weights_come_first": False}, same((dispatch(), combine(0))), "deadlock", id="late"
        ),
        pytest.param(
            {"senders_compare_heads": False}, STRAYS, "unequal verdicts", id="no heads in halves"
        ),
    ],
)
def test_ll_weights_broken(broken: dict[str, Any], programs: Programs, kind: str) -> None:
    assert explore(ll.build(programs, [FULL, FULL], WITH_WEIGHTS)).flaw is None
    found = explore(ll.build(programs, [FULL, FULL], replace(WITH_WEIGHTS, **broken)))
    assert kind_of(found) == kind, str(found)


@pytest.mark.parametrize(
    "program",
    [(dispatch(),) * 4, (dispatch(), combine(0), dispatch(), combine(2))],
    ids=["dispatches", "and combines"],
)
def test_ll_whole_calls_need_no_credit(program: Program) -> None:
    """They hear each other's heads, so none is more than one call ahead. Halves may be."""
    protocol = replace(ll.AS_IT_IS, sends_wait_for_credit=False)
    found = explore(ll.build(same(program), [FULL, FULL], protocol))
    assert kind_of(found) is None, str(found)
