"""`MoECommunicator`: dispatch and combine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NoReturn, TypeVar, overload

import torch
from torch import Tensor

from expertlink import autograd
from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import CombineCall, Combined, DispatchCall, Dispatched, Engine
from expertlink.engines.ranks.header import Operation
from expertlink.errors import ExpertlinkError
from expertlink.overlap import check_operation, check_overlap, launch
from expertlink.requests import CombineRequest, DispatchRequest, ReceiveHook, without_gradients
from expertlink.session import Session
from expertlink.types import (
    CommOverlapConfig,
    DispatchBuffers,
    DispatchHandle,
    DispatchOutput,
    QuantScales,
)

_Started = TypeVar("_Started", Dispatched, Combined)


class MoECommunicator(Session):
    """Dispatches tokens to the ranks of their experts and combines what the experts return.

    All calls but the constructor, `close` and those marked as local are collective: every rank of
    the group makes them in the same order. Not thread-safe. Usable as a context manager.

    Args:
        config: what is fixed for the communicator's lifetime.
        share_with: another communicator of the same group, of the nvlink engine: both use its
            memory and take turns, as the layers of a model do. Build the largest one first.

    Raises:
        ConfigurationError: device and group do not fit each other.
        EngineUnavailableError: the requested engine cannot run here.
    """

    def __init__(
        self, config: MoECommunicatorConfig, *, share_with: MoECommunicator | None = None
    ) -> None:
        super().__init__(config, share_with=share_with)

    # -- dispatch ---------------------------------------------------------------------------------

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
    ) -> Any:
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
                rows. `topk_ids`, where given, are compared with it.
            async_finish: return before the rows are there; call `handle.wait()` before reading.
            return_recv_hook: launch the sending half only; the third value returned launches the
                receiving half, on the stream that is current then. Between them the GPU is free.
                At most two calls may be under way so. Not where gradients are tracked.

        Returns:
            `(output, handle)`, with `return_recv_hook` `(output, handle, hook)`. Output tensors
            belong to the caller, or are views of the buffers. `hook()` may be called repeatedly;
            the handle's combine or cached dispatch calls it where nobody did.

        Raises:
            InputError: an argument does not fit; RoutingChangedError: differs from the handle's.
            CapacityError: a rank would receive more rows than it has room for (on every rank).
            HandleError, ClosedError: `previous_handle` or this communicator cannot be used.
            PeerError: another rank refused; PeerTimeoutError: a rank did not come.
        """
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
                None,
                async_finish,
                return_recv_hook,
            )
        except ExpertlinkError as error:
            _refuse_dispatch(engine, previous_handle, error)
        if async_finish:
            begin = partial(self._begin_dispatch, engine, call, previous_handle)
            started, finish = self._launch(begin, call)
        else:
            started = self._begin_dispatch(engine, call, previous_handle)
            finish = started.finish
        handle = self._calls.handle(call, started, previous_handle, topk_ids)
        if return_recv_hook:
            handle._finish = hook = ReceiveHook(finish, self._life)
            return started.output, handle, hook
        if async_finish:
            handle._finish = finish
        else:
            without_gradients(finish)
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
        check_operation(overlap, "dispatch")
        engine = self._ready()
        num_sms = None if overlap is None else overlap.num_sms
        try:
            call = self._calls.dispatch(
                input, topk_ids, weights, scales, output_buffer, previous_handle, num_sms
            )
        except ExpertlinkError as error:
            _refuse_dispatch(engine, previous_handle, error)
        begin = partial(self._begin_dispatch, engine, call, previous_handle)
        started, wait = self._launch(begin, call, overlap)
        handle = self._calls.handle(call, started, previous_handle, topk_ids)
        handle._finish = wait
        return DispatchRequest((started.output, handle), handle.wait)

    def _begin_dispatch(
        self, engine: Engine, call: DispatchCall, previous: DispatchHandle | None
    ) -> Dispatched:
        if torch.is_grad_enabled():
            weights_TK = call.weights_TK
            if weights_TK is None and previous is not None:
                weights_TK = previous.topk_weights
            if self._calls.tracked(call.x_TW, weights_TK):
                return autograd.dispatch(engine, call, weights_TK)
        return engine.dispatch(call)

    def create_buffers(
        self,
        input: Tensor | None = None,
        scales: QuantScales | Tensor | None = None,
        *,
        weighted: bool = True,
    ) -> DispatchBuffers:
        """Memory for everything that dispatches return, to be passed as `output_buffer`. Local.

        On the nvlink engine with `mode="ll"` such a dispatch allocates nothing.

        Args:
            input: example of the rows that will be dispatched, `[any, W]`; None: rows of the
                configured dtype.
            scales: example of their scales, `[any, S]`, where the caller quantizes.
            weighted: dispatches may have weights; makes a difference to TOKEN_MAJOR and RANK_MAJOR.

        Returns:
            Tensors of the largest shape that a dispatch can return. Each dispatch into them makes
            the output and the handle of the one before invalid: such a handle is refused.

        Raises:
            InputError: the examples do not fit, or `zero_copy=True`, where rows have their place.
        """
        engine = self._ready()
        kind = self._calls.kind(input, scales, weighted=weighted)
        with torch.inference_mode(False):  # else dispatches could write to them only in it
            buffers = engine.make_buffers(kind)
        buffers.owner = self._identity
        return buffers

    # -- combine ----------------------------------------------------------------------------------

    @overload
    def combine(
        self,
        expert_output: Tensor,
        handle: DispatchHandle,
        *,
        out: Tensor | None = None,
        weights: Tensor | None = None,
        weight_grads: Tensor | None = None,
        async_finish: bool = False,
        return_recv_hook: Literal[False] = False,
    ) -> Tensor | Any: ...

    @overload
    def combine(
        self,
        expert_output: Tensor,
        handle: DispatchHandle,
        *,
        out: Tensor | None = None,
        weights: Tensor | None = None,
        weight_grads: Tensor | None = None,
        async_finish: bool = False,
        return_recv_hook: Literal[True],
    ) -> tuple[Any, Callable[[], None]]: ...

    def combine(
        self,
        expert_output: Tensor,
        handle: DispatchHandle,
        *,
        out: Tensor | None = None,
        weights: Tensor | None = None,
        weight_grads: Tensor | None = None,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> Any:
        """Returns every token's weighted sum over its experts. Collective, differentiable.

        FLAT and EXPERT_MAJOR: rows are multiplied by the routing weights here. TOKEN_MAJOR and
        RANK_MAJOR: the caller's MLP has done so and summed its local experts; rows are added up.

        Args:
            expert_output: rows in the shape of the dispatch's `tokens`, last dimension H, of the
                configured dtype. Non-contiguous tensors are copied.
            handle: of the dispatch; this call consumes it.
            out: `[T, H]` contiguous tensor for the result. Not where gradients are tracked.
            weights: FLAT, EXPERT_MAJOR: float32 (float64 beside float64 rows), one number per row
                in the leading shape of the rows, instead of the routing weights. Those of slots
                without a row are not read. All ranks pass them or none. Not where gradients are
                tracked.
            weight_grads: gradients of the rows' weights (FLAT, EXPERT_MAJOR: one number per row,
                the leading shape of the rows; others: that + `[K]`), to be returned per token.
            async_finish: return before the result is there; call `handle.wait()` before reading.
            return_recv_hook: launch the sending half only; as in `dispatch`.

        Returns:
            `[T, H]` in token order, owned by the caller; with `weight_grads` a pair of that and the
            gradients `[T, K]`. Tokens without any expert get zeros. With `return_recv_hook`
            `(that, hook)`; `hook()` or `handle.wait()` launches the receiving half.

        Raises:
            InputError: an argument does not fit.
            HandleError, ClosedError: the handle is foreign, consumed or stale, or this
                communicator cannot be used.
            PeerError: another rank refused; PeerTimeoutError: a rank did not come.
        """
        if torch.compiler.is_dynamo_compiling():
            from expertlink.uncompiled import uncompiled

            return uncompiled(
                self.combine,
                expert_output,
                handle,
                out=out,
                weights=weights,
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
                weight_grads,
                weights,
                None,
                async_finish,
                return_recv_hook,
            )
        except ExpertlinkError as error:
            engine.refuse(Operation.COMBINE, error)
        if async_finish:
            begin = partial(self._begin_combine, engine, call, handle, out)
            started, finish = self._launch(begin, call)
        else:
            started = self._begin_combine(engine, call, handle, out)
            finish = started.finish
        handle.consumed = True
        result = _result_of(started)
        if return_recv_hook:
            handle._finish = hook = ReceiveHook(finish, self._life)
            return result, hook
        if async_finish:
            handle._finish = finish
        else:
            without_gradients(finish)
        return result

    def combine_async(
        self,
        expert_output: Tensor,
        handle: DispatchHandle,
        *,
        out: Tensor | None = None,
        weights: Tensor | None = None,
        weight_grads: Tensor | None = None,
        overlap: CommOverlapConfig | None = None,
    ) -> CombineRequest:
        """`combine` that returns while sums are on their way; `wait()` gives its result.

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
                weight_grads=weight_grads,
                overlap=overlap,
            )
        check_operation(overlap, "combine")
        engine = self._ready()
        num_sms = None if overlap is None else overlap.num_sms
        try:
            call = self._calls.combine(expert_output, handle, out, weight_grads, weights, num_sms)
        except ExpertlinkError as error:
            engine.refuse(Operation.COMBINE, error)
        begin = partial(self._begin_combine, engine, call, handle, out)
        started, wait = self._launch(begin, call, overlap)
        handle.consumed = True
        return CombineRequest(_result_of(started), wait)

    def _begin_combine(
        self, engine: Engine, call: CombineCall, handle: DispatchHandle, out: Tensor | None
    ) -> Combined:
        if torch.is_grad_enabled() and autograd.follows_combine(call, handle, out):
            return autograd.combine(engine, call, handle)
        return engine.combine(call)

    # -- overlap ----------------------------------------------------------------------------------

    def create_overlap_config(
        self,
        op: str,
        *,
        stream: torch.cuda.Stream | None = None,
        wait_events: Sequence[torch.cuda.Event] = (),
        num_sms: int | None = None,
    ) -> CommOverlapConfig:
        """Where the asynchronous form of `op` ("dispatch" or "combine") runs. Local.

        Args:
            op: the operation.
            stream: CUDA stream to run on; None: the communicator's own.
            wait_events: CUDA events to wait for, beside the caller's current stream.
            num_sms: SMs the operation may use; None: `num_sms_dispatch` / `num_sms_combine`.
        """
        check_overlap(op, device=self.device, on_stream=bool(stream or wait_events), sms=num_sms)
        if num_sms is None:
            config = self.config
            num_sms = config.num_sms_dispatch if op == "dispatch" else config.num_sms_combine
        return CommOverlapConfig(op, stream or self._stream, tuple(wait_events), num_sms)

    def _launch(
        self,
        begin: Callable[[], _Started],
        call: DispatchCall | CombineCall,
        overlap: CommOverlapConfig | None = None,
    ) -> tuple[_Started, Callable[[], None]]:
        """Begins a call beside the caller's stream; second value: what waits for it."""
        return launch(
            begin,
            stream=self._stream if overlap is None else overlap.stream,
            wait_events=() if overlap is None else overlap.wait_events,
            call=call,
            life=self._life,
        )


def _refuse_dispatch(
    engine: Engine, previous: DispatchHandle | None, error: ExpertlinkError
) -> NoReturn:
    engine.refuse(Operation.DISPATCH if previous is None else Operation.CACHED_DISPATCH, error)


def _result_of(started: Combined) -> Tensor | tuple[Tensor, Tensor]:
    if started.weight_grads_TK is None:
        return started.out_TH
    return started.out_TH, started.weight_grads_TK
