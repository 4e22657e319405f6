"""`MoECommunicator`: dispatch and combine, from the handshake of the ranks to `close()`.

A call goes down once and comes back once: its arguments are checked (calls.py), it is started, in
line or on a stream (overlap.py), through autograd where gradients are tracked (autograd.py), by the
engine (engines/). A call that is refused here is refused through the engine, which tells the peers.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, NoReturn, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from expertlink import autograd, graph_names
from expertlink.calls import CallBuilder
from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import (
    CombineCall,
    Combined,
    DispatchCall,
    Dispatched,
    Engine,
    nothing_left,
)
from expertlink.engines.ranks.handshake import handshake, resolve_device
from expertlink.engines.ranks.header import Operation
from expertlink.engines.ranks.rebalance import rebalance
from expertlink.engines.ranks.wire import Wire
from expertlink.engines.select import EngineChoice, build_engine, choose_engine
from expertlink.errors import ConfigurationError, ExpertlinkError, InputError, NotPicklableError
from expertlink.gradients import without_gradients
from expertlink.graph_names import GraphForm
from expertlink.handles import scope_of
from expertlink.nvtx import add_ranges
from expertlink.overlap import (
    check_operation,
    check_settings,
    make_stream,
    operation_of,
    queued,
    wait_of,
)
from expertlink.placement import ExpertPlacement
from expertlink.requests import DispatchRequest, Life, ReceiveHook, Request
from expertlink.routing import Placement
from expertlink.settings import LONGEST_S, NVTX, positive_seconds
from expertlink.types import (
    CallStatistics,
    CommOverlapConfig,
    DispatchBuffers,
    DispatchHandle,
    DispatchOutput,
    QuantScales,
)

logger = logging.getLogger("expertlink")
_identities = itertools.count(1)
_Self = TypeVar("_Self", bound="MoECommunicator")
_Received = tuple[DispatchOutput, DispatchHandle]
_Sums = Tensor | tuple[Tensor, Tensor]  # with the gradients of the weights


class MoECommunicator:
    """Dispatches tokens to the ranks of their experts and combines what the experts return.

    All methods but the constructor, `close` and those marked as local are collective: every rank of
    the group calls them in the same order. Not thread-safe. Usable as a context manager.

    Args:
        config: what is fixed for the communicator's lifetime.
        share_with: another communicator of the same group, of the nvlink engine: both use its
            memory and take turns, as the layers of a model do. Build the largest one first.

    Raises:
        ConfigurationError: device and group do not fit each other.
        EngineUnavailableError: the requested engine cannot run here, or none can.
    """

    def __init__(
        self, config: MoECommunicatorConfig, *, share_with: MoECommunicator | None = None
    ) -> None:
        self.config = config
        self._share_with = share_with
        if share_with is not None and share_with.config.group is not config.group:
            raise ConfigurationError("share_with: that communicator belongs to another group")
        self._identity = next(_identities)
        self._group: Any = config.group
        if self._group is None and dist.is_available() and dist.is_initialized():
            self._group = dist.group.WORLD
        self.device = resolve_device(config.device, self._group)
        self._choice: EngineChoice = choose_engine(config, device=self.device, group=self._group)
        self._check = self.device.type == "cpu"
        if config.check_inputs is not None:
            self._check = config.check_inputs
        assert config.timeout_s is not None
        assert config.startup_timeout_s is not None
        self._timeout_s = min(config.timeout_s, LONGEST_S)
        self._startup_timeout_s = min(config.startup_timeout_s, LONGEST_S)
        self.rank: int = 0 if self._group is None else self._group.rank()
        self.num_ranks: int = 1 if self._group is None else self._group.size()
        self._engine: Engine | None = None
        self._aborted_engine: Engine | None = None
        self._placement: Placement | None = None
        self._wire: Wire | None = None
        self._number: int | None = None  # tells communicators apart, the same on all ranks
        self._stream: torch.cuda.Stream | None = None
        # What outlives close(), such as graphs of old results, must not hold on to the group.
        self._groupless = dataclasses.replace(config, group=None)
        self._calls: CallBuilder  # made together with the engine
        self._graph_form: GraphForm | None = None  # likewise; None as well with zero_copy
        self._life = Life()
        self._has_ranges = NVTX.read()

    # -- life -------------------------------------------------------------------------------------

    def initialize(self) -> None:
        """Handshake with the other ranks; prepares all that calls need. Collective; repeatable.

        The first dispatch does it if nobody did.

        Raises:
            ConfigurationError: on every rank, naming the fields on which the ranks disagree.
            PeerTimeoutError: a rank did not come within `startup_timeout_s`.
            ClosedError: the communicator is closed or aborted.
        """
        if torch.compiler.is_dynamo_compiling():
            if self._placement is None:
                from expertlink.uncompiled import uncompiled

                uncompiled(self.initialize)
            return
        self._life.check()
        if self._engine is None:
            with torch.inference_mode(False):  # calls in any mode write to the tensors made here
                self._handshake()

    def _handshake(self) -> None:
        wire = Wire(self._group, device=self.device, timeout_s=self._startup_timeout_s)
        other, asked = self._share_with, self.config.engine
        shared_engine = other_number = None
        if other is not None:
            asked += ", memory shared"
            shared_engine, other_number = other._ready(), other._number
        placement = handshake(
            wire,
            self.config,
            engine=asked,
            check_inputs=self._check,
            shared_with=other_number,
        )
        self._wire, self._number = wire, wire.number
        self._choice, engine = build_engine(
            self._choice,
            self._groupless,
            wire=wire,
            placement=placement,
            check_inputs=self._check,
            share_with=shared_engine,
        )
        engine.set_timeout(self._timeout_s)
        self._use(engine, placement, ranks=tuple(wire.peers))
        self._stream = make_stream(self.config, self.device)
        logger.info("rank %d: %s engine: %s", self.rank, self._choice.name, self._choice.reason)

    def _use(self, engine: Engine, placement: Placement, *, ranks: tuple[object, ...] = ()) -> None:
        """Makes what depends on the engine and on where the experts live."""
        if self._has_ranges:
            add_ranges(engine)
        self._engine, self._placement = engine, placement
        num_local = len(placement.experts_of_rank[self.rank])
        scope = scope_of(
            self._groupless,
            ranks=ranks,
            engine=engine.routing_form,
            numbers_by_max_tokens=engine.numbers_by_max_tokens,
            experts_of_rank=placement.experts_of_rank,
            identity=self._identity,
        )
        self._calls = CallBuilder(
            self._groupless,
            device=self.device,
            rank=self.rank,
            num_ranks=self.num_ranks,
            num_local_experts=num_local,
            engine_quantizes=engine.quantizes,
            identity=self._identity,
            scope=scope,
        )
        self._graph_form = graph_names.register(
            self, engine=engine, num_local=num_local, identity=self._identity, scope=scope
        )

    def abort(self, reason: str) -> None:
        """Ends this communicator on all ranks. Local; safe to repeat; never raises.

        For a rank that cannot go on, for example because its experts raised. Ranks that wait for
        it, now or later, raise AbortError with the reason instead of waiting for the time-out. A
        `with` block that ends in an exception calls this. Later calls here raise ClosedError;
        `close()` is still needed. Before `initialize()` the other ranks cannot be told: they wait
        until their time-out.

        Args:
            reason: goes into the messages of all ranks.
        """
        if self._life.over is not None:
            return
        self._life.over = f"this communicator was aborted on this rank: {reason}"
        self._aborted_engine, self._engine = self._engine, None
        if self._aborted_engine is not None:
            self._aborted_engine.abort(reason)

    def close(self) -> None:
        """Releases everything. Not collective; safe to repeat.

        Handles stay good for other communicators; backward of this one's calls is over.
        """
        engine = self._engine or self._aborted_engine
        if engine is not None:
            engine.close()
        self._engine = self._aborted_engine = self._group = self._wire = None
        self._life.over = self._life.over or "this communicator is closed"

    def __enter__(self: _Self) -> _Self:
        self.initialize()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not isinstance(error, GeneratorExit):
            self.abort(f"{type(error).__name__}: {error}")
        self.close()

    def __copy__(self: _Self) -> _Self:
        """A communicator exists once; copies of a module, deep ones included, share it."""
        return self

    def __deepcopy__(self: _Self, memo: object) -> _Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise NotPicklableError(
            f"a {type(self).__name__} cannot be pickled: it is connected to the other ranks; save "
            "the model's state_dict() and make a communicator where it is loaded"
        )

    def set_timeouts(
        self, *, timeout_s: float | None = None, startup_timeout_s: float | None = None
    ) -> None:
        """Changes how long later waits may take, in seconds; None leaves a bound as it is.

        Raises:
            InputError: not a finite, positive number.
        """
        seconds = []
        for name, value in (("timeout_s", timeout_s), ("startup_timeout_s", startup_timeout_s)):
            try:
                seconds.append(None if value is None else min(positive_seconds(value), LONGEST_S))
            except ValueError as error:
                raise InputError(f"{name}={value!r}: {error} is expected") from None
        self._timeout_s = seconds[0] or self._timeout_s
        self._startup_timeout_s = seconds[1] or self._startup_timeout_s
        if self._engine is not None:
            self._engine.set_timeout(self._timeout_s)

    def set_tokens_bound(self, tokens_bound: int | None) -> None:
        """Promises that no rank has more tokens than this in later dispatches.

        Low-latency calls across hosts (`engine="hybrid"`, `mode="ll"`) send as many tokens from
        every rank, whether it has them or not. A bound near the batch of a decode step saves time
        there. Elsewhere nothing depends on it. Graphs keep the bound of their capture, and combines
        and cached dispatches that of their handle.

        Set it to the same number on all ranks, before the same call. With `check_inputs` this is
        collective and compares them; else ranks that differ wait for each other until the time-out.

        Args:
            tokens_bound: 1 to `max_tokens_per_rank`. None: `max_tokens_per_rank`, as at first.

        Raises:
            InputError: it is another number, or with `check_inputs` that of another rank is.
        """
        most = self.config.max_tokens_per_rank
        if tokens_bound is not None and not 1 <= tokens_bound <= most:
            raise InputError(
                f"tokens_bound={tokens_bound}; accepted: 1 to {most} (max_tokens_per_rank) or None"
            )
        self._ready().set_tokens_bound(tokens_bound)

    def _ready(self) -> Engine:
        self._life.check()
        self.initialize()
        assert self._engine is not None
        return self._engine

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
            raise _refused(engine, _dispatch_operation(previous_handle), error) from None
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
            raise _refused(engine, _dispatch_operation(previous_handle), error) from None
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
            raise _refused(engine, _dispatch_operation(previous_handle), error) from None
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
        stream, wait_events = self._place_of(overlap)
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

    # -- combine ----------------------------------------------------------------------------------

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
            raise _refused(engine, Operation.COMBINE, error) from None
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
            raise _refused(engine, Operation.COMBINE, error) from None
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
            raise _refused(engine, Operation.COMBINE, error) from None
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
        stream, wait_events = self._place_of(overlap)
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

    def refuse(self, op: str, error: ExpertlinkError, *, cached: bool = False) -> NoReturn:
        """Raises `error` in place of a call that the other ranks make. Collective with that call.

        For checks of a caller's own. The other ranks learn of it as they do where an argument is
        refused here: on CPUs in every call, on GPUs in new dispatches, with `check_inputs` in all.
        They raise PeerError, and the communicator stays usable; where the host waits for nothing
        they do so later, and it is lost. In a capture nobody is told.

        Args:
            op: the call, "dispatch" or "combine".
            error: what to raise.
            cached: the dispatch is one of `previous_handle`.

        Raises:
            ExpertlinkError: `error`; or what the ranks agree on instead: TooManyTokensError where
                another rank has too many, PeerError where the ranks are not in the same call.
            PeerTimeoutError: a rank did not come.
        """
        operation = operation_of(op)
        if cached and operation is Operation.DISPATCH:
            operation = Operation.CACHED_DISPATCH
        raise _refused(self._ready(), operation, error) from None

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
            stream: CUDA stream to run on; None: the communicator's own, of high priority.
            wait_events: CUDA events to wait for, besides the caller's current stream.
            num_sms: SMs the operation may use; None: `num_sms_dispatch` / `num_sms_combine`.
        """
        operation = operation_of(op)
        check_settings(device=self.device, on_stream=bool(stream or wait_events), num_sms=num_sms)
        if num_sms is None:
            config = self.config
            on_dispatch = operation is Operation.DISPATCH
            num_sms = config.num_sms_dispatch if on_dispatch else config.num_sms_combine
        return CommOverlapConfig(op, stream or self._stream, tuple(wait_events), num_sms)

    def compute_sms(self, op: str, *, num_sms: int | None = None) -> int:
        """SMs of this GPU that one dispatch or combine leaves to kernels beside it. Local.

        Give it to kernels that can be told how many blocks to launch, as the size of a persistent
        grid. Initializes (collective) if needed.

        Args:
            op: "dispatch" or "combine".
            num_sms: SMs of the call, such as `CommOverlapConfig.num_sms`; None:
                `num_sms_dispatch` / `num_sms_combine`, else the engine's choice.

        Returns:
            All SMs less those of the call; 0 where that takes all. With the collective engine all
            SMs: NCCL decides how many its kernels take, and does not say. The SMs are those of the
            GPU, also in a green context. An uncached dispatch of mode "ht" whose output turns out
            too small, as the first one does, takes more for a moment (docs/tuning.md).

        Raises:
            InputError: no such operation, or `num_sms` is less than 1.
            ConfigurationError: tensors live on the CPU, which has no SMs.
            ClosedError: the communicator is closed or aborted.
        """
        operation = operation_of(op)
        check_settings(device=self.device, on_stream=False, num_sms=num_sms)
        return self._ready().compute_sms(operation, num_sms)

    def _place_of(
        self, overlap: CommOverlapConfig | None
    ) -> tuple[torch.cuda.Stream | None, Sequence[torch.cuda.Event]]:
        """The stream of an asynchronous call, None for in line, and what it waits for."""
        return (self._stream, ()) if overlap is None else (overlap.stream, overlap.wait_events)

    # -- properties -------------------------------------------------------------------------------

    @property
    def engine_name(self) -> str:
        """Engine in use: "nvlink" or "collective"; settled once initialized."""
        return self._choice.name

    @property
    def engine_reason(self) -> str:
        """Why that engine, in one sentence."""
        return self._choice.reason

    @property
    def local_experts(self) -> list[int]:
        """Global ids of this rank's experts in local order. Initializes (collective) if needed."""
        self.initialize()
        assert self._placement is not None
        return list(self._placement.experts_of_rank[self.rank])

    @property
    def num_local_experts(self) -> int:
        """E_loc. Initializes (collective) if needed."""
        return len(self.local_experts)

    @property
    def placement(self) -> ExpertPlacement:
        """Where the expert of every id lives. Initializes (collective) if needed."""
        self.initialize()
        assert self._placement is not None
        return ExpertPlacement(self._placement.num_experts, self._placement.experts_of_rank)

    def memory_estimate(self) -> dict[str, int]:
        """Bytes by region that the largest possible call holds beyond inputs and outputs."""
        return self._ready().memory_estimate()

    # -- placement --------------------------------------------------------------------------------

    def rebalance(
        self,
        tensors: Sequence[Tensor],
        new: ExpertPlacement,
        *,
        old: ExpertPlacement | None = None,
    ) -> list[Tensor]:
        """Moves what belongs to experts to another placement, by one all-to-all. Collective.

        This communicator's own placement stays as it is: where `new` has as many slots on every
        rank it goes on to serve, else a new communicator does. On the nvlink engine too the process
        group moves the bytes, through the host where it cannot exchange tensors of the GPU. Beyond
        the results there is memory for what this rank sends and receives.

        Args:
            tensors: `[slots, ...]` any dtype, on the communicator's device: a row for each expert
                that this rank holds in `old`, such as weights and their optimizer states. Dtypes
                and row shapes are alike on all ranks.
            new: the placement to move to, the same on all ranks.
            old: the placement to move from; None: this communicator's, each id an expert.

        Returns:
            The same for the experts that this rank holds in `new`; tensors of their own, without
            gradients. On CUDA they are ready in the order of the current stream.

        Raises:
            InputError: an argument does not fit, or the ranks differ (on every rank).
            PeerError: another rank refused, or the ranks are not in the same call.
            PeerTimeoutError: a rank did not come. ClosedError: the communicator is closed.
        """
        if torch.compiler.is_dynamo_compiling():
            from expertlink.uncompiled import uncompiled

            return uncompiled(self.rebalance, tensors, new, old=old)
        self.check_health()
        old = old or self.placement
        assert self._wire is not None
        return rebalance(self._wire, self.config, tensors, old=old, new=new)

    # -- rows of a dispatch -----------------------------------------------------------------------

    def wire_rows(self, handle: DispatchHandle) -> tuple[list[int], list[int]]:
        """Rows that a dispatch sent to and received from each rank, own rank included."""
        engine = self._ready()
        handle = self._calls.check_handle(handle)
        handle.wait()
        return engine.wire_rows(handle.state)

    def expert_ranges(self, handle: DispatchHandle) -> tuple[Tensor, Tensor]:
        """Where the rows of each source rank lie among those of each local expert.

        FLAT and EXPERT_MAJOR, whose groups are ordered by source rank.

        Returns:
            `(starts, counts)`, int32 `[E_loc, R]` on the device, owned by the caller: rows of local
            expert `e` that came from rank `r` are slots `starts[e, r]` up to, not including,
            `starts[e, r] + counts[e, r]`: of `tokens` (FLAT), of `tokens[e]` (EXPERT_MAJOR).

        Raises:
            InputError: the layout is another one.
            HandleError, ClosedError: the handle or this communicator cannot be used.
        """
        engine = self._ready()
        handle = self._calls.check_handle(handle)
        if not self.config.layout.expanded:
            raise InputError(
                f"expert_ranges needs a layout with a row per expert (flat, expert_major), not "
                f"{self.config.layout.value}"
            )
        handle.wait()
        return engine.expert_ranges(handle.state)

    def slot_weights(self, handle: DispatchHandle) -> Tensor | None:
        """Routing weight of every row, 0 for rows that nothing fills. Local.

        FLAT and EXPERT_MAJOR; the other layouts have the weights in their output.

        Returns:
            float32 in the leading shape of `tokens`; None where dispatch was given no weights.

        Raises:
            InputError: the layout is another one.
            HandleError, ClosedError: the handle or this communicator cannot be used.
        """
        engine = self._ready()
        handle = self._calls.check_handle(handle)
        handle.wait()
        if not self.config.layout.expanded:
            raise InputError(
                f"slot_weights needs a layout with a row per expert (flat, expert_major), not "
                f"{self.config.layout.value}"
            )
        return engine.slot_weights(handle.state)

    def arrivals(self, handle: DispatchHandle) -> Tensor:
        """Where the choices of every arrival are: one per (source rank, token), in that order.

        Local; waits for the device. For tests and tools: experts need none of it.

        Returns:
            `[N, K]` int64, owned by the caller: the row in the flattened `tokens` (FLAT,
            EXPERT_MAJOR), or the local expert (TOKEN_MAJOR, RANK_MAJOR); -1 for choices of other
            ranks.

        Raises:
            HandleError, ClosedError: the handle or this communicator cannot be used.
        """
        engine = self._ready()
        handle = self._calls.check_handle(handle)
        handle.wait()
        return engine.arrivals(handle.state)

    def source_tokens(self, handle: DispatchHandle) -> Tensor:
        """What `DispatchOutput.source_tokens` would be, made now instead of by every dispatch.

        Local. In mode "ll" of the nvlink engine, whose tables have it; elsewhere it comes with the
        rows, if the configuration says `source_tokens=True`.

        Returns:
            Leading shape of the rows, int32, owned by the caller: the token of its rank that every
            row is, -1 in padding.

        Raises:
            ConfigurationError: this engine, or mode, cannot tell afterwards.
            HandleError, ClosedError: the handle or this communicator cannot be used.
        """
        engine = self._ready()
        handle = self._calls.check_handle(handle)
        handle.wait()
        tokens = engine.source_tokens(handle.state, handle.rows_shape[:-1])
        if tokens is None:
            raise ConfigurationError(
                f"source tokens come with the rows in mode={self.config.mode!r} of the "
                f"{engine.name} engine: configure source_tokens=True"
            )
        return tokens

    # -- health -----------------------------------------------------------------------------------

    def check_health(self) -> None:
        """Raises failures of calls that the host did not wait for, if there are any. Local.

        PeerTimeoutError or, with static shapes, CapacityError. Every call does this first. Replays
        of CUDA graphs do not: call it after synchronizing their stream.

        Raises:
            ClosedError: the communicator is closed or aborted, or an earlier failure made it
                unusable.
        """
        self._life.check()
        if self._engine is not None:
            self._engine.check_health()

    def enable_statistics(self) -> CallStatistics:
        """Counts rows and bytes of this rank's calls from now on. Local; safe to repeat.

        Returns:
            The running totals, the same tensors every time; valid as long as referenced.

        Raises:
            ConfigurationError: the engine keeps no statistics in this mode.
        """
        engine = self._ready()
        with torch.inference_mode(False):  # calls in any mode add to them
            return engine.enable_statistics()

    def query_mask(self) -> Tensor:
        """Ranks that calls leave out, `[R]` bool on the device, a copy. Local.

        True for ranks given to `mask_peer` and, with `mask_lost_peers=True`, for ranks that did not
        come to a call in time. All False on engines that cannot leave out a rank.
        """
        return self._ready().query_mask()

    def mask_peer(self, rank: int) -> None:
        """Leaves out a rank: later calls neither wait for it nor send to it. Local.

        From then on its experts add nothing to this rank's results: their rows count as zero.

        Raises:
            InputError: no such rank, or this one; or combine_precision="exact" without
                `mask_lost_peers`.
            ConfigurationError: the engine needs all ranks. Only mode="ll" of nvlink does not.
        """
        engine = self._ready()
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < self.num_ranks:
            raise InputError(f"rank={rank!r}: ranks are 0..{self.num_ranks - 1}")
        if rank == self.rank:
            raise InputError(f"rank={rank}: a rank cannot leave out itself")
        engine.mask_peer(rank)

    def clear_mask(self) -> None:
        """Lets all ranks take part again. Collective: every rank, those left out included."""
        self._ready().clear_mask()


def _refused(engine: Engine, operation: Operation, error: ExpertlinkError) -> ExpertlinkError:
    """Tells the other ranks of an error; returns what to raise.

    Without the frames it came through: these hold the error, so it would keep them, and the
    callers' tensors, until the next garbage collection.
    """
    try:
        engine.refuse(operation, error)
    except ExpertlinkError as final:
        return final.with_traceback(None)


def _dispatch_operation(previous_handle: DispatchHandle | None) -> Operation:
    return Operation.DISPATCH if previous_handle is None else Operation.CACHED_DISPATCH


def _sums_of(started: Combined) -> _Sums:
    if started.weight_grads_TK is None:
        return started.out_TH
    return started.out_TH, started.weight_grads_TK
