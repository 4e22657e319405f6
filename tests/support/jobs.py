"""What tests run on every rank: each job compares one rank's results with the oracle.

Jobs raise on the first difference. They know nothing of devices or process groups beyond what the
context or the communicator gives them, so the same jobs judge gloo on CPU, NCCL and NVLink.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from expertlink import (
    DispatchHandle,
    DispatchLayout,
    DispatchOutput,
    ExpertlinkError,
    InputError,
    MoECommunicator,
    MoECommunicatorConfig,
)
from expertlink.launch import RankContext
from support.oracle import (
    Case,
    combined_of,
    expected_of,
    expert_rows,
    inputs_of,
    received_of,
    returned_grads,
    slot_grads,
)


def config_of(case: Case, device: Any, **fields: Any) -> MoECommunicatorConfig:
    placement: dict[str, Any] = {}
    if case.placement != "even":
        placement["expert_map"] = case.rank_of_expert()
    defaults: dict[str, Any] = {
        "num_experts": case.experts,
        "hidden_size": case.hidden,
        "topk": case.topk,
        "max_tokens_per_rank": case.max_tokens,
        "dtype": case.dtype,
        "output_layout": case.layout,
        "expert_alignment": case.alignment,
        "combine_precision": case.precision,
        "domains": case.domains,
        "device": device,
        "timeout_s": 30.0,
        "startup_timeout_s": 60.0,
        **placement,
    }
    return MoECommunicatorConfig(**{**defaults, **fields})


def same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Bitwise equality, NaNs and signs of zero included."""
    actual = actual.detach().cpu().contiguous()
    expected = expected.detach().cpu().contiguous()
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"{what}: {actual.dtype} {tuple(actual.shape)}, "
            f"expected {expected.dtype} {tuple(expected.shape)}"
        )
    if actual.numel() and not torch.equal(actual.view(torch.uint8), expected.view(torch.uint8)):
        raise AssertionError(f"{what} differs:\n{actual}\nexpected\n{expected}")


def check_output(case: Case, rank: int, out: DispatchOutput, *, static: bool = False) -> None:
    """Everything a dispatch returned, against the oracle. `static`: shapes are the largest ones."""
    expected, received = expected_of(case, rank), received_of(case, rank)
    _check_shape(case, rank, out, static)
    tokens = counted(case, rank, out.tokens)
    rows = received.gather([inputs_of(case, source).x_TH for source in range(case.ranks)])
    same_bits(tokens[received.filled], rows, "tokens")
    if case.layout is DispatchLayout.FLAT:
        assert (tokens[~received.filled] == 0).all(), "alignment gaps must be zero"
        assert out.expert_offsets is not None
        assert out.expert_offsets.tolist() == expected.offsets
    assert out.num_tokens_per_expert.tolist() == expected.counts
    assert out.num_tokens_per_expert.dtype is torch.int32
    assert out.num_tokens_per_expert_list == (None if static else expected.counts)
    assert out.num_tokens_per_rank is not None
    assert out.num_tokens_per_rank.tolist() == expected.rows_per_rank
    if out.source_tokens is not None:
        _check_source_tokens(case, rank, out.source_tokens)
    if case.layout.expanded:
        assert out.topk_ids is None
        assert out.topk_weights is None
        return
    _check_choices(case, rank, out)


def _check_shape(case: Case, rank: int, out: DispatchOutput, static: bool) -> None:
    shape = expected_of(case, rank).shape
    given = tuple(out.tokens.shape)
    if static and not case.layout.padded:
        assert given[0] >= shape[0], f"{given} has no room for {shape}"
        shape = given[:1]
    assert given == (*shape, case.hidden), f"{given}, expected {shape}"


def counted(case: Case, rank: int, values: Tensor) -> Tensor:
    """The part of an output that counts stand for, on the host."""
    values = values.detach().cpu()
    return values if case.layout.padded else values[: expected_of(case, rank).shape[0]]


def _check_source_tokens(case: Case, rank: int, tokens: Tensor) -> None:
    wanted = received_of(case, rank).source_tokens()
    same_bits(counted(case, rank, tokens), wanted, "source_tokens")
    rest = slice(None, 0) if case.layout.padded else slice(len(wanted), None)
    assert (tokens[rest] == -1).all(), "rows beyond the last have source tokens"


def _check_choices(case: Case, rank: int, out: DispatchOutput) -> None:
    received = received_of(case, rank)
    assert received.ids is not None
    assert out.topk_ids is not None
    assert out.topk_ids.shape[:-1] == out.tokens.shape[:-1]
    same_bits(counted(case, rank, out.topk_ids), received.ids, "topk_ids")
    rest = slice(None, 0) if case.layout.padded else slice(len(received.ids), None)
    assert (out.topk_ids[rest] == -1).all(), "rows beyond the last have ids"
    if received.weights is None:
        assert out.topk_weights is None
        return
    assert out.topk_weights is not None
    same_bits(counted(case, rank, out.topk_weights), received.weights, "topk_weights")
    assert (out.topk_weights[rest] == 0).all(), "rows beyond the last have weights"


def dispatch_case(comm: MoECommunicator, case: Case, **options: Any) -> Any:
    """What `dispatch` of the case's tensors returns."""
    own = inputs_of(case, comm.rank)
    weights = None if own.weights_TK is None else own.weights_TK.to(comm.device)
    return comm.dispatch(own.x_TH.to(comm.device), own.ids_TK.to(comm.device), weights, **options)


def contract(ctx: RankContext, cases: list[Case], **fields: Any) -> int:
    """Dispatch and combine, twice, then cached, then with new weights, then into given buffers."""
    for case in cases:
        with MoECommunicator(config_of(case, ctx.device, **fields)) as comm:
            check_contract(comm, case)
    return len(cases)


def rounding_of_the_combiner(ctx: RankContext, cases: Sequence[Case], **fields: Any) -> None:
    """Communicators of one routing and other hosts combine each other's dispatches."""
    for made in cases:
        with MoECommunicator(config_of(made, ctx.device, **fields)) as maker:
            _, handle = dispatch_case(maker, made)
            for case in cases:
                with MoECommunicator(config_of(case, ctx.device, **fields)) as comm:
                    combine_case(comm, case, handle, f"combine with domains {case.domains}")


def choice_of(ctx: RankContext, case: Case) -> tuple[str, str]:
    """The engine that serves a case if nobody asks for one, and why; it meets the contract."""
    with MoECommunicator(config_of(case, ctx.device)) as comm:
        check_contract(comm, case)
        return comm.engine_name, comm.engine_reason


def check_contract(comm: MoECommunicator, case: Case) -> None:
    """`contract` of one case on a communicator that is there already."""
    try:
        _contract(comm, case, comm.rank)
    except AssertionError as error:
        raise AssertionError(f"{error}\nin {case}") from error


def _contract(comm: MoECommunicator, case: Case, rank: int) -> None:
    static = counts_stay_on_device(comm)
    asked = comm.config.source_tokens
    own = inputs_of(case, rank)
    x_TH, ids_TK = own.x_TH.to(comm.device), own.ids_TK.to(comm.device)
    expected = combined_of(case, rank)
    rows: Tensor | None = None
    handle = None
    for _ in range(2):
        poison_memory(comm, case)
        out, handle = dispatch_case(comm, case)
        check_output(case, rank, out, static=static)
        assert (out.source_tokens is not None) == asked
        rows = rows_for(case, rank, handle)
        poison_memory(comm, case)
        same_bits(comm.combine(rows, handle), expected, "combine")
    assert handle is not None
    assert rows is not None
    others = comm.combine(rows_for(case, rank, handle, round_=1), handle)
    same_bits(others, combined_of(case, rank, round_=1), "another combine of the same dispatch")
    same_bits(comm.combine(rows, handle), expected, "the same combine again")

    poison_memory(comm, case)
    out, cached = comm.dispatch(x_TH, ids_TK, previous_handle=handle)
    check_output(case, rank, out, static=static)
    assert (out.source_tokens is not None) == asked
    grads = filled_up(slot_grads(case, rank), cached.rows_shape[:-1], comm.device)
    result, grads_TK = comm.combine(rows, cached, weight_grads=grads)
    same_bits(result, expected, "combine after a cached dispatch")
    same_bits(comm.combine(rows, handle), expected, "combine of the dispatch before that")
    same_bits(grads_TK, returned_grads(case, rank), "weight gradients")

    if case.weighted:
        _new_weights(comm, dataclasses.replace(case, weight_seed=case.seed + 100), handle)
    options: dict[str, Any] = {}
    if not comm.config.zero_copy:
        options["output_buffer"] = poisoned_buffer(comm, case)
    out, handle = dispatch_case(comm, case, **options)
    if options:
        buffer = options["output_buffer"]
        assert out.tokens.data_ptr() == buffer.data_ptr() or out.tokens.numel() == 0
    check_output(case, rank, out, static=static)
    result = torch.full_like(own.x_TH, float("nan")).to(comm.device)
    again = comm.combine(rows_for(case, rank, handle, round_=1), handle, out=result)
    assert again is result
    same_bits(result, combined_of(case, rank, round_=1), "combine into out")


def counts_stay_on_device(comm: MoECommunicator) -> bool:
    """Whether the host does not learn how many rows arrive."""
    config = comm.config
    ll = config.mode == "ll" and comm.engine_name == "nvlink"
    return config.static_shapes or (ll and config.layout.padded)


def _new_weights(comm: MoECommunicator, case: Case, handle: DispatchHandle) -> None:
    """A cached dispatch with other weights than those of the handle's dispatch."""
    own = inputs_of(case, comm.rank)
    assert own.weights_TK is not None
    out, cached = comm.dispatch(
        own.x_TH.to(comm.device), None, own.weights_TK.to(comm.device), previous_handle=handle
    )
    check_output(case, comm.rank, out, static=counts_stay_on_device(comm))
    result = comm.combine(rows_for(case, comm.rank, cached), cached)
    same_bits(result, combined_of(case, comm.rank), "combine with new weights")


def rows_for(case: Case, rank: int, handle: DispatchHandle, *, round_: int = 0) -> Tensor:
    """`expert_rows` in the shape that the handle's combine takes, on the handle's device."""
    rows = expert_rows(case, rank, round_=round_)
    return filled_up(rows, handle.rows_shape[:-1], handle.topk_ids.device)


def filled_up(values: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """`values` with NaN behind them up to a leading shape: static shapes have room for more."""
    if len(values) == shape[0]:
        return values.to(device)
    full = torch.full((shape[0], *values.shape[1:]), float("nan"), dtype=values.dtype)
    full[: len(values)] = values
    return full.to(device)


def poison_memory(comm: MoECommunicator, case: Case) -> None:
    """Leaves NaN and -1 in the memory that the next results are likely to be given."""
    if comm.device.type != "cuda":
        return
    expected = expected_of(case, comm.rank)
    row_bytes = case.hidden * case.dtype.itemsize
    slots = math.prod(expected.shape)
    sizes = [slots * row_bytes, slots * case.topk * 8, case.tokens[comm.rank] * row_bytes]
    held = [
        torch.full((max(size, 1),), 0xFF, dtype=torch.uint8, device=comm.device) for size in sizes
    ]
    del held


def poisoned_buffer(comm: MoECommunicator, case: Case) -> Tensor:
    """A caller's `output_buffer`, with a little more room than needed."""
    shape = expected_of(case, comm.rank).shape
    if not case.layout.padded:
        shape = (shape[0] + 3,)
    return torch.full((*shape, case.hidden), float("nan"), dtype=case.dtype, device=comm.device)


# -- one communicator, many cases -----------------------------------------------------------------


def contracts(comm: MoECommunicator, cases: Sequence[Case]) -> None:
    """The contract of several cases on one communicator; unfilled slots keep what they held."""
    with torch.no_grad():
        for case in cases:
            check_contract(comm, case)


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


def without_memory(comm: MoECommunicator, case: Case) -> None:
    """Across hosts, mode "ht": a rank finds no memory for its output. It alone raises, and nothing
    is written where its last output is; the others get theirs, and the next calls work."""
    mode: Any = comm._engine._mode  # type: ignore[union-attr]
    before, _ = dispatch_case(comm, case)

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no room for it")

    for culprit in {0, comm.num_ranks - 1}:
        if comm.rank == culprit:
            tensors = (before.tokens, before.topk_ids, before.topk_weights)
            kept = [tensor.clone() for tensor in tensors if tensor is not None]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(mode._dispatcher, "_make_output", no_memory)
                with pytest.raises(torch.OutOfMemoryError):
                    dispatch_case(comm, case)
            found = [tensor for tensor in tensors if tensor is not None]
            for one, other in zip(found, kept, strict=True):
                same_bits(one, other, "the output of the call before")
        else:
            out, handle = dispatch_case(comm, case)
            check_output(case, comm.rank, out, static=counts_stay_on_device(comm))
        before, handle = dispatch_case(comm, case)
        check_output(case, comm.rank, before, static=counts_stay_on_device(comm))
        combine_case(comm, case, handle, "combine after a dispatch without memory")


# -- calls in flight ------------------------------------------------------------------------------


def overlapping(ctx: RankContext, case: Case, **fields: Any) -> bool:
    """Two dispatches and two combines in flight on one communicator."""
    own = inputs_of(case, ctx.rank)
    x_TH, ids_TK = own.x_TH.to(ctx.device), own.ids_TK.to(ctx.device)
    weights = None if own.weights_TK is None else own.weights_TK.to(ctx.device)
    with MoECommunicator(config_of(case, ctx.device, **fields)) as comm:
        overlap = comm.create_overlap_config("dispatch")
        first = comm.dispatch_async(x_TH, ids_TK, weights, overlap=overlap)
        second = comm.dispatch_async(x_TH, ids_TK, weights)
        results = [second.wait(), first.wait()]
        for out, _ in results:
            check_output(case, ctx.rank, out, static=counts_stay_on_device(comm))
        assert first.wait() is results[1], "waiting again gives the same"
        combines = [
            comm.combine_async(rows_for(case, ctx.rank, handle, round_=i), handle)
            for i, (_, handle) in enumerate(results)
        ]
        for i in (1, 0):
            result = combines[i].wait()
            assert isinstance(result, torch.Tensor)
            same_bits(result, combined_of(case, ctx.rank, round_=i), f"combine {i}")
    return True


def finished_later(ctx: RankContext, case: Case, **fields: Any) -> bool:
    """`async_finish=True`: results may be read after `handle.wait()`; combine waits by itself."""
    own = inputs_of(case, ctx.rank)
    x_TH, ids_TK = own.x_TH.to(ctx.device), own.ids_TK.to(ctx.device)
    weights = None if own.weights_TK is None else own.weights_TK.to(ctx.device)
    with MoECommunicator(config_of(case, ctx.device, **fields)) as comm:
        out, handle = comm.dispatch(x_TH, ids_TK, weights, async_finish=True)
        handle.wait()
        handle.wait()
        check_output(case, ctx.rank, out, static=counts_stay_on_device(comm))
        result = comm.combine(rows_for(case, ctx.rank, handle), handle, async_finish=True)
        handle.wait()
        same_bits(result, combined_of(case, ctx.rank), "combine")

        _, unwaited = comm.dispatch(x_TH, ids_TK, weights, async_finish=True)
        result = comm.combine(rows_for(case, ctx.rank, unwaited), unwaited)
        same_bits(result, combined_of(case, ctx.rank), "combine of an unwaited dispatch")
    return True


def gradients_through_requests(ctx: RankContext, case: Case) -> bool:
    """Asynchronous calls are differentiable and give the gradients of the plain ones."""
    own = inputs_of(case, ctx.rank)
    assert own.weights_TK is not None
    grads = []
    with MoECommunicator(config_of(case, ctx.device)) as comm:
        for asynchronous in (False, True):
            x_TH = own.x_TH.to(ctx.device).requires_grad_()
            weights_TK = own.weights_TK.to(ctx.device).requires_grad_()
            ids_TK = own.ids_TK.to(ctx.device)
            if asynchronous:
                out, handle = comm.dispatch_async(x_TH, ids_TK, weights_TK).wait()
            else:
                out, handle = comm.dispatch(x_TH, ids_TK, weights_TK)
            rows = torch.sin(out.tokens)
            if out.topk_weights is not None:
                rows = (rows * out.topk_weights.sum(-1, keepdim=True)).to(out.tokens.dtype)
            if asynchronous:
                result = comm.combine_async(rows, handle).wait()
                assert isinstance(result, torch.Tensor)
            else:
                result = comm.combine(rows, handle)
            result.square().sum().backward()
            grads.append((result, x_TH.grad, weights_TK.grad))
    return all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def two_communicators(ctx: RankContext, cases: list[Case]) -> bool:
    """Calls of two communicators on one group, interleaved and in flight together."""
    with (
        MoECommunicator(config_of(cases[0], ctx.device)) as one,
        MoECommunicator(config_of(cases[1], ctx.device)) as two,
    ):
        for _ in range(3):
            pending = []
            for comm, case in zip((one, two), cases, strict=True):
                own = inputs_of(case, ctx.rank)
                weights = None if own.weights_TK is None else own.weights_TK.to(ctx.device)
                pending.append(
                    comm.dispatch_async(own.x_TH.to(ctx.device), own.ids_TK.to(ctx.device), weights)
                )
            for comm, case, request in zip((two, one), cases[::-1], pending[::-1], strict=True):
                out, handle = request.wait()
                check_output(case, ctx.rank, out)
                result = comm.combine(expert_rows(case, ctx.rank).to(ctx.device), handle)
                same_bits(result, combined_of(case, ctx.rank), "combine")
    return True


def many_calls(ctx: RankContext, cases: list[Case], calls: int) -> bool:
    """Many calls of changing shape on one communicator; borrowed memory must never leak through."""
    with MoECommunicator(config_of(cases[0], ctx.device)) as comm:
        for index in range(calls):
            case = cases[index % len(cases)]
            own = inputs_of(case, ctx.rank)
            weights = None if own.weights_TK is None else own.weights_TK.to(ctx.device)
            out, handle = comm.dispatch(own.x_TH.to(ctx.device), own.ids_TK.to(ctx.device), weights)
            check_output(case, ctx.rank, out)
            if index % 5 == 4:
                continue  # a dispatch that is never combined
            result = comm.combine(expert_rows(case, ctx.rank).to(ctx.device), handle)
            same_bits(result, combined_of(case, ctx.rank), f"combine {index}")
    return True


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


# -- addresses ------------------------------------------------------------------------------------


def ht_odd_addresses(ctx: RankContext, case: Case) -> str:
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
