"""Low-latency mode on one GPU: up to 72 ranks in one process, bit for bit against the oracle."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import decode_jobs
import latency_jobs
import nvlink_jobs
import pytest
import torch
import train_jobs
from hosted import DEVICE, Fleet, HostedCommunicator, run_hosted
from nvlink_cases import (
    EXACT_EDGES,
    FEW_MASK_WORDS,
    LATENCY,
    RANKS,
    SMS,
    SPECIAL,
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
from oracle import Case
from rank_jobs import check_contract, config_of

from expertlink import BlockFormat, DispatchLayout, MoECommunicator
from expertlink.engines.nvlink import latency_plan

pytestmark = pytest.mark.gpu(1)
LAYOUTS = pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)
EXPANDED = pytest.mark.parametrize(
    "layout",
    [layout for layout in DispatchLayout if layout.expanded],
    ids=lambda layout: layout.value,
)
FORMATS = pytest.mark.parametrize("fmt", list(BlockFormat), ids=lambda fmt: fmt.value)
ORDERS = pytest.mark.parametrize("order", ["row_major", "column_major"])
MANY_RANKS = 8  # above it blocks have few warps, so that all ranks fit on a GPU


def fleet_of(case: Case, *, warps: int | None = None, **fields: Any) -> Fleet:
    """Hosted ranks for the configuration of a case."""
    config = config_of(case, DEVICE, **{**LATENCY, **SMS, **fields})
    if warps is None:
        warps = 16 if case.ranks <= MANY_RANKS else 4
    fleet = Fleet(config, case.ranks, latency_warps=warps)
    assert fleet.latency
    return fleet


def run(fleet: Fleet, job: Any, cases: list[Case], *args: Any) -> None:
    run_hosted(fleet, latency_jobs.without_gradients, job, cases, *args)


# -- the contract ---------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("ranks", RANKS)
def test_bits_equal_the_oracle(ranks: int, layout: DispatchLayout) -> None:
    cases = routings(usual(ranks, layout))
    cases = cases if ranks <= MANY_RANKS else cases[:4]
    run_hosted(fleet_of(cases[0]), nvlink_jobs.contracts, cases)


@LAYOUTS
@pytest.mark.parametrize("name", SPECIAL)
def test_edges_of_what_the_kernels_take(name: str, layout: DispatchLayout) -> None:
    shape = special(name, layout)
    cases = [shape.case(seed=1), shape.case(masked=0.4, weighted=False, seed=2)]
    run_hosted(fleet_of(cases[0]), nvlink_jobs.contracts, cases)


@LAYOUTS
@pytest.mark.parametrize("ranks", [3, 72])
def test_any_placement(ranks: int, layout: DispatchLayout) -> None:
    """Uneven blocks, and at 72 ranks some without any expert."""
    tokens = tuple(min(count, 7) for count in usual(ranks, layout).case().tokens)
    case = usual(ranks, layout).case(tokens, placement="scattered", seed=8)
    assert ranks < 72 or any(not case.local_experts(rank) for rank in range(ranks))
    run_hosted(fleet_of(case), nvlink_jobs.contracts, [case])


@pytest.mark.parametrize("ranks", [3, 8])
def test_alignment(ranks: int) -> None:
    cases = routings(aligned(ranks))
    run_hosted(fleet_of(cases[0]), nvlink_jobs.contracts, cases)


@LAYOUTS
def test_many_tokens_and_experts(layout: DispatchLayout) -> None:
    """Masks of several words, and more experts than fit beside them."""
    shape = many_tokens(layout)
    assert latency_plan.experts_at_once(config_of(shape.case(), "cpu")) < shape.experts
    cases = [shape.case((1024, 0, 513), seed=1), shape.case((1, 1024, 33), masked=0.5, seed=2)]
    run_hosted(fleet_of(cases[0], num_sms_dispatch=8), nvlink_jobs.contracts, cases)


@LAYOUTS
def test_many_bytes(layout: DispatchLayout) -> None:
    """Long calls: whole, in halves, of set bits, quantized, exact."""
    shape = many_bytes(layout)
    cases = [shape.case((96, 0, 96, 41), seed=1), shape.case((7, 96, 96, 96), masked=0.4, seed=2)]
    sms = {"num_sms_dispatch": 8, "num_sms_combine": 8}
    fleet = fleet_of(cases[0], **sms)
    run_hosted(fleet, nvlink_jobs.contracts, cases)
    run_hosted(fleet, latency_jobs.many_turns, cases)
    ones = [dataclasses.replace(case, content="ones") for case in cases]
    run(fleet, latency_jobs.any_bits, ones)
    quantizing = fleet_of(cases[0], quantization="e4m3_ue8m0", **sms)
    run(quantizing, latency_jobs.quantized, cases)
    if layout.expanded:
        precise = [dataclasses.replace(case, precision="exact") for case in (*cases, *ones)]
        fleet = fleet_of(precise[0], **sms)
        run_hosted(fleet, nvlink_jobs.contracts, precise[:2])
        run(fleet, latency_jobs.any_bits, precise[2:])


@LAYOUTS
def test_few_experts_at_a_time(monkeypatch: pytest.MonkeyPatch, layout: DispatchLayout) -> None:
    monkeypatch.setattr(latency_plan, "_MASK_WORDS", FEW_MASK_WORDS)
    cases = routings(usual(3, layout))
    run_hosted(fleet_of(cases[0]), nvlink_jobs.contracts, cases)


@LAYOUTS
@pytest.mark.parametrize(("blocks", "warps"), [(1, 16), (1, 2), (2, 3), (7, 16), (7, 5)])
def test_any_number_of_blocks_and_warps(blocks: int, warps: int, layout: DispatchLayout) -> None:
    cases = routings(usual(3, layout))
    sms = {"num_sms_dispatch": blocks, "num_sms_combine": blocks}
    run_hosted(fleet_of(cases[0], warps=warps, **sms), nvlink_jobs.contracts, cases)


@LAYOUTS
def test_float16(layout: DispatchLayout) -> None:
    cases = routings(half(layout))
    run_hosted(fleet_of(cases[0]), nvlink_jobs.contracts, cases)


@LAYOUTS
def test_checked_inputs(layout: DispatchLayout) -> None:
    cases = routings(usual(3, layout))
    fleet = fleet_of(cases[0], check_inputs=True)
    run_hosted(fleet, nvlink_jobs.contracts, cases)
    run(fleet, latency_jobs.odd_addresses, cases[:1])


@LAYOUTS
def test_a_limit(layout: DispatchLayout) -> None:
    if layout.padded:
        pytest.skip("padded layouts have no limit")
    case = usual(3, layout).case((9, 4, 0), seed=1)
    limit = max(nvlink_jobs.expected_of(case, rank).shape[0] for rank in range(3))
    run_hosted(fleet_of(case, max_recv_tokens_per_rank=limit), nvlink_jobs.contracts, [case])


@pytest.mark.parametrize(
    "layout", [layout for layout in DispatchLayout if layout.padded], ids=lambda item: item.value
)
def test_padded_layouts_need_no_static_shapes(layout: DispatchLayout) -> None:
    cases = routings(usual(3, layout))
    run_hosted(fleet_of(cases[0], static_shapes=False), nvlink_jobs.contracts, cases)


@LAYOUTS
def test_odd_addresses(layout: DispatchLayout) -> None:
    case = usual(3, layout).case(seed=1)
    run(fleet_of(case), latency_jobs.odd_addresses, [case])


# -- gradients ------------------------------------------------------------------------------------


@LAYOUTS
def test_padding_is_zero_where_gradients_may_be_tracked(layout: DispatchLayout) -> None:
    case = usual(3, layout).case(seed=1)
    run_hosted(fleet_of(case), check_contract, case)
    if layout.padded:
        run_hosted(fleet_of(case), nvlink_jobs.zero_padding, case)


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
            return train_jobs.gradients_on(comm, case)

    for worst in run_hosted(fleet_of(case), job):
        assert max(worst.values()) < 0.05, worst


@LAYOUTS
@pytest.mark.parametrize("ranks", [1, 3])
def test_weight_gradients_return_to_their_choice(ranks: int, layout: DispatchLayout) -> None:
    case = usual(ranks, layout).case(masked=0.2)
    fleet = fleet_of(case)
    assert all(run_hosted(fleet, train_jobs.weight_grads_on, case))


# -- what rows hold -------------------------------------------------------------------------------


@LAYOUTS
def test_rows_of_set_bits(layout: DispatchLayout) -> None:
    """They look like memory that nobody has written to."""
    for shape in (usual(3, layout), half(layout), special("model", layout)):
        cases = [shape.case(seed=1, content="ones"), shape.case(seed=2, masked=0.5, content="ones")]
        run(fleet_of(cases[0]), latency_jobs.any_bits, cases)


@EXPANDED
def test_rows_of_set_bits_in_exact_sums(layout: DispatchLayout) -> None:
    for shape in (exact(usual(3, layout)), exact(special("model", layout))):
        cases = [shape.case(seed=1, content="ones"), shape.case(seed=2, masked=0.5, content="ones")]
        run(fleet_of(cases[0]), latency_jobs.any_bits, cases)


@LAYOUTS
@ORDERS
def test_packed_rows_of_set_bits(order: str, layout: DispatchLayout) -> None:
    case = usual(3, layout).case(seed=1, weighted=False)
    run(fleet_of(case, scale_order=order), latency_jobs.any_packed_bits, [case])


@LAYOUTS
@pytest.mark.parametrize("kind", [BlockFormat.E4M3_FLOAT32, BlockFormat.E4M3_UE8M0, "opaque"])
def test_rows_that_the_caller_quantized(kind: str, layout: DispatchLayout) -> None:
    shape = usual(3, layout)
    for case in (shape.case(seed=1), shape.case(masked=0.5, weighted=False, seed=2)):
        run_hosted(fleet_of(case), nvlink_jobs.packed_rows, case, kind)


def test_gaps_of_packed_rows_are_zero() -> None:
    case = aligned(3).case(seed=1)
    run_hosted(fleet_of(case), nvlink_jobs.packed_rows, case, "opaque")


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
    fleet = fleet_of(cases[0], quantization=fmt, scale_order=order)
    run(fleet, latency_jobs.quantized, cases)


@LAYOUTS
@FORMATS
def test_other_widths_quantized_on_the_way(fmt: BlockFormat, layout: DispatchLayout) -> None:
    """float16, a row of one step, parts of several steps, groups with gaps."""
    shapes = [half(layout), usual(3, layout), special("model", layout)]
    if layout is DispatchLayout.FLAT:
        shapes.append(aligned(3))
    for shape in shapes:
        case = shape.case(seed=4, content="extreme")
        run(fleet_of(case, quantization=fmt), latency_jobs.quantized, [case])


@LAYOUTS
@ORDERS
@FORMATS
def test_order_of_scales(fmt: BlockFormat, order: str, layout: DispatchLayout) -> None:
    case = blocks_of_scales(layout).case(seed=5)
    fleet = fleet_of(case, quantization=fmt, scale_order=order)
    run(fleet, decode_jobs.scales_in_order, [case])


# -- halves ---------------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_halves(ranks: int, layout: DispatchLayout) -> None:
    cases = routings(usual(ranks, layout))
    fleet = fleet_of(cases[0])
    run(fleet, decode_jobs.halves, cases[:3])
    run(fleet, decode_jobs.in_turns, cases[:3])
    run(fleet, latency_jobs.forgotten_hooks, cases[:2])
    run(fleet, latency_jobs.three_in_flight, cases[:2])
    run(fleet, latency_jobs.dropped_results, cases[:2])


@LAYOUTS
def test_micro_batches(layout: DispatchLayout) -> None:
    cases = routings(usual(3, layout))
    fleet = fleet_of(cases[0])
    run_hosted(fleet, latency_jobs.many_turns, cases)
    run_hosted(fleet, latency_jobs.halves_and_whole_calls, cases)


@EXPANDED
def test_halves_of_exact_combines(layout: DispatchLayout) -> None:
    cases = routings(exact(usual(3, layout)))
    fleet = fleet_of(cases[0])
    run_hosted(fleet, latency_jobs.many_turns, cases)
    run_hosted(fleet, latency_jobs.halves_and_whole_calls, cases)


@LAYOUTS
def test_halves_of_quantized_dispatches(layout: DispatchLayout) -> None:
    case = blocks_of_scales(layout).case(seed=1)
    fleet = fleet_of(case, quantization="e4m3_ue8m0")

    def job(comm: MoECommunicator) -> None:
        with torch.no_grad():
            own = latency_jobs.inputs_of(case, comm.rank)
            x_TH, ids_TK = own.x_TH.to(DEVICE), own.ids_TK.to(DEVICE)
            calls = [comm.dispatch(x_TH, ids_TK, return_recv_hook=True) for _ in range(2)]
            for out, _, hook in calls:
                hook()
                latency_jobs.check_quantized(
                    case, comm.rank, out, BlockFormat.E4M3_UE8M0, order="row_major"
                )

    run_hosted(fleet, job)


@LAYOUTS
def test_communicators_that_share_memory(layout: DispatchLayout) -> None:
    """Their calls are one sequence, whole or in halves."""
    cases = routings(usual(3, layout))
    fleet = fleet_of(cases[0])

    def job(first: MoECommunicator) -> None:
        assert isinstance(first, HostedCommunicator)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            second = stack.enter_context(
                HostedCommunicator(fleet, first.rank, share_with=first, num_sms_dispatch=2)
            )
            comms = [first, second]
            for case in cases[:4]:
                for comm in comms:
                    check_contract(comm, case)
            for case, other in ((cases[0], cases[1]), (cases[1], cases[3])):
                pairs = list(zip(comms, (case, other), strict=True))
                sent = [
                    latency_jobs.dispatch_case(comm, own, return_recv_hook=True)
                    for comm, own in pairs
                ]
                sent[1][2]()  # finishes the other communicator's call, too
                for (comm, own), (out, handle, _) in zip(pairs, sent, strict=True):
                    latency_jobs.check_output(own, comm.rank, out, static=True)
                    latency_jobs.combine_case(comm, own, handle, "combine")

    run_hosted(fleet, job)


# -- combines -------------------------------------------------------------------------------------


@EXPANDED
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_exact_sums(ranks: int, layout: DispatchLayout) -> None:
    cases = routings(exact(usual(ranks, layout)))
    run_hosted(fleet_of(cases[0]), nvlink_jobs.contracts, cases)


@EXPANDED
@pytest.mark.parametrize("name", EXACT_EDGES)
def test_exact_sums_at_the_edges(name: str, layout: DispatchLayout) -> None:
    shape = exact(special(name, layout))
    cases = [shape.case(seed=1), shape.case(masked=0.4, weighted=False, seed=2)]
    run_hosted(fleet_of(cases[0]), nvlink_jobs.contracts, cases)


def test_exact_sums_of_aligned_groups() -> None:
    cases = routings(exact(aligned(3)))
    run_hosted(fleet_of(cases[0]), nvlink_jobs.contracts, cases)


@EXPANDED
def test_exact_sums_do_not_depend_on_the_placement(layout: DispatchLayout) -> None:
    shape = exact(usual(3, layout))
    case = shape.case((9, 4, 7), placement="scattered", seed=8)
    run_hosted(fleet_of(case), nvlink_jobs.contracts, [case])


@EXPANDED
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_weights_of_the_combine(ranks: int, layout: DispatchLayout) -> None:
    for shape in (usual(ranks, layout), exact(usual(ranks, layout))):
        cases = routings(shape)
        run(fleet_of(cases[0]), decode_jobs.own_weights, cases)


# -- buffers, ranges, statistics ------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("ranks", [1, 3])
def test_buffers(ranks: int, layout: DispatchLayout) -> None:
    cases = routings(usual(ranks, layout))
    fleet = fleet_of(cases[0])
    run_hosted(fleet, latency_jobs.buffers_of_every_call, cases)
    run(fleet, decode_jobs.buffers, cases[:3])
    run(fleet, decode_jobs.stale_handles, cases[:1])


@LAYOUTS
@ORDERS
def test_buffers_of_packed_rows(order: str, layout: DispatchLayout) -> None:
    case = blocks_of_scales(layout).case(masked=0.2, weighted=False)
    fleet = fleet_of(case, quantization="e4m3_pow2", scale_order=order)
    run(fleet, decode_jobs.buffers_of_packed_rows, [case])


@EXPANDED
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_ranges(ranks: int, layout: DispatchLayout) -> None:
    cases = routings(usual(ranks, layout))
    run(fleet_of(cases[0]), decode_jobs.ranges, cases)
    if layout is DispatchLayout.FLAT and ranks > 1:
        case = aligned(ranks).case(seed=1)
        run(fleet_of(case), decode_jobs.ranges, [case])


@LAYOUTS
@pytest.mark.parametrize("ranks", [1, 3])
def test_statistics(ranks: int, layout: DispatchLayout) -> None:
    shapes = [usual(ranks, layout)]
    if layout.expanded:
        shapes.append(exact(shapes[0]))
    for shape in shapes:
        for case in routings(shape)[:3]:
            run(fleet_of(case), decode_jobs.statistics, [case])


@LAYOUTS
def test_statistics_of_packed_rows(layout: DispatchLayout) -> None:
    case = blocks_of_scales(layout).case(seed=1)
    fleet = fleet_of(case, quantization="e4m3_ue8m0")
    run(fleet, latency_jobs.statistics_of_packed_rows, [case])
