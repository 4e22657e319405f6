"""Placements: proposals from loads, physical ids, and weights that move between placements."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertlink import ConfigurationError, InputError
from expertlink.engines.ranks.rebalance import plan_moves
from expertlink.placement import ExpertPlacement, propose_placement
from support import placements
from support.depth import deep
from support.small_calls import make


@st.composite
def drawn_placements(draw: Any) -> ExpertPlacement:
    """Any placement: ranks without experts, uneven slots and copies included."""
    experts, ranks = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    holders = [
        draw(st.sets(st.integers(0, ranks - 1), min_size=1, max_size=ranks)) for _ in range(experts)
    ]
    return ExpertPlacement(
        experts, tuple(tuple(e for e in range(experts) if r in holders[e]) for r in range(ranks))
    )


@st.composite
def drawn_proposals(draw: Any) -> dict[str, Any]:
    ranks, experts = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    load = st.one_of(st.integers(0, 5), st.floats(0, 1e6))
    return {
        "loads": draw(st.lists(load, min_size=experts, max_size=experts)),
        "num_ranks": ranks,
        "redundant": draw(st.integers(0, experts * (ranks - 1))),
        "domains": draw(st.none() | st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks)),
    }


# -- proposals ------------------------------------------------------------------------------------


@given(drawn_proposals())
def test_proposals_are_placements_with_even_slots(drawn: dict[str, Any]) -> None:
    placement = propose_placement(**drawn)
    experts = len(drawn["loads"])
    assert placement.num_experts == experts
    assert placement.num_physical == experts + drawn["redundant"]
    slots = placement.slots_per_rank
    assert max(slots) - min(slots) <= 1
    assert list(slots) == sorted(slots, reverse=True)
    # `ExpertPlacement` itself refuses experts without a rank, and copies that share one.
    assert placement == propose_placement(**drawn)
    as_tensor = torch.tensor(drawn["loads"], dtype=torch.float64)
    assert placement == propose_placement(**{**drawn, "loads": as_tensor})


@given(drawn_proposals())
def test_redundant_slots_go_where_a_copy_carries_most(drawn: dict[str, Any]) -> None:
    counts = list(map(len, propose_placement(**drawn).physical_ids))
    shares = [load / count for load, count in zip(drawn["loads"], counts, strict=True)]
    for expert, count in enumerate(counts):
        if count > 1:
            before = drawn["loads"][expert] / (count - 1)
            others = [s for e, s in enumerate(shares) if counts[e] < drawn["num_ranks"]]
            assert before >= max(others, default=0.0)


def busiest_over_mean(placement: ExpertPlacement, loads: list[float]) -> float:
    counts = list(map(len, placement.physical_ids))
    of_rank = [sum(loads[e] / counts[e] for e in own) for own in placement.experts_of_rank]
    return max(of_rank) / (sum(of_rank) / len(of_rank))


def test_skewed_loads_are_spread() -> None:
    loads = [1000 / (rank + 1) for rank in range(32)]
    before = busiest_over_mean(ExpertPlacement.even(32, 8), loads)
    alone = busiest_over_mean(propose_placement(loads, num_ranks=8), loads)
    copied = busiest_over_mean(propose_placement(loads, num_ranks=8, redundant=8), loads)
    assert before > 4
    best = loads[0] + sum(loads[-3:])  # the busiest expert, with the idlest beside it
    assert alone == pytest.approx(best / (sum(loads) / 8))
    assert copied < 1.05


def test_domains_are_balanced_before_ranks() -> None:
    loads = [8.0, 8.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    placement = propose_placement(loads, num_ranks=4, domains=[0, 0, 1, 1])
    of_rank = [sum(loads[e] for e in own) for own in placement.experts_of_rank]
    assert sum(of_rank[:2]) == sum(of_rank[2:]) == 11


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"loads": []}, InputError, "expected [E]"),
        ({"loads": torch.ones(2, 3)}, InputError, "shape [2, 3], expected [E]"),
        ({"loads": [1.0, float("nan")]}, InputError, "expert 1 has load nan"),
        ({"loads": [-1, 2]}, InputError, "expert 0 has load -1"),
        ({"num_ranks": 0}, ConfigurationError, "num_ranks=0"),
        ({"redundant": -1}, ConfigurationError, "redundant=-1 is not possible; accepted: 0 to 9"),
        ({"redundant": 10}, ConfigurationError, "redundant=10"),
        ({"domains": [0, 1]}, ConfigurationError, "domains has 2 entries; accepted: one per rank"),
    ],
)
def test_impossible_proposals_are_refused(
    change: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error) as refused:
        propose_placement(**{"loads": [3.0, 2.0, 1.0], "num_ranks": 4, **change})
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("experts", "ranks", "says"),
    [
        (3, [[0], [2]], "no rank holds expert 1 (1 of 3 experts have no rank)"),
        (2, [[0, 1], [1, 1]], "rank 1 is to hold expert 1 twice"),
        (2, [[0, 1], [2]], "rank 1 is to hold expert 2; experts are 0..1"),
        (2, [], "on 0 ranks"),
        (0, [[]], "of 0 experts"),
    ],
)
def test_impossible_placements_are_refused(experts: int, ranks: Any, says: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        ExpertPlacement(experts, ranks)
    assert says in str(refused.value)


def test_maps_of_communicators() -> None:
    placement = ExpertPlacement(3, ((2, 0), (0, 1)))
    assert placement.experts_of_rank == ((0, 2), (0, 1))
    assert placement.expert_map == (0, 0, 1, 1)
    assert placement.logical_ids == (0, 2, 0, 1)
    assert placement.physical_ids == ((0, 2), (3,), (1,))
    with pytest.raises(ConfigurationError, match="expert 0 has 2 copies"):
        placement.logical_map()
    assert ExpertPlacement.from_map([1, 0, 1], num_ranks=2).logical_map() == (1, 0, 1)
    with pytest.raises(ConfigurationError, match="expert 1 on rank 2; ranks are 0..1"):
        ExpertPlacement.from_map([1, 2], num_ranks=2)
    loads = torch.tensor([[1, 2, 3, 4]])
    assert placement.logical_loads(loads).tolist() == [[4, 4, 2]]
    with pytest.raises(InputError, match=r"shape \[3\], expected \[..., 4\]"):
        placement.logical_loads(torch.ones(3))


# -- physical ids ---------------------------------------------------------------------------------


@given(drawn_placements(), st.data())
def test_physical_ids_take_copies_in_turn(placement: ExpertPlacement, data: Any) -> None:
    first = data.draw(st.integers(0, 9))
    dtype = data.draw(st.sampled_from([torch.int64, torch.int32]))
    experts = placement.num_experts
    row = st.lists(st.integers(-2, experts + 1), min_size=2, max_size=2)
    rows = data.draw(st.lists(row, max_size=7))
    ids_TK = torch.tensor(rows, dtype=dtype).view(len(rows), 2)
    physical = placement.to_physical()
    given_first = torch.tensor(first) if data.draw(st.booleans()) else first
    found_TK = physical(ids_TK, first=given_first)
    assert found_TK.dtype == dtype
    for token, row in enumerate(rows):
        for choice, expert in enumerate(row):
            found = int(found_TK[token, choice])
            if 0 <= expert < experts:
                copies = placement.physical_ids[expert]
                assert found == copies[(token + first) % len(copies)]
            else:  # still no expert, or still refused
                assert found == expert if expert < 0 else found >= placement.num_physical


def test_tables_are_replaced_in_place() -> None:
    one, two = ExpertPlacement(2, ((0, 1), (0,))), ExpertPlacement(2, ((0, 1), (1,)))
    physical = one.to_physical()
    addresses = physical.table_ER.data_ptr(), physical.count_E.data_ptr()
    physical.set_(two)
    assert (physical.table_ER.data_ptr(), physical.count_E.data_ptr()) == addresses
    ids_TK = torch.tensor([[0, 1]] * 3)
    assert torch.equal(physical(ids_TK), two.to_physical()(ids_TK))
    with pytest.raises(ConfigurationError, match="cannot replace"):
        physical.set_(ExpertPlacement(2, ((0, 1), (0, 1))))


# -- moves ----------------------------------------------------------------------------------------


@given(drawn_placements(), st.data())
def test_moves_bring_every_expert_to_its_slots(old: ExpertPlacement, data: Any) -> None:
    """All ranks' plans together: what one sends the other expects, and nothing travels for free."""
    ranks, experts = old.num_ranks, old.num_experts
    redundant = data.draw(st.integers(0, experts * (ranks - 1)))
    loads = data.draw(st.lists(st.integers(0, 9), min_size=experts, max_size=experts))
    new = propose_placement(loads, num_ranks=ranks, redundant=redundant)
    plans = [plan_moves(old, new, rank) for rank in range(ranks)]
    for rank, plan in enumerate(plans):
        slots: list[int | None] = [None] * len(new.experts_of_rank[rank])
        for slot, of in plan.kept:
            slots[slot] = old.experts_of_rank[rank][of]
        assert not plan.sent[rank]
        assert not plan.received[rank]
        for source in range(ranks):
            sent = plans[source].sent[rank]
            for slot, of in zip(plan.received[source], sent, strict=True):
                assert slots[slot] is None
                slots[slot] = old.experts_of_rank[source][of]
                assert slots[slot] not in old.experts_of_rank[rank]
        assert tuple(slots) == new.experts_of_rank[rank]


def test_copies_take_turns_in_sending() -> None:
    old = ExpertPlacement(1, ((0,), (0,), (), ()))
    new = ExpertPlacement(1, ((0,), (0,), (0,), (0,)))
    assert [plan_moves(old, new, rank).sent for rank in (0, 1)] == [
        ((), (), (0,), ()),
        ((), (), (), (0,)),
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_moved_weights_are_the_right_ones(rank_pools, ranks: int) -> None:
    """Bit for bit, for every dtype, there and back, and into every rank."""
    drawn = [placements.drawn(seed, ranks) for seed in range(deep(4))]
    rank_pools(ranks).run(placements.moves, drawn, timeout_s=60)


@pytest.mark.parametrize("ranks", [1, 3])
def test_sums_over_copies(rank_pools, ranks: int) -> None:
    drawn = [placement for seed in range(deep(3)) for placement in placements.drawn(seed, ranks)]
    rank_pools(ranks).run(placements.sums, drawn, timeout_s=60)


@pytest.mark.gpu(2)
def test_sums_over_copies_over_nccl(rank_pools) -> None:
    drawn = [placement for seed in range(deep(3)) for placement in placements.drawn(seed, 2)]
    rank_pools(2, "cuda").run(placements.sums, drawn, timeout_s=120)


@pytest.mark.gpu(2)
def test_moved_weights_are_the_right_ones_over_nccl(rank_pools) -> None:
    drawn = [placements.drawn(seed, 2) for seed in range(deep(4))]
    for engine in ("collective", "nvlink"):
        rank_pools(2, "cuda").run(placements.moves, drawn, engine, timeout_s=120)


def test_differences_between_ranks_are_refused_on_all(rank_pools) -> None:
    says = rank_pools(2).run(placements.refusals, timeout_s=60)
    expected = {
        "shape": "InputError: the ranks differ in a rebalance; rows of tensors: ",
        "dtype": "InputError: the ranks differ in a rebalance; rows of tensors: ",
        "number": "InputError: the ranks differ in a rebalance; tensors: ",
        "new": "InputError: the ranks differ in a rebalance; new: ",
        "old": "InputError: the ranks differ in a rebalance; old: ",
        "other call": "PeerError: the ranks are not in the same call: rank 0 is in rebalance",
    }
    for rank, name in itertools.product(range(2), expected):
        assert says[rank][name].startswith(expected[name]), says[rank][name]
    local = {
        "slots": "tensors[0] has shape [3, 2], expected [2, ...]",
        "ranks": "new is a placement on 3 ranks, the group has 2",
        "experts": "old places 4 experts, new places 3",
        "device": "tensors[0] is on meta, expected cpu",
        "kind": "tensors[0] is a list, expected a tensor",
        "wrapper": "tensors[0] is a TwoTensor, which stands for other tensors",
        "no list": "tensors is a Tensor, expected a list of tensors",
        "no placement": "new is a tuple, expected an ExpertPlacement",
        "integers": "tensors[0] is torch.int32, expected floating point",
    }
    for name, text in local.items():
        assert says[0][name].startswith(f"InputError: {text}"), says[0][name]
        assert says[1][name].startswith("PeerError: "), says[1][name]
        assert text in says[1][name]


def test_the_first_call_may_be_a_rebalance() -> None:
    """It initializes, also where it does not have to ask where the experts are."""
    even = ExpertPlacement.even(6, 1)
    with contextlib.closing(make()) as comm:
        [moved] = comm.rebalance([torch.arange(6)], even, old=even)
    assert moved.tolist() == list(range(6))


def test_closed_communicators_move_nothing() -> None:
    comm = make()
    comm.close()
    with pytest.raises(Exception, match="is closed"):
        comm.rebalance([], ExpertPlacement.even(4, 1))
