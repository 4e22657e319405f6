"""Gradients: numerically right, equal to a dense layer, for every layout."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch

from expertlink import DispatchLayout
from support import training
from support.oracle import Case
from support.small_calls import H, T, good, make

LAYOUTS = pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)
EXPANDED = pytest.mark.parametrize(
    "layout",
    [layout for layout in DispatchLayout if layout.expanded],
    ids=lambda layout: layout.value,
)


@LAYOUTS
@pytest.mark.parametrize("ranks", [1, 3])
def test_gradcheck(rank_pools, ranks: int, layout: DispatchLayout) -> None:
    case = Case((3,) * ranks, 2, experts=4, topk=2, layout=layout, dtype=torch.float64, masked=0.2)
    assert all(rank_pools(ranks).run(training.gradcheck, case, timeout_s=120))


@LAYOUTS
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gradients_equal_a_dense_layer(rank_pools, ranks: int, layout: DispatchLayout) -> None:
    tokens = (5, 0, 7, 3)[:ranks]
    case = Case(tokens, 8, experts=6, topk=3, layout=layout, dtype=torch.float64, masked=0.2)
    scattered = dataclasses.replace(case, placement="scattered", seed=4)
    aligned = [dataclasses.replace(case, alignment=4)] if layout is DispatchLayout.FLAT else []
    exact = [dataclasses.replace(scattered, precision="exact")] if layout.expanded else []
    for drawn in (case, scattered, *aligned, *exact):
        for worst in rank_pools(ranks).run(training.gradients, drawn, timeout_s=60):
            assert max(worst.values()) < 1e-12, (drawn, worst)


@LAYOUTS
@pytest.mark.parametrize("placement", ["even", "bare"])
def test_gradients_of_three_combines_of_a_dispatch(
    rank_pools, layout: DispatchLayout, placement: str
) -> None:
    """Also where a rank receives nothing: its combines take part in backward in the same order."""
    case = Case((5, 0, 4), 8, experts=5, topk=2, layout=layout, dtype=torch.float64)
    drawn = dataclasses.replace(case, placement=placement, masked=0.2)
    for worst in rank_pools(3).run(training.gradients, drawn, 3, timeout_s=60):
        assert max(worst.values()) < 1e-12, worst


@EXPANDED
@pytest.mark.parametrize("combines", [1, 2])
@pytest.mark.parametrize("precision", ["wire", "exact"])
def test_gradients_of_weights_of_the_combine(
    rank_pools, precision: str, combines: int, layout: DispatchLayout
) -> None:
    """Those of the dispatch, of which there are some with two combines, get none."""
    case = Case((5, 0, 4), 8, experts=5, topk=2, layout=layout, dtype=torch.float64, masked=0.2)
    drawn = dataclasses.replace(case, precision=precision, placement="scattered", seed=4)
    for worst in rank_pools(3).run(training.gradients, drawn, combines, True, timeout_s=60):
        assert max(worst.values()) < 1e-12, worst


@LAYOUTS
def test_gradients_with_a_rank_without_experts(rank_pools, layout: DispatchLayout) -> None:
    case = Case((5, 4), 8, experts=3, topk=2, layout=layout, dtype=torch.float64, placement="bare")
    counted = dataclasses.replace(case, placement="even", experts=1, topk=1)
    for drawn in (case, counted):  # the second: as many as can be, which is none
        for worst in rank_pools(2).run(training.gradients, drawn, timeout_s=60):
            assert max(worst.values()) < 1e-12, (drawn, worst)


@LAYOUTS
def test_gradients_in_bfloat16(rank_pools, layout: DispatchLayout) -> None:
    """bfloat16 rows differ from the dense layer by rounding only: a few steps of 2^-8."""
    case = Case((6, 6), 16, experts=4, topk=2, layout=layout, dtype=torch.bfloat16)
    for worst in rank_pools(2).run(training.gradients, case, timeout_s=60):
        assert max(worst.values()) < 0.05, worst


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
@LAYOUTS
def test_bits_of_backward(rank_pools, layout: DispatchLayout, dtype: torch.dtype) -> None:
    """One order and one rounding, for rows of any width; garbage in padding goes nowhere."""
    tokens = (5, 0, 4)
    narrow = Case(tokens, 8, experts=7, topk=3, layout=layout, dtype=dtype, masked=0.3, seed=1)
    odd = Case(tokens, 41, experts=4, topk=2, layout=layout, dtype=dtype, masked=0.2, seed=2)
    wide = Case((2, 1, 3), 1000, experts=5, topk=2, layout=layout, dtype=dtype, seed=3)
    plain = dataclasses.replace(narrow, weighted=False)
    cases = [narrow, odd, wide, plain, dataclasses.replace(odd, placement="bare")]
    if layout is DispatchLayout.FLAT:
        cases.append(dataclasses.replace(odd, alignment=4))
    if layout.expanded:
        cases.append(dataclasses.replace(odd, precision="exact"))
    rank_pools(3).run(training.backward_bits, cases, timeout_s=120)


@LAYOUTS
def test_weight_gradients_return_to_their_choice(rank_pools, layout: DispatchLayout) -> None:
    case = Case((5, 0, 4), 4, experts=7, topk=3, layout=layout, dtype=torch.float32, masked=0.3)
    assert all(rank_pools(3).run(training.weight_grads, case, timeout_s=60))


@LAYOUTS
def test_backward_again_and_in_part(rank_pools, layout: DispatchLayout) -> None:
    case = Case((5, 4), 4, experts=4, topk=2, layout=layout, dtype=torch.float64)
    for outcome in rank_pools(2).run(training.repeated_backward, case, timeout_s=60):
        assert outcome == (True, True, False, True)


@LAYOUTS
def test_weights_of_quantized_rows(rank_pools, layout: DispatchLayout) -> None:
    case = Case((5, 4), 8, experts=4, topk=2, layout=layout, dtype=torch.float32, masked=0.2)
    assert all(rank_pools(2).run(training.quantized_weights, case, timeout_s=60))


@LAYOUTS
@pytest.mark.parametrize("leaves", [("rows",), ("weights",), ("rows", "weights")])
def test_gradients_of_kept_weights(rank_pools, layout: DispatchLayout, leaves) -> None:
    case = Case((5, 4), 6, experts=4, topk=2, layout=layout, dtype=torch.float64, masked=0.2)
    for worst in rank_pools(2).run(training.kept_weights, case, leaves, timeout_s=60):
        assert worst < 1e-12


@LAYOUTS
def test_combines_that_autograd_tracks(rank_pools, layout: DispatchLayout) -> None:
    """All where gradients are enabled, except those whose arguments exclude gradients."""
    case = Case((5, 4), 6, experts=4, topk=2, layout=layout, dtype=torch.float32)
    for seen in rank_pools(2).run(training.followed, case, timeout_s=60):
        assert [name for name, followed in seen.items() if followed] == ["plain", "later"]


def test_a_handle_keeps_no_graph_after_backward() -> None:
    """Handles kept for cached dispatches must not keep the graph of an earlier backward."""

    class Kept:
        tensor: torch.Tensor

    with make() as comm:
        fields = good()
        saved: weakref.WeakSet[Any] = weakref.WeakSet()

        def pack(tensor: torch.Tensor) -> Any:
            kept = Kept()
            kept.tensor = tensor
            saved.add(kept)
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            rows = fields.pop("input").requires_grad_().square()
        out, handle = comm.dispatch(rows, **fields)
        result = comm.combine(out.tokens, handle)
        assert len(saved) == 1
        result.sum().backward()
        del rows, out, result
        gc.collect()
        assert len(saved) == 0
        comm.dispatch(torch.zeros(T, H), None, previous_handle=handle)
