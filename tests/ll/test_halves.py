"""Which half is launched when, and after which stream, eagerly and in captures; needs no GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from expertlink import InputError, MoECommunicatorConfig
from expertlink.engines.nvlink import arena as arena_module
from expertlink.engines.nvlink.arena import Arena
from expertlink.engines.nvlink.ht.arena import HtArena
from expertlink.engines.nvlink.ht.plan import HtPlan
from expertlink.engines.nvlink.ll import arena as ll_arena
from expertlink.engines.nvlink.ll.arena import LlArena
from expertlink.engines.nvlink.ll.halves import Half, Halves
from expertlink.engines.nvlink.ll.plan import LlPlan

EAGER = 0


class Calls:
    """Calls in halves of one arena; `capture` is where they are made, `launched` what was."""

    def __init__(self) -> None:
        self.halves = Halves()
        self.capture = EAGER
        self.launched: list[tuple[str, int]] = []

    def send(self, name: str, *, tables: object = None, needs: tuple[Any, ...] = ()) -> Half:
        self.halves.finish(self.capture, 1)
        half = Half(
            self.halves,
            capture=self.capture,
            tables=tables,
            launch=lambda: self.launched.append((name, self.capture)),
            follow=lambda: None,
            capture_now=lambda: self.capture,
            needs=needs,
        )
        self.halves.add(half)
        return half

    def whole(self, name: str) -> None:
        self.halves.finish(self.capture)
        self.launched.append((name, self.capture))


@pytest.fixture
def calls() -> Calls:
    return Calls()


def test_halves_are_received_in_the_order_of_their_calls(calls: Calls) -> None:
    first, second = calls.send("first"), calls.send("second")
    second()
    second()
    first()
    assert calls.launched == [("first", EAGER), ("second", EAGER)]


def test_a_third_call_and_a_whole_one_receive_what_is_left(calls: Calls) -> None:
    hooks = [calls.send(name) for name in ("first", "second", "third")]
    assert calls.launched == [("first", EAGER)]
    calls.whole("whole")
    assert [name for name, _ in calls.launched] == ["first", "second", "third", "whole"]
    for hook in hooks:
        hook()
    assert len(calls.launched) == 4


def test_an_eager_half_is_refused_in_a_capture(calls: Calls) -> None:
    hook = calls.send("eager")
    calls.capture = 7
    for call in (hook, lambda: calls.whole("captured"), lambda: calls.send("captured half")):
        with pytest.raises(InputError, match="before the capture begins"):
            call()
    calls.capture = EAGER
    assert calls.launched == []
    hook()
    assert calls.launched == [("eager", EAGER)]


def test_a_captured_half_is_refused_eagerly_and_not_received_by_eager_calls(calls: Calls) -> None:
    calls.capture = 7
    hook = calls.send("captured")
    calls.capture = EAGER
    calls.whole("eager")
    with pytest.raises(InputError, match="was captured"):
        hook()
    assert calls.launched == [("eager", EAGER)]
    calls.capture = 8  # a graph of its own for the receiving half
    hook()
    assert calls.launched == [("eager", EAGER), ("captured", 8)]


def test_captures_leave_each_others_halves_alone(calls: Calls) -> None:
    calls.capture = 7
    first, second = calls.send("first"), calls.send("second")
    calls.capture = 8
    calls.whole("other")
    second()  # also what comes before it in its own capture
    first()
    assert calls.launched == [("other", 8), ("first", 8), ("second", 8)]


def test_a_failed_capture_leaves_nothing_to_receive(calls: Calls) -> None:
    calls.capture = 7
    calls.send("lost")
    calls.capture = 8
    calls.send("again")()
    assert calls.launched == [("again", 8)]


def test_what_a_call_needs_lives_until_its_half_is_launched(calls: Calls) -> None:
    rows = torch.empty(3)
    seen = weakref.ref(rows)
    hook = calls.send("call", needs=(rows,))
    del rows
    assert seen() is not None
    hook()
    assert seen() is None, "without a collector of cycles"


def test_tables_are_read_before_they_are_used_again(calls: Calls) -> None:
    ours, theirs = object(), object()
    calls.send("combine", tables=ours)
    calls.halves.finish_those_of(theirs)
    assert calls.launched == []
    calls.halves.finish_those_of(ours)
    assert calls.launched == [("combine", EAGER)]


# -- streams --------------------------------------------------------------------------------------


class Stream:
    """A stream that notes what it waits for."""

    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle
        self.waits: list[int] = []
        self.capture = EAGER

    def wait_stream(self, other: Stream) -> None:
        assert other.capture == self.capture, "waiting for another capture would end this one"
        self.waits.append(other.cuda_stream)


@pytest.fixture(params=["ht", "ll"])
def called(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`called(stream)`: a call of an arena is made on that stream."""
    now: list[Stream] = []
    known: dict[int, Stream] = {}
    for module in (arena_module, ll_arena):
        monkeypatch.setattr(module, "capture_of", lambda handle: known[handle].capture)
    monkeypatch.setattr(ll_arena, "is_capturing", lambda: now[-1].capture != EAGER)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: now[-1])
    low = request.param == "ll"
    arena: Any = LlArena.__new__(LlArena) if low else Arena.__new__(Arena)
    arena.device, arena._last, arena._captured = torch.device("cuda", 0), None, None
    arena._last_raw, arena._current = None, lambda: now[-1].cuda_stream

    def call(stream: Stream) -> None:
        known[stream.cuda_stream] = stream
        now.append(stream)
        if low:
            arena.follow()
        else:
            arena.enter(stream, capturing=stream.capture != EAGER)

    return call


def test_eager_calls_follow_each_other(called: Callable[..., None]) -> None:
    one, two = Stream(1), Stream(2)
    for stream in (one, one, two, two, one):
        called(stream)
    assert (one.waits, two.waits) == ([2], [1])


@pytest.mark.parametrize("begins_on_the_eager_one", [False, True])
def test_calls_of_a_capture_follow_each_other(
    called: Callable[..., None], begins_on_the_eager_one: bool
) -> None:
    eager, side = Stream(1), Stream(2)
    main = eager if begins_on_the_eager_one else Stream(3)
    called(eager)
    main.capture = side.capture = 7
    for stream in (main, side, side, main):
        called(stream)
    assert side.waits == [main.cuda_stream]
    assert main.waits == [2]
    main.capture = side.capture = EAGER
    # An eager call follows the last eager one, whatever was captured between them.
    called(side)
    assert side.waits == [main.cuda_stream, 1]


def test_captures_do_not_follow_each_other(called: Callable[..., None]) -> None:
    first, second = Stream(1), Stream(2)
    first.capture = 7
    called(first)
    first.capture, second.capture = EAGER, 8
    called(second)
    assert (first.waits, second.waits) == ([], [])
    first.capture = 8
    called(first)
    assert first.waits == [2]


def test_pools_of_captures_take_turns_apart() -> None:
    arena: Any = HtArena.__new__(HtArena)
    arena._pool = arena._captured_pool = 0
    arena.plan = HtPlan(
        flags=0, counts=0, count_words=0, metadata=0, rows=0, pool=64, max_tokens=1, stride=1
    )
    eager = [arena.next_pool(capturing=False)[0]]
    captured = [arena.next_pool(capturing=True)[0] for _ in range(3)]
    eager += [arena.next_pool(capturing=False)[0] for _ in range(2)]
    assert eager == [1, 0, 1], "a capture does not shorten the life of a view"
    assert captured == [1, 0, 1]


# -- who may share memory -------------------------------------------------------------------------


def latency_plan(**fields: Any) -> LlPlan:
    usual: dict[str, Any] = {
        "num_experts": 296,
        "hidden_size": 256,
        "topk": 2,
        "max_tokens_per_rank": 8,
        "mode": "ll",
        "device": "cpu",
    }
    return LlPlan.of(MoECommunicatorConfig(**{**usual, **fields}), 4)


@pytest.mark.parametrize(
    ("fields", "fits"),
    [
        ({}, True),
        ({"num_experts": 8}, True),
        ({"num_experts": 512}, False),
        ({"hidden_size": 128}, False),
        ({"topk": 32}, False),
        ({"max_tokens_per_rank": 4}, False),
        ({"zero_copy": True, "output_layout": "token_major"}, False),
    ],
)
def test_high_throughput_memory_is_shared_by_what_fits(fields: dict[str, Any], fits: bool) -> None:
    """Fewer experts use the first words of each count row; staged rows keep their one writer."""
    plans = [
        HtPlan.of(
            MoECommunicatorConfig(
                **{
                    "num_experts": 64,
                    "hidden_size": 256,
                    "topk": 2,
                    "max_tokens_per_rank": 8,
                    "device": "cpu",
                    **changed,
                }
            ),
            4,
        )
        for changed in ({}, fields)
    ]
    assert plans[0].holds(plans[1]) is fits
    strides = [plan.offsets(4)["kCountStride"] for plan in plans]
    assert not fits or strides[0] >= strides[1]


def test_exact_sums_that_can_do_without_a_rank_have_slots_for_every_rank() -> None:
    exact = latency_plan(combine_precision="exact")
    masks = latency_plan(combine_precision="exact", mask_lost_peers=True)
    assert (exact.slots, exact.rank_slots) == (4 * 8, 8)
    assert (masks.slots, masks.rank_slots) == (4 * 8 * 2, 8 * 2)
    assert not exact.holds(masks)
    assert not masks.holds(exact)
    assert latency_plan().holds(latency_plan(mask_lost_peers=True))


@pytest.mark.parametrize(
    "fields", [{"num_experts": 294}, {"combine_precision": "exact"}, {"topk": 3}]
)
def test_low_latency_memory_is_shared_by_equals_only(fields: dict[str, Any]) -> None:
    """Sizes are rounded, so equal sizes do not say that words lie in the same places."""
    assert latency_plan().holds(latency_plan())
    assert not latency_plan().holds(latency_plan(**fields))
