"""Ranks that fail: every other rank names them within a bound, and goes on if it can."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from expertlink.launch import RankPool
from support import faults

RANKS, CULPRIT = 3, 1
OTHERS = [rank for rank in range(RANKS) if rank != CULPRIT]


def judge(results: list[Any], *, own: str, text: str) -> None:
    """The culprit raised its own error, the others name it and repeat it; all go on."""
    kind, message = results[CULPRIT][0]
    assert kind == own, message
    assert text in message
    for rank in OTHERS:
        kind, message = results[rank][0]
        assert kind == "PeerError", message
        assert f"rank {CULPRIT} refused it: {own}" in message
        assert text in message
    assert all(recovered for _, recovered in results)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"input": torch.randn(faults.T, 3)}, "input has shape (4, 3)"),
        ({"topk_ids": torch.full((4, 2), 99)}, "topk_ids[0]=[99, 99]"),
        ({"topk_ids": torch.full((4, 2), 5)}, "chosen twice"),
        ({"weights": torch.ones(4, 2).half()}, "weights has dtype torch.float16"),
    ],
)
def test_one_rank_refuses_its_dispatch(rank_pools, fields: dict[str, Any], text: str) -> None:
    results = rank_pools(RANKS).run(faults.refused_dispatch, CULPRIT, fields, timeout_s=60)
    judge(results, own="InputError", text=text)


@pytest.mark.parametrize(
    ("kind", "own", "text"),
    [
        ("rows", "InputError", "expert_output has shape"),
        ("dtype", "InputError", "torch.float16"),
        ("foreign", "HandleError", "another communicator"),
    ],
)
def test_one_rank_refuses_its_combine(rank_pools, kind: str, own: str, text: str) -> None:
    results = rank_pools(RANKS).run(faults.refused_combine, CULPRIT, kind, timeout_s=60)
    judge(results, own=own, text=text)


@pytest.mark.parametrize("kind", ["plain", "later", "mixed"])
@pytest.mark.parametrize(
    ("counts", "rank"), [((4, 5), 1), ((5, 9, 0), 1), ((7, 3, 7), 0), ((1, 6, 9), 2)]
)
def test_too_many_tokens_are_one_error_on_all_ranks(
    rank_pools, counts: tuple[int, ...], rank: int, kind: str
) -> None:
    """With the largest number, so that all can make the same larger communicator."""
    most = counts[rank]
    results = rank_pools(len(counts)).run(faults.too_many_tokens, counts, kind, {}, timeout_s=60)
    text = f"rank {rank}: input has {most} tokens; max_tokens_per_rank=4"
    assert results == [((text, rank, most, 4), True, True)] * len(counts)


def test_one_rank_changes_its_routing(rank_pools) -> None:
    results = rank_pools(RANKS).run(faults.changed_routing, CULPRIT, timeout_s=60)
    judge(results, own="RoutingChangedError", text="topk_ids[0]=[-1, -1]")


def test_an_overflow_raises_the_same_error_on_all_ranks(rank_pools) -> None:
    results = rank_pools(RANKS).run(faults.small_buffer, CULPRIT, timeout_s=60)
    assert len({seen for seen, _ in results}) == 1
    kind, message = results[0][0]
    assert kind == "CapacityError"
    assert f"rank {CULPRIT} would receive" in message
    assert "room for 1" in message
    assert all(recovered for _, recovered in results)


def test_ranks_in_different_calls_are_named(rank_pools) -> None:
    results = rank_pools(RANKS).run(faults.different_calls, CULPRIT, timeout_s=60)
    for seen, recovered in results:
        assert seen[0] == "PeerError"
        assert "rank 0 is in combine #2 of dispatch #1; rank 1 is in dispatch #2" in seen[1]
        assert recovered


def test_weights_on_some_ranks_only_are_refused(rank_pools) -> None:
    results = rank_pools(RANKS).run(faults.missing_weights, CULPRIT, timeout_s=60)
    for seen, recovered in results:
        assert seen[0] == "InputError"
        assert "16 on ranks 0, 2, 8 on rank 1" in seen[1]
        assert recovered


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"num_experts": 10}, "num_experts: 8 on ranks 0, 2, 10 on rank 1"),
        ({"topk": 3}, "topk: 2 on ranks 0, 2, 3 on rank 1"),
        ({"dtype": torch.float64}, "dtype: torch.float32 on ranks 0, 2, torch.float64 on rank 1"),
        ({"output_layout": "token_major"}, "output_layout: flat on ranks 0, 2"),
        ({"quantization": "e4m3_pow2"}, "quantization: None on ranks 0, 2, e4m3_pow2 on rank 1"),
        ({"expert_map": [0] * 8}, "expert_map"),
        ({"check_inputs": False}, "check_inputs: True on ranks 0, 2, False on rank 1"),
        ({"combine_precision": "exact"}, "combine_precision: wire on ranks 0, 2, exact on rank 1"),
        ({"scale_order": "column_major"}, "scale_order: row_major on ranks 0, 2, column_major on"),
        ({"domains": [4, 4, 2]}, "domains: None on ranks 0, 2, [0, 0, 1] on rank 1"),
    ],
)
def test_a_disagreement_names_the_field_and_the_ranks(
    rank_pools, fields: dict[str, Any], text: str
) -> None:
    results = rank_pools(RANKS).run(faults.disagreement, CULPRIT, fields, timeout_s=60)
    assert len(set(results)) == 1, "all ranks raise the same"
    kind, message = results[0]
    assert kind == "ConfigurationError"
    assert text in message


def test_all_ranks_must_share_with_the_same_communicator(rank_pools) -> None:
    results = rank_pools(RANKS).run(faults.sharing, CULPRIT, timeout_s=60)
    text = "ranks disagree about the configuration; share_with: 7 on ranks 0, 2, 8 on rank 1"
    assert set(results) == {("ConfigurationError", text)}


def test_blocks_of_experts_may_differ_in_size_and_order(rank_pools) -> None:
    pool = rank_pools(RANKS)
    sizes = [{"num_local_experts": n} for n in (5, 0, 3)]
    results = pool.run(faults.blocks, sizes, timeout_s=60)
    assert [experts for experts, _ in results] == [[0, 1, 2, 3, 4], [], [5, 6, 7]]
    assert all(worked for _, worked in results)

    starts = [(6, 2), (0, 3), (3, 3)]
    given = [{"local_expert_start": s, "num_local_experts": n} for s, n in starts]
    results = pool.run(faults.blocks, given, timeout_s=60)
    assert [experts for experts, _ in results] == [[6, 7], [0, 1, 2], [3, 4, 5]]

    overlapping = [{"local_expert_start": s, "num_local_experts": 3} for s in (0, 2, 5)]
    results = pool.run(faults.blocks, overlapping, timeout_s=60)
    assert set(results) == {results[0]}
    assert "expert 2 is local to ranks 0 and 1" in results[0][1]


@pytest.mark.parametrize("how", ["stays away", "dies"])
@pytest.mark.parametrize("phase", ["initialize", "dispatch", "combine"])
def test_a_missing_rank_is_named_in_time(phase: str, how: str) -> None:
    # A pool of its own: a process group that lost a rank is of no use to other tests.
    with RankPool(num_ranks=RANKS) as pool:
        results = pool.run(faults.absent, CULPRIT, phase, how, timeout_s=30, return_exceptions=True)
    for rank in OTHERS:
        seen = results[rank]
        assert isinstance(seen, tuple), seen
        kind, message, missing, waited, again = seen
        assert kind == "PeerTimeoutError", message
        assert missing == (CULPRIT,), message
        assert f"missing: rank {CULPRIT}" in message
        assert f"rank {rank} waited" in message
        assert phase in message
        if phase != "initialize":
            assert ("has exited" if how == "dies" else "is alive") in message
        assert waited < 2.0 + 2.0 + 3.0, "time-out, then the search for the missing, then slack"
        assert again[0] == "ClosedError", again


def test_messages_tell_communicators_apart(rank_pools) -> None:
    results = rank_pools(RANKS).run(faults.other_communicator, CULPRIT, timeout_s=60)
    for rank, (kind, message) in enumerate(results):
        assert kind == "PeerError", message
        odd = "rank 1" if rank != CULPRIT else "rank 0"
        assert f"{odd} is in dispatch #1 of another communicator" in message


CHECKS = pytest.mark.parametrize("fields", [{}, {"check_inputs": False}])


@CHECKS
@pytest.mark.parametrize("kind", ["combine", "cached"])
def test_ranks_that_continue_different_dispatches_are_named(
    rank_pools, kind: str, fields: dict[str, Any]
) -> None:
    results = rank_pools(RANKS).run(faults.mixed_up, CULPRIT, kind, fields, timeout_s=60)
    title = {"combine": "combine", "cached": "cached dispatch"}[kind]
    expected = (
        f"the ranks are not in the same call: rank 0 is in {title} #3 of dispatch #1; "
        f"rank 1 is in {title} #3 of dispatch #2; rank 2 is in {title} #3 of dispatch #1. "
    )
    for (error, message), recovered in results:
        assert error == "PeerError", message
        assert message.startswith(expected), message
        assert recovered


@CHECKS
def test_ranks_whose_backward_follows_different_dispatches_are_named(
    rank_pools, fields: dict[str, Any]
) -> None:
    results = rank_pools(RANKS).run(faults.mixed_up_backward, CULPRIT, fields, timeout_s=60)
    assert len({seen for seen, _ in results}) == 1, "all ranks raise the same"
    for (error, message), recovered in results:
        assert error == "PeerError", message
        assert "rank 0 is in cached dispatch #5 of dispatch #1; rank 1 is in cached" in message
        assert recovered


@pytest.mark.parametrize(
    "fields",
    [
        {"output_layout": "flat", "expert_alignment": 4},
        {"output_layout": "token_major"},
        {"output_layout": "rank_major"},
        {"output_layout": "expert_major"},
        {"output_layout": "flat", "combine_precision": "exact"},
    ],
)
def test_the_default_device_has_no_effect(rank_pools, fields: dict[str, Any]) -> None:
    assert all(rank_pools(RANKS).run(faults.other_default_device, fields, timeout_s=60))


def test_messages_tell_communicators_of_different_size_apart(rank_pools) -> None:
    results = rank_pools(RANKS).run(faults.other_experts, CULPRIT, timeout_s=60)
    for (error, message), recovered in results:
        assert error == "PeerError", message
        assert "of another communicator" in message
        assert recovered


def test_a_missed_handshake_can_be_repeated() -> None:
    with RankPool(num_ranks=RANKS) as pool:
        results = pool.run(faults.late_handshake, CULPRIT, timeout_s=60)
    assert all(worked for _, worked in results)
    for rank in OTHERS:
        kind, message = results[rank][0]
        assert kind == "PeerTimeoutError"
        assert f"missing: rank {CULPRIT}" in message


def test_after_a_failed_wait_every_call_is_refused() -> None:
    with RankPool(num_ranks=RANKS) as pool:
        results = pool.run(faults.failed_wait, CULPRIT, timeout_s=60)
    for rank in OTHERS:
        assert results[rank] == ("PeerTimeoutError", *["ClosedError"] * 3)


def test_ranks_one_call_apart_are_brought_back_into_step(rank_pools) -> None:
    results = rank_pools(RANKS).run(faults.one_call_ahead, CULPRIT, timeout_s=60)
    for seen, recovered in results:
        assert seen[0] == "PeerError"
        assert "rank 0 is in dispatch #3; rank 1 is in dispatch #4" in seen[1]
        assert recovered
