"""Every exception that the library raises on purpose. All of them are `ExpertlinkError`s.

Input and configuration errors are also `ValueError`s, time-outs are also `TimeoutError`s, so that
generic handlers keep working.
"""

from __future__ import annotations

from collections.abc import Sequence


class ExpertlinkError(Exception):
    """Base of all errors of this library."""


class ConfigurationError(ExpertlinkError, ValueError):
    """A configuration that cannot work, or one that differs between the ranks of a group."""


class EngineUnavailableError(ExpertlinkError, RuntimeError):
    """The requested engine cannot run here; the message says why."""


class InputError(ExpertlinkError, ValueError):
    """An argument of dispatch or combine has a wrong shape, dtype, device or value."""


class TooManyTokensError(InputError):
    """A rank dispatches more tokens than `max_tokens_per_rank`. Raised alike on every rank.

    So the ranks can agree to make a larger communicator without asking each other. With
    `static_shapes`, in mode "ll" without `check_inputs`, and in a capture it is raised on that rank
    alone, with its own number.

    Attributes:
        rank: the rank with most tokens, the lowest of several.
        num_tokens: its T.
        capacity: `max_tokens_per_rank`.
    """

    def __init__(self, message: str, *, rank: int, num_tokens: int, capacity: int) -> None:
        super().__init__(message)
        self.rank = rank
        self.num_tokens = num_tokens
        self.capacity = capacity

    @classmethod
    def of(cls, *, rank: int, num_tokens: int, capacity: int) -> TooManyTokensError:
        """The error of that rank, in the words that all ranks use."""
        text = f"rank {rank}: input has {num_tokens} tokens; max_tokens_per_rank={capacity}"
        return cls(text, rank=rank, num_tokens=num_tokens, capacity=capacity)

    def __reduce__(self) -> tuple[object, ...]:
        fields = ("rank", "num_tokens", "capacity")
        return _rebuild, (type(self), str(self), {name: getattr(self, name) for name in fields})


class RoutingChangedError(InputError):
    """A cached dispatch was given a routing that differs from the one in its handle."""


class HandleError(ExpertlinkError, RuntimeError):
    """A dispatch handle that is stale, or of a communicator too different from the one called."""


class ClosedError(ExpertlinkError, RuntimeError):
    """The communicator is closed or aborted, or unusable after an earlier failure."""


class NotPicklableError(ExpertlinkError, TypeError):
    """An attempt to pickle something that belongs to this process, such as a communicator."""


class CapacityError(ExpertlinkError, RuntimeError):
    """A rank would receive more rows than it has room for. Raised alike on every rank.

    Attributes:
        rank: the rank that would overflow.
        rows: rows it would receive.
        capacity: rows it has room for.
    """

    def __init__(self, message: str, *, rank: int, rows: int, capacity: int) -> None:
        super().__init__(message)
        self.rank = rank
        self.rows = rows
        self.capacity = capacity

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (
            type(self),
            str(self),
            {"rank": self.rank, "rows": self.rows, "capacity": self.capacity},
        )


class PeerError(ExpertlinkError, RuntimeError):
    """Another rank refused the call that this rank made; the communicator stays usable.

    Attributes:
        ranks: the ranks that refused.
    """

    def __init__(self, message: str, *, ranks: Sequence[int]) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), str(self), {"ranks": self.ranks})


class AbortError(ExpertlinkError, RuntimeError):
    """A rank called `abort()`, or an exception left its `with` block: nobody waits for it.

    The communicator is unusable afterwards.

    Attributes:
        rank: the rank that aborted.
        reason: why, in its own words.
    """

    def __init__(self, message: str, *, rank: int, reason: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), str(self), {"rank": self.rank, "reason": self.reason})


class PeerTimeoutError(ExpertlinkError, TimeoutError):
    """A bounded wait for other ranks ended without them. The communicator is unusable afterwards.

    Attributes:
        rank: the rank that waited.
        missing: the ranks that did not arrive, as far as this rank could find out; may be empty.
        phase: what was being waited for.
        call: sequence number of the call on this communicator.
        waited_s: seconds until the wait ended; less than the time-out where a connection broke.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int,
        missing: Sequence[int],
        phase: str,
        call: int,
        waited_s: float,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.missing = tuple(missing)
        self.phase = phase
        self.call = call
        self.waited_s = waited_s

    def __reduce__(self) -> tuple[object, ...]:
        fields = ("rank", "missing", "phase", "call", "waited_s")
        return _rebuild, (type(self), str(self), {name: getattr(self, name) for name in fields})


def _rebuild(
    cls: type[ExpertlinkError], message: str, fields: dict[str, object]
) -> ExpertlinkError:
    # Pickle cannot rebuild exceptions with keyword-only arguments by itself.
    return cls(message, **fields)
