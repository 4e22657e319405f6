"""`MoECommunicator`: from a configuration to dispatch and combine."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from expertlink import autograd
from expertlink.calls import CallBuilder
from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import CombineCall, Combined, DispatchCall, Dispatched, Engine
from expertlink.engines.meeting import meet, resolve_device
from expertlink.engines.select import EngineChoice, build_engine, choose_engine
from expertlink.engines.wire import Wire
from expertlink.errors import ClosedError, ConfigurationError, ExpertlinkError, InputError
from expertlink.overlap import check_operation, check_overlap, launch
from expertlink.requests import CombineRequest, DispatchRequest
from expertlink.routing import Placement
from expertlink.types import CommOverlapConfig, DispatchHandle, DispatchOutput, QuantScales

logger = logging.getLogger("expertlink")
_identities = itertools.count(1)
_Started = TypeVar("_Started", Dispatched, Combined)


class MoECommunicator:
    """Dispatches tokens to the ranks of their experts and combines what the experts return.

    All calls but the constructor and `close` are collective: every rank of the group makes them in
    the same order. Not thread-safe. Usable as a context manager.

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
        self.config = config
        self._share_with = share_with
        if share_with is not None and share_with.config.group is not config.group:
            raise ConfigurationError("share_with: that communicator belongs to another group")
        self._identity = next(_identities)
        self._group: Any = config.group
        if self._group is None and dist.is_available() and dist.is_initialized():
            self._group = dist.group.WORLD
        self.device = resolve_device(config.device, self._group)
        self._choice: EngineChoice = choose_engine(config, device=self.device)
        self._check = self.device.type == "cpu"
        if config.check_inputs is not None:
            self._check = config.check_inputs
        assert config.timeout_s is not None
        assert config.startup_timeout_s is not None
        self._timeout_s, self._startup_timeout_s = config.timeout_s, config.startup_timeout_s
        self.rank: int = 0 if self._group is None else self._group.rank()
        self.num_ranks: int = 1 if self._group is None else self._group.size()
        self._engine: Engine | None = None
        self._placement: Placement | None = None
        self._stream: torch.cuda.Stream | None = None
        # What outlives close(), such as graphs of old results, must not hold on to the group.
        self._groupless = dataclasses.replace(config, group=None)
        self._calls = CallBuilder(
            self._groupless, device=self.device, num_ranks=self.num_ranks, identity=self._identity
        )
        self._closed = False

    # -- life -------------------------------------------------------------------------------------

    def initialize(self) -> None:
        """Meets the other ranks and prepares everything calls need. Collective; safe to repeat.

        The first dispatch does it if nobody did.

        Raises:
            ConfigurationError: on every rank, naming the fields on which the ranks disagree.
            PeerTimeoutError: a rank did not come within `startup_timeout_s`.
            ClosedError: the communicator is closed.
        """
        if self._closed:
            raise ClosedError("this communicator is closed")
        if self._engine is not None:
            return
        wire = Wire(self._group, device=self.device, timeout_s=self._startup_timeout_s)
        asked = self.config.engine + ("" if self._share_with is None else ", memory shared")
        self._placement = meet(wire, self.config, engine=asked, check_inputs=self._check)
        other = self._share_with
        self._choice, self._engine = build_engine(
            self._choice,
            self._groupless,
            wire=wire,
            placement=self._placement,
            check_inputs=self._check,
            share_with=None if other is None else other._ready(),
        )
        self._engine.set_timeout(self._timeout_s)
        self._calls.num_local_experts = len(self._placement.experts_of_rank[self.rank])
        if self.config.enable_overlap and self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
        logger.info("rank %d: %s engine: %s", self.rank, self._choice.name, self._choice.reason)

    def close(self) -> None:
        """Releases everything; handles become unusable. Not collective; safe to repeat."""
        if self._engine is not None:
            self._engine.close()
        self._engine = self._group = None
        self._closed = True

    def __enter__(self) -> MoECommunicator:
        self.initialize()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def set_timeouts(
        self, *, timeout_s: float | None = None, startup_timeout_s: float | None = None
    ) -> None:
        """Changes how long later waits may take, in seconds; None leaves a bound as it is."""
        for name, value in (("timeout_s", timeout_s), ("startup_timeout_s", startup_timeout_s)):
            if value is not None and not value > 0:
                raise InputError(f"{name}={value!r}: a positive number of seconds is expected")
        self._timeout_s = timeout_s or self._timeout_s
        self._startup_timeout_s = startup_timeout_s or self._startup_timeout_s
        if self._engine is not None:
            self._engine.set_timeout(self._timeout_s)

    # -- what it is -------------------------------------------------------------------------------

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

    def memory_estimate(self) -> dict[str, int]:
        """Bytes by region that the largest possible call holds beyond inputs and outputs."""
        return self._ready().memory_estimate()

    def check_health(self) -> None:
        """Raises what went wrong in calls that the host did not wait for, if anything. Local.

        PeerTimeoutError or, with static shapes, CapacityError. Every call does this first; replays
        of CUDA graphs do not: look after the stream has been synchronized.
        """
        self._ready().check_health()

    def wire_rows(self, handle: DispatchHandle) -> tuple[list[int], list[int]]:
        """Rows that a dispatch sent to and received from each rank, own rank included."""
        engine = self._ready()
        self._calls.check_owner(handle)
        handle.wait()
        return engine.wire_rows(handle.state)

    # -- dispatch ---------------------------------------------------------------------------------

    def dispatch(
        self,
        input: Tensor,
        topk_ids: Tensor | None,
        weights: Tensor | None = None,
        scales: QuantScales | Tensor | None = None,
        *,
        output_buffer: Tensor | None = None,
        previous_handle: DispatchHandle | None = None,
        async_finish: bool = False,
    ) -> tuple[DispatchOutput, DispatchHandle]:
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
                first N rows. Not possible where gradients are tracked.
            previous_handle: reuse that dispatch's routing: nothing is counted or exchanged but
                rows. `topk_ids`, where given, are compared with it.
            async_finish: return before the rows are there; call `handle.wait()` before reading.

        Returns:
            `(output, handle)`; output tensors belong to the caller.

        Raises:
            InputError: an argument does not fit; RoutingChangedError: differs from the handle's.
            CapacityError: a rank would receive more rows than it has room for (on every rank).
            HandleError, ClosedError: `previous_handle` or this communicator cannot be used.
            PeerError: another rank refused; PeerTimeoutError: a rank did not come.
        """
        output, handle, wait = self._dispatch(
            input, topk_ids, weights, scales, output_buffer, previous_handle, async_finish, None
        )
        if async_finish:
            handle._finish = wait
        else:
            wait()
        return output, handle

    def dispatch_async(
        self,
        input: Tensor,
        topk_ids: Tensor | None,
        weights: Tensor | None = None,
        scales: QuantScales | Tensor | None = None,
        *,
        output_buffer: Tensor | None = None,
        previous_handle: DispatchHandle | None = None,
        overlap: CommOverlapConfig | None = None,
    ) -> DispatchRequest:
        """`dispatch` that returns once counts are agreed; `wait()` gives `(output, handle)`.

        Inputs must not be written to before `wait()`.
        """
        check_operation(overlap, "dispatch")
        output, handle, wait = self._dispatch(
            input, topk_ids, weights, scales, output_buffer, previous_handle, True, overlap
        )
        handle._finish = wait
        return DispatchRequest((output, handle), handle.wait)

    def _dispatch(
        self,
        x: Tensor,
        topk_ids: Tensor | None,
        weights: Tensor | None,
        scales: QuantScales | Tensor | None,
        output_buffer: Tensor | None,
        previous: DispatchHandle | None,
        beside: bool,
        overlap: CommOverlapConfig | None,
    ) -> tuple[DispatchOutput, DispatchHandle, Callable[[], None]]:
        engine = self._ready()
        kind = "dispatch" if previous is None else "cached_dispatch"
        try:
            num_sms = None if overlap is None else overlap.num_sms
            call = self._calls.dispatch(
                x, topk_ids, weights, scales, output_buffer, previous, num_sms
            )
        except ExpertlinkError as error:
            engine.refuse(kind, error)

        def begin() -> Dispatched:
            if self._calls.tracked(call):
                return autograd.dispatch(engine, call)
            return engine.dispatch(call)

        started, wait = self._launch(begin, beside, overlap, call)
        handle = self._calls.handle(call, started, previous, topk_ids)
        return started.output, handle, wait

    # -- combine ----------------------------------------------------------------------------------

    def combine(
        self,
        expert_output: Tensor,
        handle: DispatchHandle,
        *,
        out: Tensor | None = None,
        weight_grads: Tensor | None = None,
        async_finish: bool = False,
    ) -> Tensor | Any:
        """Returns every token's weighted sum over its experts. Collective, differentiable.

        FLAT and EXPERT_MAJOR: rows are multiplied by the routing weights here. TOKEN_MAJOR and
        RANK_MAJOR: the caller's MLP has done so and summed its local experts; rows are added up.

        Args:
            expert_output: rows in the shape of the dispatch's `tokens`, last dimension H, of the
                configured dtype. Non-contiguous tensors are copied.
            handle: of the dispatch; this call consumes it.
            out: `[T, H]` contiguous tensor for the result. Not where gradients are tracked.
            weight_grads: gradients of the rows' weights (FLAT, EXPERT_MAJOR: one number per row,
                the leading shape of the rows; others: that + `[K]`), to be returned per token.
            async_finish: return before the result is there; call `handle.wait()` before reading.

        Returns:
            `[T, H]` in token order, owned by the caller; with `weight_grads` a pair of that and the
            gradients `[T, K]`. Tokens without any expert get zeros.

        Raises:
            InputError: an argument does not fit.
            HandleError, ClosedError: the handle is foreign or consumed, or this communicator
                cannot be used.
            PeerError: another rank refused; PeerTimeoutError: a rank did not come.
        """
        result, wait = self._combine(expert_output, handle, out, weight_grads, async_finish, None)
        if async_finish:
            handle._finish = wait
        else:
            wait()
        return result

    def combine_async(
        self,
        expert_output: Tensor,
        handle: DispatchHandle,
        *,
        out: Tensor | None = None,
        weight_grads: Tensor | None = None,
        overlap: CommOverlapConfig | None = None,
    ) -> CombineRequest:
        """`combine` that returns while sums are on their way; `wait()` gives its result.

        `expert_output` must not be written to before `wait()`.
        """
        check_operation(overlap, "combine")
        result, wait = self._combine(expert_output, handle, out, weight_grads, True, overlap)
        return CombineRequest(result, wait)

    def _combine(
        self,
        rows: Tensor,
        handle: DispatchHandle,
        out: Tensor | None,
        weight_grads: Tensor | None,
        beside: bool,
        overlap: CommOverlapConfig | None,
    ) -> tuple[Any, Callable[[], None]]:
        engine = self._ready()
        try:
            num_sms = None if overlap is None else overlap.num_sms
            call = self._calls.combine(rows, handle, out, weight_grads, num_sms)
        except ExpertlinkError as error:
            engine.refuse("combine", error)
        weights_TK = handle.topk_weights if call.weighted else None
        result: list[Tensor] = []

        def begin() -> Combined:
            if autograd.needs_grad(call.rows, weights_TK):
                out_TH, combined = autograd.combine(engine, call, weights_TK)
                result.append(out_TH)
                return combined
            result.append(call.out_TH)
            return engine.combine(call)

        started, wait = self._launch(begin, beside, overlap, call)
        handle.consumed = True
        if started.weight_grads_TK is None:
            return result[0], wait
        return (result[0], started.weight_grads_TK), wait

    # -- overlap ----------------------------------------------------------------------------------

    def create_overlap_config(
        self,
        op: str,
        *,
        stream: torch.cuda.Stream | None = None,
        wait_events: Sequence[torch.cuda.Event] = (),
        num_sms: int | None = None,
    ) -> CommOverlapConfig:
        """Where the asynchronous form of `op` ("dispatch" or "combine") runs.

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
        beside: bool,
        overlap: CommOverlapConfig | None,
        call: DispatchCall | CombineCall,
    ) -> tuple[_Started, Callable[[], None]]:
        return launch(
            begin,
            stream=(self._stream if overlap is None else overlap.stream) if beside else None,
            wait_events=() if overlap is None else overlap.wait_events,
            call=call,
        )

    def _ready(self) -> Engine:
        self.initialize()
        assert self._engine is not None
        return self._engine
