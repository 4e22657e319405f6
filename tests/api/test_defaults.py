"""The caller's default device, default dtype and inference mode change nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from expertlink import BlockFormat, DispatchLayout
from support import defaults
from support.oracle import Case

LAYOUTS = pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_equal_the_oracle(rank_pools, layout: DispatchLayout, dtype: torch.dtype) -> None:
    case = Case((5, 0), 8, experts=6, topk=3, layout=layout, dtype=dtype, masked=0.2)
    drawn = [case, dataclasses.replace(case, placement="scattered", seed=2)]
    if layout is DispatchLayout.FLAT:
        drawn.append(dataclasses.replace(case, alignment=4))
    if layout.expanded:
        drawn.append(dataclasses.replace(case, precision="exact"))
    for one in drawn:
        assert all(rank_pools(2).run(defaults.contract, one, timeout_s=60))


@LAYOUTS
@pytest.mark.parametrize("block_format", [None, *BlockFormat])
def test_training_is_the_same(
    rank_pools, layout: DispatchLayout, block_format: BlockFormat | None
) -> None:
    case = Case((5, 4), 256, experts=4, topk=2, layout=layout, dtype=torch.float32)
    assert all(rank_pools(2).run(defaults.training, case, block_format, timeout_s=60))
