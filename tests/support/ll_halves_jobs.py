"""What tests of calls in halves run on every rank: hooks in any order, micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from expertlink import MoECommunicator
from expertlink.engines.nvlink.ll.dispatch import Tables
from support.ll_jobs import ROUNDS, combine_case
from support.oracle import Case, inputs_of
from support.oracle_results import combined_of
from support.rank_jobs import (
    check_output,
    counts_stay_on_device,
    dispatch_case,
    rows_for,
    same_bits,
)


def forgotten_hooks(comm: MoECommunicator, case: Case) -> None:
    """What nobody has finished, the next call finishes; later hooks do nothing."""
    rank = comm.rank
    first, first_handle, hook = dispatch_case(comm, case, return_recv_hook=True)
    second, handle = dispatch_case(comm, case)
    check_output(case, rank, first, static=counts_stay_on_device(comm))
    check_output(case, rank, second, static=counts_stay_on_device(comm))
    hook()
    rows = rows_for(case, rank, handle)
    result, hook = comm.combine(rows, handle, return_recv_hook=True)
    combine_case(comm, case, first_handle, "the combine after half of one")
    same_bits(result, combined_of(case, rank), "combine that another one finished")
    hook()
    same_bits(result, combined_of(case, rank), "combine that another one finished")


def dropped_results(comm: MoECommunicator, case: Case) -> None:
    """Whatever the caller has let go of, halves that are left write to no other tensor's memory."""
    rank = comm.rank
    dispatch_case(comm, case, return_recv_hook=True)
    guards = guards_like(comm, case)
    _, handle = dispatch_case(comm, case)
    rows = rows_for(case, rank, handle)
    comm.combine(rows, handle, return_recv_hook=True)
    guards += guards_like(comm, case)
    out, handle, _ = dispatch_case(comm, case, return_recv_hook=True)
    result, hook = comm.combine(rows, handle, return_recv_hook=True)
    del out, handle  # the tables, too, are the engine's to keep
    guards += guards_like(comm, case)
    hook()
    same_bits(result, combined_of(case, rank), "combine whose handle is gone")
    assert all((guard == 7).all() for guard in guards)


def guards_like(comm: MoECommunicator, case: Case) -> list[Tensor]:
    """Tensors that are likely to be given memory that a call has let go of."""
    device, own = comm.device, inputs_of(case, comm.rank)
    largest = comm.create_buffers()
    wanted = [value for value in vars(largest.output).values() if isinstance(value, Tensor)]
    sizes = [value.nbytes for value in wanted]
    if isinstance(largest.tables, Tables):
        sizes += [largest.tables.block.nbytes]
    engine: Any = comm._engine
    sizes += [4 * engine._low._tables.words(len(own.x_TH)), own.x_TH.nbytes, own.ids_TK.nbytes]
    del largest, wanted
    return [
        torch.full((max(size, 1),), 7, dtype=torch.uint8, device=device)
        for size in sizes
        for _ in range(3)
    ]


def three_in_flight(comm: MoECommunicator, case: Case) -> None:
    """The third of them finishes the first, the fourth the second."""
    rank = comm.rank
    calls = [dispatch_case(comm, case, return_recv_hook=True) for _ in range(4)]
    for out, _, _ in calls[:2]:
        check_output(case, rank, out, static=counts_stay_on_device(comm))
    calls[3][2]()  # also what comes before it
    for out, _, _ in calls:
        check_output(case, rank, out, static=counts_stay_on_device(comm))
    calls[2][2]()
    handles = [handle for _, handle, _ in calls]
    rows = [rows_for(case, rank, handles[0], round_=i) for i in range(4)]
    results = [
        comm.combine(own, handle, return_recv_hook=True)
        for own, handle in zip(rows, handles, strict=True)
    ]
    for index, (result, hook) in enumerate(results):
        hook()
        same_bits(result, combined_of(case, rank, round_=index), f"combine {index}")


def many_turns(comm: MoECommunicator, cases: Sequence[Case]) -> None:
    """Two micro-batches that take turns through several layers, as decode overlaps them."""
    rank = comm.rank
    with torch.no_grad():
        waiting: list[Callable[[], None]] = []
        for layer in range(5):
            batches = [cases[(2 * layer + batch) % len(cases)] for batch in range(2)]
            sent = [dispatch_case(comm, case, return_recv_hook=True) for case in batches]
            for finish in waiting:
                finish()
            waiting = []
            for index, (case, (out, handle, hook)) in enumerate(zip(batches, sent, strict=True)):
                hook()
                check_output(case, rank, out, static=counts_stay_on_device(comm))
                rows = rows_for(case, rank, handle, round_=index)
                result, hook = comm.combine(rows, handle, return_recv_hook=True)
                waiting.append(_compared(hook, result, combined_of(case, rank, round_=index)))
        for finish in waiting:
            finish()


def _compared(hook: Callable[[], None], result: Tensor, expected: Tensor) -> Callable[[], None]:
    def finish() -> None:
        hook()
        same_bits(result, expected, "combine of a micro-batch")

    return finish


def halves_and_whole_calls(comm: MoECommunicator, cases: Sequence[Case]) -> None:
    """Any mixture of halves, whole calls, cached ones and gradients of weights."""
    rank = comm.rank
    with torch.no_grad():
        for round_ in range(2 * ROUNDS):
            case, other = cases[round_ % len(cases)], cases[(round_ + 1) % len(cases)]
            out, handle, hook = dispatch_case(comm, case, return_recv_hook=True)
            if round_ % 2:
                hook()
            between, whole = dispatch_case(comm, other)
            check_output(case, rank, out, static=counts_stay_on_device(comm))
            check_output(other, rank, between, static=counts_stay_on_device(comm))
            x_TH = inputs_of(case, rank).x_TH.to(comm.device)
            again, cached, hook = comm.dispatch(
                x_TH, None, previous_handle=handle, return_recv_hook=True
            )
            combine_case(comm, other, whole, "whole combine behind half a dispatch")
            hook()
            check_output(case, rank, again, static=counts_stay_on_device(comm))
            rows = rows_for(case, rank, handle)
            result, hook = comm.combine(rows, handle, return_recv_hook=True)
            if round_ % 3 == 0:
                hook()
            combine_case(comm, case, cached, "combine of the cached dispatch", round_=1)
            same_bits(result, combined_of(case, rank), "combine in halves")
