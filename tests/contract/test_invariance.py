"""The same global batch gives the same results on any number of ranks, in any layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expertlink import DispatchLayout, MoECommunicator, MoECommunicatorConfig
from expertlink.launch import RankContext
from support.training import experts_of

T, H, E, K = 12, 6, 5, 3


def whole_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(5)
    x = torch.randn(T, H, generator=gen, dtype=torch.float64)
    ids = torch.rand(T, E, generator=gen).topk(K).indices
    weights = torch.rand(T, K, generator=gen, dtype=torch.float64)
    experts = torch.randn(E, H, H, generator=gen, dtype=torch.float64)
    return x, ids, weights, experts


def slice_of_the_batch(
    ctx: RankContext, layout: DispatchLayout, dtype: torch.dtype, precision: str = "wire"
) -> Any:
    x, ids, weights, experts = whole_batch()
    x, experts = x.to(dtype), experts.to(dtype)
    if dtype is not torch.float64:
        weights = weights.float()
    begin, end = (T * r // ctx.num_ranks for r in (ctx.rank, ctx.rank + 1))
    config = MoECommunicatorConfig(
        num_experts=E,
        hidden_size=H,
        topk=K,
        max_tokens_per_rank=T,
        dtype=dtype,
        output_layout=layout,
        combine_precision=precision,  # type: ignore[arg-type]
        device="cpu",
    )
    with MoECommunicator(config) as comm:
        out, handle = comm.dispatch(x[begin:end], ids[begin:end], weights[begin:end])
        mine = experts[comm.local_experts]
        if dtype is torch.float64:
            return comm.combine(experts_of(out, mine), handle)
        # Elementwise experts: a row's bits do not depend on other rows.
        counts = out.num_tokens_per_expert.tolist()
        scale = torch.repeat_interleave(mine[:, 0], torch.tensor(counts), dim=0)
        return comm.combine(torch.tanh(out.tokens * scale), handle)


def test_float64_results_equal_across_ranks_and_layouts(rank_pools) -> None:
    x, ids, weights, experts = whole_batch()
    share = torch.zeros(T, E, dtype=torch.float64).scatter_(1, ids, weights)
    expected = torch.einsum(
        "te,eth->th", share, torch.tanh(torch.einsum("th,ehg->etg", x, experts))
    )
    for ranks in (1, 2, 3, 4):
        for layout in DispatchLayout:
            job = (slice_of_the_batch, layout, torch.float64)
            parts = rank_pools(ranks).run(*job, timeout_s=60)
            torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-13, atol=1e-13)


def test_exact_sums_equal_across_ranks_bit_for_bit(rank_pools) -> None:
    """Rounded once, in an order that no placement changes; sums per rank would differ here."""
    results = {}
    for precision in ("exact", "wire"):
        for ranks in (1, 2, 4):
            job = (slice_of_the_batch, DispatchLayout.FLAT, torch.bfloat16, precision)
            results[precision, ranks] = torch.cat(rank_pools(ranks).run(*job, timeout_s=60))
    for ranks in (2, 4):
        assert torch.equal(results["exact", ranks], results["exact", 1])
    assert not torch.equal(results["wire", 4], results["exact", 1])
