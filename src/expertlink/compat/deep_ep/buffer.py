"""`Buffer`: the interface of DeepEP's V1, on top of communicators."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from expertlink.compat.deep_ep import config as configs
from expertlink.compat.deep_ep import pool as pools
from expertlink.compat.deep_ep.config import Config
from expertlink.compat.deep_ep.errors import REFUSALS, CallError, UnsupportedError, expect
from expertlink.compat.deep_ep.events import AnyEvent, EventHandle, EventOverlap, handle_of
from expertlink.compat.deep_ep.handles import Dispatched
from expertlink.compat.deep_ep.internode import HostCounter
from expertlink.compat.deep_ep.layout import DispatchCounts, LayoutCounter
from expertlink.compat.deep_ep.life import until_exit
from expertlink.compat.deep_ep.low_latency import (
    Hook,
    LowLatencyCalls,
    Rows,
    known_low_latency,
    quantization_of,
    refuse_halves,
    zero_copy_rows,
)
from expertlink.compat.deep_ep.normal import (
    NormalCalls,
    check_bias,
    check_combine,
    check_routing,
    check_stats,
    known_normal,
    rows_of,
)
from expertlink.compat.deep_ep.pool import Pool
from expertlink.compat.deep_ep.streams import Streams, comm_stream
from expertlink.config import MAX_TOPK
from expertlink.errors import ExpertlinkError

_NO_WAIT_COSTS = (
    "waits are not measured in clock cycles; MoECommunicator.enable_statistics() has the longest"
)
_DESTROYED = "this buffer has been destroyed"


class Buffer:
    """What DeepEP's `Buffer` does, for one group of ranks.

    All dispatches and combines are collective: every rank makes the same ones in the same order.
    So is the constructor: the ranks tell each other which hosts they are on. Tensors live on CUDA's
    current device, or on the CPU where there is no GPU, whatever the group's backend.

    Args:
        group: process group, NCCL or gloo; NCCL where GPUs are on several hosts.
        num_nvl_bytes: kept as given; memory is made as calls need it.
        num_rdma_bytes: likewise.
        low_latency_mode: the low-latency calls will be used.
        num_qps_per_rank: ignored, as the next four.
        allow_nvlink_for_low_latency_mode: ignored.
        allow_mnnvl: ignored.
        use_fabric: ignored.
        explicitly_destroy: `destroy()` will be called.
        enable_shrink: low-latency calls leave out ranks that do not come in time, in place of
            raising. Only on GPUs of one NVLink domain; elsewhere nobody can be left out.
        comm: MPI communicators are not supported.

    Raises:
        ValueError: no group was given.
    """

    num_sms: ClassVar[int] = 20

    def __init__(
        self,
        group: Any = None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        *,
        use_fabric: bool | None = None,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
    ) -> None:
        if comm is not None:
            raise UnsupportedError("comm: MPI communicators are not supported; pass a group")
        if group is None:
            raise CallError("group is None; a torch.distributed.ProcessGroup is expected")
        self.group = group
        self.rank: int = group.rank()
        self.group_size: int = group.size()
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self.runtime: Pool | None = pools.connect(group)
        self._device = self.runtime.device
        self._streams = Streams(self._device)
        self._count = LayoutCounter(self._device, self.group_size)
        domains, self._per_host = self.runtime.domains, None
        if domains.num_hosts > 1:
            self._per_host = HostCounter(domains, self._device)
        self._normal = NormalCalls(self.runtime, rank=self.rank, num_ranks=self.group_size)
        self._low_latency: LowLatencyCalls | None = None
        if low_latency_mode:
            self.nvshmem_qp_depth = int(os.environ.get("NVSHMEM_QP_DEPTH", "1024"))
            self._low_latency = LowLatencyCalls(
                self.runtime, self._streams, num_ranks=self.group_size, masks=enable_shrink
            )
        until_exit(self)

    def destroy(self) -> None:
        """Releases everything. Local; safe to repeat. Needs `explicitly_destroy=True`."""
        expect(self.explicitly_destroy, "destroy() needs Buffer(..., explicitly_destroy=True)")
        if self.runtime is not None:
            self.runtime.close()
        self.runtime = self._low_latency = None

    # -- static -----------------------------------------------------------------------------------

    @staticmethod
    def is_sm90_compiled() -> bool:
        """True: every kernel is there that callers ask for."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Changes `Buffer.num_sms`, for all buffers. It must be even."""
        expect(new_num_sms % 2 == 0, f"num_sms={new_num_sms} must be even")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """An event on the current stream."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """What DeepEP would want as `num_rdma_bytes`; memory is made as calls need it."""
        return configs.low_latency_size_hint(
            num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts
        )

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """The default of `dispatch(config=)`."""
        return configs.dispatch_config(num_ranks, Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """The default of `combine(config=)`."""
        return configs.combine_config(num_ranks, Buffer.num_sms)

    def get_comm_stream(self) -> torch.cuda.Stream:
        """The stream of asynchronous calls."""
        expect(self._device.type == "cuda", f"there are no streams on {self._device}")
        return comm_stream(self._device)

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> Tensor:
        """Scratch memory as long as the buffer that DeepEP would have. No call reads it.

        Args:
            dtype: of the elements.
            size: shape of the first elements; None: all of them, in one dimension.
            offset: bytes to leave out at the front.
            use_rdma_buffer: as long as `num_rdma_bytes`, not `num_nvl_bytes`.
        """
        num_bytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        count = (num_bytes - offset) // dtype.itemsize
        shape = (count,) if size is None else tuple(size)
        expect(torch.Size(shape).numel() <= count, f"{list(shape)} of {dtype}: {count} fit")
        return torch.empty(shape, dtype=dtype, device=self._device)

    # -- normal calls -----------------------------------------------------------------------------

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
        num_sms = (Buffer.num_sms if config is None else config.num_sms) or None
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
        num_sms = (Buffer.num_sms if config is None else config.num_sms) or None
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

    # -- low-latency calls ------------------------------------------------------------------------

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        *,
        x_global_scale: Tensor | None = None,
        use_nvfp4: bool = False,
    ) -> tuple[Rows, Tensor, tuple[Any, ...], EventOverlap, Hook | None]:
        """Sends every token to its experts, for decode. Collective; the host waits for nothing.

        The first call of new shapes makes a communicator, so it cannot be captured in a CUDA graph.

        Args:
            x: `[T, H]` contiguous bfloat16; H a multiple of 128, with `use_fp8` of 512.
            topk_idx: `[T, K]` contiguous int64 or int32, -1 for none.
            num_max_dispatch_tokens_per_rank: M, the same on all ranks; T is at most M.
            num_experts: E, a multiple of R.
            cumulative_local_expert_recv_stats: `[E_loc]` int32; `recv_count` is added to it.
            dispatch_wait_recv_cost_stats: not supported.
            use_fp8: rows are quantized to e4m3 in blocks of 128, with float32 scales.
            round_scale: scales are powers of two.
            use_ue8m0: scales are their exponents, four in an int32.
            async_finish: return before the rows are there.
            return_recv_hook: launch the sending half; the hook launches the receiving half, on the
                stream that is current now.
            x_global_scale: not supported.
            use_nvfp4: not supported.

        Returns:
            `(recv_x, recv_count, handle, event, hook)`. `recv_x` is `[E_loc, R * M, H]`, with
            `use_fp8` a tuple of that and the scales `[E_loc, R * M, H / 128]` (int32: H / 512),
            whose last two dimensions are swapped in memory. Rows are ordered by source rank and
            token; those past `recv_count` `[E_loc]` int32 are undefined. `hook` is None unless it
            was asked for.

        Raises:
            CallError, UnsupportedError: an argument does not fit, or is not supported.
            ExpertlinkError: see `MoECommunicator.dispatch`.
        """
        calls = self._low_latency_calls()
        try:
            if x_global_scale is not None or use_nvfp4:
                raise UnsupportedError(
                    "use_nvfp4 and x_global_scale are not supported: use e4m3 rows"
                )
            if dispatch_wait_recv_cost_stats is not None:
                raise UnsupportedError(f"dispatch_wait_recv_cost_stats: {_NO_WAIT_COSTS}")
            if async_finish and return_recv_hook:
                refuse_halves()
            if cumulative_local_expert_recv_stats is not None:
                stats = cumulative_local_expert_recv_stats
                check_stats(stats, num_experts // self.group_size, self._device)
            form = calls.form(
                x,
                topk_idx,
                num_max_dispatch_tokens_per_rank,
                num_experts,
                quantization_of(use_fp8=use_fp8, round_scale=round_scale, use_ue8m0=use_ue8m0),
            )
        except REFUSALS as error:
            raise self._refused(
                partial(
                    calls.refuse_dispatch,
                    error,
                    x,
                    topk_idx,
                    num_max_dispatch_tokens_per_rank,
                    num_experts,
                )
            ) from None
        return calls.dispatch(
            form,
            x,
            topk_idx,
            received_stats=cumulative_local_expert_recv_stats,
            async_finish=async_finish,
            return_recv_hook=return_recv_hook,
        )

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: tuple[Any, ...],
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
        *,
        overlap: bool = False,
        src_signals: Tensor | None = None,
        src_signal_expect_value: int = 0,
        packed_recv_count: Tensor | None = None,
        comp_signal: Tensor | None = None,
        block_m: int | None = None,
        threshold: int | None = None,
        num_sms: int | None = None,
    ) -> tuple[Tensor, EventOverlap, Hook | None]:
        """Brings every row back and returns the weighted sums of this rank's tokens. Collective.

        `sum_k topk_weights[t, k] * row[t, k]`: in top-k order on the rank of the experts, then over
        ranks in ascending order, both in float32 and rounded to bfloat16.

        Args:
            x: `[E_loc, R * M, H]` contiguous bfloat16, in the order of the dispatch.
            topk_idx: of the dispatch.
            topk_weights: `[T, K]` float32; those of choices -1 are not read.
            handle: of the dispatch; any number of combines may use it.
            use_logfmt: not supported.
            zero_copy: read the rows from `get_next_low_latency_combine_buffer(handle)`; of `x` only
                the shape is looked at.
            async_finish: return before the result is there.
            return_recv_hook: as in `low_latency_dispatch`.
            out: `[T, H]` contiguous bfloat16 for the result.
            combine_wait_recv_cost_stats: not supported.
            overlap: not supported, as all that follow: signals between GEMM and combine.
            src_signals: not supported.
            src_signal_expect_value: not supported.
            packed_recv_count: not supported.
            comp_signal: not supported.
            block_m: not supported.
            threshold: not supported.
            num_sms: not supported.

        Returns:
            `(combined_x [T, H] bfloat16, event, hook)`; `combined_x` is `out` where that is given.

        Raises:
            CallError, UnsupportedError: an argument does not fit, or is not supported.
            ExpertlinkError: see `MoECommunicator.combine`.
        """
        calls = self._low_latency_calls()
        try:
            if use_logfmt:
                raise UnsupportedError("use_logfmt is not supported: rows travel as bfloat16")
            if combine_wait_recv_cost_stats is not None:
                raise UnsupportedError(f"combine_wait_recv_cost_stats: {_NO_WAIT_COSTS}")
            if overlap or src_signals is not None or comp_signal is not None:
                raise UnsupportedError(
                    "overlap, src_signals and comp_signal are not supported: switch off "
                    "single-batch overlap"
                )
            if async_finish and return_recv_hook:
                refuse_halves()
            known = known_low_latency(handle)
            rows = zero_copy_rows(x, known) if zero_copy else x
        except REFUSALS as error:
            raise self._refused(partial(calls.refuse_combine, error, handle)) from None
        return calls.combine(
            rows,
            topk_weights,
            known,
            async_finish=async_finish,
            return_recv_hook=return_recv_hook,
            out=out,
        )

    def get_next_low_latency_combine_buffer(self, handle: tuple[Any, ...]) -> Tensor:
        """Memory `[E_loc, R * M, H]` bfloat16 that the next combine with `zero_copy` reads.

        Contiguous; the same memory for all handles of the same shapes.
        """
        return self._low_latency_calls().combine_buffer(handle)

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Nothing has to be cleaned: normal and low-latency calls have memory of their own."""
        self._low_latency_calls()

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leaves out a rank from now on. Local.

        Raises:
            UnsupportedError: `mask=False` (use `low_latency_clean_mask_buffer`), or there are no
                masks without GPUs.
        """
        calls = self._shrinking()
        if not mask:
            raise UnsupportedError(
                "one rank alone cannot be unmasked: low_latency_clean_mask_buffer() unmasks all"
            )
        calls.mask(rank_to_mask)

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Writes 1 for every rank that is left out, 0 for the others, into `[R]` int32. Local."""
        calls = self._shrinking()
        expect(
            mask_status.shape == (self.group_size,) and mask_status.dtype is torch.int32,
            f"mask_status must be int32 [{self.group_size}], not {mask_status.dtype} "
            f"{list(mask_status.shape)}",
        )
        mask_status.copy_(calls.query_mask())

    def low_latency_clean_mask_buffer(self) -> None:
        """Lets all ranks take part again. Collective: every rank calls it, those left out too."""
        self._shrinking().clear_mask()

    def _low_latency_calls(self) -> LowLatencyCalls:
        if self._low_latency is None:
            expect(self.runtime is not None, _DESTROYED)
            raise CallError("low-latency calls need Buffer(..., low_latency_mode=True)")
        return self._low_latency

    def _shrinking(self) -> LowLatencyCalls:
        expect(self.enable_shrink, "masks need Buffer(..., enable_shrink=True)")
        return self._low_latency_calls()

    # -- checks -----------------------------------------------------------------------------------

    def _refused(self, refuse: Callable[[], NoReturn]) -> ExpertlinkError:
        return self._streams.refused(refuse)

    def _check_several_hosts(self, name: str, instead: str) -> None:
        self._check_alive()
        if self._per_host is None:
            raise CallError(f"{name}: all ranks share a host; {instead}() serves them")

    def _check_alive(self) -> None:
        expect(self.runtime is not None, _DESTROYED)

    def _check_experts(self, num_experts: int) -> None:
        if num_experts <= 0 or num_experts % self.group_size:
            raise CallError(
                f"num_experts={num_experts} is not a multiple of the group's {self.group_size} "
                "ranks"
            )

    def _check_tensor(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self._device:
            raise CallError(f"{name} is on {tensor.device}; this buffer works on {self._device}")
