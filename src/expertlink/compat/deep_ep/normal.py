"""Normal (high-throughput) calls of `Buffer`: training and prefill.

Rows are moved by TOKEN_MAJOR communicators, as bytes: those of unquantized rows are bfloat16 of the
same length, so that one communicator serves every dtype, and the combine as well.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from expertlink.communicator import MoECommunicator
from expertlink.compat.deep_ep import apart
from expertlink.compat.deep_ep.errors import CallError, expect
from expertlink.compat.deep_ep.handles import (
    Dispatched,
    NormalHandle,
    TensorTuple,
    known_of,
    with_rows,
)
from expertlink.compat.deep_ep.internode import InternodeHandle
from expertlink.compat.deep_ep.layout import ranks_as_experts
from expertlink.compat.deep_ep.pool import Pool, Routing
from expertlink.errors import EngineUnavailableError, ExpertlinkError
from expertlink.layouts import align
from expertlink.types import DispatchHandle, DispatchOutput

ROW_BYTES = 16  # rows are multiples of this
_IDS = (torch.int64, torch.int32)


class NormalCalls:
    """Dispatches and combines of one buffer. Every call queues its work on the current stream.

    Args:
        pool: the buffer's communicators.
        rank: this rank.
        num_ranks: R.
    """

    def __init__(self, pool: Pool, *, rank: int, num_ranks: int) -> None:
        self._pool, self._rank, self._num_ranks = pool, rank, num_ranks
        self._static = True  # until a communicator of static shapes could not be had

    # -- dispatch ---------------------------------------------------------------------------------

    def dispatch(
        self,
        x: Tensor,
        rows: Tensor,
        scales: Tensor | None,
        *,
        is_token_in_rank: Tensor,
        num_tokens_per_expert: Tensor,
        topk_ids: Tensor | None,
        topk_weights: Tensor | None,
        expert_alignment: int,
        num_worst_tokens: int,
        num_sms: int | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, list[int], TensorTuple]:
        """`(recv_x, recv_scales, recv_topk_ids, recv_topk_weights, counts, handle)`.

        `rows` are `rows_of(x, scales)`.
        """
        if topk_ids is None:
            ids = ranks_as_experts(is_token_in_rank)
            routing = Routing(self._num_ranks, ids.shape[1])
        else:
            ids = topk_ids
            routing = Routing(num_tokens_per_expert.shape[0], ids.shape[1])
        if num_worst_tokens:
            routing = self._routing_of_worst(routing, num_worst_tokens)
        num_tokens, hidden = rows.shape

        def call(comm: MoECommunicator) -> tuple[DispatchOutput, DispatchHandle]:
            return comm.dispatch_in_line(rows, ids, topk_weights, scales, None, num_sms)

        try:
            (output, handle), capacity = self._pool.dispatch(routing, hidden, num_tokens, call)
        except EngineUnavailableError:
            if not routing.static_tokens:
                raise
            self._static = False  # raised on every rank, so all of them go on without
            routing = Routing(routing.num_experts, routing.topk)
            (output, handle), capacity = self._pool.dispatch(routing, hidden, num_tokens, call)
        received = output.tokens.shape[0]
        padded = num_worst_tokens or received
        if padded < received:
            raise CallError(
                f"num_worst_tokens={num_worst_tokens}, but rank {self._rank} receives {received} "
                "rows"
            )
        known = Dispatched(handle, routing, capacity, received, padded)
        recv_ids = recv_weights = None
        counts: list[int] = []
        if topk_ids is not None:
            recv_ids, recv_weights = output.topk_ids, output.topk_weights
            assert recv_ids is not None
            if topk_ids.dtype is not torch.int64:
                recv_ids = recv_ids.to(topk_ids.dtype)
            if num_worst_tokens:
                recv_ids = with_rows(recv_ids, padded, -1)
                if recv_weights is not None:
                    recv_weights = with_rows(recv_weights, padded, 0)
            else:
                per_expert = output.num_tokens_per_expert_list
                assert per_expert is not None
                counts = aligned(per_expert, expert_alignment)
        elif not num_worst_tokens:
            counts = self._own_counts(num_tokens_per_expert, expert_alignment)
        recv_x, recv_scales = self._received(output, x, padded)
        new_handle = self._handle(known, output, is_token_in_rank)
        return recv_x, recv_scales, recv_ids, recv_weights, counts, new_handle

    def _handle(
        self, known: Dispatched, output: DispatchOutput, is_token_in_rank: Tensor
    ) -> TensorTuple:
        """What the caller gets: `deep_ep` has other tensors in it where there are several hosts."""
        domains = self._pool.domains
        if domains.num_hosts == 1:
            return NormalHandle.of(known, output, is_token_in_rank, self._rank)
        return InternodeHandle.of(known, output, is_token_in_rank, rank=self._rank, domains=domains)

    def dispatch_cached(
        self, x: Tensor, rows: Tensor, scales: Tensor | None, known: Dispatched, num_sms: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """`(recv_x, recv_scales)` for the routing of an earlier dispatch."""
        comm = self._pool.member(known.routing, rows.shape[1], known.capacity)
        output, _ = comm.dispatch_in_line(rows, None, None, scales, known.handle, num_sms)
        return self._received(output, x, known.padded_rows)

    def refuse_dispatch(
        self,
        error: ExpertlinkError,
        x: object,
        scales: object,
        *,
        num_tokens_per_expert: object,
        topk_ids: object,
        num_worst_tokens: int,
    ) -> NoReturn:
        """Raises `error` in place of a new dispatch with these arguments; tells the other ranks."""
        routing = Routing(num_experts=self._num_ranks, topk=self._num_ranks)
        unknown: set[str] = set()
        if topk_ids is not None:
            num_experts, topk = (
                experts_of(num_tokens_per_expert, self._num_ranks),
                topk_of(topk_ids),
            )
            routing = Routing(num_experts or 0, topk or 0)
            unknown = {
                name
                for name, value in (("num_experts", num_experts), ("topk", topk))
                if value is None
            }
        if num_worst_tokens:
            routing = self._routing_of_worst(routing, num_worst_tokens)
        known = {name: value for name, value in routing._asdict().items() if name not in unknown}
        self._pool.refuse("dispatch", error, routing=known, hidden=hidden_of(x, scales))

    def refuse_cached(
        self, error: ExpertlinkError, x: object, scales: object, known: Dispatched | None
    ) -> NoReturn:
        """Raises `error` in place of a cached dispatch; `known` is None for an unknown handle."""
        refuse_with_handle(
            self._pool, "dispatch", error, known, hidden=hidden_of(x, scales), cached=True
        )

    def _routing_of_worst(self, routing: Routing, num_worst_tokens: int) -> Routing:
        """Static shapes, where they can be had; elsewhere rows are padded afterwards."""
        if self._pool.device.type != "cuda" or not self._static:
            return routing
        tokens = -(-num_worst_tokens // self._num_ranks)
        return routing._replace(static_tokens=tokens, max_rows=num_worst_tokens)

    def _received(
        self, output: DispatchOutput, x: Tensor, num_rows: int
    ) -> tuple[Tensor, Tensor | None]:
        """Rows in the caller's dtype and scales, both with that many rows."""
        tokens = output.tokens if output.tokens.dtype is x.dtype else output.tokens.view(x.dtype)
        scales = None if output.scales is None else with_rows(output.scales.tensor, num_rows)
        return with_rows(tokens, num_rows), scales

    def _own_counts(self, num_tokens_per_expert: Tensor, alignment: int) -> list[int]:
        """Rows of this rank's experts where ids do not travel: every rank sends its counts."""
        num_local = num_tokens_per_expert.shape[0] // self._num_ranks
        width = align(num_local, ROW_BYTES // 4)
        rows = torch.zeros(
            (self._num_ranks, width), dtype=torch.int32, device=num_tokens_per_expert.device
        )
        rows[:, :num_local] = num_tokens_per_expert.view(self._num_ranks, num_local)
        ids = torch.arange(self._num_ranks, dtype=torch.int64, device=rows.device)[:, None]

        def call(comm: MoECommunicator) -> DispatchOutput:
            return comm.dispatch(rows.view(torch.bfloat16), ids)[0]

        routing = Routing(num_experts=self._num_ranks, topk=1)
        output, _ = self._pool.dispatch(routing, 2 * width, self._num_ranks, call)
        received = output.tokens.view(torch.int32)[:, :num_local].sum(dim=0).tolist()
        return aligned(received, alignment)

    # -- combine ----------------------------------------------------------------------------------

    def combine(
        self,
        x: Tensor,
        known: Dispatched,
        topk_weights: Tensor | None,
        bias: Tensor | tuple[Tensor, ...] | None,
        num_sms: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        """`(combined_x, combined_topk_weights)`."""
        if known.padded_rows != known.rows:
            x = x[: known.rows]
            topk_weights = None if topk_weights is None else topk_weights[: known.rows]
        combined_weights = None
        if topk_weights is not None:
            combined_weights = self._sum_of_weights(topk_weights, known, num_sms)
        if bias is None:
            comm = self._pool.member(known.routing, x.shape[1], known.capacity)
            return comm.combine_in_line(x, known.handle, num_sms), combined_weights
        rows_TRH = self.rows_apart(x, known, num_sms)
        terms = apart.sums_of_hosts(rows_TRH, self._pool.domains)
        total = apart.sum_in_order(terms, apart.sum_of_biases(bias))
        return total.to(x.dtype), combined_weights

    def refuse_combine(
        self,
        error: ExpertlinkError,
        x: object,
        known: Dispatched | None,
        topk_weights: object,
        bias: object,
    ) -> NoReturn:
        """Raises `error` in place of a combine; `known` is None for an unknown handle."""
        hidden = hidden_of_returned(x)
        if known is not None and topk_weights is not None:  # they travel first
            hidden = self._width(4 * known.routing.topk)
        elif hidden is not None and bias is not None:
            hidden = self._width(-(-hidden // self._num_ranks))
        refuse_with_handle(self._pool, "combine", error, known, hidden=hidden)

    def _width(self, part: int) -> int:
        """Columns of a combine in which every rank has `part` of its own."""
        return align(part, ROW_BYTES // 2) * self._num_ranks

    def _sum_of_weights(
        self, topk_weights: Tensor, known: Dispatched, num_sms: int | None
    ) -> Tensor:
        """`[T, K]` sums over all ranks that a token went to, also of lanes that are -1 there."""
        rows = apart.floats_as_rows(topk_weights)
        rows_TRW = self.rows_apart(rows, known, num_sms, at_once=True)
        return apart.sum_in_order(apart.rows_as_floats(rows_TRW))

    def rows_apart(
        self, rows: Tensor, known: Dispatched, num_sms: int | None, *, at_once: bool = False
    ) -> Tensor:
        """Every rank's row of every token, `[T, R, H]`.

        Args:
            rows: this rank's.
            known: their dispatch.
            num_sms: SMs of a combine.
            at_once: in one combine of R * H columns, not in R of H each.
        """
        part = rows.shape[1] if at_once else -(-rows.shape[1] // self._num_ranks)
        width = self._width(part)
        comm = self._pool.member(known.routing, width, known.capacity)
        return apart.rows_apart(
            rows,
            lambda wide: comm.combine_in_line(wide, known.handle, num_sms),
            rank=self._rank,
            num_ranks=self._num_ranks,
            width=width,
        )


def aligned(counts: list[int], alignment: int) -> list[int]:
    """The counts, rounded up to multiples."""
    return counts if alignment == 1 else [align(count, alignment) for count in counts]


def known_normal(handle: object) -> Dispatched:
    """What the library knows of a normal dispatch's handle, over one host or several."""
    kind: type[NormalHandle | InternodeHandle] = NormalHandle
    if isinstance(handle, tuple) and len(handle) == InternodeHandle.LENGTH:
        kind = InternodeHandle
    return known_of(Dispatched, handle, key=kind.KEY, length=kind.LENGTH)


def rows_of(x: Tensor, scales: Tensor | None) -> Tensor:
    """The rows as communicators take them.

    Raises:
        CallError: rows that cannot be moved.
    """
    # Messages are made where they are raised: making one takes longer than all checks.
    if x.dim() != 2 or not x.is_contiguous():
        raise CallError(f"x must be [T, H] and contiguous, not {_form(x)}")
    row_bytes = x.shape[1] * x.element_size()
    if row_bytes == 0 or row_bytes % ROW_BYTES:
        raise CallError(f"rows of x have {row_bytes} bytes; a multiple of {ROW_BYTES} is needed")
    if scales is None:
        return x if x.dtype is torch.bfloat16 else x.view(torch.bfloat16)
    if x.element_size() != 1:
        raise CallError(f"x has scales, so its elements must be bytes, not {x.dtype}")
    if scales.dim() != 2 or scales.shape[0] != x.shape[0] or scales.element_size() != 4:
        raise CallError(f"scales must be [{x.shape[0]}, S] of 4 bytes each, not {_form(scales)}")
    return x


def hidden_of(x: object, scales: object) -> int | None:
    """H of rows of a dispatch as communicators have it; None where it cannot be told."""
    if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_contiguous():
        return None
    row_bytes = x.shape[1] * x.element_size()
    if row_bytes == 0 or row_bytes % ROW_BYTES or (scales is not None and x.element_size() != 1):
        return None
    return row_bytes // 2 if scales is None else row_bytes


def hidden_of_returned(x: object) -> int | None:
    """H of rows of a combine, whatever their dtype; None where it cannot be told."""
    if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_contiguous():
        return None
    return x.shape[1] if x.shape[1] and 2 * x.shape[1] % ROW_BYTES == 0 else None


def experts_of(num_tokens_per_expert: object, num_ranks: int) -> int | None:
    """E of such counts; None where it cannot be told."""
    if not isinstance(num_tokens_per_expert, Tensor) or num_tokens_per_expert.dim() != 1:
        return None
    num_experts = num_tokens_per_expert.shape[0]
    return num_experts if num_experts and num_experts % num_ranks == 0 else None


def topk_of(topk_ids: object) -> int | None:
    """K of such ids; None where it cannot be told."""
    if not isinstance(topk_ids, Tensor) or topk_ids.dim() != 2 or not topk_ids.is_contiguous():
        return None
    return topk_ids.shape[1] or None


def refuse_with_handle(
    pool: Pool,
    op: str,
    error: ExpertlinkError,
    known: Dispatched | None,
    *,
    hidden: int | None,
    cached: bool = False,
) -> NoReturn:
    """Raises `error` in place of a call with a handle, after telling the other ranks."""
    routing = {} if known is None else known.routing._asdict()
    capacity = 0 if known is None else known.capacity
    pool.refuse(op, error, routing=routing, hidden=hidden, capacity=capacity, cached=cached)


def check_routing(
    x: Tensor, topk_ids: Tensor | None, topk_weights: Tensor | None, num_experts: int
) -> None:
    """Refuses ids and weights that do not fit the rows.

    Raises:
        CallError: one of them does not.
    """
    if topk_ids is None:
        expect(topk_weights is None, "topk_weights are given, but no topk_idx")
        return
    shape = topk_ids.shape
    if len(shape) != 2 or shape[0] != x.shape[0] or not topk_ids.is_contiguous():
        raise CallError(f"topk_idx must be [{x.shape[0]}, K] and contiguous, not {_form(topk_ids)}")
    if topk_ids.dtype not in _IDS:
        raise CallError(f"topk_idx is {topk_ids.dtype}, not int64 or int32")
    if not 0 < shape[1] <= num_experts:
        raise CallError(f"topk_idx has {shape[1]} choices of {num_experts} experts")
    if topk_weights is not None and (
        topk_weights.shape != shape or topk_weights.dtype is not torch.float32
    ):
        raise CallError(f"topk_weights must be float32 {list(shape)}, not {_form(topk_weights)}")


def check_combine(
    x: Tensor,
    topk_weights: Tensor | None,
    *,
    num_rows: int,
    weights_shape: tuple[int, ...],
) -> None:
    """Refuses rows, or weights beside them, that do not fit a handle.

    Raises:
        CallError: one of them does not.
    """
    shape = x.shape
    if len(shape) != 2 or shape[0] != num_rows or not x.is_contiguous():
        raise CallError(f"x must be [{num_rows}, H] and contiguous, not {_form(x)}")
    if x.dtype is not torch.bfloat16:
        raise CallError(f"x is {x.dtype}; combine takes bfloat16")
    row_bytes = 2 * shape[1]
    if row_bytes == 0 or row_bytes % ROW_BYTES:
        raise CallError(f"rows of x have {row_bytes} bytes")
    if topk_weights is not None and (
        topk_weights.shape != weights_shape or topk_weights.dtype is not torch.float32
    ):
        raise CallError(
            f"topk_weights must be float32 {list(weights_shape)}, not {_form(topk_weights)}"
        )


def check_stats(stats: Any, num_local: int, device: torch.device) -> None:
    """Refuses what is neither None nor totals to which the counts of local experts can be added.

    Raises:
        CallError: it is something else.
    """
    if stats is None:
        return
    fits = isinstance(stats, Tensor) and stats.shape == (num_local,) and stats.device == device
    if not fits or stats.dtype is not torch.int32:
        raise CallError(
            f"cumulative_local_expert_recv_stats must be int32 [{num_local}] on {device}, not "
            f"{_form(stats)}"
        )


def check_bias(bias: Any, shape: tuple[int, int], device: torch.device) -> None:
    """Refuses what is not None, a bias, or two of them.

    Raises:
        CallError: it is something else.
    """
    if bias is None:
        return
    biases = bias if isinstance(bias, tuple) else (bias,)
    expect(1 <= len(biases) <= 2, f"{len(biases)} biases; at most two can be added")
    for one in biases:
        fits = isinstance(one, Tensor) and one.shape == shape and one.dtype is torch.bfloat16
        if not fits:
            raise CallError(f"a bias must be bfloat16 {list(shape)}, not {_form(one)}")
        if one.device != device:
            raise CallError(f"a bias is on {one.device}; x is on {device}")


def _form(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} {list(value.shape)} of strides {list(value.stride())}"
