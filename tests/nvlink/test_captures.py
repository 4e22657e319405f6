"""Captures of CUDA graphs: on some ranks only, repeated, with halves and on several streams."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any

import pytest
import torch

from expertlink import ExpertlinkError, InputError
from support.side_by_side import DEVICE, Rank, World, inputs_of, is_right, round_trip, run_ranks

pytestmark = pytest.mark.gpu

LL: dict[str, Any] = {"mode": "ll", "output_layout": "expert_major"}
STATIC: dict[str, Any] = {"output_layout": "token_major", "static_shapes": True}


def refused(call: Any) -> str:
    """The text of the `InputError` that a call raises."""
    try:
        call()
    except InputError as error:
        return str(error)
    return ""


# -- zero copy ------------------------------------------------------------------------------------


def captured_on_one(world: World, rank: int, layout: str, static: bool) -> Any:
    """One rank captures a zero-copy dispatch more than the other, which nobody replays."""
    comm = Rank(world, rank, output_layout=layout, zero_copy=True, static_shapes=static)
    x, ids, weights = inputs_of(comm, 1)
    out, handle = comm.dispatch(x, ids, weights)
    comm.combine(out.tokens.clone(), handle)
    comm.settle()
    kept: list[Any] = []
    if rank == 0:
        for _ in range(1 if static else 3):
            with comm.capture() as graph:
                kept.append((graph, comm.dispatch(x, None, previous_handle=handle)))
    right = [round_trip(comm, seed) for seed in range(2, 6)]
    out, again = comm.dispatch(x, ids, weights)
    later, cached = comm.dispatch(x, ids, previous_handle=again)
    right += [is_right(comm, 1, comm.combine(later.tokens, cached))]
    right += [is_right(comm, 1, comm.combine(out.tokens, again))]
    comm.check_health()
    return all(right)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("layout", ["token_major", "rank_major"])
def test_rows_go_to_the_pool_that_the_receiver_looks_at(layout: str, static: bool) -> None:
    assert all(run_ranks(3, captured_on_one, layout, static))


def views_between_captures(world: World, rank: int) -> Any:
    """A capture between two eager dispatches does not shorten the life of a view."""
    comm = Rank(world, rank, **STATIC, zero_copy=True)
    x, ids, weights = inputs_of(comm, 1)
    first, handle = comm.dispatch(x, ids, weights)
    kept = first.tokens.cpu().view(torch.uint8)  # also what no row has filled
    other = inputs_of(comm, 2)
    with comm.capture() as graph:
        captured = comm.dispatch(*other)
    comm.dispatch(*inputs_of(comm, 3))
    comm.settle()
    world.meet()
    same = torch.equal(kept, first.tokens.cpu().view(torch.uint8))
    del graph, captured, handle
    comm.check_health()
    return same


def test_a_view_lives_until_the_next_dispatch_but_one() -> None:
    assert all(run_ranks(2, views_between_captures))


# -- graphs ---------------------------------------------------------------------------------------


def unequal_captures(world: World, rank: int, fields: dict[str, Any], fails: bool) -> Any:
    """Ranks capture different numbers of graphs, one of them fails; all replay one of them."""
    comm = Rank(world, rank, **fields)
    x, ids, weights = (tensor.clone() for tensor in inputs_of(comm, 1))
    right = [round_trip(comm, 1)]
    world.meet()
    kept: list[Any] = []
    if fails and rank == 0:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        comm.dispatch(x, ids, weights)
        text = refused(lambda: comm.dispatch(x[:, :1], ids, weights))
        assert "input has shape" in text
        graph.capture_end()
        kept.append(graph)

    def capture() -> Any:
        with comm.capture() as graph:
            out, handle = comm.dispatch(x, ids, weights)
            y = comm.combine(out.tokens.clone(), handle)
        return graph, handle, y, out

    kept += [capture() for _ in range(1 + 2 * (rank == 1))]
    graph, handle, y, _ = kept[-1]
    world.meet()
    for seed in range(2, 6):
        for target, source in zip((x, ids, weights), inputs_of(comm, seed), strict=True):
            target.copy_(source)
        graph.replay()
        right.append(is_right(comm, seed, y))
        right.append(round_trip(comm, seed + 10))
    # A handle of the graph serves eager calls too: its routing is that of the last replay.
    graph.replay()
    out, again = comm.dispatch(x, None, previous_handle=handle)
    right.append(is_right(comm, 5, comm.combine(out.tokens.clone(), again)))
    comm.check_health()
    return all(right)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("fields", [STATIC, LL], ids=["ht", "ll"])
def test_ranks_that_capture_different_numbers_of_graphs(
    fields: dict[str, Any], fails: bool
) -> None:
    assert all(run_ranks(2, unequal_captures, fields, fails))


def branches(world: World, rank: int, fields: dict[str, Any]) -> Any:
    """Two calls on parallel branches of one capture."""
    comm = Rank(world, rank, **{**fields, "enable_overlap": True})
    side = torch.cuda.Stream(DEVICE)
    x, ids, weights = inputs_of(comm, 1)
    x2, ids2, weights2 = inputs_of(comm, 2)
    out, handle = comm.dispatch(x, ids, weights)
    rows = out.tokens.clone()
    comm.combine(rows, handle)
    world.meet()
    main = torch.cuda.current_stream()
    with comm.capture() as graph:
        _, handle = comm.dispatch(x, ids, weights)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            other, second = comm.dispatch(x2, ids2, weights2)
            copied = other.tokens.clone()
        y = comm.combine(rows, handle)
        main.wait_stream(side)
        z = comm.combine(copied, second)
    right = []
    for _ in range(20):
        graph.replay()
        right += [is_right(comm, 1, y), is_right(comm, 2, z)]
    comm.check_health()
    return all(right)


@pytest.mark.parametrize("fields", [STATIC, LL], ids=["ht", "ll"])
def test_calls_of_one_capture_are_ordered(fields: dict[str, Any]) -> None:
    assert all(run_ranks(2, branches, fields))


def uncached(world: World, rank: int) -> Any:
    comm = Rank(world, rank, output_layout="token_major", timeout_s=3.0)
    right = [round_trip(comm, 1)]
    inputs = inputs_of(comm, 1)
    comm.settle()
    started = time.monotonic()
    with comm.capture() as graph:
        text = refused(lambda: comm.dispatch(*inputs))
    waited = time.monotonic() - started
    del graph
    right.append(round_trip(comm, 2))
    comm.check_health()
    return all(right), text, waited


def test_a_dispatch_that_waits_for_counts_is_refused_in_a_capture() -> None:
    for right, text, waited in run_ranks(2, uncached):
        assert right
        assert "static_shapes=True" in text
        assert waited < 1.0


# -- halves ---------------------------------------------------------------------------------------


def eager_half_before(world: World, rank: int, whole: bool) -> Any:
    """An eager sending half, then a capture that would launch its receiving half."""
    comm = Rank(world, rank, **LL)
    right = [round_trip(comm, 1)]
    buffers = [comm.create_buffers() for _ in range(2)]
    x, ids, weights = inputs_of(comm, 2)
    out, handle, hook = comm.dispatch(
        x, ids, weights, output_buffer=buffers[0], return_recv_hook=True
    )
    with comm.capture() as graph:
        text = refused(
            hook if not whole else lambda: comm.dispatch(x, ids, weights, output_buffer=buffers[1])
        )
    out.tokens.zero_()
    hook()
    right.append(is_right(comm, 2, comm.combine(out.tokens.clone(), handle)))
    right.append(round_trip(comm, 3))
    comm.check_health()
    del graph
    return all(right), "before the capture begins" in text


@pytest.mark.parametrize("whole", [True, False])
def test_an_eager_half_is_not_received_in_a_capture(whole: bool) -> None:
    assert run_ranks(2, eager_half_before, whole) == [(True, True)] * 2


def captured_half(world: World, rank: int) -> Any:
    """A captured sending half concerns no eager call."""
    comm = Rank(world, rank, **LL)
    right = [round_trip(comm, 1)]
    x, ids, weights = (tensor.clone() for tensor in inputs_of(comm, 2))
    with comm.capture() as sends:
        out, handle, hook = comm.dispatch(x, ids, weights, return_recv_hook=True)
    right += [round_trip(comm, 3), round_trip(comm, 4)]
    text = refused(hook)
    with comm.capture() as receives:
        hook()
        y = comm.combine(out.tokens.clone(), handle)
    for _ in range(3):
        sends.replay()
        receives.replay()
        right += [is_right(comm, 2, y), round_trip(comm, 5)]
    comm.check_health()
    return all(right), "captured" in text


def test_a_captured_half_is_no_eager_calls_business() -> None:
    assert run_ranks(2, captured_half) == [(True, True)] * 2


def replay_between_halves(world: World, rank: int) -> Any:
    comm = Rank(world, rank, **LL, timeout_s=30.0)
    x, ids, weights = inputs_of(comm, 2)
    assert round_trip(comm, 1)
    with comm.capture() as graph:
        comm.dispatch(x, ids, weights)
    comm.dispatch(x, ids, weights, return_recv_hook=True)
    graph.replay()
    comm.settle()
    try:
        comm.check_health()
    except ExpertlinkError as error:
        return type(error).__name__, "between the halves of another one" in str(error)
    return "", False


def test_a_replay_between_halves_is_loud() -> None:
    assert run_ranks(2, replay_between_halves) == [("InputError", True)] * 2


def memory_of_halves(world: World, rank: int) -> Any:
    """What a call in halves used is free as soon as its hook has run, without a collector."""
    comm = Rank(world, rank, **LL)
    x, ids, weights = inputs_of(comm, 2)
    gc.collect()
    gc.disable()
    try:
        out, handle, hook = comm.dispatch(x, ids, weights, return_recv_hook=True)
        hook()
        rows = out.tokens.clone()
        seen = [weakref.ref(out.tokens), weakref.ref(rows)]
        y, combine_hook = comm.combine(rows, handle, return_recv_hook=True)
        combine_hook()
        right = is_right(comm, 2, y)
        del out, handle, rows
        freed = [ref() is None for ref in seen]
        del hook, combine_hook
    finally:
        gc.enable()
    comm.check_health()
    return right, freed


def test_halves_hold_nothing_after_their_hook() -> None:
    assert run_ranks(2, memory_of_halves) == [(True, [True, True])] * 2


def buffers_used_again(world: World, rank: int) -> Any:
    """A dispatch into buffers whose tables a pending half of a combine still reads."""
    comm = Rank(world, rank, **LL)
    buffers = comm.create_buffers()
    x, ids, weights = inputs_of(comm, 1)
    out, handle = comm.dispatch(x, ids, weights, output_buffer=buffers)
    y, hook = comm.combine(out.tokens.clone(), handle, return_recv_hook=True)
    other = inputs_of(comm, 2)
    out, handle, second = comm.dispatch(*other, output_buffer=buffers, return_recv_hook=True)
    hook()
    right = is_right(comm, 1, y)
    second()
    right &= is_right(comm, 2, comm.combine(out.tokens.clone(), handle))
    comm.check_health()
    return right


def test_buffers_are_not_overwritten_under_a_pending_half() -> None:
    assert all(run_ranks(3, buffers_used_again))
