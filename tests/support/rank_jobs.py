"""What tests run on every rank: each job compares one rank's results with the oracle.

Jobs raise on the first difference. They know nothing of devices or process groups beyond what the
context gives them, so the same jobs judge gloo on CPU and NCCL on GPUs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from expertlink import (
    DispatchHandle,
    DispatchLayout,
    DispatchOutput,
    MoECommunicator,
    MoECommunicatorConfig,
)
from expertlink.launch import RankContext
from support.oracle import Case, expected_of, inputs_of, received_of
from support.oracle_results import combined_of, expert_rows, returned_grads, slot_grads


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
    tokens = _counted(case, rank, out.tokens)
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


def _counted(case: Case, rank: int, values: Tensor) -> Tensor:
    """The part of an output that counts stand for, on the host."""
    values = values.detach().cpu()
    return values if case.layout.padded else values[: expected_of(case, rank).shape[0]]


def _check_choices(case: Case, rank: int, out: DispatchOutput) -> None:
    received = received_of(case, rank)
    assert received.ids is not None
    assert out.topk_ids is not None
    assert out.topk_ids.shape[:-1] == out.tokens.shape[:-1]
    same_bits(_counted(case, rank, out.topk_ids), received.ids, "topk_ids")
    rest = slice(None, 0) if case.layout.padded else slice(len(received.ids), None)
    assert (out.topk_ids[rest] == -1).all(), "rows beyond the last have ids"
    if received.weights is None:
        assert out.topk_weights is None
        return
    assert out.topk_weights is not None
    same_bits(_counted(case, rank, out.topk_weights), received.weights, "topk_weights")
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
    own = inputs_of(case, rank)
    x_TH, ids_TK = own.x_TH.to(comm.device), own.ids_TK.to(comm.device)
    expected = combined_of(case, rank)
    rows: Tensor | None = None
    handle = None
    for _ in range(2):
        poison_memory(comm, case)
        out, handle = dispatch_case(comm, case)
        check_output(case, rank, out, static=static)
        rows = rows_for(case, rank, handle)
        poison_memory(comm, case)
        same_bits(comm.combine(rows, handle), expected, "combine")
    assert handle is not None
    assert rows is not None

    poison_memory(comm, case)
    out, cached = comm.dispatch(x_TH, ids_TK, previous_handle=handle)
    check_output(case, rank, out, static=static)
    grads = filled_up(slot_grads(case, rank), cached.rows_shape[:-1], comm.device)
    result, grads_TK = comm.combine(rows, cached, weight_grads=grads)
    same_bits(result, expected, "combine after a cached dispatch")
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
    latency = config.mode == "ll" and comm.engine_name == "nvlink"
    return config.static_shapes or (latency and config.layout.padded)


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
