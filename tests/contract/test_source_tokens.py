"""Which token of its rank every received row is: with every layout, where it is asked for."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from expertlink import BlockFormat, ConfigurationError, DispatchLayout, MoECommunicatorConfig
from support import decode, shared_routing, source_tokens
from support.jobs import contract
from support.oracle import Case
from support.small_calls import E, H, good, make

LAYOUTS = pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)


@LAYOUTS
@pytest.mark.parametrize("ranks", [1, 3])
def test_they_equal_the_oracle(rank_pools, ranks: int, layout: DispatchLayout) -> None:
    """New and cached dispatches, with weights and without, into given buffers."""
    case = Case((5, 0, 7)[:ranks], 8, experts=6, topk=3, layout=layout, masked=0.2)
    drawn = [
        case,
        dataclasses.replace(case, placement="scattered", weighted=False, seed=1),
        dataclasses.replace(case, masked=1.0, seed=2),
        dataclasses.replace(case, tokens=(0,) * ranks, seed=3),
    ]
    if layout is DispatchLayout.FLAT:
        drawn.append(dataclasses.replace(case, alignment=4))
    pool = rank_pools(ranks)
    assert pool.run(contract, drawn, source_tokens=True, timeout_s=60) == [len(drawn)] * ranks
    jobs = [decode.halves, decode.buffers, source_tokens.buffers]
    for job in jobs:
        done = pool.run(decode.on_a_rank, job, drawn[:2], source_tokens=True, timeout_s=60)
        assert done == [2] * ranks


@LAYOUTS
def test_they_come_beside_scales(rank_pools, layout: DispatchLayout) -> None:
    for block_format in (None, *BlockFormat):
        case = Case((5, 0), 256, experts=4, topk=2, layout=layout, dtype=torch.float32)
        job = source_tokens.beside_scales
        assert all(rank_pools(2).run(job, case, block_format, timeout_s=60))


@LAYOUTS
def test_handles_of_communicators_without_them(rank_pools, layout: DispatchLayout) -> None:
    case = Case((5, 0), 24, experts=6, topk=3, layout=layout, dtype=torch.float32, limit=9)
    job = shared_routing.asked_later
    assert all(rank_pools(2).run(job, case, timeout_s=60))


def test_ranks_agree_whether_they_are_asked_for(rank_pools) -> None:
    for message in rank_pools(2).run(source_tokens.disagree, timeout_s=60):
        assert "source_tokens: True on rank 0, False on rank 1" in message


def test_the_field_is_checked() -> None:
    with pytest.raises(ConfigurationError, match="source_tokens=1 is not possible"):
        MoECommunicatorConfig(
            num_experts=E,
            hidden_size=H,
            topk=1,
            max_tokens_per_rank=1,
            source_tokens=1,  # type: ignore[arg-type]
        )
    with make() as comm:
        ids = torch.zeros(2, 2, dtype=torch.int64) - 1
        out, _ = comm.dispatch(torch.zeros(2, H), ids)
        assert out.source_tokens is None


def test_they_cannot_be_told_afterwards_on_cpus() -> None:
    with make() as comm, torch.no_grad():
        _, handle = comm.dispatch(**good())
        with pytest.raises(ConfigurationError, match="configure source_tokens=True"):
            comm.source_tokens(handle)
