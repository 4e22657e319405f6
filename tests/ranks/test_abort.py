"""A rank that aborts: the other ranks' waits end at once with its reason, and nothing hangs."""

from __future__ import annotations

from typing import Any

import pytest

from support import giving_up

RANKS, CULPRIT = 3, 1
OTHERS = [rank for rank in range(RANKS) if rank != CULPRIT]
SOON_S = 5.0  # half a second on an idle machine; the time-out of these jobs is a minute


@pytest.mark.parametrize("fields", [{}, {"check_inputs": False}])
@pytest.mark.parametrize("phase", ["combine", "backward", "dispatch"])
def test_an_error_in_the_experts_ends_the_waits_of_other_ranks(
    rank_pools, phase: str, fields: dict[str, Any]
) -> None:
    pool = rank_pools(RANKS)
    results = pool.run(giving_up.experts_raise, CULPRIT, phase, fields, timeout_s=60)
    text, later = results[CULPRIT]
    assert text == "boom"
    assert later[0] == "ClosedError"
    for rank in OTHERS:
        (kind, message, who, why, waited), again, health = results[rank]
        assert kind == "AbortError", message
        assert who == CULPRIT
        assert why == "ValueError: boom"
        assert f"rank {CULPRIT} aborted" in message
        assert "ValueError: boom" in message
        assert waited < SOON_S
        for later in (again, health):
            assert later[0] == "ClosedError"
            assert "ValueError: boom" in later[1]


@pytest.mark.parametrize("phase", ["dispatch", "initialize"])
def test_a_signal_ends_the_waits_of_all_ranks(rank_pools, phase: str) -> None:
    results = rank_pools(RANKS).run(giving_up.interrupted, CULPRIT, phase, timeout_s=60)
    waited, health = results[CULPRIT]
    assert waited < SOON_S
    if phase == "dispatch":
        assert health[0] == "ClosedError"
        assert "Stopped: by a signal" in health[1]
    for rank in OTHERS if phase == "initialize" else OTHERS[:1]:
        kind, message, who, why, waited = results[rank]
        assert kind == "AbortError", message
        assert who == CULPRIT
        assert why == "Stopped: by a signal"
        assert waited < SOON_S


@pytest.mark.parametrize("call", ["dispatch", "cached", "combine"])
def test_a_call_that_fails_on_one_rank_ends_on_all_ranks(rank_pools, call: str) -> None:
    results = rank_pools(RANKS).run(giving_up.fails_within, CULPRIT, call, timeout_s=60)
    assert results[CULPRIT][0] == ("MemoryError", "no room")
    assert results[CULPRIT][1][0] == "ClosedError"
    for rank in OTHERS:
        (kind, message, who, why, waited), again = results[rank]
        assert kind == "AbortError", message
        assert who == CULPRIT
        assert why == "MemoryError: no room"
        assert waited < SOON_S
        assert again[0] == "ClosedError"
