"""The drop-in over several hosts, which are pretended: they are found as engines find them."""

from __future__ import annotations

import pytest

from support.drop_in import decode, elastic, internode, normal, refusals, serving, training
from support.drop_in.inputs import Shapes
from support.drop_in.place import EVERYWHERE, Job, run_on

WHERE = pytest.mark.parametrize("where", EVERYWHERE)
TWO, FOUR, TWO_BY_TWO = (0, 1), (0, 1, 2, 3), (0, 0, 1, 1)
WOVEN, UNEVEN = (0, 1, 1, 0), (0, 0, 1)
SMALL = Shapes(tokens=9, hidden=128, experts=12, topk=3, fewer=2, masked=0.2)
DECODE = Shapes(tokens=4, hidden=512, experts=8, topk=3, fewer=1, masked=0.2)


@WHERE
@pytest.mark.parametrize("hosts", [TWO, TWO_BY_TWO, FOUR])
def test_internode(rank_pools, where: str, hosts: tuple[int, ...]) -> None:
    shapes = Shapes(tokens=24, hidden=256, experts=16, topk=4)
    assert all(run_on(rank_pools, where, hosts, internode.internode, shapes))


@WHERE
def test_any_shapes_on_one_buffer(rank_pools, where: str) -> None:
    shapes = [
        SMALL,
        Shapes(tokens=5, hidden=128, experts=12, topk=3, fewer=5, seed=1),  # T=0 on three ranks
        Shapes(tokens=100, hidden=128, experts=12, topk=3, fewer=30, seed=2),  # more than before
        Shapes(tokens=0, hidden=128, experts=12, topk=3, seed=3),  # no tokens at all
        Shapes(tokens=7, hidden=16, experts=32, topk=32, seed=4),
        Shapes(tokens=9, hidden=128, experts=12, topk=3, masked=1.0, seed=5),  # nobody chooses
    ]
    assert all(run_on(rank_pools, where, TWO_BY_TWO, normal.shapes_on_one_buffer, shapes))


@WHERE
@pytest.mark.parametrize(
    "job",
    [
        normal.sums_with_weights_and_biases,
        normal.long_lived_handles,
        normal.kinds_of_rows,
        normal.odd_ids,
    ],
    ids=lambda job: job.__name__,
)
def test_calls_beyond(rank_pools, where: str, job: Job) -> None:
    assert all(run_on(rank_pools, where, TWO_BY_TWO, job, SMALL))


@pytest.mark.parametrize("hosts", [WOVEN, UNEVEN])
def test_hosts_of_any_kind(rank_pools, hosts: tuple[int, ...]) -> None:
    """Ranks of a host need not be neighbours, and hosts may differ in size."""
    assert all(run_on(rank_pools, "cpu", hosts, normal.shapes_on_one_buffer, [SMALL]))
    assert all(run_on(rank_pools, "cpu", hosts, normal.sums_with_weights_and_biases, SMALL))
    assert all(run_on(rank_pools, "cpu", hosts, internode.domains))


@WHERE
@pytest.mark.parametrize("hosts", [TWO, TWO_BY_TWO])
def test_low_latency(rank_pools, where: str, hosts: tuple[int, ...]) -> None:
    assert all(run_on(rank_pools, where, hosts, decode.low_latency, DECODE))


@WHERE
@pytest.mark.parametrize("fields", [{}, {"allow_multiple_reduction": False}], ids=["many", "once"])
def test_elastic(rank_pools, where: str, fields: dict[str, bool]) -> None:
    shapes = Shapes(tokens=6, hidden=256, experts=8, topk=3, fewer=1, masked=0.3)
    assert all(run_on(rank_pools, where, TWO_BY_TWO, elastic.elastic, shapes, fields))


@pytest.mark.parametrize(
    "job",
    [training.slime, training.torchtitan, serving.vllm_high_throughput, serving.sglang],
    ids=lambda job: job.__name__,
)
def test_calls_of(rank_pools, job: Job) -> None:
    shapes = Shapes(tokens=12, hidden=512, experts=8, topk=3, fewer=1, masked=0.1)
    assert all(run_on(rank_pools, "cpu", TWO, job, shapes))


def test_refusals(rank_pools) -> None:
    assert all(run_on(rank_pools, "cpu", TWO, refusals.normal, SMALL, 1))


def test_what_several_hosts_do_not_have(rank_pools) -> None:
    for said in run_on(rank_pools, "cpu", TWO, internode.bad_calls):
        assert "peers can be masked on GPUs of one NVLink domain" in said[0]
        assert "a handle is expected" in said[1]


def test_groups_with_gloo_between_gpus(rank_pools) -> None:
    """As vLLM hands them over: on one host they will do, over several all ranks refuse them."""
    pool = rank_pools(2)
    assert pool.run(internode.gloo_between_gpus, (0, 0)) == [["cuda:0"]] * 2
    for said in pool.run(internode.gloo_between_gpus, TWO):
        assert len(said) == 3
        for text in said:
            assert text.startswith("CallError: group: its ranks are on 2 hosts")
            assert "pass one that has NCCL" in text


def test_constructors_that_meet_other_calls(rank_pools) -> None:
    for said in run_on(rank_pools, "cpu", TWO, internode.different_constructors):
        assert "rank 0: tokens; rank 1: buffer" in said
