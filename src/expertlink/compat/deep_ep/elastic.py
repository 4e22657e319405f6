"""`ElasticBuffer`: the interface of DeepEP's V2, on top of communicators.

Rows are moved by TOKEN_MAJOR communicators, with `do_expand` by FLAT ones. Routing weights travel
with the rows but are never multiplied with them: that is the caller's business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from expertlink.compat.deep_ep import pool as pools
from expertlink.compat.deep_ep.elastic_calls import (
    Brought,
    ElasticCalls,
    check_returned,
    column_major,
)
from expertlink.compat.deep_ep.elastic_handle import EPHandle, Geometry
from expertlink.compat.deep_ep.errors import REFUSALS, CallError, UnsupportedError, expect
from expertlink.compat.deep_ep.events import EventHandle, EventOverlap, handle_of
from expertlink.compat.deep_ep.life import until_exit
from expertlink.compat.deep_ep.low_latency import Rows
from expertlink.compat.deep_ep.normal import (
    ROW_BYTES,
    check_bias,
    check_routing,
    check_stats,
    rows_of,
)
from expertlink.compat.deep_ep.pool import Pool, Routing
from expertlink.compat.deep_ep.streams import Streams, comm_stream
from expertlink.compat.deep_ep.topology import logical_size, physical_size
from expertlink.errors import ExpertlinkError
from expertlink.layouts import align

AnyEvent = EventOverlap | EventHandle

_PAGE = 2 << 20
_USUAL_TOPK = 32  # where num_topk is 0
_USUAL_SMS = 24
_MOST_SMS = 64  # where communication has the GPU for itself


class ElasticBuffer:
    """What DeepEP's `ElasticBuffer` does, for one group of ranks.

    All dispatches, combines and barriers are collective: every rank makes the same ones in the same
    order. So is the constructor. Memory is made as calls need it, whatever number of bytes was
    asked for.

    Args:
        group: process group, NCCL or gloo; NCCL where GPUs are on several hosts.
        num_bytes: kept as given; None: `get_buffer_size_hint` of the four numbers that follow.
        num_cpu_bytes: must be 0.
        num_max_tokens_per_rank: largest T of any rank in any call that says no other number.
        hidden: H of the hint.
        num_topk: K of the hint.
        use_fp8_dispatch: ignored, as all that follow but the next three and the last.
        deterministic: results always are.
        allow_hybrid_mode: decides the attributes that count scale-out and scale-up ranks alone:
            calls tell hosts apart in any case.
        allow_multiple_reduction: False: sums of expanded rows are rounded once, where the engine
            can do that; it is `collective` that can.
        prefer_overlap_with_compute, sl_idx, num_allocated_qps,
            num_cpu_timeout_secs, num_gpu_timeout_secs: ignored.
        explicitly_destroy: `destroy()` will be called.

    Raises:
        CallError, UnsupportedError: an argument does not fit; then the other ranks raise PeerError.
            Without a group on this rank alone.
        ConfigurationError: `num_max_tokens_per_rank` or `allow_multiple_reduction` differs between
            ranks; on all.
        PeerTimeoutError: a rank did not come.
    """

    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        if group is None:
            raise CallError("group is None; a torch.distributed.ProcessGroup is expected")
        self.group = group
        self.rank_idx: int = group.rank()
        self.num_ranks: int = group.size()
        try:
            if num_cpu_bytes:
                raise UnsupportedError(
                    "num_cpu_bytes: buffers on the host are not supported; pass 0"
                )
            if num_bytes is None:
                expect(
                    num_max_tokens_per_rank > 0 and hidden > 0,
                    "either num_bytes, or num_max_tokens_per_rank and hidden, must be given",
                )
                num_bytes = ElasticBuffer.get_buffer_size_hint(
                    group, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch
                )
            expect(num_bytes % _PAGE == 0, f"num_bytes={num_bytes} must be a multiple of 2 MiB")
        except (*REFUSALS, TypeError) as error:
            pools.refuse_buffer(group, error)
        self.num_bytes = num_bytes
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.allow_hybrid_mode = allow_hybrid_mode
        self.allow_multiple_reduction = allow_multiple_reduction
        self.prefer_overlap_with_compute = prefer_overlap_with_compute
        self.deterministic = deterministic
        self.explicitly_destroy = explicitly_destroy
        self.num_allocated_qps = num_allocated_qps or (129 if allow_hybrid_mode else 17)
        self.nccl_comm_handle = None
        self.runtime: Pool | None = pools.connect(
            group,
            "ElasticBuffer",
            num_max_tokens_per_rank=num_max_tokens_per_rank,
            allow_multiple_reduction=bool(allow_multiple_reduction),
        )
        self._domains = domains = self.runtime.domains
        self.num_scaleout_ranks, self.num_scaleup_ranks = self.get_logical_domain_size()
        self.scaleout_rank_idx, self.scaleup_rank_idx = 0, self.rank_idx
        if allow_hybrid_mode:
            self.scaleout_rank_idx = domains.host_of[self.rank_idx]
            self.scaleup_rank_idx = domains.local_of(self.rank_idx)
        self.num_rdma_ranks, self.num_nvlink_ranks = self.get_physical_domain_size()
        self._device = self.runtime.device
        self._streams = Streams(self._device)
        self._calls: ElasticCalls | None = ElasticCalls(
            self.runtime,
            rank=self.rank_idx,
            num_ranks=self.num_ranks,
            num_max_tokens=num_max_tokens_per_rank,
            exact=not allow_multiple_reduction,
        )
        until_exit(self)

    def destroy(self) -> None:
        """Releases everything. Local; safe to repeat. Needs `explicitly_destroy=True`."""
        expect(
            self.explicitly_destroy, "destroy() needs ElasticBuffer(..., explicitly_destroy=True)"
        )
        if self.runtime is not None:
            self.runtime.close()
        self.runtime = self._calls = None

    # -- what callers ask -------------------------------------------------------------------------

    @staticmethod
    def get_buffer_size_hint(
        group: Any,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """A multiple of 2 MiB that grows with every argument; callers compare it with others."""
        topk = num_topk or _USUAL_TOPK
        row = 2 * hidden + 16 * topk + 64
        return align(num_max_tokens_per_rank * (group.size() + topk) * row, _PAGE)

    @staticmethod
    def capture() -> EventHandle:
        """An event on the current stream."""
        return EventHandle()

    def get_comm_stream(self) -> torch.cuda.Stream:
        """The stream of asynchronous calls."""
        expect(self._device.type == "cuda", f"there are no streams on {self._device}")
        return comm_stream(self._device)

    def get_physical_domain_size(self) -> tuple[int, int]:
        """`(RDMA ranks, NVLink ranks)`: hosts, and the ranks on the largest."""
        return physical_size(self._domains)

    def get_logical_domain_size(self) -> tuple[int, int]:
        """`(scale-out ranks, scale-up ranks)`: as above; `(1, R)` without `allow_hybrid_mode`."""
        return logical_size(self._domains, allow_hybrid_mode=self.allow_hybrid_mode)

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 200,
        sm_write_gbs: float = 50,
    ) -> int:
        """SMs that calls should have: 24, or 64 without overlap; never more than the GPU has."""
        wanted = _USUAL_SMS if self.prefer_overlap_with_compute else _MOST_SMS
        if self._device.type == "cuda":
            properties = torch.cuda.get_device_properties(self._device)
            wanted = min(wanted, properties.multi_processor_count // 2 * 2)
        return wanted

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """DeepEP's number of queue pairs; there are none here."""
        wanted = num_sms * 16 + 1 if self.allow_hybrid_mode else min(num_sms, 9)
        return min(wanted, self.num_allocated_qps)

    def barrier(
        self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True
    ) -> None:
        """Every rank waits for all others. Collective."""
        ranks = torch.arange(self.num_ranks, dtype=torch.int64, device=self._device)[:, None]
        rows = torch.zeros(
            (self.num_ranks, ROW_BYTES // 2), dtype=torch.bfloat16, device=self._device
        )
        self._alive()
        pool = self.runtime
        assert pool is not None
        routing = Routing(num_experts=self.num_ranks, topk=1)
        self._streams.run(
            lambda: pool.dispatch(
                routing, rows.shape[1], self.num_ranks, lambda comm: comm.dispatch(rows, ranks)
            ),
            (rows, ranks),
        )
        if with_cpu_sync and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    # -- dispatch ---------------------------------------------------------------------------------

    def dispatch(
        self,
        x: Rows,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: AnyEvent | None = None,
        previous_event_before_epilogue: AnyEvent | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Rows, Tensor | None, Tensor | None, EPHandle, EventOverlap]:
        """Sends every token to the ranks of its experts. Collective.

        Args:
            x: `[T, H]` contiguous rows of a multiple of 16 bytes, or a tuple of rows of one-byte
                elements and their scales `[T, S]` of 4 bytes, of any strides.
            topk_idx: `[T, K]` contiguous int64 or int32, -1 for none; not with `handle`.
            topk_weights: `[T, K]` float32.
            cumulative_local_expert_recv_stats: `[E_loc]` int32; counts are added to it.
            num_experts: E, a multiple of R; with `handle` that of the handle, or None.
            num_max_tokens_per_rank: the same on all ranks; None: the handle's or the constructor's.
            expert_alignment: multiple of the groups' sizes; None: the handle's, or 1.
            num_sms: SMs of the call; 0: the engine's choice.
            num_qps: ignored.
            previous_event: wait for this event in place of the current stream.
            previous_event_before_epilogue: an event to wait for as well.
            async_with_compute_stream: return before the rows are there.
            allocate_on_comm_stream: ignored.
            handle: of an earlier dispatch, whose routing is used again.
            do_handle_copy: the handle has a copy of `topk_idx`, not that tensor itself.
            do_cpu_sync: True: as many rows as arrive. False: as many as can arrive, and the host
                waits for nothing where the nvlink engine serves. None: True without `handle`.
            do_expand: a row per (token, local expert), grouped by expert.
            do_zero_padding: rows between groups are zero, as they always are. Needs `do_expand`.
            use_tma_aligned_col_major_sf: received scales are column-major, columns aligned to 4.

        Returns:
            `(recv_x, recv_topk_idx, recv_topk_weights, handle, event)`. Not expanded: rows ordered
            by source rank and token, ids of local experts `[rows, K]` or -1, weights `[rows, K]`.
            Expanded: rows ordered by expert, source rank and token, None, weights `[rows]`. With
            `handle` that very handle is returned.

        Raises:
            CallError: an argument does not fit.
            ExpertlinkError: see `MoECommunicator.dispatch`.
        """
        calls = self._alive()
        rows, scales = x if isinstance(x, tuple) else (x, None)
        most = num_max_tokens_per_rank or self.num_max_tokens_per_rank
        synced = do_cpu_sync is None or do_cpu_sync
        known: EPHandle | None = None
        try:
            geometry = None
            if handle is not None:
                geometry, known = _handle_of(handle).geometry, handle
            sent = rows_of(rows, scales)
            expect(not do_zero_padding or do_expand, "do_zero_padding needs do_expand")
            if handle is not None and geometry is not None:
                expect(topk_idx is None, "topk_idx and handle exclude each other")
                expect(not do_cpu_sync, "do_cpu_sync and handle exclude each other")
                for name, value in (
                    ("num_experts", num_experts),
                    ("num_max_tokens_per_rank", num_max_tokens_per_rank),
                    ("expert_alignment", expert_alignment),
                ):
                    own = getattr(handle, name)
                    expect(value is None or value == own, f"{name}={value}; the handle's is {own}")
                ids = handle.topk_idx
            else:
                if num_experts is None or topk_idx is None:
                    raise CallError("topk_idx and num_experts are needed without a handle")
                ids = topk_idx
                geometry = self._geometry(
                    rows,
                    num_experts=num_experts,
                    most=most,
                    alignment=1 if expert_alignment is None else expert_alignment,
                    num_sms=num_sms,
                    do_expand=do_expand,
                    synced=synced,
                )
                check_stats(
                    cumulative_local_expert_recv_stats,
                    geometry.num_experts // self.num_ranks,
                    self._device,
                )
            check_routing(rows, ids, topk_weights, geometry.num_experts)
            handle_of(previous_event)  # refuses what is none
            before_epilogue = handle_of(previous_event_before_epilogue)
        except REFUSALS as error:
            if handle is None:
                raise self._refused(
                    partial(
                        calls.refuse_dispatch,
                        error,
                        rows,
                        scales,
                        topk_ids=topk_idx,
                        num_experts=num_experts,
                        most=most,
                        alignment=expert_alignment or 1,
                        do_expand=do_expand,
                        synced=synced,
                    )
                ) from None
            raise self._refused(
                partial(calls.refuse_cached, error, rows, scales, known, do_expand=do_expand)
            ) from None

        def run() -> Brought:
            if before_epilogue is not None:
                before_epilogue.current_stream_wait()
            if handle is not None:
                brought = calls.dispatch_cached(
                    sent, scales, topk_weights, handle, do_expand=do_expand, num_sms=num_sms
                )
            else:
                brought = calls.dispatch(
                    sent, scales, ids, topk_weights, geometry, copies_ids=do_handle_copy
                )
                if cumulative_local_expert_recv_stats is not None:
                    stats = cumulative_local_expert_recv_stats
                    stats += brought.handle.num_unaligned_recv_tokens_per_expert
            if use_tma_aligned_col_major_sf and brought.scales is not None:
                brought = dataclasses.replace(brought, scales=column_major(brought.scales))
            return brought

        result, event = self._streams.run(
            run,
            (rows, scales, ids, topk_weights, handle),
            previous_event=previous_event,
            async_finish=async_with_compute_stream,
        )
        tokens = result.tokens
        tokens = tokens if tokens.dtype is rows.dtype else tokens.view(rows.dtype)
        received: Rows = tokens if result.scales is None else (tokens, result.scales)
        recv_ids = result.ids
        if recv_ids is not None and recv_ids.dtype is not ids.dtype:
            recv_ids = recv_ids.to(ids.dtype)
        return received, recv_ids, result.weights, result.handle, event

    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: AnyEvent | None = None,
        previous_event_before_epilogue: AnyEvent | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Brings the rows back and adds up those of every token, unweighted. Collective.

        Every rank adds up its rows of a token in top-k order, and rounds. The token's rank adds up
        what comes back in float32, from +0.0 or from the sum of the biases, and rounds once: over
        ranks in ascending order; with a bias in the order of the ranks' highest choices. Over
        several hosts it adds up their sums, rounded, in ascending order.

        Args:
            x: `[rows, H]` contiguous bfloat16, in the order of the dispatch. H may be another one.
            handle: of a dispatch.
            topk_weights: float32 `[rows, K]`, expanded `[rows]`; each token gets, for each choice,
                the number of the rank that has its expert.
            bias: `[T, H]` bfloat16, or two of them.
            num_sms: SMs of the call; 0: the engine's choice.
            num_qps: ignored.
            previous_event: wait for this event in place of the current stream.
            previous_event_before_epilogue: an event to wait for as well.
            async_with_compute_stream: return before the result is there.
            allocate_on_comm_stream: ignored.

        Returns:
            `(combined_x [T, H] bfloat16, combined_topk_weights [T, K] float32 or None, event)`.

        Raises:
            CallError: an argument does not fit.
            ExpertlinkError: see `MoECommunicator.combine`.
        """
        calls = self._alive()
        made: EPHandle | None = None
        try:
            known, made = _handle_of(handle).known, handle
            check_returned(x, topk_weights, handle)
            expect(
                topk_weights is None or not known.routing.exact,
                "topk_weights need allow_multiple_reduction=True where rows are expanded",
            )
            check_bias(bias, (known.handle.num_tokens, x.shape[1]), x.device)
            handle_of(previous_event)  # refuses what is none
            before_epilogue = handle_of(previous_event_before_epilogue)
        except REFUSALS as error:
            raise self._refused(
                partial(calls.refuse_combine, error, x, made, topk_weights, bias)
            ) from None

        def run() -> tuple[Tensor, Tensor | None]:
            if before_epilogue is not None:
                before_epilogue.current_stream_wait()
            return calls.combine(x, handle, topk_weights, bias, num_sms)

        (combined, weights), event = self._streams.run(
            run,
            (x, topk_weights, bias, known.handle),
            previous_event=previous_event,
            async_finish=async_with_compute_stream,
        )
        return combined, weights, event

    def _geometry(
        self,
        rows: Tensor,
        *,
        num_experts: int,
        most: int,
        alignment: int,
        num_sms: int,
        do_expand: bool,
        synced: bool,
    ) -> Geometry:
        """What a new dispatch is asked for, checked."""
        expect(
            num_experts > 0 and num_experts % self.num_ranks == 0,
            f"num_experts={num_experts} is not a multiple of {self.num_ranks} ranks",
        )
        expect(alignment > 0, f"expert_alignment={alignment}: at least 1")
        expect(
            most > 0 and rows.shape[0] <= most,
            f"rank {self.rank_idx} has {rows.shape[0]} tokens; num_max_tokens_per_rank={most}",
        )
        return Geometry(
            do_expand=do_expand,
            num_experts=num_experts,
            expert_alignment=alignment,
            num_max_tokens_per_rank=most,
            num_sms=num_sms,
            num_ranks=self.num_ranks,
            synced=synced,
        )

    def _refused(self, refuse: Callable[[], NoReturn]) -> ExpertlinkError:
        return self._streams.refused(refuse)

    def _alive(self) -> ElasticCalls:
        if self._calls is None:
            raise CallError("this buffer has been destroyed")
        return self._calls


def _handle_of(handle: object) -> EPHandle:
    if not isinstance(handle, EPHandle):
        raise CallError(f"an EPHandle is expected, not {type(handle).__name__}")
    return handle
