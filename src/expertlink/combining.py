"""`MoECommunicator.combine` in all its forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from expertlink import autograd
from expertlink.connection import Connection, refused
from expertlink.engines.base import CombineCall, Combined, Engine, nothing_left
from expertlink.engines.ranks.header import Operation
from expertlink.errors import ExpertlinkError
from expertlink.gradients import without_gradients
from expertlink.overlap import check_operation, place_of, queued, wait_of
from expertlink.requests import ReceiveHook, Request
from expertlink.types import CommOverlapConfig, DispatchHandle

_Sums = Tensor | tuple[Tensor, Tensor]  # with the gradients of the weights


class Combining(Connection):
    """Combine: in line, beside the caller's work, and in halves."""

    @overload
    def combine(
        self,
        expert_output: Tensor,
        handle: DispatchHandle,
        *,
        out: Tensor | None = None,
        weights: Tensor | None = None,
        topk_weights: Tensor | None = None,
        weight_grads: None = None,
        async_finish: bool = False,
        return_recv_hook: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def combine(
        self,
        expert_output: Tensor,
        handle: DispatchHandle,
        *,
        out: Tensor | None = None,
        weights: Tensor | None = None,
        topk_weights: Tensor | None = None,
        weight_grads: Tensor,
        async_finish: bool = False,
        return_recv_hook: Literal[False] = False,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def combine(
        self,
        expert_output: Tensor,
        handle: DispatchHandle,
        *,
        out: Tensor | None = None,
        weights: Tensor | None = None,
        topk_weights: Tensor | None = None,
        weight_grads: None = None,
        async_finish: bool = False,
        return_recv_hook: Literal[True],
    ) -> tuple[Tensor, Callable[[], None]]: ...

    @overload
    def combine(
        self,
        expert_output: Tensor,
        handle: DispatchHandle,
        *,
        out: Tensor | None = None,
        weights: Tensor | None = None,
        topk_weights: Tensor | None = None,
        weight_grads: Tensor,
        async_finish: bool = False,
        return_recv_hook: Literal[True],
    ) -> tuple[tuple[Tensor, Tensor], Callable[[], None]]: ...

    def combine(
        self,
        expert_output: Tensor,
        handle: DispatchHandle,
        *,
        out: Tensor | None = None,
        weights: Tensor | None = None,
        topk_weights: Tensor | None = None,
        weight_grads: Tensor | None = None,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> _Sums | tuple[_Sums, Callable[[], None]]:
        """Returns every token's weighted sum over its experts. Collective, differentiable.

        FLAT and EXPERT_MAJOR: rows are multiplied by the routing weights here. TOKEN_MAJOR and
        RANK_MAJOR: the caller's MLP has done so and summed its local experts; rows are added up.

        Args:
            expert_output: rows in the shape of the dispatch's `tokens`, last dimension H, of the
                configured dtype. Non-contiguous tensors are copied.
            handle: of the dispatch; any number of combines may use it. It may be of another
                communicator of the same ranks, closed or not, that agrees with this one in all
                that a routing depends on (`DispatchHandle`); hidden size and dtype may differ.
            out: `[T, H]` contiguous tensor for the result. Not where gradients are tracked.
            weights: FLAT, EXPERT_MAJOR: float32 (float64 with float64 rows), one number per row
                in the leading shape of the rows, instead of the routing weights. Weights of slots
                without a row are not read. All ranks pass them or none. Not where gradients are
                tracked.
            topk_weights: FLAT, EXPERT_MAJOR: `[T, K]` float32 (float64 with float64 rows), this
                rank's tokens' own, instead of the routing weights: the result is that of a
                dispatch with these. The dispatch may have had others, or none, and keeps them.
                Those of choices without an expert are not read. All ranks pass them or none.
                Excludes `weights`. Differentiable.
            weight_grads: gradients of the rows' weights (FLAT, EXPERT_MAJOR: one number per row,
                the leading shape of the rows; others: that + `[K]`), to be returned per token.
            async_finish: return before the result is there; call `handle.wait()` before reading.
            return_recv_hook: launch the sending half only; as in `dispatch`.

        Returns:
            `[T, H]` in token order, owned by the caller; with `weight_grads` a pair of that and the
            gradients `[T, K]`. Tokens without any expert get zeros. With `return_recv_hook`,
            `(result, hook)`; `hook()` or `handle.wait()` launches the receiving half.

        Raises:
            InputError: an argument does not fit.
            HandleError, ClosedError: the handle is stale or does not suit this communicator, or
                that cannot be used.
            PeerError: another rank refused; PeerTimeoutError: a rank did not come.
        """
        if torch.compiler.is_dynamo_compiling() or is_in_torch_dispatch_mode():
            from expertlink.ops import traced

            if traced.takes_combine(
                self,
                handle,
                out=out,
                weights=weights,
                weight_grads=weight_grads,
                async_finish=async_finish,
                return_recv_hook=return_recv_hook,
            ):
                return traced.combine(self, expert_output, handle, topk_weights)
            if torch.compiler.is_dynamo_compiling():
                from expertlink.uncompiled import uncompiled

                return uncompiled(
                    self.combine,
                    expert_output,
                    handle,
                    out=out,
                    weights=weights,
                    topk_weights=topk_weights,
                    weight_grads=weight_grads,
                    async_finish=async_finish,
                    return_recv_hook=return_recv_hook,
                )
        engine = self._engine
        if engine is None:
            engine = self._ready()
        try:
            call = self._calls.combine(
                expert_output,
                handle,
                out,
                weights,
                topk_weights,
                weight_grads,
                async_finish,
                return_recv_hook,
            )
        except ExpertlinkError as error:
            raise refused(engine, Operation.COMBINE, error) from None
        if async_finish:
            started, handle._finish = self._combine_queued(engine, call, handle, out, overlap=None)
            return _sums_of(started)
        if torch.is_grad_enabled():
            started = self._start_combine(engine, call, handle, out)
        else:
            started = engine.combine(call)
        if return_recv_hook:
            handle._finish = hook = ReceiveHook(started.finish, self._life)
            return _sums_of(started), hook
        if started.finish is not nothing_left:
            without_gradients(started.finish)
        if started.weight_grads_TK is None:
            return started.out_TH
        return _sums_of(started)

    def combine_in_line(
        self, expert_output: Tensor, handle: DispatchHandle, num_sms: int | None
    ) -> Tensor:
        """`combine` as `dispatch_in_line` is `dispatch`."""
        if torch.compiler.is_dynamo_compiling():
            from expertlink.uncompiled import uncompiled

            return uncompiled(self.combine_in_line, expert_output, handle, num_sms)
        engine = self._engine
        if engine is None:
            engine = self._ready()
        try:
            call = self._calls.combine(
                expert_output, handle, None, None, None, None, False, False, num_sms
            )
        except ExpertlinkError as error:
            raise refused(engine, Operation.COMBINE, error) from None
        started = engine.combine(call)
        if started.finish is not nothing_left:
            started.finish()
        return started.out_TH

    @overload
    def combine_async(
        self,
        expert_output: Tensor,
        handle: DispatchHandle,
        *,
        out: Tensor | None = None,
        weights: Tensor | None = None,
        topk_weights: Tensor | None = None,
        weight_grads: None = None,
        overlap: CommOverlapConfig | None = None,
    ) -> Request[Tensor]: ...

    @overload
    def combine_async(
        self,
        expert_output: Tensor,
        handle: DispatchHandle,
        *,
        out: Tensor | None = None,
        weights: Tensor | None = None,
        topk_weights: Tensor | None = None,
        weight_grads: Tensor,
        overlap: CommOverlapConfig | None = None,
    ) -> Request[tuple[Tensor, Tensor]]: ...

    def combine_async(
        self,
        expert_output: Tensor,
        handle: DispatchHandle,
        *,
        out: Tensor | None = None,
        weights: Tensor | None = None,
        topk_weights: Tensor | None = None,
        weight_grads: Tensor | None = None,
        overlap: CommOverlapConfig | None = None,
    ) -> Request[Tensor] | Request[tuple[Tensor, Tensor]]:
        """`combine` that returns while sums are in transit; `wait()` gives its result.

        `expert_output` must not be written to before `wait()`.
        """
        if torch.compiler.is_dynamo_compiling():
            from expertlink.uncompiled import uncompiled

            return uncompiled(
                self.combine_async,
                expert_output,
                handle,
                out=out,
                weights=weights,
                topk_weights=topk_weights,
                weight_grads=weight_grads,
                overlap=overlap,
            )
        check_operation(overlap, Operation.COMBINE)
        engine = self._ready()
        try:
            call = self._calls.combine(
                expert_output,
                handle,
                out=out,
                weights=weights,
                topk_weights=topk_weights,
                weight_grads=weight_grads,
                num_sms=None if overlap is None else overlap.num_sms,
            )
        except ExpertlinkError as error:
            raise refused(engine, Operation.COMBINE, error) from None
        started, wait = self._combine_queued(engine, call, handle, out, overlap=overlap)
        if started.weight_grads_TK is None:
            return Request(started.out_TH, wait)
        return Request((started.out_TH, started.weight_grads_TK), wait)

    def _combine_queued(
        self,
        engine: Engine,
        call: CombineCall,
        handle: DispatchHandle,
        out: Tensor | None,
        *,
        overlap: CommOverlapConfig | None,
    ) -> tuple[Combined, Callable[[], None]]:
        """Starts an asynchronous combine; second value: what makes its results readable."""
        stream, wait_events = place_of(overlap, self._stream)
        with queued(call, stream=stream, wait_events=wait_events):
            started = self._start_combine(engine, call, handle, out)
            wait = wait_of(started, stream=stream, life=self._life)
        return started, wait

    def _start_combine(
        self, engine: Engine, call: CombineCall, handle: DispatchHandle, out: Tensor | None
    ) -> Combined:
        """Starts a combine that autograd tracks where it has to."""
        if torch.is_grad_enabled() and autograd.tracks_combine(call, handle, out):
            return autograd.combine(engine, call, handle)
        return engine.combine(call)


def _sums_of(started: Combined) -> _Sums:
    if started.weight_grads_TK is None:
        return started.out_TH
    return started.out_TH, started.weight_grads_TK
