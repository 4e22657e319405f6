"""Dispatches and combines of `ElasticBuffer`, once their arguments have been checked."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from expertlink.communicator import MoECommunicator
from expertlink.compat.deep_ep import apart
from expertlink.compat.deep_ep.elastic_handle import EPHandle, Geometry, worst_rows
from expertlink.compat.deep_ep.errors import expect
from expertlink.compat.deep_ep.handles import Dispatched, with_rows
from expertlink.compat.deep_ep.normal import (
    ROW_BYTES,
    hidden_of,
    hidden_of_returned,
    refuse_with_handle,
    topk_of,
)
from expertlink.compat.deep_ep.pool import Pool, Routing
from expertlink.errors import EngineUnavailableError, ExpertlinkError
from expertlink.layouts import align
from expertlink.types import CommOverlapConfig, DispatchHandle, DispatchOutput


@dataclass(frozen=True, eq=False)
class Brought:
    """What a dispatch brought.

    Attributes:
        tokens: rows, of the dtype in which they travelled.
        scales: `[rows, S]`, or None.
        ids: `[rows, K]` int64 local experts or -1; None where rows are expanded.
        weights: `[rows, K]`, expanded `[rows]`; None where the call had none.
        handle: for later calls.
    """

    tokens: Tensor
    scales: Tensor | None
    ids: Tensor | None
    weights: Tensor | None
    handle: EPHandle


class ElasticCalls:
    """Dispatches and combines of one buffer. Every call queues its work on the current stream.

    Args:
        pool: the buffer's communicators.
        rank: this rank.
        num_ranks: R.
        num_max_tokens: communicators are made for that many tokens at least.
        exact: sums of expanded rows are rounded once, where the engine can do that.
    """

    def __init__(
        self, pool: Pool, *, rank: int, num_ranks: int, num_max_tokens: int, exact: bool
    ) -> None:
        self._pool, self._rank, self._num_ranks = pool, rank, num_ranks
        self._num_max_tokens = num_max_tokens
        self._on_gpu = pool.device.type == "cuda"
        self._static = self._on_gpu  # until a communicator of static shapes could not be had
        # The nvlink engine has exact sums in its low-latency mode only.
        self._exact = exact and not self._on_gpu

    # -- dispatch ---------------------------------------------------------------------------------

    def dispatch(
        self,
        rows: Tensor,
        scales: Tensor | None,
        topk_ids: Tensor,
        topk_weights: Tensor | None,
        geometry: Geometry,
        *,
        copies_ids: bool,
    ) -> Brought:
        """A dispatch of a new routing; its handle has a copy of the ids if asked for."""
        expanded = geometry.do_expand
        routing = self._routing(
            geometry.num_experts, topk_ids.shape[1], geometry.expert_alignment, expanded=expanded
        )
        comm, routing = self._communicator(routing, rows.shape[1], geometry)
        output, handle = comm.dispatch_in_line(
            rows, topk_ids, topk_weights, scales, None, geometry.num_sms or None
        )
        received = padded = output.tokens.shape[0]
        if not geometry.synced:
            padded = worst_rows(geometry, topk_ids.shape[1], do_expand=expanded)
        # Combine must not multiply: the weights stay aside.
        unweighted = dataclasses.replace(handle, topk_weights=None)
        known = Dispatched(unweighted, routing, comm.config.max_tokens_per_rank, received, padded)
        kept_ids = topk_ids.clone() if copies_ids else topk_ids
        made = EPHandle.of(known, geometry, kept_ids, output)
        return _brought(comm, output, handle, made, weighted=topk_weights is not None)

    def _routing(self, num_experts: int, topk: int, alignment: int, *, expanded: bool) -> Routing:
        return Routing(
            num_experts=num_experts,
            topk=topk,
            output_layout="flat" if expanded else "token_major",
            expert_alignment=alignment if expanded else 1,
            exact=expanded and self._exact,
        )

    def _communicator(
        self, routing: Routing, hidden: int, geometry: Geometry
    ) -> tuple[MoECommunicator, Routing]:
        """The communicator of a new routing, and the routing as that has it."""
        most = geometry.num_max_tokens_per_rank
        if not geometry.synced and self._static:
            static = routing._replace(static_tokens=most)
            try:
                return self._pool.member(static, hidden, most), static
            except EngineUnavailableError:  # raised on every rank
                self._static = False
        return self._pool.member(routing, hidden, max(most, self._num_max_tokens)), routing

    def refuse_dispatch(
        self,
        error: ExpertlinkError,
        x: object,
        scales: object,
        *,
        topk_ids: object,
        num_experts: int | None,
        most: int,
        alignment: int,
        do_expand: bool,
        synced: bool,
    ) -> NoReturn:
        """Raises `error` in place of a new dispatch with these arguments; tells the other ranks."""
        experts = num_experts if num_experts and num_experts % self._num_ranks == 0 else None
        topk = topk_of(topk_ids)
        routing = self._routing(experts or 0, topk or 0, alignment, expanded=do_expand)
        capacity = max(most, self._num_max_tokens)
        if not synced and self._static:
            routing, capacity = routing._replace(static_tokens=most), most
        known = routing._asdict()
        if experts is None:
            del known["num_experts"]
        if topk is None:
            del known["topk"]
        hidden = hidden_of(x, scales)
        self._pool.refuse("dispatch", error, routing=known, hidden=hidden, capacity=capacity)

    def refuse_cached(
        self,
        error: ExpertlinkError,
        x: object,
        scales: object,
        handle: EPHandle | None,
        *,
        do_expand: bool,
    ) -> NoReturn:
        """Raises `error` in place of a cached dispatch; None stands for an unknown handle."""
        if handle is not None and do_expand != handle.do_expand:
            if handle.twin is None:
                geometry = handle.geometry
                self.refuse_dispatch(
                    error,
                    x,
                    scales,
                    topk_ids=handle.topk_idx,
                    num_experts=geometry.num_experts,
                    most=geometry.num_max_tokens_per_rank,
                    alignment=geometry.expert_alignment,
                    do_expand=do_expand,
                    synced=geometry.synced,
                )
            handle = handle.twin
        known = None if handle is None else handle.known
        hidden = hidden_of(x, scales)
        refuse_with_handle(self._pool, "dispatch", error, known, hidden=hidden, cached=True)

    def dispatch_cached(
        self,
        rows: Tensor,
        scales: Tensor | None,
        topk_weights: Tensor | None,
        handle: EPHandle,
        *,
        do_expand: bool,
        num_sms: int,
    ) -> Brought:
        """A dispatch of an earlier routing, in either layout; it returns that very handle."""
        if do_expand != handle.do_expand:
            return self._in_other_layout(rows, scales, topk_weights, handle, num_sms)
        known = handle.known
        comm = self._pool.member(known.routing, rows.shape[1], known.capacity)
        output, again = comm.dispatch_in_line(
            rows, None, topk_weights, scales, known.handle, num_sms or None
        )
        return _brought(comm, output, again, handle, weighted=topk_weights is not None)

    def _in_other_layout(
        self,
        rows: Tensor,
        scales: Tensor | None,
        topk_weights: Tensor | None,
        handle: EPHandle,
        num_sms: int,
    ) -> Brought:
        """The same choices as rows of the other layout: a routing of its own, made once."""
        do_expand = not handle.do_expand
        if handle.twin is not None:
            brought = self.dispatch_cached(
                rows, scales, topk_weights, handle.twin, do_expand=do_expand, num_sms=num_sms
            )
        else:
            geometry = dataclasses.replace(handle.geometry, do_expand=do_expand)
            brought = self.dispatch(
                rows, scales, handle.topk_idx, topk_weights, geometry, copies_ids=False
            )
            handle.twin = brought.handle
        return dataclasses.replace(brought, handle=handle)

    # -- combine ----------------------------------------------------------------------------------

    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None,
        bias: Tensor | tuple[Tensor, ...] | None,
        num_sms: int,
    ) -> tuple[Tensor, Tensor | None]:
        """`(combined_x, combined_topk_weights)`."""
        known = handle.known
        rows, hidden = cut(x, known.rows), x.shape[1]
        comm = self._pool.member(known.routing, hidden, known.capacity)
        combined = combined_weights = None
        if topk_weights is not None:
            combined, combined_weights = comm.combine_async(
                rows,
                known.handle,
                weight_grads=cut(topk_weights, known.rows),
                overlap=bounded_combine(num_sms),
            ).wait()
        if bias is not None:
            return self._from_bias(rows, handle, bias, num_sms), combined_weights
        if combined is None:
            combined = comm.combine_in_line(rows, known.handle, num_sms or None)
        return combined, combined_weights

    def refuse_combine(
        self,
        error: ExpertlinkError,
        x: object,
        handle: EPHandle | None,
        topk_weights: object,
        bias: object,
    ) -> NoReturn:
        """Raises `error` in place of a combine; `handle` is None for an unknown one."""
        known, hidden = None if handle is None else handle.known, hidden_of_returned(x)
        alone = bias is not None and topk_weights is None
        if (
            alone
            and known is not None
            and hidden is not None
            and self._pool.has(known.routing, hidden, known.capacity)
        ):
            hidden = self._width(hidden)  # rows begin with their parts
        refuse_with_handle(self._pool, "combine", error, known, hidden=hidden)

    def _width(self, hidden: int) -> int:
        """Columns of a combine in which every rank has a share of its rows."""
        return align(-(-hidden // self._num_ranks), ROW_BYTES // 2) * self._num_ranks

    def _from_bias(
        self, rows: Tensor, handle: EPHandle, bias: Tensor | tuple[Tensor, ...], num_sms: int
    ) -> Tensor:
        """Sums that begin with the biases, over ranks in the order of their highest choices.

        Over several hosts: over hosts in ascending order, whose sums are rounded.
        """
        known, ranks = handle.known, self._num_ranks
        width = self._width(rows.shape[1])
        comm = self._pool.member(known.routing, width, known.capacity)
        terms_TRH = apart.rows_apart(
            rows,
            lambda wide: comm.combine_in_line(wide, known.handle, num_sms or None),
            rank=self._rank,
            num_ranks=ranks,
            width=width,
        )
        biases, domains = apart.sum_of_biases(bias), self._pool.domains
        if domains.num_hosts > 1:
            terms = apart.sums_of_hosts(terms_TRH, domains)
            return apart.sum_in_order(terms, biases).to(rows.dtype)
        ids_TK = handle.topk_idx.to(torch.int64)
        rank_TK = ids_TK // (handle.num_experts // ranks)  # -1 stays -1: it rounds down
        lane = torch.arange(ids_TK.shape[1], dtype=torch.int64, device=ids_TK.device)
        here_TKR = rank_TK[:, :, None] == torch.arange(ranks, device=ids_TK.device)
        highest_TR = torch.where(here_TKR, lane[:, None], -1).max(dim=1).values
        order_TR = highest_TR.sort(dim=1, stable=True).indices
        ordered = terms_TRH.gather(1, order_TR[:, :, None].expand_as(terms_TRH))
        return apart.sum_in_order(ordered, biases).to(rows.dtype)


def _brought(
    comm: MoECommunicator,
    output: DispatchOutput,
    handle: DispatchHandle,
    made: EPHandle,
    *,
    weighted: bool,
) -> Brought:
    """The tensors of a dispatch, with the rows that its caller expects.

    Args:
        comm: that made it.
        output: of the dispatch.
        handle: the library's own, for its weights.
        made: the handle to return.
        weighted: the call was given weights.
    """
    rows = made.known.padded_rows
    ids = weights = None
    if made.do_expand:
        if weighted:
            weights = comm.slot_weights(handle)
    else:
        assert output.topk_ids is not None
        ids = with_rows(output.topk_ids, rows, -1)
        weights = output.topk_weights if weighted else None
    return Brought(
        tokens=with_rows(output.tokens, rows),
        scales=None if output.scales is None else with_rows(output.scales.tensor, rows),
        ids=ids,
        weights=None if weights is None else with_rows(weights, rows, 0),
        handle=made,
    )


@functools.cache
def bounded_combine(num_sms: int) -> CommOverlapConfig:
    """Settings of a combine on the current stream with that many SMs; 0: as many as it likes."""
    return CommOverlapConfig("combine", None, (), num_sms or None)


def column_major(scales: Tensor) -> Tensor:
    """The same scales with strides `(1, rows rounded up to a multiple of 4)`."""
    rows, columns = scales.shape
    memory = scales.new_empty((columns, align(rows, 4)))
    turned = memory.t()[:rows]
    return turned.copy_(scales)


def cut(tensor: Tensor, num_rows: int) -> Tensor:
    """The first rows; where there are too few, the missing ones belong to no token."""
    if tensor.shape[0] < num_rows:
        return with_rows(tensor, num_rows, 0)
    return tensor[:num_rows]


def check_returned(x: Tensor, topk_weights: Tensor | None, handle: EPHandle) -> None:
    """Refuses rows, or weights beside them, that do not fit the handle."""
    rows, topk = handle.known.padded_rows, handle.known.routing.topk
    expect(
        x.dim() == 2 and x.dtype is torch.bfloat16 and x.is_contiguous(),
        f"x must be [rows, H], bfloat16 and contiguous, not {x.dtype} {list(x.shape)}",
    )
    expect(
        handle.do_expand or x.shape[0] == rows, f"x has {x.shape[0]} rows; the dispatch had {rows}"
    )
    expect(x.shape[1] > 0 and 2 * x.shape[1] % ROW_BYTES == 0, f"H={x.shape[1]}: a multiple of 8")
    if topk_weights is None:
        return
    shape = (x.shape[0],) if handle.do_expand else (x.shape[0], topk)
    expect(
        topk_weights.shape == shape and topk_weights.dtype is torch.float32,
        f"topk_weights must be float32 {list(shape)}, not {topk_weights.dtype} "
        f"{list(topk_weights.shape)}",
    )
