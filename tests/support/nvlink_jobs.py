"""What tests of the nvlink engine run on every rank, hosted in a thread or in a process."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from expertlink import (
    BlockFormat,
    DispatchHandle,
    DispatchLayout,
    DispatchOutput,
    ExpertlinkError,
    MoECommunicator,
)
from expertlink.launch import RankContext
from expertlink.quantization import quantize
from support.nvlink_cases import usual
from support.oracle import Case, expected_of, inputs_of, received_of
from support.oracle_results import combined_of
from support.rank_jobs import (
    check_contract,
    check_output,
    config_of,
    dispatch_case,
    poison_memory,
    rows_for,
    same_bits,
)


def contracts(comm: MoECommunicator, cases: Sequence[Case]) -> None:
    """The contract of several cases on one communicator; unfilled slots keep what they held."""
    with torch.no_grad():
        for case in cases:
            check_contract(comm, case)


# -- padding and zero copy ------------------------------------------------------------------------


def zero_padding(comm: MoECommunicator, case: Case) -> None:
    """Where gradients may be tracked, slots that no row fills are zero."""
    poison_memory(comm, case)
    out, _ = dispatch_case(comm, case)
    filled = received_of(case, comm.rank).filled
    assert (out.tokens.cpu()[~filled] == 0).all()


def views_survive(comm: MoECommunicator, cases: Sequence[Case]) -> None:
    """The view of a dispatch is as it was after the next dispatch, cached or not, has run."""
    held: tuple[Case, DispatchOutput] | None = None
    for case in cases:
        x_TH = inputs_of(case, comm.rank).x_TH.to(comm.device)
        handle: DispatchHandle | None = None
        for _ in range(2):
            if handle is None:
                out, handle = dispatch_case(comm, case)
            else:
                out, _ = comm.dispatch(x_TH, None, previous_handle=handle)
            torch.cuda.synchronize(comm.device)
            if held is not None:
                check_output(held[0], comm.rank, held[1])
                if out.tokens.numel() and held[1].tokens.numel():
                    assert held[1].tokens.data_ptr() != out.tokens.data_ptr()
            held = (case, out)


def combine_views(comm: MoECommunicator, case: Case) -> None:
    """Rows go back from where they lie in the pool."""
    own = inputs_of(case, comm.rank)
    out, handle = dispatch_case(comm, case)
    owner = torch.tensor([*case.rank_of_expert(), -1])
    ranks_TK = owner[own.ids_TK.to(torch.int64)]
    expected = torch.zeros(own.x_TH.shape)
    for rank in range(case.ranks):
        here = (ranks_TK == rank).any(dim=1, keepdim=True)
        expected = torch.where(here, expected + own.x_TH.float(), expected)
    same_bits(comm.combine(out.tokens, handle), expected.to(case.dtype), "combine of the view")


# -- rows that the caller quantized ---------------------------------------------------------------


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


# -- failures -------------------------------------------------------------------------------------


def error_of(call: Callable[[], object]) -> ExpertlinkError | None:
    """What the call raises, if it raises."""
    try:
        call()
    except ExpertlinkError as error:
        return error
    return None


def fails_once(
    comm: MoECommunicator, case: Case, call: Callable[[MoECommunicator], object]
) -> ExpertlinkError | None:
    """The error of one call; the next ones are as if it had not been made."""
    error = error_of(lambda: call(comm))
    torch.cuda.synchronize(comm.device)
    contracts(comm, [case])
    return error


@dataclasses.dataclass(frozen=True)
class Lost:
    """What a rank saw of a call in which another one was missing.

    Attributes:
        error: what the call raised.
        later: classes of what later calls raised; the missing rank makes none.
        gpu_works: whether the CUDA context survived.
    """

    error: ExpertlinkError | None
    later: tuple[str, ...]
    gpu_works: bool


def lose_a_rank(
    comm: MoECommunicator,
    case: Case,
    phase: str,
    culprit: int,
    leave: Callable[[], object] = lambda: None,
) -> Lost:
    """Good calls, then one of `phase` ("dispatch", "cached dispatch", "combine") without a rank.

    Before that call every rank calls `leave`.
    """
    out, handle = dispatch_case(comm, case)
    rows = rows_for(case, comm.rank, handle)
    if phase != "combine":
        comm.combine(rows, handle)
    x_TH = inputs_of(case, comm.rank).x_TH.to(comm.device)
    check_output(case, comm.rank, out, static=comm.config.static_shapes)
    torch.cuda.synchronize(comm.device)
    leave()

    def call() -> None:
        if phase == "dispatch":
            dispatch_case(comm, case)
        elif phase == "combine":
            comm.combine(rows, handle)
        else:
            comm.dispatch(x_TH, None, previous_handle=handle)
        torch.cuda.synchronize(comm.device)
        comm.check_health()

    return lost_in(call, comm, case, ends=comm.rank == culprit)


def lost_in(
    call: Callable[[], object], comm: MoECommunicator, case: Case, *, ends: bool = False
) -> Lost:
    """What a rank sees of `call` and, unless it `ends` there, of later ones."""
    error = error_of(call)
    ones = torch.ones((64, 64), device=comm.device)
    works = bool(((ones @ ones) == 64).all())
    if ends:
        return Lost(error, (), works)
    later = (error_of(comm.check_health), error_of(lambda: dispatch_case(comm, case)))
    return Lost(error, tuple(type(item).__name__ for item in later), works)


def killed(
    ctx: RankContext, culprit: int, phase: str, layout: DispatchLayout, **fields: Any
) -> Lost:
    """`lose_a_rank` where the rank's process is killed."""
    case = usual(ctx.num_ranks, layout).case((24,) * ctx.num_ranks, seed=1)

    def leave() -> None:
        dist.barrier()
        if ctx.rank == culprit:
            os.kill(os.getpid(), signal.SIGKILL)

    settings: dict[str, Any] = {"engine": "nvlink", "timeout_s": 3.0, **fields}
    comm = MoECommunicator(config_of(case, ctx.device, **settings))
    comm.initialize()
    lost = lose_a_rank(comm, case, phase, culprit, leave)
    comm.close()
    return lost


def odd_addresses(ctx: RankContext, case: Case) -> str:
    """Inputs, buffers and results at addresses that bulk copies cannot take.

    Either the call is refused or the results are right: the GPU does not fault.
    """

    def odd(shape: Sequence[int]) -> Tensor:
        size = torch.Size(shape).numel()
        return torch.empty(size + 1, dtype=case.dtype, device=ctx.device)[1:].view(*shape)

    own = inputs_of(case, ctx.rank)
    refused = ""
    with torch.no_grad(), MoECommunicator(config_of(case, ctx.device, engine="nvlink")) as comm:
        x_TH = odd(own.x_TH.shape).copy_(own.x_TH)
        options: dict[str, Any] = {"topk_ids": own.ids_TK.to(ctx.device)}
        if own.weights_TK is not None:
            options["weights"] = own.weights_TK.to(ctx.device)
        out, handle = comm.dispatch(x_TH, **options)
        check_output(case, ctx.rank, out)
        rows = odd(handle.rows_shape).copy_(rows_for(case, ctx.rank, handle))
        same_bits(comm.combine(rows, handle), combined_of(case, ctx.rank), "combine")
        try:
            buffer = odd((*expected_of(case, ctx.rank).shape, case.hidden))
            out, handle = comm.dispatch(x_TH, **options, output_buffer=buffer)
            check_output(case, ctx.rank, out)
        except ExpertlinkError:
            refused += "output_buffer "
        out, handle = comm.dispatch(x_TH, **options)
        try:
            result = comm.combine(rows, handle, out=odd(own.x_TH.shape))
            same_bits(result, combined_of(case, ctx.rank), "combine into out")
        except ExpertlinkError:
            refused += "out"
    return refused
