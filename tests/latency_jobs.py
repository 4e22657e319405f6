"""What tests of low-latency mode run on every rank, hosted in a thread or in a process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from oracle import (
    Case,
    combined_of,
    expected_of,
    inputs_of,
    received_of,
    returned_grads,
    slot_grads,
)
from rank_jobs import (
    check_output,
    counts_stay_on_device,
    dispatch_case,
    filled_up,
    poison_memory,
    rows_for,
    same_bits,
)
from torch import Tensor

from expertlink import (
    BlockFormat,
    DispatchBuffers,
    DispatchHandle,
    DispatchOutput,
    InputError,
    MoECommunicator,
)
from expertlink.engines.nvlink.latency import Tables
from expertlink.quantization import quantize

Job = Callable[..., None]
ROUNDS = 4  # more than there are staging sets: each is used again


def without_gradients(comm: MoECommunicator, job: Job, cases: Sequence[Case], *args: Any) -> None:
    """Runs a job for each case, as decode does."""
    with torch.no_grad():
        for case in cases:
            try:
                job(comm, case, *args)
            except AssertionError as error:
                raise AssertionError(f"{error}\nin {case}") from error


def combine_case(
    comm: MoECommunicator, case: Case, handle: DispatchHandle, what: str, *, round_: int = 0
) -> None:
    """A combine and its result."""
    rows = rows_for(case, comm.rank, handle, round_=round_)
    poison_memory(comm, case)
    same_bits(comm.combine(rows, handle), combined_of(case, comm.rank, round_=round_), what)


# -- what rows hold -------------------------------------------------------------------------------


def any_bits(comm: MoECommunicator, case: Case) -> None:
    """Rows that hold the words by which kernels know that nothing has come."""
    rank = comm.rank
    for _ in range(ROUNDS):
        poison_memory(comm, case)
        out, handle = dispatch_case(comm, case)
        check_output(case, rank, out, static=counts_stay_on_device(comm))
        rows = rows_for(case, rank, handle)
        # Set bits are no numbers; which of them a sum is made to hold is not in the contract.
        same_numbers(comm.combine(rows, handle), combined_of(case, rank), "combine")


def same_numbers(actual: Tensor, expected: Tensor, what: str) -> None:
    """Bitwise equality, but for the payload of what is no number."""
    actual, expected = actual.cpu(), expected.cpu()
    broken = expected.float().isnan()
    assert torch.equal(actual.float().isnan(), broken), f"{what}: NaN in other places"
    zero = torch.zeros((), dtype=actual.dtype)
    same_bits(torch.where(broken, zero, actual), torch.where(broken, zero, expected), what)


def packed_ones(case: Case, rank: int) -> tuple[Tensor, Tensor]:
    """Opaque rows and scales of a rank with many, or nothing but, set bits."""
    gen = torch.Generator().manual_seed(rank + 1)
    count = case.tokens[rank]

    def drawn(columns: int) -> Tensor:
        values = torch.randint(0, 256, (count, columns), generator=gen)
        share = torch.rand((count, 1), generator=gen) * 1.5  # a third of the rows: all of it
        ones = torch.rand((count, columns), generator=gen) < share
        return torch.where(ones, 0xFF, values).to(torch.uint8)

    return drawn(64), drawn(8)


def any_packed_bits(comm: MoECommunicator, case: Case) -> None:
    """The same for rows and scales of which the library knows nothing."""
    everyone = [packed_ones(case, rank) for rank in range(case.ranks)]
    rows, scales = (values.to(comm.device) for values in everyone[comm.rank])
    ids_TK = inputs_of(case, comm.rank).ids_TK.to(comm.device)
    received = received_of(case, comm.rank)
    handle = None
    for _ in range(ROUNDS):
        poison_memory(comm, case)
        ids = ids_TK if handle is None else None
        out, handle = comm.dispatch(rows, ids, scales=scales, previous_handle=handle)
        assert out.scales is not None
        for values, index in ((out.tokens, 0), (out.scales.tensor, 1)):
            expected = received.gather([pair[index] for pair in everyone])
            same_bits(filled_part(case, received.filled, values), expected, f"member {index}")


def filled_part(case: Case, filled: Tensor, values: Tensor) -> Tensor:
    """Slots that hold rows, of values with the leading shape of `tokens`."""
    held = values.cpu()
    return (held if case.layout.padded else held[: len(filled)])[filled]


# -- quantization on the way ----------------------------------------------------------------------


def quantized(comm: MoECommunicator, case: Case) -> None:
    """Rows that the kernel quantizes equal those of quantization.py; combine is as ever."""
    fmt = comm.config.block_format
    assert fmt is not None
    rank, own = comm.rank, inputs_of(case, comm.rank)
    x_TH = own.x_TH.to(comm.device)
    for _ in range(ROUNDS - 2):
        poison_memory(comm, case)
        out, handle = dispatch_case(comm, case)
        check_quantized(case, rank, out, fmt, order=comm.config.scale_order)
        combine_case(comm, case, handle, "combine")
        poison_memory(comm, case)
        out, cached = comm.dispatch(x_TH, None, previous_handle=handle)
        check_quantized(case, rank, out, fmt, order=comm.config.scale_order)
        combine_case(comm, case, cached, "combine after a cached dispatch")


def check_quantized(
    case: Case, rank: int, out: DispatchOutput, fmt: BlockFormat, *, order: str
) -> None:
    """Values and scales of every slot; gaps between the groups of FLAT are zero."""
    received = received_of(case, rank)
    theirs = [quantize(inputs_of(case, source).x_TH, fmt) for source in range(case.ranks)]
    assert out.scales is not None
    assert out.scales.format is fmt
    scales = out.scales.tensor
    assert scales.shape[:-1] == out.tokens.shape[:-1]
    plain = scales.transpose(-1, -2) if order == "column_major" else scales
    assert plain.is_contiguous()
    rows = filled_part(case, received.filled, out.tokens.view(torch.uint8))
    expected = received.gather([pair[0].view(torch.uint8) for pair in theirs])
    no_number = (expected & 0x7F) == 0x7F
    assert torch.equal((rows & 0x7F) == 0x7F, no_number), "NaN in other places"
    same_bits(rows.masked_fill(no_number, 0), expected.masked_fill(no_number, 0), "rows")
    arrived = filled_part(case, received.filled, scales)
    wanted = received.gather([pair[1] for pair in theirs])
    if wanted.dtype.is_floating_point:
        same_numbers(arrived, wanted, "scales")
    else:
        same_bits(arrived, wanted, "scales")
    expected_counts = expected_of(case, rank)
    assert out.num_tokens_per_expert.tolist() == expected_counts.counts
    if case.alignment > 1:
        gaps = ~received.filled
        for values in (out.tokens.view(torch.uint8), scales):
            held = values.cpu()[: len(gaps)][gaps]
            assert (held == 0).all(), "gaps must be zero"


# -- halves ---------------------------------------------------------------------------------------


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


# -- buffers --------------------------------------------------------------------------------------


def buffers_of_every_call(comm: MoECommunicator, cases: Sequence[Case]) -> None:
    """One of them serves any T, width of ids, and calls with and without weights."""
    rank = comm.rank
    with torch.no_grad():
        one = comm.create_buffers()
        homes = _addresses(one)
        for round_ in range(2):
            for case in cases:
                out, handle = dispatch_case(comm, case, output_buffer=one)
                check_output(case, rank, out, static=counts_stay_on_device(comm))
                for name, value in vars(out).items():
                    if isinstance(value, Tensor) and value.numel():
                        assert value.data_ptr() == homes[name], name
                combine_case(comm, case, handle, "combine", round_=round_)
        assert _addresses(one) == homes
        unweighted = comm.create_buffers(weighted=False)
        plain = [case for case in cases if not case.weighted]
        for case in plain:
            out, handle = dispatch_case(comm, case, output_buffer=unweighted)
            check_output(case, rank, out, static=counts_stay_on_device(comm))
            combine_case(comm, case, handle, "combine")


def _addresses(buffers: DispatchBuffers) -> dict[str, int]:
    members = vars(buffers.output).items()
    return {name: value.data_ptr() for name, value in members if isinstance(value, Tensor)}


# -- addresses ------------------------------------------------------------------------------------


def odd_addresses(comm: MoECommunicator, case: Case) -> None:
    """Tensors at addresses that are no multiples of 16: copied, or refused by name."""

    def odd(values: Tensor) -> Tensor:
        memory = torch.empty(values.numel() + 1, dtype=values.dtype, device=comm.device)
        return memory[1:].view(values.shape).copy_(values)

    rank, own = comm.rank, inputs_of(case, comm.rank)
    x_TH, ids_TK = odd(own.x_TH), own.ids_TK.to(comm.device)
    weights_TK = None if own.weights_TK is None else odd(own.weights_TK)
    out, handle = comm.dispatch(x_TH, ids_TK, weights_TK)
    check_output(case, rank, out, static=counts_stay_on_device(comm))
    rows = odd(rows_for(case, rank, handle))
    same_bits(comm.combine(rows, handle), combined_of(case, rank), "combine of odd rows")
    out, handle, hook = comm.dispatch(x_TH, ids_TK, weights_TK, return_recv_hook=True)
    hook()
    given = odd(torch.zeros_like(x_TH))
    result, hook = comm.combine(rows, handle, out=given, return_recv_hook=True)
    hook()
    assert result.data_ptr() == given.data_ptr()
    same_bits(result, combined_of(case, rank), "combine into odd memory")
    # Only where ranks agree beforehand does a refusal leave the communicator in order.
    if comm._check:
        buffer = odd(torch.zeros_like(out.tokens))
        with pytest.raises(InputError, match="no multiple of 16"):
            comm.dispatch(x_TH, ids_TK, weights_TK, output_buffer=buffer)
        out, handle = comm.dispatch(x_TH, ids_TK, weights_TK)
        check_output(case, rank, out, static=counts_stay_on_device(comm))


# -- statistics -----------------------------------------------------------------------------------


def statistics_of_packed_rows(comm: MoECommunicator, case: Case) -> None:
    """Bytes are those of rows and scales as they travel, quantized on the way."""
    fmt = comm.config.block_format
    assert fmt is not None
    rank = comm.rank
    totals = comm.enable_statistics()
    out, _ = dispatch_case(comm, case)
    assert out.scales is not None
    scale_bytes = out.scales.tensor.shape[-1] * out.scales.tensor.element_size()
    received = expected_of(case, rank).rows_per_rank
    sent = [expected_of(case, dest).rows_per_rank[rank] for dest in range(case.ranks)]
    assert totals.rows_sent.tolist() == sent
    assert totals.rows_received.tolist() == received
    for total, rows in ((totals.bytes_sent, sent), (totals.bytes_received, received)):
        away = [0 if other == rank else count for other, count in enumerate(rows)]
        assert total.tolist() == [count * (case.hidden + scale_bytes) for count in away]


def waits_are_measured(comm: MoECommunicator, case: Case, late: int, cycles: int) -> list[int]:
    """Longest waits for each rank where one of them sends later than the others: nanoseconds."""
    totals = comm.enable_statistics()
    _, handle = dispatch_case(comm, case)
    combine_case(comm, case, handle, "combine")
    for tensor in vars(totals).values():
        tensor.zero_()
    torch.cuda.synchronize(comm.device)
    if comm.rank == late:
        torch.cuda._sleep(cycles)
    _, handle = dispatch_case(comm, case)
    torch.cuda.synchronize(comm.device)
    combine_case(comm, case, handle, "combine")
    return totals.longest_wait_ns.tolist()


# -- ranks that are lost --------------------------------------------------------------------------


def lost(case: Case, rank: int) -> Case:
    """The case for those who go on without a rank: it sends nothing and its experts are gone."""
    tokens = tuple(0 if other == rank else count for other, count in enumerate(case.tokens))
    return dataclasses.replace(case, tokens=tokens, without=rank)


def calls_without(comm: MoECommunicator, case: Case, gone: int, what: str) -> DispatchHandle:
    """A dispatch and its combine after a rank has been lost; the lost one only makes the calls."""
    after, rank = lost(case, gone), comm.rank
    poison_memory(comm, case)
    out, handle = dispatch_case(comm, case)
    if rank != gone:
        check_output(after, rank, out, static=counts_stay_on_device(comm))
    rows = rows_for(after, rank, handle)
    grads = filled_up(slot_grads(after, rank), handle.rows_shape[:-1], comm.device)
    poison_memory(comm, case)
    result, grads_TK = comm.combine(rows, handle, weight_grads=grads)
    if rank != gone:
        same_bits(result, combined_of(after, rank), f"combine {what}")
        same_bits(grads_TK, returned_grads(after, rank), f"weight gradients {what}")
    return handle


def cached_without(
    comm: MoECommunicator, case: Case, handle: DispatchHandle, gone: int, what: str
) -> None:
    """A cached dispatch with a handle from before or after the loss, and its combine."""
    after, rank = lost(case, gone), comm.rank
    x_TH = inputs_of(case, rank).x_TH.to(comm.device)
    poison_memory(comm, case)
    out, cached = comm.dispatch(x_TH, None, previous_handle=handle)
    if rank != gone:
        check_output(after, rank, out, static=counts_stay_on_device(comm))
    result = comm.combine(rows_for(after, rank, cached), cached)
    if rank != gone:
        same_bits(result, combined_of(after, rank), f"cached combine {what}")


def combine_without(
    comm: MoECommunicator, case: Case, gone: int, leave: Callable[[], object]
) -> None:
    """A rank leaves between a dispatch and its combine: its sums do not come back."""
    rank = comm.rank
    out, handle = dispatch_case(comm, case)
    check_output(case, rank, out, static=counts_stay_on_device(comm))
    rows = rows_for(case, rank, handle)
    grads = filled_up(slot_grads(case, rank), handle.rows_shape[:-1], comm.device)
    leave()
    result, grads_TK = comm.combine(rows, handle, weight_grads=grads)
    if rank == gone:
        return
    same_bits(result, combined_of(case, rank, missing=gone), "combine without a rank")
    homes = torch.tensor([*case.rank_of_expert(), -1])[inputs_of(case, rank).ids_TK.long()]
    expected = returned_grads(case, rank).masked_fill(homes == gone, 0.0)
    same_bits(grads_TK, expected, "weight gradients without a rank")


def survivors_go_on(
    comm: MoECommunicator,
    cases: Sequence[Case],
    gone: int,
    phase: str,
    leave: Callable[[], object],
    timeout_ns: int,
) -> None:
    """A rank leaves for good; the others wait for it once, and then go on without it.

    Args:
        comm: with `mask_lost_peers`, or where the others mask the rank beforehand.
        cases: routings, in turn.
        gone: the rank.
        phase: first call that it does not take part in: "dispatch", "combine" or "halves".
        leave: called by every rank before that call.
        timeout_ns: time that the others will wait at least; 0: none.
    """
    rank = comm.rank
    with torch.no_grad():
        totals = comm.enable_statistics()
        handles = [calls_with_all(comm, case) for case in cases]
        totals.longest_wait_ns.zero_()
        if phase == "combine":
            combine_without(comm, cases[0], gone, leave)
        elif phase == "halves":
            leave()
            _halves_without(comm, cases[0], gone)
        else:
            leave()
            calls_without(comm, cases[0], gone, "of the first call")
        torch.cuda.synchronize(comm.device)
        masked = [other == gone for other in range(comm.num_ranks)]
        if rank != gone:
            assert comm.query_mask().tolist() == masked
            waited = totals.longest_wait_ns.tolist()[gone]
            assert waited >= timeout_ns // 2, f"waited {waited} ns"
        totals.longest_wait_ns.zero_()
        for round_ in range(ROUNDS):
            for case, before in zip(cases, handles, strict=True):
                handle = calls_without(comm, case, gone, f"in round {round_}")
                cached_without(comm, case, handle, gone, f"in round {round_}")
                cached_without(comm, case, before, gone, f"of an old handle in round {round_}")
            _halves_without(comm, cases[round_ % len(cases)], gone)
        torch.cuda.synchronize(comm.device)
        if rank != gone:
            comm.check_health()
            assert comm.query_mask().tolist() == masked
            assert totals.longest_wait_ns.tolist()[gone] == 0, "waited for it again"


def calls_with_all(comm: MoECommunicator, case: Case) -> DispatchHandle:
    """A dispatch and its combine while everybody is there."""
    out, handle = dispatch_case(comm, case)
    check_output(case, comm.rank, out, static=counts_stay_on_device(comm))
    combine_case(comm, case, handle, "combine with all")
    return handle


def _halves_without(comm: MoECommunicator, case: Case, gone: int) -> None:
    """Two dispatches under way at once, then their combines."""
    after, rank = lost(case, gone), comm.rank
    sent = [dispatch_case(comm, case, return_recv_hook=True) for _ in range(2)]
    combines = []
    for index, (out, handle, hook) in enumerate(sent):
        hook()
        if rank != gone:
            check_output(after, rank, out, static=counts_stay_on_device(comm))
        rows = rows_for(after, rank, handle, round_=index)
        combines.append(comm.combine(rows, handle, return_recv_hook=True))
    for index, (result, hook) in enumerate(combines):
        hook()
        if rank != gone:
            expected = combined_of(after, rank, round_=index)
            same_bits(result, expected, "combine in halves without a rank")
