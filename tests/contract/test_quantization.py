"""Block formats: definition, bounds, packing, and quantized rows through dispatch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertlink import BlockFormat, DispatchLayout, InputError
from expertlink.quantization import dequantize, quantize, scale_columns
from support.depth import deep
from support.payloads import opaque_rows, quantized_dispatch

FORMATS = pytest.mark.parametrize("block_format", list(BlockFormat), ids=lambda f: f.value)


def reference_scale(block: torch.Tensor, block_format: BlockFormat) -> float:
    """The definition in numpy float32, one block at a time."""
    amax = max(np.float32(block.float().abs().max().item()), np.float32(1e-4))
    scale = np.float32(amax) / np.float32(448.0)
    if block_format is BlockFormat.E4M3_FLOAT32:
        return float(scale)
    mantissa, exponent = math.frexp(float(scale))
    return math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)


@st.composite
def rows(draw: st.DrawFn) -> torch.Tensor:
    hidden = draw(st.sampled_from([1, 100, 128, 129, 640]))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    scale = draw(st.sampled_from([1e-30, 1e-4, 1.0, 448.0, 6e4]))
    return (torch.randn(draw(st.integers(0, 3)), hidden, generator=gen) * scale).to(dtype)


@FORMATS
def test_scales_and_values_follow_the_definition(block_format: BlockFormat) -> None:
    @settings(max_examples=deep(60))
    @given(rows())
    def check(x: torch.Tensor) -> None:
        x = x.clamp(-6e4, 6e4)
        q, scales = quantize(x, block_format)
        assert q.dtype is torch.float8_e4m3fn
        assert q.shape == x.shape
        assert scales.shape == (len(x), scale_columns(x.shape[1], block_format))
        back = dequantize(q, scales, block_format, torch.float32)
        for row in range(len(x)):
            for begin in range(0, x.shape[1], 128):
                block = x[row, begin : begin + 128]
                scale = reference_scale(block, block_format)
                expected = (block.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
                assert torch.equal(q[row, begin : begin + 128].float(), expected.float())
                assert torch.equal(back[row, begin : begin + 128], expected.float() * scale)

    check()


@FORMATS
def test_error_is_bounded(block_format: BlockFormat) -> None:
    """e4m3 keeps 3 mantissa bits: 1/16 of a value, or half the smallest step of its block."""
    x = torch.randn(64, 512) * torch.logspace(-3, 3, 64)[:, None]
    back = dequantize(*quantize(x, block_format), block_format, torch.float32)
    amax = x.unflatten(1, (4, 128)).abs().amax(-1).repeat_interleave(128, 1)
    assert ((back - x).abs() <= x.abs() / 16 + amax * 2.0**-9 / 448 * 2).all()


def test_packing_is_lowest_block_first() -> None:
    x = torch.zeros(1, 5 * 128)
    for block in range(5):
        x[0, block * 128] = 448.0 * 2.0**block
    _, packed = quantize(x, BlockFormat.E4M3_UE8M0)
    assert packed.dtype is torch.int32
    assert packed.view(torch.uint8).tolist() == [[127, 128, 129, 130, 131, 0, 0, 0]]


@FORMATS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_not_hidden(block_format: BlockFormat, value: float) -> None:
    x = torch.randn(1, 256)
    x[0, 3] = value
    back = dequantize(*quantize(x, block_format), block_format, torch.float32)
    assert back[0, :128].isnan().all()
    assert back[0, 128:].isfinite().all()


@pytest.mark.parametrize("block_format", list(BlockFormat), ids=lambda form: form.value)
@pytest.mark.parametrize("hidden", [128, 512, 1024])
def test_scales_in_either_memory_order(block_format: BlockFormat, hidden: int) -> None:
    rows, scales = quantize(torch.randn(3, 5, hidden), block_format)
    memory = torch.empty((3, scales.shape[-1], 5), dtype=scales.dtype)
    column_major = memory.transpose(-1, -2).copy_(scales)
    expected = dequantize(rows, scales, block_format, torch.bfloat16)
    assert torch.equal(dequantize(rows, column_major, block_format, torch.bfloat16), expected)


def test_quantization_refuses() -> None:
    with pytest.raises(InputError, match="dtype torch.float64; accepted: bfloat16"):
        quantize(torch.randn(2, 8).double(), BlockFormat.E4M3_POW2)
    q, scales = quantize(torch.randn(2, 8), BlockFormat.E4M3_POW2)
    with pytest.raises(InputError, match=r"accepted: \(2, 1\)"):
        dequantize(q, scales.repeat(1, 2), BlockFormat.E4M3_POW2)


@FORMATS
@pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)
def test_dispatch_quantizes_like_the_reference(
    rank_pools, block_format: BlockFormat, layout: DispatchLayout
) -> None:
    assert all(rank_pools(3).run(quantized_dispatch, layout, block_format, timeout_s=60))


@pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)
@pytest.mark.parametrize(("width", "scales", "dtype"), [(48, 6, "uint8"), (33, 1, "int8")])
def test_opaque_rows_pass_through(
    rank_pools, layout: DispatchLayout, width: int, scales: int, dtype: str
) -> None:
    """Rows and scales of a format that the library does not know arrive byte for byte."""
    arguments = (layout, width, scales, getattr(torch, dtype))
    assert all(rank_pools(2).run(opaque_rows, *arguments, timeout_s=60))
