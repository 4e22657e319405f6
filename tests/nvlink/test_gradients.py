"""Backward of weighted combines on one GPU: bits, and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from expertlink import DispatchLayout, MoECommunicator
from support import training
from support.cases import EXPANDED, MODES, aligned, half, large_rows, special, usual
from support.hosted import fleet_of, run_hosted
from support.jobs import rows_for
from support.oracle import Case, inputs_of, token_grads

pytestmark = pytest.mark.gpu(1)


def in_own_threads(job: Callable[..., Any], cases: Sequence[Case]) -> Callable[..., None]:
    """The job for each case; backward in the rank's own thread, where the others are too."""

    def every_case(comm: MoECommunicator) -> None:
        with torch.autograd.set_multithreading_enabled(False):
            for case in cases:
                job(comm, case)

    return every_case


@MODES
@EXPANDED
@pytest.mark.parametrize("name", ["usual", "float16", "narrow", "model"])
def test_bits_of_backward(mode: str, name: str, layout: DispatchLayout) -> None:
    if name == "usual":
        shape = usual(3, layout)
    else:
        shape = half(layout) if name == "float16" else special(name, layout)
    tokens = (5, 0, 7, 3)[: shape.ranks]
    cases = [shape.case(tokens, masked=0.2, seed=1), shape.case(tokens, weighted=False, seed=2)]
    fleet = fleet_of(mode, cases[0])
    run_hosted(fleet, in_own_threads(training.backward_bits_on, cases))


@MODES
@pytest.mark.parametrize("static", [False, True])
def test_bits_of_backward_with_gaps(mode: str, static: bool) -> None:
    cases = [aligned(3).case((5, 0, 7), masked=0.2, seed=1)]
    fields = {"static_shapes": True} if static else {}
    fleet = fleet_of(mode, cases[0], **fields)
    run_hosted(fleet, in_own_threads(training.backward_bits_on, cases))


@EXPANDED
def test_memory_of_backward(layout: DispatchLayout) -> None:
    """Only the gradients that arrive are as large as the expert outputs."""
    case = large_rows(layout).case((512,), seed=1)
    spent: list[tuple[int, int]] = []

    def job(comm: MoECommunicator) -> None:
        own, device = inputs_of(case, 0), comm.device
        assert own.weights_TK is not None
        weights_TK = own.weights_TK.to(device).requires_grad_()
        _, handle = comm.dispatch(own.x_TH.to(device), own.ids_TK.to(device), weights_TK)
        rows = rows_for(case, 0, handle).requires_grad_()
        result = comm.combine(rows, handle)
        grads = token_grads(case, 0).to(device)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.autograd.set_multithreading_enabled(False):
            result.backward(grads)
        spent.append((torch.cuda.max_memory_allocated(device) - before, rows.nbytes))

    run_hosted(fleet_of("ht", case), job)
    [(peak, size)] = spent
    assert size <= peak < 1.25 * size, (peak, size)
