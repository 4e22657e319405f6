"""Which call is which: ranks in other calls, communicators of one arena, ranks that are late."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from expertlink import CapacityError, ExpertlinkError
from support.side_by_side import Rank, World, inputs_of, is_right, is_sum, round_trip, run_ranks

pytestmark = pytest.mark.gpu

LL: dict[str, Any] = {"mode": "ll", "output_layout": "expert_major"}
HT: dict[str, Any] = {"output_layout": "token_major"}
MODES = pytest.mark.parametrize("fields", [HT, LL], ids=["ht", "ll"])


def seen_by(comm: Rank) -> tuple[str, str, str]:
    """What a rank is told of calls that did not fit; then every call is refused."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            comm.check_health()
        except CapacityError:
            pass
        except ExpertlinkError as error:
            try:
                comm.dispatch(*inputs_of(comm, 1))
            except ExpertlinkError as again:
                return type(error).__name__, str(error), type(again).__name__
            return type(error).__name__, str(error), "goes on"
        time.sleep(0.01)
    return "", "no error", ""


def all_alike(results: list[Any], *texts: str) -> None:
    """Every rank raised the same `PeerError`, at once, and refuses everything afterwards."""
    assert len(set(results)) == 1, results
    kind, text, again = results[0]
    assert (kind, again) == ("PeerError", "ClosedError"), results[0]
    for part in texts:
        assert part in text, text


def swapped_combines(world: World, rank: int, fields: dict[str, Any]) -> Any:
    comm = Rank(world, rank, timeout_s=60.0, **fields)
    received = [comm.dispatch(*inputs_of(comm, seed)) for seed in (1, 2)]
    for out, handle in received if rank == 0 else received[::-1]:
        try:
            comm.combine(out.tokens.clone(), handle)
        except ExpertlinkError as error:
            return type(error).__name__, str(error), "ClosedError"
    return seen_by(comm)


@MODES
def test_combines_in_another_order_are_noticed_by_all(fields: dict[str, Any]) -> None:
    """Same counts or not, no rank takes rows of one dispatch for those of the other."""
    started = time.monotonic()
    results = run_ranks(2, swapped_combines, fields)
    assert time.monotonic() - started < 40, "nobody waits for the time-out"
    all_alike(results, "rank 0 is in combine #3 of dispatch #1", "combine #3 of dispatch #2")


def different_subjects(world: World, rank: int, fields: dict[str, Any], kind: str) -> Any:
    comm = Rank(world, rank, timeout_s=60.0, **fields)
    x, ids, weights = inputs_of(comm, 1)
    out, first = comm.dispatch(x, ids, weights)
    again, second = comm.dispatch(x, ids, previous_handle=first)
    comm.settle()
    odd = rank == 1
    if kind == "cached dispatch":
        comm.dispatch(x, None, previous_handle=second if odd else first)
    elif kind == "combine of a cached dispatch":
        comm.combine(again.tokens.clone(), second if odd else first)
    elif odd:
        comm.combine(out.tokens.clone(), first)
    else:
        comm.dispatch(x, None, previous_handle=first)
    return seen_by(comm)


@MODES
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("cached dispatch", "cached dispatch #3 of dispatch #2"),
        ("combine of a cached dispatch", "combine #3 of dispatch #2"),
        ("two kinds", "rank 0 is in cached dispatch #3 of dispatch #1; rank 1 is in combine #3"),
    ],
)
def test_calls_of_other_dispatches_are_noticed(
    fields: dict[str, Any], kind: str, text: str
) -> None:
    all_alike(run_ranks(2, different_subjects, fields, kind), text)


def in_two_communicators(world: World, rank: int, fields: dict[str, Any], combines: bool) -> Any:
    first = Rank(world, rank, timeout_s=60.0, **fields)
    second = Rank(world, rank, share_with=first, timeout_s=60.0, **fields)
    if not combines:
        (second if rank else first).dispatch(*inputs_of(first, 1))
        return seen_by(first)
    sent = [comm.dispatch(*inputs_of(comm, 1)) for comm in (first, second)]
    out, handle = sent[rank]
    (second if rank else first).combine(out.tokens.clone(), handle)
    return seen_by(second)


@MODES
@pytest.mark.parametrize("combines", [True, False], ids=["combine", "dispatch"])
def test_communicators_of_one_arena_are_told_apart(fields: dict[str, Any], combines: bool) -> None:
    fields = {**fields, "static_shapes": True}
    all_alike(run_ranks(2, in_two_communicators, fields, combines), "of another communicator")


def static_disagreement(world: World, rank: int, layout: str) -> Any:
    first = Rank(world, rank, output_layout=layout, static_shapes=True, timeout_s=60.0)
    second = Rank(
        world, rank, share_with=first, output_layout=layout, static_shapes=True, timeout_s=60.0
    )
    comm = second if rank else first
    buffer = torch.full((2 * 32 * 2, 64), 7.0, dtype=torch.bfloat16, device=comm.device)
    comm.dispatch(*inputs_of(comm, 1), output_buffer=buffer)
    kind, text, again = seen_by(comm)
    comm.settle()
    return kind, again, "another communicator" in text, bool((buffer == 7.0).all())


@pytest.mark.parametrize("layout", ["flat", "token_major"])
def test_nothing_is_placed_after_disagreement(layout: str) -> None:
    for result in run_ranks(2, static_disagreement, layout):
        assert result == ("PeerError", "ClosedError", True, True)


# -- communicators with unequal numbers of experts in one arena -----------------------------------


def shared_arena(world: World, rank: int, experts: tuple[int, int], layout: str) -> Any:
    """Turns of two communicators; in each round another rank is late at another step."""
    big = Rank(world, rank, num_experts=max(experts), output_layout=layout, timeout_s=20.0)
    small = Rank(
        world,
        rank,
        share_with=big,
        num_experts=min(experts),
        output_layout=layout,
        timeout_s=20.0,
    )
    turns = (big, small) if experts[0] >= experts[1] else (small, big)
    right = all(turns_of_two(world, rank, turns, late, layout) for late in range(16))
    for comm in turns:
        comm.check_health()
    return right


def turns_of_two(world: World, rank: int, turns: tuple[Rank, Rank], late: int, layout: str) -> bool:
    """Sixteen calls of two communicators; rank `late % R` is late at step `late`."""
    first, second = turns
    # Tokens of rank r go to rank r and its neighbour only, so a transfer may end on ranks that
    # have nothing to do with the late one.
    right = True
    step = 0
    for round_ in range(2):
        for comm in (first, second, first, second):
            size = comm.config.num_experts // world.num_ranks
            seed = 10 * round_ + comm.config.num_experts
            x, _, weights = inputs_of(comm, seed)
            other = (rank + (round_ % 2)) % world.num_ranks * size + size - 1
            ids = torch.tensor([[rank * size, other]] * len(x)).to(x.device)
            if step == late and rank == late % world.num_ranks:
                time.sleep(0.05)
            out, handle = comm.dispatch(x, ids, weights)
            step += 1
            if step == late and rank == late % world.num_ranks:
                time.sleep(0.05)
            y = comm.combine(out.tokens.clone(), handle)
            step += 1
            right &= is_sum(comm, y, x, ids, weights)
    return right


@pytest.mark.parametrize("layout", ["flat", "token_major"])
@pytest.mark.parametrize("experts", [(64, 8), (8, 64), (60, 4), (16, 16)])
def test_shared_arenas_of_unequal_experts(experts: tuple[int, int], layout: str) -> None:
    """A head that comes late lands in its own row, whichever communicator is ahead."""
    assert all(run_ranks(4, shared_arena, experts, layout))


# -- a peer whose counts are garbage --------------------------------------------------------------


def garbage_counts(world: World, rank: int, layout: str, zero_copy: bool) -> Any:
    comm = Rank(
        world,
        rank,
        output_layout=layout,
        zero_copy=zero_copy,
        static_shapes=True,
        timeout_s=0.5,
    )
    engine: Any = comm._engine
    arena = engine.arena
    if rank == 1:  # says what a rank with a broken memory might, and stays away
        words = torch.full((arena.plan.count_words,), 1 << 30, dtype=torch.int32, device="cpu")
        head = [1, engine._wire.number, 1, 0, -1, 128, 8, 0, 0, 1, 1 << 20]
        words[: len(head)] = torch.tensor(head, dtype=torch.int32)
        at = arena.plan.offsets(2)
        memory = arena.buffer.buffers[0]
        row = at["kCountsAt"] + 4 * arena.plan.count_words
        memory[row : row + 4 * len(words)].copy_(words.view(torch.uint8))
        torch.cuda.current_stream().synchronize()
        memory[at["kReadyAt"] + 4 : at["kReadyAt"] + 8].view(torch.int32).fill_(1)
        memory[at["kCreditsAt"] + 4 : at["kCreditsAt"] + 8].view(torch.int32).fill_(1)
        world.meet()
        return "PeerTimeoutError"
    world.meet()
    comm.dispatch(*inputs_of(comm, 1))
    return seen_by(comm)[0]


@pytest.mark.parametrize(
    ("layout", "zero_copy"), [("flat", False), ("token_major", True), ("rank_major", False)]
)
def test_counts_of_a_peer_never_become_addresses_unchecked(layout: str, zero_copy: bool) -> None:
    assert run_ranks(2, garbage_counts, layout, zero_copy) == ["PeerTimeoutError"] * 2
    torch.cuda.synchronize()  # no illegal address


# -- abort ----------------------------------------------------------------------------------------


def aborting(world: World, rank: int, fields: dict[str, Any], waiting: str) -> Any:
    comm = Rank(world, rank, timeout_s=60.0, **fields)
    assert round_trip(comm, 1)
    x, ids, weights = inputs_of(comm, 2)
    out, handle = comm.dispatch(x, ids, weights)
    comm.settle()
    if rank == 1:
        time.sleep(0.2)
        comm.abort("ValueError: boom")
        comm.abort("once more")
        return seen_by(comm)
    started = time.monotonic()
    try:
        if waiting == "combine":
            comm.combine(out.tokens.clone(), handle)
        else:
            comm.dispatch(x, ids, weights)
    except ExpertlinkError as error:
        waited = time.monotonic() - started
        return type(error).__name__, str(error), waited
    kind, text, again = seen_by(comm)
    assert again == "ClosedError"
    waited = time.monotonic() - started
    comm.settle()
    comm.close()
    return kind, text, waited


@MODES
@pytest.mark.parametrize("waiting", ["combine", "dispatch"])
def test_abort_ends_the_waits_of_all(fields: dict[str, Any], waiting: str) -> None:
    zero, one, two = run_ranks(3, aborting, fields, waiting)
    assert one[0] == "ClosedError"
    assert "ValueError: boom" in one[1]
    for kind, text, waited in (zero, two):
        assert kind == "AbortError", text
        assert "rank 1 called abort: ValueError: boom" in text
        assert waited < 2.0


def leaving_with_an_exception(world: World, rank: int) -> Any:
    comm = Rank(world, rank, timeout_s=60.0, **HT)
    try:
        with comm:
            out, handle = comm.dispatch(*inputs_of(comm, 2))
            if rank == 0:
                raise ValueError("boom")
            comm.combine(out.tokens.clone(), handle)
            comm.settle()
            comm.check_health()
    except (ExpertlinkError, ValueError) as error:
        return type(error).__name__, str(error)
    return "", ""


def test_an_exception_that_leaves_the_block_aborts() -> None:
    results = run_ranks(2, leaving_with_an_exception)
    assert results[0] == ("ValueError", "boom")
    assert results[1][0] == "AbortError"
    assert "ValueError: boom" in results[1][1]


class _Interrupt(BaseException):
    """Like KeyboardInterrupt, in a thread."""


def interrupted(world: World, rank: int, monkeypatch: Any) -> Any:
    comm = Rank(world, rank, timeout_s=60.0, **HT)
    assert round_trip(comm, 1)
    if rank == 1:
        time.sleep(0.3)
        try:  # the other one has sent its rows; it will not combine
            out, handle = comm.dispatch(*inputs_of(comm, 2))
            comm.combine(out.tokens.clone(), handle)
        except ExpertlinkError as error:
            return type(error).__name__
        return seen_by(comm)[0]
    engine: Any = comm._engine
    started = time.monotonic()

    class Clock:
        monotonic = time.monotonic

        @staticmethod
        def sleep(_: float) -> None:
            if time.monotonic() - started > 0.05:
                raise _Interrupt

    monkeypatch.setattr("expertlink.engines.nvlink.watchdog.time", Clock)
    with pytest.raises(_Interrupt):
        comm.dispatch(*inputs_of(comm, 2))
    monkeypatch.undo()
    assert engine.watchdog.dead
    comm.settle()  # its kernels have ended as well
    return seen_by(comm)[0]


def test_an_interrupted_wait_ends_the_communicator_everywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = run_ranks(2, interrupted, monkeypatch)
    assert results == ["ClosedError", "AbortError"]


def test_results_are_right_where_all_agree() -> None:
    """What the tests above find wrong is right in calls that fit."""

    def job(world: World, rank: int, fields: dict[str, Any]) -> bool:
        comm = Rank(world, rank, **fields)
        x, ids, weights = inputs_of(comm, 1)
        out, handle = comm.dispatch(x, ids, weights)
        later, other = comm.dispatch(*inputs_of(comm, 2))
        rows = [received.tokens.clone() for received in (out, later)]
        second = comm.combine(rows[1], other)
        first = comm.combine(rows[0], handle)
        right = is_right(comm, 1, first) and is_right(comm, 2, second)
        comm.check_health()
        return right

    for fields in (
        HT,
        LL,
        {"output_layout": "flat"},
        {"output_layout": "rank_major", "mode": "ll"},
    ):
        assert all(run_ranks(3, job, fields)), fields
