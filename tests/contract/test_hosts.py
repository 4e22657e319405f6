"""Several hosts: one more rounding, for any partition of the ranks, as the contract says."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contract import cases

from expertlink import DispatchLayout
from support import training
from support.depth import deep
from support.jobs import contract, rounding_of_the_combiner
from support.oracle import Case, combined_of, input_grads

LAYOUTS = pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)


@st.composite
def cases_on_hosts(draw: st.DrawFn, ranks: int, layout: DispatchLayout | None = None) -> Case:
    """Any partition of the ranks: unequal hosts, ranks that are no neighbours, any numbers."""
    if layout is None:
        layout = draw(st.sampled_from(list(DispatchLayout)))
    case = draw(cases(ranks, layout))
    domains = draw(st.lists(st.integers(-1, ranks), min_size=ranks, max_size=ranks))
    return dataclasses.replace(case, domains=tuple(domains))


@LAYOUTS
def test_bits_equal_the_oracle(rank_pools, layout: DispatchLayout) -> None:
    pool = rank_pools(4)

    @settings(max_examples=deep(4))
    @given(st.lists(cases_on_hosts(4, layout), min_size=1, max_size=4))
    def check(drawn: list[Case]) -> None:
        assert pool.run(contract, drawn, timeout_s=120) == [len(drawn)] * 4

    check()


def test_backward_of_dispatch_rounds_by_host(rank_pools) -> None:
    pool = rank_pools(4)

    @settings(max_examples=deep(4))
    @given(st.lists(cases_on_hosts(4), min_size=4, max_size=8))
    def check(drawn: list[Case]) -> None:
        pool.run(training.dispatch_backward_bits, drawn, timeout_s=120)

    check()


@settings(max_examples=deep(30))
@given(cases_on_hosts(4), st.sampled_from([(0, 0, 0, 0), (7, 7, 7, 7)]))
def test_one_host_has_the_bits_of_none(case: Case, one: tuple[int, ...]) -> None:
    """Of the oracle, by which engines are judged."""
    flat = dataclasses.replace(case, domains=None)
    for rank in range(4):
        for of in (combined_of, input_grads):
            assert torch.equal(of(dataclasses.replace(case, domains=one), rank), of(flat, rank))


@pytest.mark.parametrize("precision", ["wire", "exact"])
def test_hosts_change_bits_of_sums_per_rank_only(rank_pools, precision: str) -> None:
    """An engine that ignored the hosts would fail with "wire", one that did not with "exact"."""
    case = Case(
        (9, 8, 7, 9),
        hidden=64,
        experts=8,
        topk=8,
        layout=DispatchLayout.FLAT,
        precision=precision,
    )
    partitions: list[tuple[int, ...] | None] = [None, (0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 0, 1)]
    drawn = [dataclasses.replace(case, domains=domains) for domains in partitions]
    results = [combined_of(one, 0) for one in drawn]
    for index, one in enumerate(results):
        for other in results[:index]:
            assert torch.equal(one, other) == (precision == "exact")
    assert rank_pools(4).run(contract, drawn, timeout_s=60) == [len(drawn)] * 4
    rank_pools(4).run(rounding_of_the_combiner, drawn[1:3], timeout_s=60)
