"""Bytes that calls need between hosts, from ids as callers pass them."""

from __future__ import annotations

import pytest
import torch

from expertlink import DispatchLayout
from expertlink.domains import Domains
from expertlink.engines.hybrid.tally import RailTally
from expertlink.routing import Placement, even_blocks
from expertlink.types import CallStatistics, DispatchOutput

RANKS, EXPERTS, HIDDEN = 4, 8, 16


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_outside_the_experts_go_nowhere(dtype: torch.dtype) -> None:
    """The contract takes each of them for "no expert", and kernels of mode "ll" let them pass."""
    ids_TK = torch.tensor(
        [[7, EXPERTS], [-1, EXPERTS + 5], [-9, -1000], [6, 7], [0, 4], [2**31 - 1, 3]], dtype=dtype
    )
    given = ids_TK.clone()
    placement = Placement.from_ranks(even_blocks(EXPERTS, RANKS), num_ranks=RANKS)
    tally = RailTally(placement, Domains((0, 0, 1, 1)), rank=0)
    zeros = CallStatistics.zeros(num_local=2, num_ranks=RANKS, device=torch.device("cpu"))
    rail_bytes = tally.enable(zeros).rail_bytes
    rows = torch.zeros(3, HIDDEN, dtype=torch.bfloat16)
    tally.add_dispatch(
        lambda: ids_TK,
        DispatchOutput(rows, torch.zeros(2, dtype=torch.int32), DispatchLayout.TOKEN_MAJOR),
    )
    tally.add_combine(lambda: ids_TK, rows)
    assert rail_bytes.tolist() == [0, 2 * 3 * 2 * HIDDEN]
    assert torch.equal(ids_TK, given)


def test_calls_that_are_not_counted_make_no_ids() -> None:
    placement = Placement.from_ranks(even_blocks(EXPERTS, RANKS), num_ranks=RANKS)
    tally = RailTally(placement, Domains((0, 0, 1, 1)), rank=0)

    def ids() -> torch.Tensor:
        raise AssertionError("asked for")

    tally.add_combine(ids, torch.zeros(1, HIDDEN))
