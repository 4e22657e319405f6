"""A model small enough to know its answer: experts that scale, and the sum they must add up to.

Expert e multiplies its rows by a power of two that neighbours do not share. Rows that reach a wrong
expert, get lost, arrive twice or take another token's weight change the sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expertlink.quantization import dequantize, quantize
from expertlink.types import BlockFormat, DispatchLayout, DispatchOutput

_FACTORS = (1.0, 0.25, 2.0, 0.5, 4.0)
_ROUNDINGS = 4
_SMALLEST = 1e-6


def scaling_experts(
    out: DispatchOutput,
    local_experts: Sequence[int],
    *,
    dtype: torch.dtype,
    block_format: BlockFormat | None = None,
) -> Tensor:
    """Applies the experts to what a rank received.

    Args:
        out: what dispatch returned.
        local_experts: global ids of this rank's experts, in local order.
        dtype: element type that combine expects.
        block_format: how the rows are quantized, if they are.

    Returns:
        Expert output in the shape of `out.tokens`, in memory of its own. Where no row was
        received, it is NaN: combine must not read it. Counts are read from the device, so the
        shape may be the largest possible one (`static_shapes`).
    """
    if out.scales is not None and block_format is not None:
        rows = dequantize(out.tokens, out.scales.tensor, block_format, dtype)
    else:
        rows = out.tokens.to(dtype, copy=True)
    # One more, for "no expert": a rank may hold none.
    factors = [*(_factor(expert) for expert in local_experts), 1.0]
    padded = torch.tensor(factors, dtype=torch.float32, device=rows.device)
    factors = padded[:-1]
    counts = out.num_tokens_per_expert.to(torch.int64)
    if out.layout is DispatchLayout.FLAT:
        assert out.expert_offsets is not None
        per_row = factors.repeat_interleave(out.expert_offsets.to(torch.int64).diff())
        rows[: len(per_row)].mul_(per_row.to(dtype)[:, None])
        rows[len(per_row) :] = float("nan")
        return rows
    if out.layout is DispatchLayout.EXPERT_MAJOR:
        rows.mul_(factors.to(dtype)[:, None, None])
        for expert, count in enumerate(counts.tolist()):
            rows[expert, count:] = float("nan")
        return rows
    assert out.topk_ids is not None
    assert out.topk_weights is not None
    ids = out.topk_ids.to(torch.int64).masked_fill(~_received(out)[..., None], -1)
    chosen = ids >= 0
    weight = out.topk_weights * padded[ids]
    per_row = torch.where(chosen, weight, 0.0).sum(dim=-1)
    rows = rows.float().mul_(per_row[..., None]).to(dtype)
    rows[~chosen.any(dim=-1)] = float("nan")
    return rows


def _received(out: DispatchOutput) -> Tensor:
    """Leading shape of the tokens (TOKEN_MAJOR, RANK_MAJOR), bool: where a rank got a row."""
    places = torch.arange(out.tokens.shape[-2], dtype=torch.int64, device=out.tokens.device)
    counts_R = out.num_tokens_per_rank
    if counts_R is None:
        return torch.ones(out.tokens.shape[:-1], dtype=torch.bool, device=places.device)
    return places < (counts_R.sum() if out.tokens.dim() == 2 else counts_R[:, None])


def expected_sum(
    x_TH: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    *,
    num_experts: int,
    block_format: BlockFormat | None = None,
) -> Tensor:
    """`[T, H]` float32: what dispatch, `scaling_experts` and combine add up to, unrounded."""
    if block_format is not None:
        q_TH, scales = quantize(x_TH, block_format)
        x_TH = dequantize(q_TH, scales, block_format)
    factors = torch.tensor(
        [_factor(expert) for expert in range(num_experts)], dtype=torch.float32, device=x_TH.device
    )
    weight = topk_weights_TK * factors[topk_ids_TK.clamp(min=0)]
    return x_TH.float() * torch.where(topk_ids_TK >= 0, weight, 0.0).sum(dim=1, keepdim=True)


def mismatch(y_TH: Tensor, expected_TH: Tensor, *, wire_dtype: torch.dtype) -> str | None:
    """What is wrong with a combined result, in one sentence; None where it is right.

    All weights and factors are positive, so nothing cancels: the error is a few roundings of the
    value itself, to the type of the result and to the type on the wire.
    """
    if y_TH.shape != expected_TH.shape:
        return f"combine returned {tuple(y_TH.shape)}, expected {tuple(expected_TH.shape)}"
    if y_TH.numel() == 0:
        return None
    eps = max(torch.finfo(y_TH.dtype).eps, torch.finfo(wire_dtype).eps)
    tolerance = expected_TH.abs() * (_ROUNDINGS * eps) + _SMALLEST
    wrong_T = ~((y_TH.float() - expected_TH).abs() <= tolerance).all(dim=1)
    if not bool(wrong_T.any()):
        return None
    token = int(wrong_T.nonzero()[0])
    error = float((y_TH[token].float() - expected_TH[token]).abs().max())
    return (
        f"{int(wrong_T.sum())} of {len(wrong_T)} tokens are wrong after dispatch and combine; "
        f"token {token} is off by up to {error:.3g}"
    )


def _factor(expert: int) -> float:
    return _FACTORS[expert % len(_FACTORS)]
