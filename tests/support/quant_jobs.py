"""Quantized and opaque rows on every rank."""

from __future__ import annotations

import dataclasses

import torch

from expertlink import BlockFormat, DispatchLayout, MoECommunicator
from expertlink.launch import RankContext
from expertlink.quantization import quantize
from support.oracle import Case, expected_of, inputs_of
from support.rank_jobs import config_of, same_bits


def quantized_dispatch(ctx: RankContext, layout: DispatchLayout, fmt: BlockFormat) -> bool:
    """Rows that dispatch quantizes equal rows that the caller quantized, slot by slot."""
    case = Case((5, 0, 4)[: ctx.num_ranks], 300, experts=5, topk=2, layout=layout, masked=0.2)
    own = inputs_of(case, ctx.rank)
    x_TH, ids_TK = own.x_TH.to(ctx.device), own.ids_TK.to(ctx.device)
    with MoECommunicator(config_of(case, ctx.device, quantization=fmt)) as comm:
        out, handle = comm.dispatch(x_TH, ids_TK)
        q, scales = quantize(x_TH, fmt)
        passed, _ = comm.dispatch(q, ids_TK, scales=scales)
        again, cached = comm.dispatch(x_TH, None, previous_handle=handle)
        for copy in expected_of(case, ctx.rank).copies:
            rows, row_scales = quantize(inputs_of(case, copy.source).x_TH[[copy.token]], fmt)
            for arrived in (out, passed, again):
                assert arrived.scales is not None
                assert arrived.scales.format is fmt
                same_bits(arrived.tokens[copy.slot], rows[0], "row")
                same_bits(arrived.scales.tensor[copy.slot], row_scales[0], "scales")
        # Expert outputs come back in the wire type, whatever went out.
        result = comm.combine(
            torch.ones(handle.rows_shape, dtype=case.dtype, device=ctx.device), cached
        )
        return result.dtype is case.dtype and result.shape == x_TH.shape


def opaque_rows(
    ctx: RankContext, layout: DispatchLayout, width: int, columns: int, dtype: torch.dtype
) -> bool:
    case = Case((4, 3), 96, experts=4, topk=2, layout=layout)
    case = dataclasses.replace(case, masked=0.2)

    def packed(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        gen = torch.Generator().manual_seed(rank)
        rows = torch.randint(-128, 128, (case.tokens[rank], width), generator=gen)
        scales = torch.randint(0, 256, (case.tokens[rank], columns), generator=gen)
        return rows.to(dtype), scales.to(torch.uint8)

    rows, scales = packed(ctx.rank)
    own = inputs_of(case, ctx.rank)
    with MoECommunicator(config_of(case, ctx.device)) as comm:
        out, _ = comm.dispatch(
            rows.to(ctx.device), own.ids_TK.to(ctx.device), scales=scales.to(ctx.device)
        )
        assert out.scales is not None
        for copy in expected_of(case, ctx.rank).copies:
            theirs, their_scales = packed(copy.source)
            same_bits(out.tokens[copy.slot], theirs[copy.token], "row")
            same_bits(out.scales.tensor[copy.slot], their_scales[copy.token], "scales")
    return True
