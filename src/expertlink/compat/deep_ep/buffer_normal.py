"""Normal calls of `Buffer`, as callers see them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from expertlink.compat.deep_ep.buffer_parts import BufferParts
from expertlink.compat.deep_ep.config import Config
from expertlink.compat.deep_ep.errors import REFUSALS, CallError, expect
from expertlink.compat.deep_ep.events import AnyEvent, EventOverlap, handle_of
from expertlink.compat.deep_ep.handles import Dispatched
from expertlink.compat.deep_ep.layout import DispatchCounts
from expertlink.compat.deep_ep.low_latency import Rows
from expertlink.compat.deep_ep.normal import (
    check_bias,
    check_combine,
    check_routing,
    known_normal,
    rows_of,
)
from expertlink.compat.deep_ep.streams import Streams
from expertlink.config import MAX_TOPK


class NormalBuffer(BufferParts):
    """What a `Buffer` has of normal (high-throughput) calls."""

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: AnyEvent | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """Counts where the tokens of this rank go. Local.

        Args:
            topk_idx: `[T, K]` int64 or int32, contiguous; ids outside of 0..E-1 choose nobody.
            num_experts: E, a multiple of R.
            previous_event: wait for this event in place of the current stream.
            async_finish: return before the result is there.
            allocate_on_comm_stream: ignored.

        Returns:
            `(num_tokens_per_rank [R] int32, num_tokens_per_rdma_rank [hosts] int32,
            num_tokens_per_expert [E] int32, is_token_in_rank [T, R] bool, event)`. The second is
            None where all ranks share a host.
        """
        self._check_experts(num_experts)
        if topk_idx.dim() != 2 or not topk_idx.is_contiguous():
            raise CallError(f"topk_idx must be [T, K] and contiguous, not {list(topk_idx.shape)}")
        streams = self._streams
        if topk_idx.device != self._device:  # this call moves nothing, so ids may be anywhere
            streams = Streams(topk_idx.device)

        def count() -> tuple[DispatchCounts, Tensor | None]:
            counts = self._count(topk_idx, num_experts)
            per_host = self._per_host
            return counts, None if per_host is None else per_host(counts.is_token_in_rank)

        (counts, per_host), event = streams.run(count, (topk_idx,), previous_event, async_finish)
        return counts.per_rank, per_host, counts.per_expert, counts.is_token_in_rank, event

    def dispatch(
        self,
        x: Rows,
        handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: AnyEvent | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Rows, Tensor | None, Tensor | None, list[int] | None, tuple | None, EventOverlap]:
        """Sends every token to the ranks of its experts. Collective.

        Args:
            x: `[T, H]` contiguous rows of a multiple of 16 bytes, or a tuple of rows of one-byte
                elements and their scales `[T, S]` of 4 bytes, of any strides.
            handle: of an earlier dispatch, whose routing is used again.
            num_tokens_per_rank: of `get_dispatch_layout`; needed without `handle`.
            num_tokens_per_rdma_rank: ignored.
            is_token_in_rank: of `get_dispatch_layout`; needed without `handle`. It decides where
                tokens go where there is no `topk_idx`.
            num_tokens_per_expert: of `get_dispatch_layout`; needed without `handle`.
            topk_idx: `[T, K]` int64 or int32 ids of experts; they decide where tokens go.
            topk_weights: `[T, K]` float32.
            expert_alignment: the list of counts is rounded up to multiples of it.
            num_worst_tokens: not 0: this many rows are returned, and the host waits for nothing
                where the nvlink engine serves. T is at most a rank's share of it.
            config: its `num_sms` bounds the SMs; None: `Buffer.num_sms`.
            previous_event: wait for this event in place of the current stream.
            async_finish: return before the rows are there.
            allocate_on_comm_stream: ignored.

        Returns:
            `(recv_x, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert_list, handle,
            event)`, rows ordered by source rank and token. With `handle`, all but the first and the
            last are None. The new handle is a tuple of 6, over several hosts of 10.

        Raises:
            CallError: an argument does not fit.
            ExpertlinkError: see `MoECommunicator.dispatch`.
        """
        self._check_alive()
        rows, scales = x if isinstance(x, tuple) else (x, None)
        num_sms = (self.num_sms if config is None else config.num_sms) or None
        if handle is not None:
            known = None
            try:
                known = known_normal(handle)
                expect(
                    topk_idx is None and topk_weights is None, "topk and handle exclude each other"
                )
                self._check_tensor("x", rows)
                sent = rows_of(rows, scales)
                if previous_event is not None:
                    handle_of(previous_event)  # refuses what is none
            except REFUSALS as error:
                raise self._refused(
                    partial(self._normal.refuse_cached, error, rows, scales, known)
                ) from None
            (recv_x, recv_scales), event = self._streams.run(
                lambda: self._normal.dispatch_cached(rows, sent, scales, known, num_sms),
                (rows, scales, known),
                previous_event,
                async_finish,
            )
            received = recv_x if recv_scales is None else (recv_x, recv_scales)
            return received, None, None, None, None, event
        try:
            if (
                num_tokens_per_rank is None
                or is_token_in_rank is None
                or num_tokens_per_expert is None
            ):
                raise CallError(
                    "without a handle, num_tokens_per_rank, is_token_in_rank and "
                    "num_tokens_per_expert are needed, as get_dispatch_layout returns them"
                )
            self._check_tensor("x", rows)
            sent = rows_of(rows, scales)
            num_experts = num_tokens_per_expert.shape[0]
            self._check_experts(num_experts)
            if is_token_in_rank.shape != (rows.shape[0], self.group_size):
                raise CallError(
                    f"is_token_in_rank has shape {list(is_token_in_rank.shape)}; "
                    f"[{rows.shape[0]}, {self.group_size}] is expected"
                )
            if is_token_in_rank.dtype is not torch.bool:
                raise CallError(f"is_token_in_rank is {is_token_in_rank.dtype}, not bool")
            check_routing(rows, topk_idx, topk_weights, num_experts)
            if expert_alignment < 1 or num_worst_tokens < 0:
                raise CallError(
                    f"expert_alignment={expert_alignment} and num_worst_tokens={num_worst_tokens}: "
                    "at least 1, and at least 0"
                )
            if topk_idx is None and self.group_size > MAX_TOPK:
                raise CallError(f"topk_idx is needed in a group of more than {MAX_TOPK} ranks")
            expect(
                not num_worst_tokens or topk_idx is not None,
                "num_worst_tokens needs topk_idx",
            )
            if previous_event is not None:
                handle_of(previous_event)  # refuses what is none
        except REFUSALS as error:
            raise self._refused(
                partial(
                    self._normal.refuse_dispatch,
                    error,
                    rows,
                    scales,
                    num_tokens_per_expert=num_tokens_per_expert,
                    topk_ids=topk_idx,
                    num_worst_tokens=num_worst_tokens,
                )
            ) from None
        (recv_x, recv_scales, ids, weights, counts, new_handle), event = self._streams.run(
            lambda: self._normal.dispatch(
                rows,
                sent,
                scales,
                is_token_in_rank=is_token_in_rank,
                num_tokens_per_expert=num_tokens_per_expert,
                topk_ids=topk_idx,
                topk_weights=topk_weights,
                expert_alignment=expert_alignment,
                num_worst_tokens=num_worst_tokens,
                num_sms=num_sms,
            ),
            (rows, scales, topk_idx, topk_weights, is_token_in_rank, num_tokens_per_expert),
            previous_event,
            async_finish,
        )
        received = recv_x if recv_scales is None else (recv_x, recv_scales)
        return received, ids, weights, counts, new_handle, event

    def combine(
        self,
        x: Tensor,
        handle: tuple[Any, ...],
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: AnyEvent | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Brings the rows back and adds up those of every token. Collective.

        float32 sums from +0.0, or from the sum of the biases, over ranks in ascending order; one
        rounding. Over several hosts: sums over the ranks of each host from +0.0, rounded, then
        likewise over hosts.

        Args:
            x: `[N, H]` contiguous bfloat16, in the order of the dispatch. H may be another one.
            handle: of a dispatch, of this buffer or of another one of the group.
            topk_weights: `[N, K]` float32, added up over the ranks that a token went to.
            bias: `[T, H]` bfloat16, or two of them.
            config: its `num_sms` bounds the SMs; None: `Buffer.num_sms`.
            previous_event: wait for this event in place of the current stream.
            async_finish: return before the result is there.
            allocate_on_comm_stream: ignored.

        Returns:
            `(combined_x [T, H] bfloat16, combined_topk_weights [T, K] float32 or None, event)`.
            Tokens that went nowhere get zeros, or the bias.

        Raises:
            CallError: an argument does not fit.
            ExpertlinkError: see `MoECommunicator.combine`.
        """
        self._check_alive()
        num_sms = (self.num_sms if config is None else config.num_sms) or None
        known: Dispatched | None = None
        try:
            known = known_normal(handle)
            self._check_tensor("x", x)
            rows = known.padded_rows
            check_combine(x, topk_weights, num_rows=rows, weights_shape=(rows, known.routing.topk))
            check_bias(bias, (known.handle.num_tokens, x.shape[1]), x.device)
            if previous_event is not None:
                handle_of(previous_event)  # refuses what is none
        except REFUSALS as error:
            raise self._refused(
                partial(self._normal.refuse_combine, error, x, known, topk_weights, bias)
            ) from None
        (combined_x, combined_weights), event = self._streams.run(
            lambda: self._normal.combine(x, known, topk_weights, bias, num_sms),
            (x, topk_weights, bias, known),
            previous_event,
            async_finish,
        )
        return combined_x, combined_weights, event

    def internode_dispatch(self, *args: Any, **options: Any) -> Any:
        """`dispatch`, for a group that spans several hosts. Collective.

        Raises:
            CallError: all ranks share a host.
        """
        self._check_several_hosts("internode_dispatch", "dispatch")
        return self.dispatch(*args, **options)

    def internode_combine(self, *args: Any, **options: Any) -> Any:
        """`combine`, for a group that spans several hosts. Collective.

        Raises:
            CallError: all ranks share a host.
        """
        self._check_several_hosts("internode_combine", "combine")
        return self.combine(*args, **options)
