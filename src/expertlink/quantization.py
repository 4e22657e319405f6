"""Block-scaled e4m3 rows in plain torch: the definition that every engine reproduces bit for bit.

A row is cut into blocks of 128 elements; the last one may be shorter. `amax` is the largest
magnitude of a block. Every step is in float32, rounded to nearest even:

    scale = max(amax, 1e-4) / 448          448 is the largest finite e4m3 value
    scale = 2 ** ceil(log2(scale))         power-of-two formats only
    q     = e4m3(clamp(x / scale, -448, 448))

A block with a NaN or an infinity gets a non-finite scale, so all of it dequantizes to NaN: such
values are never hidden. E8M0 exponents: https://www.opencompute.org, "OCP Microscaling Formats",
section 5.4.1; e4m3: Micikevicius et al., "FP8 Formats for Deep Learning", 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expertlink.errors import InputError
from expertlink.types import BlockFormat

BLOCK = 128
E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4
_MANTISSA_BITS = 23
_E8M0_NAN = 255


def num_blocks(hidden_size: int) -> int:
    """Scales per row."""
    return -(-hidden_size // BLOCK)


def scale_columns(hidden_size: int, block_format: BlockFormat) -> int:
    """Columns of the scale tensor: one per block, or one per four blocks where packed."""
    blocks = num_blocks(hidden_size)
    return -(-blocks // 4) if block_format is BlockFormat.E4M3_UE8M0 else blocks


def scale_form(hidden_size: int, block_format: BlockFormat) -> tuple[torch.dtype, int]:
    """Element type and columns of the scale tensor."""
    packed = block_format is BlockFormat.E4M3_UE8M0
    return torch.int32 if packed else torch.float32, scale_columns(hidden_size, block_format)


def quantize(x_TH: Tensor, block_format: BlockFormat) -> tuple[Tensor, Tensor]:
    """Rows to e4m3 with a scale per 128 elements.

    Args:
        x_TH: `[..., H]` bfloat16, float16 or float32.
        block_format: how scales are rounded and stored.

    Returns:
        `(q, scales)`: `[..., H]` float8_e4m3fn, and float32 `[..., ceil(H / 128)]` or, packed,
        int32 `[..., ceil(ceil(H / 128) / 4)]`.
    """
    if x_TH.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise InputError(f"rows have dtype {x_TH.dtype}; accepted: bfloat16, float16 or float32")
    hidden = x_TH.shape[-1]
    blocks = num_blocks(hidden)
    padded = torch.nn.functional.pad(x_TH.float(), (0, blocks * BLOCK - hidden))
    grouped = padded.unflatten(-1, (blocks, BLOCK))
    # clamp(min=) keeps NaN on every device.
    amax = grouped.abs().amax(dim=-1).clamp(min=SMALLEST_AMAX)
    # Divided by a tensor: by a number, torch on CUDA multiplies with its rounded reciprocal.
    scale = amax / torch.full_like(amax, E4M3_MAX)
    if block_format is not BlockFormat.E4M3_FLOAT32:
        scale = _exponents_to_float(_ceil_exponents(scale))
    values = (grouped / scale.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)
    q = values.flatten(-2)[..., :hidden].to(torch.float8_e4m3fn).contiguous()
    if block_format is BlockFormat.E4M3_UE8M0:
        return q, _pack(_ceil_exponents(scale))
    return q, scale


def dequantize(
    q_TH: Tensor, scales: Tensor, block_format: BlockFormat, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Inverse of `quantize` up to rounding: `e4m3 value * scale` in float32, rounded to `dtype`."""
    hidden = q_TH.shape[-1]
    columns = scale_columns(hidden, block_format)
    if scales.shape != (*q_TH.shape[:-1], columns):
        raise InputError(
            f"scales have shape {tuple(scales.shape)}; accepted: {(*q_TH.shape[:-1], columns)} for "
            f"{block_format.value} rows of shape {tuple(q_TH.shape)}"
        )
    blocks = num_blocks(hidden)
    if block_format is BlockFormat.E4M3_UE8M0:
        scale = _exponents_to_float(_unpack(scales, blocks))
    else:
        scale = scales
    per_element = scale.repeat_interleave(BLOCK, dim=-1)[..., :hidden]
    return (q_TH.float() * per_element).to(dtype)


def _ceil_exponents(scale: Tensor) -> Tensor:
    """Biased exponent (int32) of the smallest power of two that is not below `scale`."""
    bits = scale.contiguous().view(torch.int32)
    exponent = bits >> _MANTISSA_BITS
    mantissa = bits & ((1 << _MANTISSA_BITS) - 1)
    raised = exponent + (mantissa != 0).to(torch.int32)
    return torch.where(scale.isfinite(), raised, torch.full_like(raised, _E8M0_NAN))


def _exponents_to_float(exponent: Tensor) -> Tensor:
    powers = (exponent << _MANTISSA_BITS).view(torch.float32)
    nan = torch.full_like(powers, float("nan"))
    return torch.where(exponent == _E8M0_NAN, nan, powers)


def _pack(exponent: Tensor) -> Tensor:
    """Four biased exponents per int32, lowest block in the lowest byte, zero-padded."""
    missing = -exponent.shape[-1] % 4
    bytes_ = torch.nn.functional.pad(exponent, (0, missing)).to(torch.uint8)
    return bytes_.contiguous().view(torch.int32)


def _unpack(packed: Tensor, blocks: int) -> Tensor:
    # A copy: one column in column-major order counts as contiguous, but cannot be viewed as bytes.
    packed = packed.clone(memory_format=torch.contiguous_format)
    return packed.view(torch.uint8)[..., :blocks].to(torch.int32)
