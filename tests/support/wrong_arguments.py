"""One rank passes other arguments than it should: calls, and what every rank has to raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from expertlink import (
    CapacityError,
    DispatchLayout,
    ExpertlinkError,
    MoECommunicator,
    PeerError,
)
from support.cases import exact, usual
from support.faults import error_of
from support.jobs import contracts
from support.oracle import Case, expected_of, inputs_of

RANKS, CULPRIT = 3, 1
OTHERS = [rank for rank in range(RANKS) if rank != CULPRIT]
Errors = list[ExpertlinkError | None]

MASKABLE = [pytest.param(usual(RANKS, layout), id=layout.value) for layout in DispatchLayout]
SHAPES = [
    *MASKABLE,
    pytest.param(exact(usual(RANKS, DispatchLayout.FLAT)), id="flat-exact"),
    pytest.param(exact(usual(RANKS, DispatchLayout.EXPERT_MAJOR)), id="expert_major-exact"),
]
# Faulty ids of `usual` shapes, and what the error says of them.
FAULTY_IDS: list[tuple[list[int], str]] = [
    ([96], "topk_ids[2]=[96,"),
    ([-2], "topk_ids[2]=[-2,"),
    ([2**40 + 1], f"topk_ids[2]=[{2**40 + 1},"),
    ([5, 5], "an expert is chosen twice"),
]


def dispatch_with(case: Case, **changed: Callable[[torch.Tensor], Any]) -> Callable[..., object]:
    """A dispatch in which one rank passes arguments that were changed."""

    def call(comm: MoECommunicator) -> object:
        own = inputs_of(case, comm.rank)
        arguments: dict[str, Any] = {"input": own.x_TH, "topk_ids": own.ids_TK}
        if own.weights_TK is not None:
            arguments["weights"] = own.weights_TK
        if comm.rank == CULPRIT:
            arguments.update({name: change(arguments[name]) for name, change in changed.items()})
        on_gpu: dict[str, Any] = {
            k: None if v is None else v.to(comm.device) for k, v in arguments.items()
        }
        return comm.dispatch(**on_gpu)

    return call


def usual_case(layout: DispatchLayout) -> Case:
    return usual(RANKS, layout).case((9, 4, 7), seed=1)


def judge(errors: Errors, *, own: str, text: str) -> None:
    """The culprit raised its own error, the others name it and repeat it."""
    assert type(errors[CULPRIT]).__name__ == own, errors
    assert text in str(errors[CULPRIT])
    for rank in OTHERS:
        error = errors[rank]
        assert isinstance(error, PeerError), errors
        assert error.ranks == (CULPRIT,)
        assert f"rank {CULPRIT} refused it: {own}" in str(error)
        assert text in str(error)


def with_ids(first: list[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Token 2 chooses these experts first."""

    def change(ids_TK: torch.Tensor) -> torch.Tensor:
        ids_TK[2, : len(first)] = torch.tensor(first)
        return ids_TK

    return change


def check_overflow(errors: Errors, rank: int, rows: int, room: int) -> None:
    """One error, the same on all ranks."""
    for error in errors:
        assert isinstance(error, CapacityError), errors
        assert (error.rank, error.rows, error.capacity) == (rank, rows, room)
        assert f"rank {rank} " in str(error)
        assert f" {rows} rows" in str(error)
    assert len({str(error) for error in errors}) == 1


def rows_of(case: Case) -> list[int]:
    """Rows that every rank receives, gaps of FLAT included."""
    return [expected_of(case, rank).shape[0] for rank in range(case.ranks)]


def fails_once(
    comm: MoECommunicator, case: Case, call: Callable[[MoECommunicator], object]
) -> ExpertlinkError | None:
    """The error of one call; the next ones are as if it had not been made."""
    error = error_of(lambda: call(comm))
    torch.cuda.synchronize(comm.device)
    contracts(comm, [case])
    return error
