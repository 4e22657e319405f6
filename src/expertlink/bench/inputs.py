"""Inputs of a case: drawn, sent through a checked dispatch and combine, and kept for the clock."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from expertlink.bench.cases import Case, Plan
from expertlink.bench.check import expected_sum, mismatch, scaling_experts
from expertlink.bench.clocks import gather_on_hosts
from expertlink.bench.graphs import CapturedCalls, capture_calls
from expertlink.bench.raw import RawExchange, WireRows
from expertlink.bench.routings import RoutingSpec, draw_routing, draw_token_counts
from expertlink.communicator import MoECommunicator
from expertlink.errors import ExpertlinkError
from expertlink.quantization import quantize, scale_columns
from expertlink.types import BlockFormat, DispatchHandle, QuantScales

_MOST_INPUT_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
_SCALE_BYTES = 4


class WrongResultError(ExpertlinkError, RuntimeError):
    """Dispatch and combine did not give the right sum; nothing was timed."""


@dataclass(frozen=True)
class Input:
    """One of the inputs that iterations take turns with, and all that is prepared for it.

    Attributes:
        x_TH: tokens of the configured element type.
        rows: what is dispatched: `x_TH`, or the same quantized.
        scales: scales of quantized rows, or None.
        topk_ids_TK: their experts.
        topk_weights_TK: their routing weights.
        expert_out: what the experts return, in memory of its own.
        handle: of an earlier dispatch with this routing.
        wire: rows on the wire.
        raw: the baseline for them.
        graphs: the captured calls; None where the variant launches its calls itself.
    """

    x_TH: Tensor
    rows: Tensor
    scales: QuantScales | None
    topk_ids_TK: Tensor
    topk_weights_TK: Tensor
    expert_out: Tensor
    handle: DispatchHandle
    wire: WireRows
    raw: RawExchange
    graphs: CapturedCalls | None

    @property
    def nbytes(self) -> int:
        """Device memory that the input holds, roughly."""
        wire = self.wire
        # Both graphs with a dispatch have an output of their own.
        outputs = self.expert_out.nbytes * (1 if self.graphs is None else 3)
        rows = sum(wire.rows_to) + sum(wire.rows_from)
        return (
            self.x_TH.nbytes + outputs + rows * (wire.dispatch_row_bytes + wire.combine_row_bytes)
        )


def prepare_inputs(
    comm: MoECommunicator,
    case: Case,
    plan: Plan,
    device: torch.device,
    control: dist.ProcessGroup | None,
) -> list[Input]:
    """Inputs with their expert outputs; a dispatch and a combine of each one were checked."""
    inputs: list[Input] = []
    problem: str | None = None
    while len(inputs) < plan.inputs:
        item, wrong = _prepare_one(comm, case, plan.seed, len(inputs), device)
        inputs.append(item)
        problem = problem or wrong
        # All ranks take turns with as many.
        largest = gather_on_hosts(torch.tensor([float(item.nbytes)]), control)
        if float(largest.max()) * (len(inputs) + 1) > _MOST_INPUT_BYTES[device.type]:
            break
    wrong_ranks = gather_on_hosts(
        torch.tensor([0.0 if problem is None else 1.0]), control
    ).flatten()
    if bool(wrong_ranks.any()):
        ranks = wrong_ranks.nonzero().flatten().tolist()
        raise WrongResultError(problem or f"wrong results on ranks {ranks}, not on this one")
    return inputs


def _prepare_one(
    comm: MoECommunicator, case: Case, seed: int, index: int, device: torch.device
) -> tuple[Input, str | None]:
    counts = draw_token_counts(
        ranks=case.ranks, tokens=case.tokens, uneven=case.uneven, seed=seed + index
    )
    routing = draw_routing(
        RoutingSpec.parse(case.routing),
        tokens_per_rank=counts,
        experts=case.experts,
        topk=case.topk,
        seed=seed,
        trace=case.trace,
        index=index,
    )[comm.rank]
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index * case.ranks + comm.rank)
    x_TH = torch.randn(counts[comm.rank], case.hidden, generator=generator)
    x_TH = x_TH.to(case.torch_dtype).to(device)
    ids_TK, weights_TK = routing.topk_ids_TK.to(device), routing.topk_weights_TK.to(device)
    block_format = None if case.quantization is None else BlockFormat(case.quantization)

    # Models quantize in the kernel that makes the rows, so it is not part of what is timed.
    rows, scales = x_TH, None
    if block_format is not None:
        rows, values = quantize(x_TH, block_format)
        scales = QuantScales(values, block_format)
    out, handle = comm.dispatch(rows, ids_TK, weights_TK, scales)
    expert_out = scaling_experts(
        out, comm.local_experts, dtype=case.torch_dtype, block_format=block_format
    )
    del out
    y_TH = torch.full_like(x_TH, float("nan"))
    y_TH = comm.combine(expert_out, handle, out=y_TH)
    expected_TH = expected_sum(
        x_TH, ids_TK, weights_TK, num_experts=case.experts, block_format=block_format
    )
    problem = mismatch(y_TH, expected_TH, wire_dtype=case.wire_dtype)
    graphs = None
    if case.calls.graph:
        graphs = capture_calls(comm, rows, scales, ids_TK, weights_TK, expert_out)
        graphs.dispatch.replay()
        graphs.combine.replay()
        graphs.pair.replay()
        for replayed_TH in (graphs.y_TH, graphs.pair_y_TH):
            wrong = mismatch(replayed_TH, expected_TH, wire_dtype=case.wire_dtype)
            problem = problem or wrong
    wire = _wire_rows(comm, case, handle)
    raw = RawExchange(wire, device=device)
    item = Input(x_TH, rows, scales, ids_TK, weights_TK, expert_out, handle, wire, raw, graphs)
    return item, problem


def _wire_rows(comm: MoECommunicator, case: Case, handle: DispatchHandle) -> WireRows:
    rows_to, rows_from = comm.wire_rows(handle)
    row_bytes = case.hidden * case.torch_dtype.itemsize
    if case.quantization is not None:
        columns = scale_columns(case.hidden, BlockFormat(case.quantization))
        row_bytes = case.hidden + columns * _SCALE_BYTES
    return WireRows(
        rank=comm.rank,
        rows_to=list(rows_to),
        rows_from=list(rows_from),
        dispatch_row_bytes=row_bytes,
        combine_row_bytes=case.hidden * case.wire_dtype.itemsize,
    )
