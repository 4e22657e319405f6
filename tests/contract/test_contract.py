"""The contract over drawn cases: every layout, any routing, bit for bit against the oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertlink import DispatchLayout
from support.depth import deep
from support.jobs import contract
from support.oracle import Case

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@st.composite
def cases(draw: st.DrawFn, ranks: int, layout: DispatchLayout) -> Case:
    experts = draw(st.integers(1, 9))
    return Case(
        tokens=tuple(draw(st.lists(st.integers(0, 6), min_size=ranks, max_size=ranks))),
        hidden=draw(st.sampled_from([1, 3, 8, 20])),
        experts=experts,
        topk=draw(st.integers(1, min(experts, 6))),
        layout=layout,
        dtype=draw(st.sampled_from(DTYPES)),
        masked=draw(st.sampled_from([0.0, 0.3, 1.0])),
        skew=draw(st.sampled_from([0.0, 1.0, 5.0])),
        alignment=draw(st.sampled_from([1, 1, 4, 16])) if layout is DispatchLayout.FLAT else 1,
        weighted=draw(st.booleans()),
        ids_dtype=draw(st.sampled_from([torch.int64, torch.int32])),
        placement=draw(st.sampled_from(["even", "scattered", "bare"])),
        precision=draw(st.sampled_from(["wire", "exact"])) if layout.expanded else "wire",
        seed=draw(st.integers(0, 10_000)),
    )


@pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_bits_equal_the_oracle(rank_pools, ranks: int, layout: DispatchLayout) -> None:
    pool = rank_pools(ranks)

    @settings(max_examples=deep(8))
    @given(st.lists(cases(ranks, layout), min_size=1, max_size=4))
    def check(drawn: list[Case]) -> None:
        assert pool.run(contract, drawn, timeout_s=120) == [len(drawn)] * ranks

    check()


@pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)
def test_wide_models(rank_pools, layout: DispatchLayout) -> None:
    """More experts, choices and columns than the drawn cases have."""
    wide = [
        Case((5, 0, 7), hidden=264, experts=64, topk=32, layout=layout, masked=0.1),
        Case((5, 0, 7), 264, 64, 32, layout, precision="exact" if layout.expanded else "wire"),
        Case((3, 4, 1), hidden=16, experts=2048, topk=8, layout=layout),
        Case((9, 9, 9), hidden=1, experts=3, topk=1, layout=layout, skew=9.0),
        Case((0, 0, 0), hidden=8, experts=4, topk=2, layout=layout),
    ]
    assert rank_pools(3).run(contract, wide, timeout_s=120) == [len(wide)] * 3
