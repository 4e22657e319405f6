"""Calls that go wrong in mode "ll" alone: disagreement that only the kernels see, and no room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from expertlink import (
    CapacityError,
    DispatchLayout,
    ExpertlinkError,
    InputError,
    MoECommunicator,
    PeerError,
)
from expertlink.launch import RankPool
from support import faults, jobs, lost_ranks
from support.cases import LAYOUTS, Shape, exact, usual
from support.hosted import DEVICE, fleet_of, run_hosted
from support.jobs import dispatch_case
from support.oracle import Case, inputs_of
from support.wrong_arguments import (
    CULPRIT,
    RANKS,
    dispatch_with,
    rows_of,
    usual_case,
)

pytestmark = pytest.mark.gpu(1)
FLAT, TOKEN_MAJOR = DispatchLayout.FLAT, DispatchLayout.TOKEN_MAJOR


# -- disagreement that only the kernels see -------------------------------------------------------


def packed_of_width(case: Case) -> Callable[[MoECommunicator], object]:
    """A dispatch of bytes; those of one rank are fewer."""

    def call(comm: MoECommunicator) -> object:
        count, width = case.tokens[comm.rank], 32 if comm.rank == CULPRIT else 48
        rows = torch.zeros((count, width), dtype=torch.uint8, device=DEVICE)
        ids_TK = inputs_of(case, comm.rank).ids_TK.to(DEVICE)
        return comm.dispatch(rows, ids_TK, scales=rows[:, :4].contiguous())

    return call


DISAGREEMENTS: list[tuple[str, Callable[[Case], Callable[..., object]], str]] = [
    (
        "refused",
        lambda case: dispatch_with(case, input=lambda x_TH: x_TH[:, :3]),
        "PeerError: rank 1 refused dispatch #",
    ),
    (
        "weights",
        lambda case: dispatch_with(case, weights=lambda _: None),
        "did not happen: some ranks pass weights, others do not",
    ),
    ("width", packed_of_width, "bytes of a row: 48 on ranks 0, 2, 32 on rank 1"),
]


@LAYOUTS
@pytest.mark.parametrize(
    ("what", "make", "text"), DISAGREEMENTS, ids=[name for name, *_ in DISAGREEMENTS]
)
def test_disagreement_without_agreement(
    what: str, make: Callable[[Case], Callable[..., object]], text: str, layout: DispatchLayout
) -> None:
    """All ranks learn the same at their next call; from then on only `clear_mask` helps."""
    case = usual_case(layout)
    call = make(case)

    def job(comm: MoECommunicator) -> tuple[ExpertlinkError | None, ...]:
        with torch.no_grad():
            jobs.contracts(comm, [case])
            own = faults.error_of(lambda: call(comm))
            torch.cuda.synchronize(DEVICE)
            later = [faults.error_of(comm.check_health) for _ in range(2)]
            later.append(faults.error_of(lambda: dispatch_case(comm, case)))
            comm.clear_mask()
            jobs.contracts(comm, [case])
        return (own, *later)

    said: set[str] = set()
    for rank, (own, *later) in enumerate(run_hosted(fleet_of("ll", case), job)):
        refused = rank == CULPRIT and what == "refused"
        assert isinstance(own, InputError) if refused else own is None, own
        assert isinstance(later[0], (PeerError, InputError)), later
        said.add(f"{type(later[0]).__name__}: {later[0]}")
        assert [type(error).__name__ for error in later[1:]] == ["ClosedError"] * 2
    assert len(said) == 1, said
    assert text in said.pop()


# -- capacity -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [usual(RANKS, FLAT), usual(RANKS, TOKEN_MAJOR), exact(usual(RANKS, FLAT))],
    ids=["flat", "token_major", "flat-exact"],
)
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("room_for", ["limit", "buffer"])
def test_what_found_no_room_is_reported(room_for: str, at_once: bool, shape: Shape) -> None:
    """Rows are dropped, nothing else is touched, nobody waits, and all ranks are told alike."""
    fits, large = shape.case((9, 4, 7), seed=1), shape.case((40, 2, 40), seed=2)
    room = max(rows_of(fits)) + 3
    needed = rows_of(large)

    def job(comm: MoECommunicator) -> ExpertlinkError | None:
        with torch.no_grad():
            guarded = torch.full((room + 64, large.hidden), 7.0, dtype=large.dtype, device=DEVICE)
            options: dict[str, Any] = {}
            if room_for == "buffer":
                options["output_buffer"] = guarded[:room]
            _, handle = dispatch_case(comm, large, **options)
            rows = torch.zeros(handle.rows_shape, dtype=large.dtype, device=DEVICE)
            if not at_once:
                torch.cuda.synchronize(DEVICE)
                comm.check_health()  # others cannot know of it yet, so nobody does
            comm.combine(rows, handle)
            torch.cuda.synchronize(DEVICE)
            error = faults.error_of(comm.check_health)
            comm.check_health()
            assert (guarded[room:] == 7.0).all()
            jobs.contracts(comm, [fits])
            return error

    limit = {"max_recv_tokens_per_rank": room} if room_for == "limit" else {}
    fleet = fleet_of("ll", fits, timeout_s=2.0, **limit)
    first = next(rank for rank, rows in enumerate(needed) if rows > room)
    for error in run_hosted(fleet, job):
        assert isinstance(error, CapacityError), error
        assert (error.rank, error.rows, error.capacity) == (first, needed[first], room)


def test_no_room_at_all() -> None:
    """In a process of its own: a fault would end the CUDA context."""
    with RankPool(num_ranks=1, device="cuda") as pool:
        for layout in (FLAT, TOKEN_MAJOR):
            case = usual(1, layout).case((9,), seed=1)
            assert pool.run(lost_ranks.no_room_at_all, case, timeout_s=60) == [9]
