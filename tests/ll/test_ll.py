"""What mode "ll" alone can do, on one GPU, bit for bit against the oracle: see test_modes.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from expertlink import DispatchLayout, MoECommunicator
from expertlink.engines.nvlink import tuning
from expertlink.engines.nvlink.ll import plan as ll_plan
from support import decode, jobs, payloads, training
from support.cases import (
    EXACT_EDGES,
    EXPANDED,
    FEW_MASK_WORDS,
    LAYOUTS,
    aligned,
    blocks_of_scales,
    exact,
    half,
    many_bytes,
    many_tokens,
    routings,
    special,
    usual,
)
from support.hosted import fleet_of, run_cases, run_hosted
from support.jobs import config_of

pytestmark = pytest.mark.gpu(1)


@LAYOUTS
def test_many_tokens_and_experts(layout: DispatchLayout) -> None:
    """Masks of several words, and more experts than fit in shared memory with them."""
    shape = many_tokens(layout)
    assert ll_plan.experts_at_once(config_of(shape.case(), "cpu")) < shape.experts
    cases = [shape.case((1024, 0, 513), seed=1), shape.case((1, 1024, 33), masked=0.5, seed=2)]
    run_hosted(fleet_of("ll", cases[0], num_sms_dispatch=8), jobs.contracts, cases)


@LAYOUTS
def test_many_bytes(layout: DispatchLayout) -> None:
    """Long calls: whole, in halves, of set bits, quantized, exact."""
    shape = many_bytes(layout)
    cases = [shape.case((96, 0, 96, 41), seed=1), shape.case((7, 96, 96, 96), masked=0.4, seed=2)]
    sms = {"num_sms_dispatch": 8, "num_sms_combine": 8}
    fleet = fleet_of("ll", cases[0], **sms)
    run_hosted(fleet, jobs.contracts, cases)
    run_hosted(fleet, decode.many_turns, cases)
    ones = [dataclasses.replace(case, content="ones") for case in cases]
    run_cases(fleet, payloads.any_bits, ones)
    quantizing = fleet_of("ll", cases[0], quantization="e4m3_ue8m0", **sms)
    run_cases(quantizing, payloads.quantized, cases)
    if layout.expanded:
        precise = [dataclasses.replace(case, precision="exact") for case in (*cases, *ones)]
        fleet = fleet_of("ll", precise[0], **sms)
        run_hosted(fleet, jobs.contracts, precise[:2])
        run_cases(fleet, payloads.any_bits, precise[2:])


@LAYOUTS
def test_few_experts_at_a_time(monkeypatch: pytest.MonkeyPatch, layout: DispatchLayout) -> None:
    monkeypatch.setattr(tuning, "LL_MASK_WORDS", FEW_MASK_WORDS)
    cases = routings(usual(3, layout))
    run_hosted(fleet_of("ll", cases[0]), jobs.contracts, cases)


@LAYOUTS
@pytest.mark.parametrize(("blocks", "warps"), [(1, 16), (1, 2), (2, 3), (7, 16), (7, 5)])
def test_any_number_of_blocks_and_warps(blocks: int, warps: int, layout: DispatchLayout) -> None:
    cases = routings(usual(3, layout))
    sms = {"num_sms_dispatch": blocks, "num_sms_combine": blocks}
    run_hosted(fleet_of("ll", cases[0], warps=warps, **sms), jobs.contracts, cases)


@LAYOUTS
def test_float16(layout: DispatchLayout) -> None:
    cases = routings(half(layout))
    run_hosted(fleet_of("ll", cases[0]), jobs.contracts, cases)


@pytest.mark.parametrize(
    "layout", [layout for layout in DispatchLayout if layout.padded], ids=lambda item: item.value
)
def test_padded_layouts_need_no_static_shapes(layout: DispatchLayout) -> None:
    cases = routings(usual(3, layout))
    run_hosted(fleet_of("ll", cases[0], static_shapes=False), jobs.contracts, cases)


@LAYOUTS
def test_odd_addresses(layout: DispatchLayout) -> None:
    case = usual(3, layout).case(seed=1)
    run_cases(fleet_of("ll", case), jobs.odd_addresses, [case])


# -- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    # Rows beyond the last of TOKEN_MAJOR hold anything, which only the experts can leave out.
    [layout for layout in DispatchLayout if layout is not DispatchLayout.TOKEN_MAJOR],
    ids=lambda layout: layout.value,
)
@pytest.mark.parametrize("ranks", [1, 3])
def test_gradients(ranks: int, layout: DispatchLayout) -> None:
    case = usual(ranks, layout).case(masked=0.2)

    def job(comm: MoECommunicator) -> dict[str, float]:
        # In the rank's own thread: the others have to be in backward at the same time.
        with torch.autograd.set_multithreading_enabled(False):
            return training.gradients_on(comm, case)

    for worst in run_hosted(fleet_of("ll", case), job):
        assert max(worst.values()) < 0.05, worst


@LAYOUTS
@pytest.mark.parametrize("ranks", [1, 3])
def test_weight_gradients_return_to_their_choice(ranks: int, layout: DispatchLayout) -> None:
    case = usual(ranks, layout).case(masked=0.2)
    fleet = fleet_of("ll", case)
    assert all(run_hosted(fleet, training.weight_grads_on, case))


# -- combines -------------------------------------------------------------------------------------


@EXPANDED
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_exact_sums(ranks: int, layout: DispatchLayout) -> None:
    cases = routings(exact(usual(ranks, layout)))
    run_hosted(fleet_of("ll", cases[0]), jobs.contracts, cases)


@EXPANDED
@pytest.mark.parametrize("name", EXACT_EDGES)
def test_exact_sums_at_the_edges(name: str, layout: DispatchLayout) -> None:
    shape = exact(special(name, layout))
    cases = [shape.case(seed=1), shape.case(masked=0.4, weighted=False, seed=2)]
    run_hosted(fleet_of("ll", cases[0]), jobs.contracts, cases)


def test_exact_sums_of_aligned_groups() -> None:
    cases = routings(exact(aligned(3)))
    run_hosted(fleet_of("ll", cases[0]), jobs.contracts, cases)


@EXPANDED
def test_exact_sums_do_not_depend_on_the_placement(layout: DispatchLayout) -> None:
    shape = exact(usual(3, layout))
    case = shape.case((9, 4, 7), placement="scattered", seed=8)
    run_hosted(fleet_of("ll", case), jobs.contracts, [case])


@EXPANDED
@pytest.mark.parametrize("name", EXACT_EDGES)
def test_exact_sums_with_weights_of_the_tokens_ranks(name: str, layout: DispatchLayout) -> None:
    shape = exact(special(name, layout))
    cases = [shape.case(seed=1), shape.case(masked=0.4, seed=2)]
    run_cases(fleet_of("ll", cases[0]), decode.topk_weights, cases)


@EXPANDED
@pytest.mark.parametrize("precision", ["wire", "exact"])
def test_weights_of_the_tokens_ranks_for_quantized_rows(
    precision: str, layout: DispatchLayout
) -> None:
    case = blocks_of_scales(layout).case(masked=0.2, seed=1)
    case = dataclasses.replace(case, precision=precision)
    fleet = fleet_of("ll", case, quantization="e4m3_ue8m0")
    run_cases(fleet, decode.topk_weights, [case])


@EXPANDED
@pytest.mark.parametrize("precision", ["wire", "exact"])
def test_gradients_of_weights_of_the_combine(precision: str, layout: DispatchLayout) -> None:
    case = dataclasses.replace(usual(3, layout).case(masked=0.2), precision=precision)

    def job(comm: MoECommunicator) -> dict[str, float]:
        with torch.autograd.set_multithreading_enabled(False):  # as in test_gradients
            return training.gradients_on(comm, case, at_combine=True)

    for worst in run_hosted(fleet_of("ll", case), job):
        assert max(worst.values()) < 0.05, worst


@EXPANDED
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_weights_of_the_combine(ranks: int, layout: DispatchLayout) -> None:
    for shape in (usual(ranks, layout), exact(usual(ranks, layout))):
        cases = routings(shape)
        run_cases(fleet_of("ll", cases[0]), decode.own_weights, cases)
