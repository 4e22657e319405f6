"""What tests of low-latency mode run on every rank, in a thread or a process: whole calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from expertlink import (
    BlockFormat,
    DispatchBuffers,
    DispatchHandle,
    DispatchOutput,
    InputError,
    MoECommunicator,
)
from expertlink.quantization import quantize
from support.oracle import Case, expected_of, inputs_of, received_of
from support.oracle_results import combined_of
from support.rank_jobs import (
    check_output,
    counts_stay_on_device,
    dispatch_case,
    poison_memory,
    rows_for,
    same_bits,
)

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


def calls_with_all(comm: MoECommunicator, case: Case) -> DispatchHandle:
    """A dispatch and its combine while everybody is there."""
    out, handle = dispatch_case(comm, case)
    check_output(case, comm.rank, out, static=counts_stay_on_device(comm))
    combine_case(comm, case, handle, "combine with all")
    return handle


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
