"""Low-latency calls of `Buffer`, as callers see them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from expertlink.compat.deep_ep.buffer_parts import DESTROYED, BufferParts
from expertlink.compat.deep_ep.errors import REFUSALS, CallError, UnsupportedError, expect
from expertlink.compat.deep_ep.events import EventOverlap
from expertlink.compat.deep_ep.low_latency import (
    Hook,
    LowLatencyCalls,
    Rows,
    known_low_latency,
    quantization_of,
    refuse_halves,
    zero_copy_rows,
)
from expertlink.compat.deep_ep.normal import check_stats

_NO_WAIT_COSTS = (
    "waits are not measured in clock cycles; MoECommunicator.enable_statistics() has the longest"
)


class LowLatencyBuffer(BufferParts):
    """What a `Buffer` has of low-latency calls."""

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
            expect(self.runtime is not None, DESTROYED)
            raise CallError("low-latency calls need Buffer(..., low_latency_mode=True)")
        return self._low_latency

    def _shrinking(self) -> LowLatencyCalls:
        expect(self.enable_shrink, "masks need Buffer(..., enable_shrink=True)")
        return self._low_latency_calls()
