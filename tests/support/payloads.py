"""What rows may hold: packed rows with scales, bytes nobody understands, set bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from expertlink import (
    BlockFormat,
    DispatchHandle,
    DispatchLayout,
    DispatchOutput,
    MoECommunicator,
)
from expertlink.launch import RankContext
from expertlink.quantization import quantize
from support.decode import poisoned, tensors_of
from support.jobs import (
    ROUNDS,
    check_output,
    combine_case,
    config_of,
    counts_stay_on_device,
    dispatch_case,
    poison_memory,
    rows_for,
    same_bits,
)
from support.oracle import Case, combined_of, expected_of, inputs_of, received_of

# -- rows that the caller packed ------------------------------------------------------------------


def quantized_dispatch(ctx: RankContext, layout: DispatchLayout, fmt: BlockFormat) -> bool:
    """Rows that dispatch quantizes equal rows that the caller quantized, slot by slot."""
    case = Case((5, 0, 4)[: ctx.num_ranks], 300, experts=5, topk=2, layout=layout, masked=0.2)
    own = inputs_of(case, ctx.rank)
    x_TH, ids_TK = own.x_TH.to(ctx.device), own.ids_TK.to(ctx.device)
    with MoECommunicator(config_of(case, ctx.device, quantization=fmt)) as comm:
        out, handle = comm.dispatch(x_TH, ids_TK)
        q, scales = quantize(x_TH, fmt)
        passed, _ = comm.dispatch(q, ids_TK, scales=scales)
        again, cached = comm.dispatch(x_TH, None, previous_handle=handle)
        for copy in expected_of(case, ctx.rank).copies:
            rows, row_scales = quantize(inputs_of(case, copy.source).x_TH[[copy.token]], fmt)
            for arrived in (out, passed, again):
                assert arrived.scales is not None
                assert arrived.scales.format is fmt
                same_bits(arrived.tokens[copy.slot], rows[0], "row")
                same_bits(arrived.scales.tensor[copy.slot], row_scales[0], "scales")
        # Expert outputs come back in the wire type, whatever went out.
        result = comm.combine(
            torch.ones(handle.rows_shape, dtype=case.dtype, device=ctx.device), cached
        )
        return result.dtype is case.dtype and result.shape == x_TH.shape


def opaque_rows(
    ctx: RankContext, layout: DispatchLayout, width: int, columns: int, dtype: torch.dtype
) -> bool:
    case = Case((4, 3), 96, experts=4, topk=2, layout=layout)
    case = dataclasses.replace(case, masked=0.2)

    def packed(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        gen = torch.Generator().manual_seed(rank)
        rows = torch.randint(-128, 128, (case.tokens[rank], width), generator=gen)
        scales = torch.randint(0, 256, (case.tokens[rank], columns), generator=gen)
        return rows.to(dtype), scales.to(torch.uint8)

    rows, scales = packed(ctx.rank)
    own = inputs_of(case, ctx.rank)
    with MoECommunicator(config_of(case, ctx.device)) as comm:
        out, _ = comm.dispatch(
            rows.to(ctx.device), own.ids_TK.to(ctx.device), scales=scales.to(ctx.device)
        )
        assert out.scales is not None
        for copy in expected_of(case, ctx.rank).copies:
            theirs, their_scales = packed(copy.source)
            same_bits(out.tokens[copy.slot], theirs[copy.token], "row")
            same_bits(out.scales.tensor[copy.slot], their_scales[copy.token], "scales")
    return True


def packed(case: Case, rank: int, kind: str) -> tuple[Tensor, Tensor]:
    """Rows and scales of a rank: of a block format, or bytes that nobody understands."""
    if kind != "opaque":
        return quantize(inputs_of(case, rank).x_TH, BlockFormat(kind))
    gen = torch.Generator().manual_seed(rank)
    count = case.tokens[rank]
    rows = torch.randint(0, 256, (count, 48), generator=gen).to(torch.uint8)
    scales = torch.randint(0, 256, (count, 6), generator=gen).to(torch.uint8)
    return rows, scales


def packed_rows(comm: MoECommunicator, case: Case, kind: str) -> None:
    """Uncached, cached and into a buffer: rows and scales arrive as they were, results as ever."""
    everyone = [packed(case, rank, kind) for rank in range(case.ranks)]
    rows, scales = (values.to(comm.device) for values in everyone[comm.rank])
    own = inputs_of(case, comm.rank)
    ids_TK = own.ids_TK.to(comm.device)
    weights_TK = None if own.weights_TK is None else own.weights_TK.to(comm.device)
    received = received_of(case, comm.rank)

    def check(out: DispatchOutput, handle: DispatchHandle) -> None:
        assert out.scales is not None
        for values, index, what in ((out.tokens, 0, "row"), (out.scales.tensor, 1, "scales")):
            expected = received.gather([_bytes(both[index]) for both in everyone])
            arrived = _bytes(values.cpu())
            if not case.layout.padded:
                arrived = arrived[: len(received.filled)]
            same_bits(arrived[received.filled], expected, what)
            if case.layout is DispatchLayout.FLAT:
                assert (arrived[~received.filled] == 0).all(), f"{what}: gaps must be zero"
        if received.ids is not None:
            assert out.topk_ids is not None
            same_bits(out.topk_ids[: len(received.ids)], received.ids, "topk_ids")
        result = comm.combine(rows_for(case, comm.rank, handle), handle)
        same_bits(result, combined_of(case, comm.rank), "combine")

    with torch.no_grad():
        poison_memory(comm, case)
        out, handle = comm.dispatch(rows, ids_TK, weights_TK, scales)
        check(out, handle)
        check(*comm.dispatch(rows, None, scales=scales, previous_handle=handle))
        if comm.config.zero_copy:
            return
        shape = expected_of(case, comm.rank).shape
        if not case.layout.padded:
            shape = (shape[0] + 3,)
        buffer = torch.full((*shape, rows.shape[1]), 255, dtype=torch.uint8, device=comm.device)
        check(
            *comm.dispatch(rows, ids_TK, weights_TK, scales, output_buffer=buffer.view(rows.dtype))
        )


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def buffers_of_packed_rows(comm: MoECommunicator, case: Case) -> None:
    """Rows with scales, quantized by the caller, by the library, and bytes nobody understands."""
    fmt = comm.config.block_format
    assert fmt is not None
    own = inputs_of(case, comm.rank)
    x_TH, ids_TK = own.x_TH.to(comm.device), own.ids_TK.to(comm.device)
    q, scales = quantize(x_TH, fmt)
    plain = poisoned(comm.create_buffers())
    packed = poisoned(comm.create_buffers(q, scales))
    for rows, own_scales, one in ((x_TH, None, plain), (q, scales, packed), (q, scales, plain)):
        out, _ = comm.dispatch(rows, ids_TK, scales=own_scales, output_buffer=one)
        check_rows_with_scales(case, comm.rank, out, lambda x: quantize(x, fmt))
        storages = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(one.output)}
        for tensor in tensors_of(out):
            assert tensor.numel() == 0 or tensor.untyped_storage().data_ptr() in storages


# -- set bits -------------------------------------------------------------------------------------


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


# -- rows that dispatch quantizes -----------------------------------------------------------------


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


def scales_in_order(comm: MoECommunicator, case: Case) -> None:
    """Shape and values do not depend on the memory order; strides do."""
    fmt = comm.config.block_format
    assert fmt is not None
    own = inputs_of(case, comm.rank)
    x_TH, ids_TK = own.x_TH.to(comm.device), own.ids_TK.to(comm.device)
    out, handle = comm.dispatch(x_TH, ids_TK)
    again, _ = comm.dispatch(x_TH, None, previous_handle=handle)
    for arrived in (out, again):
        check_rows_with_scales(case, comm.rank, arrived, lambda x: quantize(x, fmt))
        assert arrived.scales is not None
        tensor = arrived.scales.tensor
        plain = tensor.transpose(-1, -2) if comm.config.scale_order == "column_major" else tensor
        assert plain.is_contiguous()


def check_rows_with_scales(
    case: Case,
    rank: int,
    out: DispatchOutput,
    packed: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Rows and scales of every slot equal those of its token at the source."""
    received = received_of(case, rank)
    theirs = [packed(inputs_of(case, source).x_TH) for source in range(case.ranks)]
    assert out.scales is not None
    assert out.scales.tensor.shape[:-1] == out.tokens.shape[:-1]
    for values, index in ((out.tokens, 0), (out.scales.tensor, 1)):
        held = values.cpu()
        held = held if case.layout.padded else held[: len(received.filled)]
        expected = received.gather([pair[index].view(torch.uint8) for pair in theirs])
        same_bits(held[received.filled].view(torch.uint8), expected, f"member {index} of the rows")
