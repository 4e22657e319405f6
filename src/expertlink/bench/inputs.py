"""Inputs of a case: drawn, sent through a checked dispatch and combine, and kept for the clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from expertlink.bench.cases import Case, Plan
from expertlink.bench.ceilings import Moves
from expertlink.bench.clock import Clock
from expertlink.communicator import MoECommunicator
from expertlink.errors import ExpertlinkError
from expertlink.quantization import quantize
from expertlink.types import DispatchHandle, QuantScales
from expertlink.workloads.check import expected_sum, mismatch, scaling_experts
from expertlink.workloads.routings import RoutingSpec, draw_routing, draw_token_counts

_MOST_INPUT_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
_METADATA_BYTES = 8  # of an id (int32) and its weight (float32)


class WrongResultError(ExpertlinkError, RuntimeError):
    """Dispatch and combine did not give the right sum; nothing was timed."""


@dataclass(frozen=True)
class WireRows:
    """`[R]` rows that a rank sends to and receives from every rank in a dispatch, its own share
    included; combine reverses them."""

    rank: int
    rows_to: list[int]
    rows_from: list[int]

    def traffic(self, case: Case) -> list[tuple[int, int, int]]:
        """For each phase, bytes of rows that leave the rank, of rows that arrive, and of the ids
        and weights that leave beside them; its own share does neither."""
        out, back = (sum(rows) - rows[self.rank] for rows in (self.rows_to, self.rows_from))
        there, home = case.row_bytes("dispatch"), case.row_bytes("combine")
        metadata = 0 if case.calls.cached else out * case.topk * _METADATA_BYTES
        dispatch, combine = (out * there, back * there, metadata), (back * home, out * home, 0)
        pair = (dispatch[0] + combine[0], dispatch[1] + combine[1], metadata)
        return [dispatch, combine, pair]

    def raw_moves(self, case: Case, device: torch.device) -> Moves:
        """`all_to_all_single` of as many bytes, by phase, on buffers that are allocated once.

        No counting, no reordering, no reduction: what is left of a call when that costs nothing.
        """

        def exchange(phase: str, rows_out: list[int], rows_in: list[int]) -> Callable[[], object]:
            source, target = (
                torch.zeros(sum(rows), case.row_bytes(phase), dtype=torch.uint8, device=device)
                for rows in (rows_out, rows_in)
            )
            return partial(dist.all_to_all_single, target, source, rows_in, rows_out)

        return {
            ("dispatch", "raw"): exchange("dispatch", self.rows_to, self.rows_from),
            ("combine", "raw"): exchange("combine", self.rows_from, self.rows_to),
        }


@dataclass(frozen=True, kw_only=True)
class Input:
    """One of the inputs that iterations take turns with, and all that is prepared for it."""

    x_TH: Tensor  # tokens of the configured element type
    rows: Tensor  # what is dispatched: `x_TH`, or in mode "ht" the same quantized
    scales: QuantScales | None  # of rows that are quantized already
    topk_ids_TK: Tensor
    topk_weights_TK: Tensor
    expert_out: Tensor  # what the experts return, in memory of its own
    expected_TH: Tensor  # float32, what combine has to return, unrounded
    handle: DispatchHandle  # of an earlier dispatch with this routing
    wire: WireRows
    raw: Moves  # the raw exchange of as many bytes

    def nbytes(self, case: Case) -> int:
        """Device memory that the input holds, roughly."""
        # Both graphs with a dispatch have an output of their own.
        outputs = 3 if case.calls.static and case.calls.graph else 1
        rows = sum(self.wire.rows_to) + sum(self.wire.rows_from)
        row_bytes = case.row_bytes("dispatch") + case.row_bytes("combine")
        tensors = self.x_TH.nbytes + self.expected_TH.nbytes + outputs * self.expert_out.nbytes
        return tensors + rows * row_bytes


def prepare_inputs(comm: MoECommunicator, case: Case, plan: Plan, clock: Clock) -> list[Input]:
    """Inputs with their expert outputs; a dispatch and a combine of each one were checked."""
    inputs: list[Input] = []
    problem: str | None = None
    while len(inputs) < plan.inputs:
        item, wrong = _prepare_one(comm, case, plan.seed, len(inputs), clock.device)
        inputs.append(item)
        problem = problem or wrong
        # All ranks take turns with as many.
        largest = float(clock.gather(torch.tensor([float(item.nbytes(case))])).max())
        if largest * (len(inputs) + 1) > _MOST_INPUT_BYTES[clock.device.type]:
            break
    agree_on_results(problem, clock)
    return inputs


def agree_on_results(problem: str | None, clock: Clock) -> None:
    """Raises `WrongResultError` on every rank if any rank has a problem. Collective."""
    ranks = clock.ranks_with(problem)
    if ranks:
        raise WrongResultError(problem or f"wrong results on ranks {ranks}, not on this one")


@dataclass(frozen=True)
class Drawn:
    """What a rank has before a call."""

    x_TH: Tensor  # tokens of the configured element type
    topk_ids_TK: Tensor
    topk_weights_TK: Tensor


def draw_input(case: Case, seed: int, index: int, *, rank: int, device: torch.device) -> Drawn:
    """The input of that number."""
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
    )[rank]
    # On the device: a CPU takes seconds for the rows of large cases.
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + index * case.ranks + rank)
    x_TH = torch.randn(counts[rank], case.hidden, generator=generator, device=device)
    return Drawn(
        x_TH.to(case.torch_dtype),
        routing.topk_ids_TK.to(device),
        routing.topk_weights_TK.to(device),
    )


def _prepare_one(
    comm: MoECommunicator, case: Case, seed: int, index: int, device: torch.device
) -> tuple[Input, str | None]:
    """The input of that number, and what is wrong with its result."""
    drawn = draw_input(case, seed, index, rank=comm.rank, device=device)
    x_TH, ids_TK, weights_TK = drawn.x_TH, drawn.topk_ids_TK, drawn.topk_weights_TK
    dtype, block_format = case.torch_dtype, case.block_format

    # In training and prefill models quantize in the kernel that makes the rows, so it is not part
    # of what is timed. In decode dispatch does it.
    rows, scales = x_TH, None
    if block_format is not None and case.mode == "ht":
        rows, values = quantize(x_TH, block_format)
        scales = QuantScales(values, block_format)
    out, handle = comm.dispatch(rows, ids_TK, weights_TK, scales)
    expert_out = scaling_experts(out, comm.local_experts, dtype=dtype, block_format=block_format)
    del out
    y_TH = comm.combine(expert_out, handle, out=torch.full_like(x_TH, float("nan")))
    expected_TH = expected_sum(
        x_TH, ids_TK, weights_TK, num_experts=case.experts, block_format=block_format
    )
    rows_to, rows_from = comm.wire_rows(handle)
    wire = WireRows(comm.rank, list(rows_to), list(rows_from))
    item = Input(
        x_TH=x_TH,
        rows=rows,
        scales=scales,
        topk_ids_TK=ids_TK,
        topk_weights_TK=weights_TK,
        expert_out=expert_out,
        expected_TH=expected_TH,
        handle=handle,
        wire=wire,
        raw=wire.raw_moves(case, device),
    )
    return item, mismatch(y_TH, expected_TH, wire_dtype=dtype)
