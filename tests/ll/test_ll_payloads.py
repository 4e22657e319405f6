"""Mode "ll" on one GPU: whatever rows hold, set bits too, and quantization on the way."""

from __future__ import annotations

import pytest
import torch

from expertlink import BlockFormat, DispatchLayout
from support import payloads
from support.cases import (
    EXPANDED,
    FORMATS,
    LAYOUTS,
    ORDERS,
    aligned,
    blocks_of_scales,
    exact,
    half,
    special,
    usual,
)
from support.hosted import fleet_of, run_cases

pytestmark = pytest.mark.gpu(1)


@LAYOUTS
def test_rows_of_set_bits(layout: DispatchLayout) -> None:
    """They look like memory that nobody has written to."""
    for shape in (usual(3, layout), half(layout), special("model", layout)):
        cases = [shape.case(seed=1, content="ones"), shape.case(seed=2, masked=0.5, content="ones")]
        run_cases(fleet_of("ll", cases[0]), payloads.any_bits, cases)


@EXPANDED
def test_rows_of_set_bits_in_exact_sums(layout: DispatchLayout) -> None:
    for shape in (exact(usual(3, layout)), exact(special("model", layout))):
        cases = [shape.case(seed=1, content="ones"), shape.case(seed=2, masked=0.5, content="ones")]
        run_cases(fleet_of("ll", cases[0]), payloads.any_bits, cases)


@LAYOUTS
@ORDERS
def test_packed_rows_of_set_bits(order: str, layout: DispatchLayout) -> None:
    case = usual(3, layout).case(seed=1, weighted=False)
    run_cases(fleet_of("ll", case, scale_order=order), payloads.any_packed_bits, [case])


@LAYOUTS
@ORDERS
@FORMATS
def test_rows_quantized_on_the_way(fmt: BlockFormat, order: str, layout: DispatchLayout) -> None:
    shape = blocks_of_scales(layout)
    cases = [
        shape.case(seed=1),
        shape.case(seed=2, masked=0.4, weighted=False, content="extreme"),
        shape.case((33, 40, 0), seed=3, content="extreme", ids_dtype=torch.int32),
    ]
    fleet = fleet_of("ll", cases[0], quantization=fmt, scale_order=order)
    run_cases(fleet, payloads.quantized, cases)


@LAYOUTS
@FORMATS
def test_other_widths_quantized_on_the_way(fmt: BlockFormat, layout: DispatchLayout) -> None:
    """float16, a row of one step, parts of several steps, groups with gaps."""
    shapes = [half(layout), usual(3, layout), special("model", layout)]
    if layout is DispatchLayout.FLAT:
        shapes.append(aligned(3))
    for shape in shapes:
        case = shape.case(seed=4, content="extreme")
        run_cases(fleet_of("ll", case, quantization=fmt), payloads.quantized, [case])


@LAYOUTS
@ORDERS
@FORMATS
def test_order_of_scales(fmt: BlockFormat, order: str, layout: DispatchLayout) -> None:
    case = blocks_of_scales(layout).case(seed=5)
    fleet = fleet_of("ll", case, quantization=fmt, scale_order=order)
    run_cases(fleet, payloads.scales_in_order, [case])
