"""The nvlink engine on one GPU: up to 72 ranks in one process, bit for bit against the oracle."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hosted import DEVICE, Fleet, run_hosted
from oracle import Case
from rank_jobs import check_contract, config_of

from expertlink import DispatchLayout

pytestmark = pytest.mark.gpu(1)
LAYOUTS = pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)


def fleet_of(case: Case, **fields: object) -> Fleet:
    fields = {"num_sms_dispatch": 3, "num_sms_combine": 3, **fields}
    return Fleet(config_of(case, DEVICE, engine="nvlink", **fields), case.ranks)


def tokens_of(ranks: int) -> tuple[int, ...]:
    return tuple((5, 0, 7, 1, 16, 3, 40, 9)[rank % 8] for rank in range(ranks))


def cases_for(ranks: int, layout: DispatchLayout) -> list[Case]:
    tokens = tokens_of(ranks)
    few = tuple(min(count, 5) for count in tokens)
    cases = [
        Case(tokens, 16, experts=max(9, ranks), topk=3, layout=layout, seed=1),
        Case(tokens, 264, experts=96, topk=8, layout=layout, masked=0.3, seed=2),
        Case(tokens, 8, experts=73, topk=2, layout=layout, dtype=torch.float16, skew=5.0, seed=3),
        Case(tokens, 16, experts=74, topk=3, layout=layout, placement="scattered", seed=6),
        Case(few, 16, experts=75, topk=32, layout=layout, weighted=False, seed=7),
        Case(tokens, 16, experts=8, topk=1, layout=layout, skew=9.0, seed=8),
        Case((0,) * ranks, 16, experts=8, topk=2, layout=layout, seed=9),
        Case(tokens, 16, experts=8, topk=2, layout=layout, masked=1.0, seed=10),
        Case(few, 16, experts=2048, topk=8, layout=layout, ids_dtype=torch.int32, seed=11),
    ]
    if layout is DispatchLayout.FLAT:
        cases.append(Case(tokens, 16, experts=9, topk=3, layout=layout, alignment=16, seed=12))
    return cases


@LAYOUTS
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 33, 72])
def test_bits_equal_the_oracle(ranks: int, layout: DispatchLayout) -> None:
    for case in cases_for(ranks, layout):
        run_hosted(fleet_of(case), check_contract, case)


@LAYOUTS
@pytest.mark.parametrize("hidden", [8, 512, 7168, 16384])
def test_row_widths(hidden: int, layout: DispatchLayout) -> None:
    case = Case((70, 3, 0, 33), hidden, experts=16, topk=4, layout=layout)
    run_hosted(fleet_of(case), check_contract, case)


@LAYOUTS
@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_any_number_of_blocks(blocks: int, layout: DispatchLayout) -> None:
    case = Case((300, 0, 65, 1), 64, experts=16, topk=4, layout=layout)
    sms = {"num_sms_dispatch": blocks, "num_sms_combine": blocks}
    run_hosted(fleet_of(case, **sms), check_contract, case)


@LAYOUTS
def test_checked_inputs(layout: DispatchLayout) -> None:
    case = Case((5, 0, 7), 16, experts=9, topk=3, layout=layout)
    run_hosted(fleet_of(case, check_inputs=True), check_contract, dataclasses.replace(case))
