"""The life of a communicator: from a configuration to an engine, and what can be asked of it."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from expertlink.calls import CallBuilder
from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import Engine
from expertlink.engines.ranks.handshake import handshake, resolve_device
from expertlink.engines.ranks.wire import Wire
from expertlink.engines.select import EngineChoice, build_engine, choose_engine
from expertlink.errors import ConfigurationError, InputError, NotPicklableError
from expertlink.requests import Life
from expertlink.routing import Placement
from expertlink.settings import LONGEST_S, positive_seconds
from expertlink.types import CallStatistics, DispatchHandle

logger = logging.getLogger("expertlink")
_identities = itertools.count(1)
_Self = TypeVar("_Self", bound="Session")


class Session:
    """What a communicator is before and between its calls; see `MoECommunicator`."""

    def __init__(self, config: MoECommunicatorConfig, *, share_with: Session | None = None) -> None:
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
        self._timeout_s = min(config.timeout_s, LONGEST_S)
        self._startup_timeout_s = min(config.startup_timeout_s, LONGEST_S)
        self.rank: int = 0 if self._group is None else self._group.rank()
        self.num_ranks: int = 1 if self._group is None else self._group.size()
        self._engine: Engine | None = None
        self._aborted_engine: Engine | None = None
        self._placement: Placement | None = None
        self._number: int | None = None  # tells communicators apart, the same on all ranks
        self._stream: torch.cuda.Stream | None = None
        # What outlives close(), such as graphs of old results, must not hold on to the group.
        self._groupless = dataclasses.replace(config, group=None)
        self._calls = CallBuilder(
            self._groupless, device=self.device, num_ranks=self.num_ranks, identity=self._identity
        )
        self._life = Life()

    # -- life -------------------------------------------------------------------------------------

    def initialize(self) -> None:
        """Meets the other ranks and prepares everything calls need. Collective; safe to repeat.

        The first dispatch does it if nobody did.

        Raises:
            ConfigurationError: on every rank, naming the fields on which the ranks disagree.
            PeerTimeoutError: a rank did not come within `startup_timeout_s`.
            ClosedError: the communicator is closed or aborted.
        """
        if torch.compiler.is_dynamo_compiling():
            from expertlink.uncompiled import uncompiled

            uncompiled(self.initialize)
            return
        self._life.check()
        if self._engine is None:
            with torch.inference_mode(False):  # tensors that calls in any mode may write to
                self._meet()

    def _meet(self) -> None:
        wire = Wire(self._group, device=self.device, timeout_s=self._startup_timeout_s)
        asked = self.config.engine + ("" if self._share_with is None else ", memory shared")
        other = self._share_with
        shared = None if other is None else other._ready()
        self._placement = handshake(
            wire,
            self.config,
            engine=asked,
            check_inputs=self._check,
            shared_with=None if other is None else other._number,
        )
        self._number = wire.number
        self._choice, self._engine = build_engine(
            self._choice,
            self._groupless,
            wire=wire,
            placement=self._placement,
            check_inputs=self._check,
            share_with=shared,
        )
        self._engine.set_timeout(self._timeout_s)
        self._calls.num_local_experts = len(self._placement.experts_of_rank[self.rank])
        self._calls.engine_quantizes = self._engine.quantizes
        if self.config.enable_overlap and self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
        logger.info("rank %d: %s engine: %s", self.rank, self._choice.name, self._choice.reason)

    def abort(self, reason: str) -> None:
        """Gives this communicator up on all ranks. Local; safe to repeat; never raises.

        For a rank that cannot go on, as when its experts raised: ranks that wait for it, or will,
        raise AbortError with the reason instead of waiting until the time-out. A `with` block that
        an exception leaves does this. Later calls here raise ClosedError; `close()` is still to be
        called. Before `initialize()` there is nobody to tell: others wait for their time-out.

        Args:
            reason: for messages.
        """
        if self._life.over is not None:
            return
        self._life.over = f"this communicator was aborted on this rank: {reason}"
        self._aborted_engine, self._engine = self._engine, None
        if self._aborted_engine is not None:
            self._aborted_engine.abort(reason)

    def close(self) -> None:
        """Releases everything; handles become unusable. Not collective; safe to repeat."""
        engine = self._engine or self._aborted_engine
        if engine is not None:
            engine.close()
        self._engine = self._aborted_engine = self._group = None
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

    def _ready(self) -> Engine:
        self._life.check()
        self.initialize()
        assert self._engine is not None
        return self._engine

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

    # -- what has arrived -------------------------------------------------------------------------

    def wire_rows(self, handle: DispatchHandle) -> tuple[list[int], list[int]]:
        """Rows that a dispatch sent to and received from each rank, own rank included."""
        engine = self._ready()
        self._calls.check_handle(handle)
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
        self._calls.check_handle(handle)
        if not self.config.layout.expanded:
            raise InputError(
                f"expert_ranges needs a layout with a row per expert (flat, expert_major), not "
                f"{self.config.layout.value}"
            )
        handle.wait()
        return engine.expert_ranges(handle.state)

    # -- health -----------------------------------------------------------------------------------

    def check_health(self) -> None:
        """Raises what went wrong in calls that the host did not wait for, if anything. Local.

        PeerTimeoutError or, with static shapes, CapacityError. Every call does this first; replays
        of CUDA graphs do not: look after the stream has been synchronized.

        Raises:
            ClosedError: the communicator is closed or aborted, or an earlier failure has made it
                unusable.
        """
        self._life.check()
        if self._engine is not None:
            self._engine.check_health()

    def enable_statistics(self) -> CallStatistics:
        """Counts this rank's calls from now on. Local; safe to repeat.

        Returns:
            The running totals, the same tensors every time; valid as long as referenced.

        Raises:
            ConfigurationError: the engine does not count in this mode.
        """
        engine = self._ready()
        with torch.inference_mode(False):  # calls in any mode add to them
            return engine.enable_statistics()

    def query_mask(self) -> Tensor:
        """Ranks that calls leave out, `[R]` bool on the device, a copy. Local.

        True for ranks that `mask_peer` named and, with `mask_lost_peers=True`, for those that did
        not come to a call in time. All False on engines that cannot leave out a rank.
        """
        return self._ready().query_mask()

    def mask_peer(self, rank: int) -> None:
        """Leaves out a rank: later calls neither wait for it nor send to it. Local.

        Rows of its experts are missing in this rank's results from then on: they count as zero.

        Raises:
            InputError: no such rank, or this one.
            ConfigurationError: the engine needs all ranks; mode="ll" on the nvlink engine does not.
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
