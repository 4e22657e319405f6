"""A rank's connection to the other ranks: the handshake, what is agreed there, abort, `close()`."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from expertlink import graph_names
from expertlink.calls import CallBuilder
from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import Engine
from expertlink.engines.ranks.handshake import handshake, resolve_device
from expertlink.engines.ranks.header import Operation
from expertlink.engines.ranks.wire import Wire
from expertlink.engines.select import EngineChoice, build_engine, choose_engine
from expertlink.errors import ConfigurationError, ExpertlinkError, InputError, NotPicklableError
from expertlink.graph_names import GraphForm
from expertlink.handles import scope_of
from expertlink.nvtx import add_ranges
from expertlink.overlap import make_stream, operation_of
from expertlink.placement import ExpertPlacement
from expertlink.requests import Life
from expertlink.routing import Placement
from expertlink.settings import LONGEST_S, NVTX, positive_seconds

logger = logging.getLogger("expertlink")
_identities = itertools.count(1)
_Self = TypeVar("_Self", bound="Connection")


class Connection:
    """What a communicator is before it has calls: an engine shared with the other ranks.

    `Dispatching` and `Combining` add the calls, each on its own; `MoECommunicator` has both.
    """

    def __init__(
        self, config: MoECommunicatorConfig, *, share_with: Connection | None = None
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

    def _ready(self) -> Engine:
        self._life.check()
        self.initialize()
        assert self._engine is not None
        return self._engine

    # -- what can be changed ----------------------------------------------------------------------

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

    # -- failures ---------------------------------------------------------------------------------

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
        raise refused(self._ready(), operation, error) from None

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


def refused(engine: Engine, operation: Operation, error: ExpertlinkError) -> ExpertlinkError:
    """Tells the other ranks of an error; returns what to raise.

    Without the frames it came through: these hold the error, so it would keep them, and the
    callers' tensors, until the next garbage collection.
    """
    try:
        engine.refuse(operation, error)
    except ExpertlinkError as final:
        return final.with_traceback(None)
