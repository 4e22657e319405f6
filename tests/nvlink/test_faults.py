"""Calls of the nvlink engine that go wrong alike in both modes: what every rank learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from expertlink import DispatchLayout, InputError, MoECommunicator, TooManyTokensError
from expertlink.engines.nvlink import watchdog
from expertlink.launch import RankPool
from support import jobs, lost_ranks
from support.cases import LAYOUTS, MODES, Shape, fields_of, usual
from support.hosted import DEVICE, fleet_of, run_hosted
from support.jobs import dispatch_case, rows_for
from support.oracle import inputs_of
from support.wrong_arguments import (
    CULPRIT,
    FAULTY_IDS,
    MASKABLE,
    OTHERS,
    RANKS,
    SHAPES,
    dispatch_with,
    fails_once,
    judge,
    usual_case,
    with_ids,
)

pytestmark = pytest.mark.gpu(1)


# -- refusals -------------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize(("mode", "check"), [("ht", False), ("ht", True), ("ll", True)])
def test_a_wrong_form_on_one_rank(mode: str, check: bool, layout: DispatchLayout) -> None:
    """Ranks that agree beforehand name it, and the next call works."""
    case = usual_case(layout)
    call = dispatch_with(case, input=lambda x_TH: x_TH[:, :3])
    errors = run_hosted(fleet_of(mode, case, check_inputs=check), fails_once, case, call)
    judge(errors, own="InputError", text="input has shape (4, 3)")


@pytest.mark.parametrize("layout", [DispatchLayout.TOKEN_MAJOR, DispatchLayout.EXPERT_MAJOR])
@pytest.mark.parametrize(("mode", "check"), [("ht", False), ("ht", True), ("ll", True)])
def test_too_many_tokens_are_one_error_on_all_ranks(
    mode: str, check: bool, layout: DispatchLayout
) -> None:
    """Where ranks agree on the dispatch; also beside a rank that refuses it for another reason."""
    case = usual_case(layout)
    fleet = fleet_of(mode, case, check_inputs=check)
    most = fleet.config.max_tokens_per_rank

    def call(comm: MoECommunicator) -> object:
        count = (most + 15, 3, most + 1)[comm.rank]
        dtype = torch.float32 if comm.rank == 1 else case.dtype
        x_TH = torch.zeros((count, case.hidden), dtype=dtype, device=DEVICE)
        ids_TK = torch.zeros((count, case.topk), dtype=torch.int64, device=DEVICE)
        return comm.dispatch(x_TH, ids_TK)

    for error in run_hosted(fleet, fails_once, case, call):
        assert isinstance(error, TooManyTokensError), error
        assert (error.rank, error.num_tokens, error.capacity) == (0, most + 15, most)


@MODES
@LAYOUTS
@pytest.mark.parametrize(("first", "text"), FAULTY_IDS)
def test_faulty_ids_on_one_rank(
    mode: str, first: list[int], text: str, layout: DispatchLayout
) -> None:
    case = usual_case(layout)
    call = dispatch_with(case, topk_ids=with_ids(first))
    errors = run_hosted(fleet_of(mode, case, check_inputs=True), fails_once, case, call)
    judge(errors, own="InputError", text=text)


def each(mode: str, shapes: list[Any]) -> list[Any]:
    """Parameters `mode` and `shape`."""
    return [pytest.param(mode, *shape.values, id=f"{mode}-{shape.id}") for shape in shapes]


@pytest.mark.parametrize(("mode", "shape"), [*each("ht", MASKABLE), *each("ll", SHAPES)])
@pytest.mark.parametrize("first", [first for first, _ in FAULTY_IDS])
def test_unchecked_ids_stay_memory_safe(first: list[int], mode: str, shape: Shape) -> None:
    """An id that is out of range counts as no expert; a double one is the caller's affair."""
    case = shape.case((9, 4, 7), seed=1)
    change = dispatch_with(case, topk_ids=with_ids(first))

    def call(comm: MoECommunicator) -> None:
        result: Any = change(comm)
        if mode == "ll":
            rows = torch.zeros(result[1].rows_shape, dtype=case.dtype, device=DEVICE)
            comm.combine(rows, result[1])

    errors = run_hosted(fleet_of(mode, case), fails_once, case, call)
    assert errors == [None] * RANKS


@MODES
@LAYOUTS
def test_weights_on_some_ranks_only(mode: str, layout: DispatchLayout) -> None:
    case = usual_case(layout)
    call = dispatch_with(case, weights=lambda _: None)
    # Mode "ll" agrees beforehand only where it is asked to; see test_ll_refusals.py.
    fields = {"check_inputs": True} if mode == "ll" else {}
    errors = run_hosted(fleet_of(mode, case, **fields), fails_once, case, call)
    for error in errors:
        assert isinstance(error, InputError), errors
        assert "either weights or none" in str(error)


@MODES
@LAYOUTS
def test_one_rank_changes_its_routing(mode: str, layout: DispatchLayout) -> None:
    case = usual_case(layout)

    def call(comm: MoECommunicator) -> object:
        own = inputs_of(case, comm.rank)
        _, handle = dispatch_case(comm, case)
        if comm.rank == CULPRIT:
            own.ids_TK[0] = -1
        x_TH, ids_TK = own.x_TH.to(DEVICE), own.ids_TK.to(DEVICE)
        return comm.dispatch(x_TH, ids_TK, previous_handle=handle)

    errors = run_hosted(fleet_of(mode, case, check_inputs=True), fails_once, case, call)
    judge(errors, own="RoutingChangedError", text="topk_ids[0]=[-1, -1")


@MODES
@LAYOUTS
def test_one_rank_refuses_its_combine(mode: str, layout: DispatchLayout) -> None:
    case = usual_case(layout)

    def call(comm: MoECommunicator) -> object:
        _, handle = dispatch_case(comm, case)
        rows = rows_for(case, comm.rank, handle)
        return comm.combine(rows.float() if comm.rank == CULPRIT else rows, handle)

    errors = run_hosted(fleet_of(mode, case, check_inputs=True), fails_once, case, call)
    judge(errors, own="InputError", text="expert_output has dtype torch.float32")


# -- buffers --------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize(
    "layout", [DispatchLayout.FLAT, DispatchLayout.TOKEN_MAJOR], ids=lambda layout: layout.value
)
def test_a_buffer_larger_than_anything_that_can_arrive(mode: str, layout: DispatchLayout) -> None:
    case = usual_case(layout)
    buffer_rows = RANKS * case.max_tokens * case.topk + 5

    def job(comm: MoECommunicator) -> None:
        guard = torch.full((1 << 16,), 7, dtype=torch.int64, device=DEVICE)
        buffer = torch.zeros((buffer_rows, case.hidden), dtype=case.dtype, device=DEVICE)
        out, _ = dispatch_case(comm, case, output_buffer=buffer)
        torch.cuda.synchronize(DEVICE)
        jobs.check_output(case, comm.rank, out, static=True)
        assert (guard == 7).all()

    run_hosted(fleet_of(mode, case, static_shapes=True), job)


# -- ranks that do not come -----------------------------------------------------------------------

PHASES = pytest.mark.parametrize("phase", ["dispatch", "cached dispatch", "combine"])
ONE_BLOCK = {"num_sms_dispatch": 1, "num_sms_combine": 1}
THREE_BLOCKS = {"num_sms_dispatch": 3, "num_sms_combine": 3}


def absentees() -> list[Any]:
    """Parameters `mode`, `shape` and `fields` of communicators that lose a rank."""
    variants: list[tuple[str, DispatchLayout, dict[str, Any]]] = [
        *(("plain", layout, {}) for layout in DispatchLayout),
        ("zero_copy", DispatchLayout.TOKEN_MAJOR, {"zero_copy": True}),
        ("static_shapes", DispatchLayout.FLAT, {"static_shapes": True}),
        ("static_shapes", DispatchLayout.RANK_MAJOR, {"static_shapes": True}),
        ("one block", DispatchLayout.FLAT, ONE_BLOCK),
    ]
    ht = [
        pytest.param("ht", usual(RANKS, layout), fields, id=f"ht-{name}-{layout.value}")
        for name, layout, fields in variants
    ]
    ll = [
        pytest.param("ll", *shape.values, fields, id=f"ll-{name}-{shape.id}")
        for name, fields in (("one block", ONE_BLOCK), ("three blocks", THREE_BLOCKS))
        for shape in SHAPES
    ]
    return [*ht, *ll]


@PHASES
@pytest.mark.parametrize(("mode", "shape", "fields"), absentees())
def test_a_missing_rank_is_named(
    monkeypatch: pytest.MonkeyPatch, mode: str, shape: Shape, fields: dict[str, Any], phase: str
) -> None:
    if mode == "ht":  # the missing rank waits for its own GPU, which was never given the call
        monkeypatch.setattr(watchdog, "_MARGIN_S", 0.5)
    case = shape.case((24, 24, 24), seed=1)
    number = 1 if phase == "combine" else 2  # of the call that it misses
    fleet = fleet_of(mode, case, timeout_s=0.5, **fields)
    fleet.skip = lambda launch: (CULPRIT,) if launch == number else ()
    results = run_hosted(fleet, lost_ranks.lose_a_rank, case, phase, CULPRIT)
    for rank in OTHERS:
        lost_ranks.check_lost(results[rank], phase, 0.5)
    # New communicators find nothing of the failure.
    fleet.skip = lambda _: ()
    run_hosted(fleet, jobs.contracts, [case])


@pytest.mark.gpu(4)
@PHASES
@pytest.mark.parametrize(
    ("mode", "layout"), [("ht", "flat"), ("ht", "token_major"), ("ll", "expert_major")]
)
def test_a_killed_rank_is_named(phase: str, mode: str, layout: str) -> None:
    with RankPool(num_ranks=4, device="cuda") as pool:
        results = pool.run(
            lost_ranks.killed,
            CULPRIT,
            phase,
            DispatchLayout(layout),
            timeout_s=90,
            return_exceptions=True,
            **fields_of(mode),
        )
    for rank in (0, 2, 3):
        lost = results[rank]
        assert isinstance(lost, lost_ranks.Lost), lost
        lost_ranks.check_lost(lost, phase, 3.0)
