"""`MoECommunicator.dispatch` in all its forms, and the memory that it can be given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from expertlink import autograd
from expertlink.connection import Connection, refused
from expertlink.engines.base import DispatchCall, Dispatched, Engine, nothing_left
from expertlink.engines.ranks.header import Operation
from expertlink.errors import ExpertlinkError
from expertlink.gradients import without_gradients
from expertlink.overlap import check_operation, place_of, queued, wait_of
from expertlink.requests import DispatchRequest, ReceiveHook
from expertlink.types import (
    CommOverlapConfig,
    DispatchBuffers,
    DispatchHandle,
    DispatchOutput,
    QuantScales,
)

_Received = tuple[DispatchOutput, DispatchHandle]


class Dispatching(Connection):
    """Dispatch: in line, beside the caller's work, and in halves."""

    @overload
    def dispatch(
        self,
        input: Tensor,
        topk_ids: Tensor | None,
        weights: Tensor | None = None,
        scales: QuantScales | Tensor | None = None,
        *,
        output_buffer: Tensor | DispatchBuffers | None = None,
        previous_handle: DispatchHandle | None = None,
        async_finish: bool = False,
        return_recv_hook: Literal[False] = False,
    ) -> tuple[DispatchOutput, DispatchHandle]: ...

    @overload
    def dispatch(
        self,
        input: Tensor,
        topk_ids: Tensor | None,
        weights: Tensor | None = None,
        scales: QuantScales | Tensor | None = None,
        *,
        output_buffer: Tensor | DispatchBuffers | None = None,
        previous_handle: DispatchHandle | None = None,
        async_finish: bool = False,
        return_recv_hook: Literal[True],
    ) -> tuple[DispatchOutput, DispatchHandle, Callable[[], None]]: ...

    def dispatch(
        self,
        input: Tensor,
        topk_ids: Tensor | None,
        weights: Tensor | None = None,
        scales: QuantScales | Tensor | None = None,
        *,
        output_buffer: Tensor | DispatchBuffers | None = None,
        previous_handle: DispatchHandle | None = None,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> _Received | tuple[DispatchOutput, DispatchHandle, Callable[[], None]]:
        """Sends every token to the ranks of its experts. Collective, differentiable.

        Args:
            input: `[T, H]` rows of the configured dtype, or one-byte rows `[T, W]` with `scales`.
                T may differ per rank and be 0. Non-contiguous tensors are copied.
            topk_ids: `[T, K]` int64 or int32 global expert ids, -1 for none. May be None with
                `previous_handle`.
            weights: `[T, K]` float32 routing weights (float64 with float64 rows); None: combine
                adds rows up unweighted. With `previous_handle`, None reuses that call's weights.
            scales: `[T, S]` scales of quantized rows, any dtype, carried as bytes.
            output_buffer: contiguous tensor that receives `tokens`; for FLAT and TOKEN_MAJOR its
                first N rows. Or `create_buffers()`, for everything that is returned: a later
                dispatch into them makes this output and handle invalid. Not possible where
                gradients are tracked.
            previous_handle: reuse that dispatch's routing: nothing is counted or exchanged but
                rows. `topk_ids`, where given, are compared with it. It may be of another
                communicator, as in `combine`.
            async_finish: return before the rows are there; call `handle.wait()` before reading.
            return_recv_hook: launch the sending half only; the third value returned launches the
                receiving half, on the stream that is current then. Between them the GPU is free.
                At most two calls may be between their halves. Not where gradients are tracked.

        Returns:
            `(output, handle)`, with `return_recv_hook` `(output, handle, hook)`. Output tensors
            belong to the caller, or are views of the buffers. `hook()` may be called repeatedly;
            the handle's combine or cached dispatch calls it where nobody did.

        Raises:
            InputError: an argument does not fit; RoutingChangedError: differs from the handle's;
                TooManyTokensError: T exceeds `max_tokens_per_rank` on some rank (on every rank).
            CapacityError: a rank would receive more rows than it has room for (on every rank).
            HandleError, ClosedError: `previous_handle` or this communicator cannot be used.
            PeerError: another rank refused; PeerTimeoutError: a rank did not come.
        """
        if torch.compiler.is_dynamo_compiling() or is_in_torch_dispatch_mode():
            from expertlink.ops import traced

            if traced.takes_dispatch(
                self,
                input,
                topk_ids,
                output_buffer=output_buffer,
                previous_handle=previous_handle,
                async_finish=async_finish,
                return_recv_hook=return_recv_hook,
            ):
                return traced.dispatch(self, input, topk_ids, weights, scales, previous_handle)
            if torch.compiler.is_dynamo_compiling():
                from expertlink.uncompiled import uncompiled

                return uncompiled(
                    self.dispatch,
                    input,
                    topk_ids,
                    weights,
                    scales,
                    output_buffer=output_buffer,
                    previous_handle=previous_handle,
                    async_finish=async_finish,
                    return_recv_hook=return_recv_hook,
                )
        engine = self._engine
        if engine is None:
            engine = self._ready()
        try:
            call = self._calls.dispatch(
                input,
                topk_ids,
                weights,
                scales,
                output_buffer,
                previous_handle,
                async_finish,
                return_recv_hook,
            )
        except ExpertlinkError as error:
            raise refused(engine, _operation(previous_handle), error) from None
        if async_finish:
            return self._dispatch_queued(engine, call, previous_handle, topk_ids, overlap=None)
        if torch.is_grad_enabled():
            started = self._start_dispatch(engine, call, previous_handle)
        else:
            started = engine.dispatch(call)
        handle = self._calls.handle(call, started, previous_handle, topk_ids)
        if return_recv_hook:
            handle._finish = hook = ReceiveHook(started.finish, self._life)
            return started.output, handle, hook
        if started.finish is not nothing_left:
            without_gradients(started.finish)
        return started.output, handle

    def dispatch_in_line(
        self,
        input: Tensor,
        topk_ids: Tensor | None,
        weights: Tensor | None,
        scales: Tensor | None,
        previous_handle: DispatchHandle | None,
        num_sms: int | None,
    ) -> _Received:
        """`dispatch` on the current stream, with a number of SMs, for callers with grad mode off.

        It is what `dispatch_async` with such settings and its `wait()` do, for less of the host's
        time.
        """
        if torch.compiler.is_dynamo_compiling():
            from expertlink.uncompiled import uncompiled

            return uncompiled(
                self.dispatch_in_line, input, topk_ids, weights, scales, previous_handle, num_sms
            )
        engine = self._engine
        if engine is None:
            engine = self._ready()
        try:
            call = self._calls.dispatch(
                input, topk_ids, weights, scales, None, previous_handle, False, False, num_sms
            )
        except ExpertlinkError as error:
            raise refused(engine, _operation(previous_handle), error) from None
        started = engine.dispatch(call)
        handle = self._calls.handle(call, started, previous_handle, topk_ids)
        if started.finish is not nothing_left:
            started.finish()
        return started.output, handle

    def dispatch_async(
        self,
        input: Tensor,
        topk_ids: Tensor | None,
        weights: Tensor | None = None,
        scales: QuantScales | Tensor | None = None,
        *,
        output_buffer: Tensor | DispatchBuffers | None = None,
        previous_handle: DispatchHandle | None = None,
        overlap: CommOverlapConfig | None = None,
    ) -> DispatchRequest:
        """`dispatch` that returns once counts are agreed; `wait()` gives `(output, handle)`.

        Inputs must not be written to before `wait()`.
        """
        if torch.compiler.is_dynamo_compiling():
            from expertlink.uncompiled import uncompiled

            return uncompiled(
                self.dispatch_async,
                input,
                topk_ids,
                weights,
                scales,
                output_buffer=output_buffer,
                previous_handle=previous_handle,
                overlap=overlap,
            )
        check_operation(overlap, Operation.DISPATCH)
        engine = self._ready()
        try:
            call = self._calls.dispatch(
                input,
                topk_ids,
                weights,
                scales,
                output_buffer=output_buffer,
                previous_handle=previous_handle,
                num_sms=None if overlap is None else overlap.num_sms,
            )
        except ExpertlinkError as error:
            raise refused(engine, _operation(previous_handle), error) from None
        output, handle = self._dispatch_queued(
            engine, call, previous_handle, topk_ids, overlap=overlap
        )
        return DispatchRequest((output, handle), handle.wait)

    def _dispatch_queued(
        self,
        engine: Engine,
        call: DispatchCall,
        previous_handle: DispatchHandle | None,
        topk_ids: Tensor | None,
        *,
        overlap: CommOverlapConfig | None,
    ) -> _Received:
        """Starts an asynchronous dispatch; `handle.wait()` makes its results readable."""
        stream, wait_events = place_of(overlap, self._stream)
        with queued(call, stream=stream, wait_events=wait_events):
            started = self._start_dispatch(engine, call, previous_handle)
            wait = wait_of(started, stream=stream, life=self._life)
        handle = self._calls.handle(call, started, previous_handle, topk_ids)
        handle._finish = wait
        return started.output, handle

    def _start_dispatch(
        self, engine: Engine, call: DispatchCall, previous_handle: DispatchHandle | None
    ) -> Dispatched:
        """Starts a dispatch that autograd tracks where it has to."""
        weights_TK = call.weights_TK
        if weights_TK is None and previous_handle is not None:
            weights_TK = previous_handle.topk_weights
        if self._calls.is_tracked(call.x_TW, weights_TK):
            return autograd.dispatch(engine, call, weights_TK)
        return engine.dispatch(call)

    def create_buffers(
        self,
        input: Tensor | None = None,
        scales: QuantScales | Tensor | None = None,
        *,
        weighted: bool = True,
    ) -> DispatchBuffers:
        """Memory for everything that a dispatch returns, to be passed as `output_buffer`. Local.

        On the nvlink engine a dispatch into it allocates nothing, unless it has scales of its own
        and `scale_order="column_major"` (mode "ht").

        Args:
            input: example of the rows that will be dispatched, `[any, W]`; None: rows of the
                configured dtype.
            scales: example of their scales, `[any, S]`, where the caller quantizes.
            weighted: dispatches may have weights. Matters for TOKEN_MAJOR and RANK_MAJOR.

        Returns:
            Tensors of the largest shape that a dispatch can return. Each dispatch into them makes
            the output and the handle of the one before invalid: such a handle is refused.

        Raises:
            InputError: the examples do not fit, or `zero_copy=True`, where rows stay in the arena.
        """
        engine = self._ready()
        kind = self._calls.kind(input, scales, weighted=weighted)
        with torch.inference_mode(False):  # dispatches in any mode write to them
            buffers = engine.make_buffers(kind)
        buffers.owner = self._identity
        return buffers


def _operation(previous_handle: DispatchHandle | None) -> Operation:
    return Operation.DISPATCH if previous_handle is None else Operation.CACHED_DISPATCH
