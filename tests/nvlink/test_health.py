"""Overflow, masks and memory: what ranks learn alike, and what outlives a call."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import torch

from expertlink import CapacityError, HandleError
from expertlink.engines.nvlink import watchdog
from support.side_by_side import Rank, World, inputs_of, is_right, round_trip, run_ranks

pytestmark = pytest.mark.gpu

STATIC: dict[str, Any] = {
    "output_layout": "token_major",
    "static_shapes": True,
    "max_recv_tokens_per_rank": 40,
}
MODES = pytest.mark.parametrize("mode", ["ht", "ll"])


def overflowing(world: World, rank: int, mode: str) -> Any:
    """Rows for rank 1 find no room there; every rank runs ahead as far as it likes."""
    comm = Rank(world, rank, mode=mode, **STATIC)
    assert comm._placement is not None
    experts = comm._placement.experts_of_rank[1][:2]
    x, _, weights = inputs_of(comm, 1)
    full = torch.tensor([experts] * len(x)).to(x.device)
    for _ in range(1 + 3 * rank):  # no call raises, however far ahead this rank is
        out, handle = comm.dispatch(x, full, weights)
        comm.combine(out.tokens.clone(), handle)
        if rank == 0:
            comm.settle()
    for _ in range(9 - 3 * rank):
        out, handle = comm.dispatch(x, full, weights)
        comm.combine(out.tokens.clone(), handle)
    comm.settle()
    try:
        comm.check_health()
    except CapacityError as error:
        seen = (str(error), error.rank, error.rows, error.capacity)
    else:
        seen = ("", -1, 0, 0)
    comm.check_health()
    few = [round_trip(comm, seed, tokens=8) for seed in (2, 3)]
    comm.check_health()
    return seen, all(few)


@MODES
def test_overflow_is_raised_alike_by_check_health(
    mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "expertlink"):
        results = run_ranks(3, overflowing, mode)
    assert len(set(results)) == 1, results
    (text, rank, rows, capacity), works = results[0]
    assert (rank, rows, capacity) == (1, 96, 40), text
    assert "dropped" in text
    assert works
    assert "check_health() raises this" in caplog.text, "calls tell of it without raising"


def dropped_gradients(world: World, rank: int, layout: str) -> Any:
    """Weight gradients of rows that found no room are zero, not what lies behind the gradients."""
    fields = {**STATIC, "output_layout": layout, "mode": "ll", "max_recv_tokens_per_rank": 8}
    comm = Rank(world, rank, **fields)
    x, ids, weights = inputs_of(comm, 1)
    out, handle = comm.dispatch(x, ids, weights)
    room = out.tokens.shape[0]
    memory = torch.full((64 * room, 2), 7.0)
    memory[:room] = 1.0
    memory = memory.to(x.device)
    engine: Any = comm._engine
    grads = engine.weight_grads(handle.state, memory[:room])
    comm.settle()
    grads = grads.cpu()
    return bool(((grads == 0) | (grads == 1)).all()), bool((grads == 1).any())


def test_gradients_of_dropped_rows_are_zero() -> None:
    results = run_ranks(2, dropped_gradients, "token_major")
    assert all(only for only, _ in results), "a gradient is that of a row or zero"
    assert any(some for _, some in results), "there were rows with room"


def stale_after_clear(world: World, rank: int, cached: bool) -> Any:
    comm = Rank(world, rank, mode="ll", output_layout="expert_major", mask_lost_peers=True)
    x, ids, weights = inputs_of(comm, 1)
    out, handle = comm.dispatch(x, ids, weights)
    comm.settle()
    comm.clear_mask()
    text = ""
    try:
        if cached:
            comm.dispatch(x, ids, previous_handle=handle)
        else:
            comm.combine(out.tokens.clone(), handle)
    except HandleError as error:
        text = str(error)
    world.meet()
    right = round_trip(comm, 2)
    comm.check_health()
    return "clear_mask()" in text, right


@pytest.mark.parametrize("cached", [False, True])
def test_handles_from_before_clear_mask_are_refused(cached: bool) -> None:
    assert run_ranks(2, stale_after_clear, cached) == [(True, True)] * 2


def abandoned(world: World, rank: int) -> int:
    comm = Rank(world, rank, output_layout="token_major")
    assert round_trip(comm, 1)
    engine: Any = comm._engine
    return engine.watchdog.address


def closed(world: World, rank: int) -> int:
    comm = Rank(world, rank, output_layout="token_major")
    assert round_trip(comm, 1)
    engine: Any = comm._engine
    address = engine.watchdog.address
    comm.close()
    return address


def test_words_of_kernels_outlive_a_communicator_that_nobody_closed() -> None:
    left = run_ranks(2, abandoned)
    gc.collect()
    kept = {words.data_ptr() for words in watchdog._abandoned}
    assert kept >= set(left)
    freed = run_ranks(2, closed)
    gc.collect()
    assert not {words.data_ptr() for words in watchdog._abandoned} & set(freed)


def dropped(world: World, rank: int) -> Any:
    comm = Rank(world, rank, mode="ll", output_layout="expert_major")
    assert round_trip(comm, 1)
    engine: Any = comm._engine
    arena = weakref.ref(engine.arena)
    world.meet()
    gc.disable()
    try:
        del comm, engine
        return arena() is None
    finally:
        gc.enable()


def test_memory_goes_with_a_communicator_that_is_dropped() -> None:
    assert all(run_ranks(2, dropped)), "without a collector of cycles"


def three_calls(world: World, rank: int) -> Any:
    """After an overflow that nobody asked about, later results are right."""
    comm = Rank(world, rank, **STATIC)
    x, _, weights = inputs_of(comm, 1)
    ids = torch.tensor([[0, 1]] * len(x)).to(x.device)
    out, handle = comm.dispatch(x, ids, weights)
    comm.combine(out.tokens.clone(), handle)
    x, ids, weights = inputs_of(comm, 2, tokens=10)
    out, handle = comm.dispatch(x, ids, weights)
    return is_right(comm, 2, comm.combine(out.tokens.clone(), handle), tokens=10)


def test_calls_go_on_after_an_overflow() -> None:
    assert all(run_ranks(3, three_calls))
