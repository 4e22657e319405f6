"""Every exception the library raises on purpose.

Input and configuration errors are also `ValueError`s, time-outs are also `TimeoutError`s, so that
generic handlers keep working. All of them are `ExpertlinkError`s.
"""

from __future__ import annotations

from collections.abc import Sequence


class ExpertlinkError(Exception):
    """Base of all errors of this library."""


class ConfigurationError(ExpertlinkError, ValueError):
    """A configuration that cannot work, or on which the ranks of a group disagree."""


class EngineUnavailableError(ExpertlinkError, RuntimeError):
    """The requested engine cannot run here; the message says why."""


class InputError(ExpertlinkError, ValueError):
    """An argument of dispatch or combine has a wrong shape, dtype, device or value."""


class RoutingChangedError(InputError):
    """A cached dispatch was given a routing that differs from the one in its handle."""


class HandleError(ExpertlinkError, RuntimeError):
    """A dispatch handle that is foreign, already consumed, or of a closed communicator."""


class ClosedError(ExpertlinkError, RuntimeError):
    """The communicator is closed or aborted, or unusable after an earlier failure."""


class NotPicklableError(ExpertlinkError, TypeError):
    """Something that belongs to this process, such as a communicator, was to be pickled."""


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
    """A rank called `abort()`, or left a `with` block by an exception: nobody waits for it.

    The communicator is unusable afterwards.

    Attributes:
        rank: the rank that aborted.
        reason: what it said.
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
        missing: the ranks that did not arrive, as far as could be found out; may be empty.
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
    # Exceptions with keyword-only fields need help to cross a process boundary.
    return cls(message, **fields)
