"""Host memory that the kernels write: the counts that the host waits for, and reports of failures.

The words are those of `Control` in kernels/common/sync.cuh. Every wait on the device is bounded by
`timeout_ns`; the first that expires writes its report here and lets all others of this rank end.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from typing import Any

import torch

from expertlink.engines.header import NUM_FIELDS, Operation
from expertlink.engines.nvlink.arena import HEAD_WORDS
from expertlink.errors import CapacityError, ClosedError, PeerError, PeerTimeoutError

_MAIL_FIELDS = ("verdict", "rank", "rows", "capacity", "arrivals", "slots")
_SPINS = 4000  # looks without pause, about as many microseconds / 10
_PAUSE_S = 20e-6
_MARGIN_S = 30.0  # the device reports a missing peer itself; the host only guards against itself


class _Words(ctypes.Structure):
    _fields_ = (
        ("reported", ctypes.c_uint32),
        ("phase", ctypes.c_uint32),
        ("peer", ctypes.c_int32),
        ("expected", ctypes.c_uint32),
        ("seen", ctypes.c_uint32),
        ("index", ctypes.c_uint32),
        ("waited_ms", ctypes.c_uint32),
        ("operation", ctypes.c_uint32),
        ("timeout_ns", ctypes.c_uint64),
        ("overflowed", ctypes.c_uint32),
        ("overflow_rank", ctypes.c_int32),
        ("overflow_rows", ctypes.c_int32),
        ("overflow_capacity", ctypes.c_int32),
        ("unused", ctypes.c_uint32 * 2),
        ("mail_number", ctypes.c_uint32),
    )


_PHASES = {
    1: "for this rank's own blocks",
    2: "for room at a peer, which has not finished the call before",
    3: "for a peer to begin the call",
    4: "for rows of a peer",
    5: "for agreement",
}
_PHASE_AGREEMENT = 5
FINE, DISAGREE, OVERFLOW = 0, 1, 2


@dataclass(frozen=True)
class Mail:
    """What a rank learns about an uncached dispatch.

    Attributes:
        verdict: FINE, DISAGREE or OVERFLOW; the same on all ranks.
        rank: OVERFLOW: the rank without room.
        rows: OVERFLOW: rows it would receive.
        capacity: OVERFLOW: rows it has room for.
        arrivals: rows this rank receives, each token once.
        slots: rows of this rank's `tokens` in an expanded layout, alignment gaps included.
        heads: `[R][NUM_FIELDS]` what every rank said of its call.
        rows_from: `[R]` rows from each rank.
        counts: `[E_loc]` choices of each local expert.
    """

    verdict: int
    rank: int
    rows: int
    capacity: int
    arrivals: int
    slots: int
    heads: list[list[int]]
    rows_from: list[int]
    counts: list[int]


class Watchdog:
    """The host's end of one rank's control words.

    Args:
        rank: this rank.
        num_ranks: R.
        counts: counts of experts that a mail has room for.
        timeout_s: bound of every wait of the device.
    """

    def __init__(self, *, rank: int, num_ranks: int, counts: int, timeout_s: float) -> None:
        self._rank, self._num_ranks = rank, num_ranks
        room = len(_MAIL_FIELDS) + num_ranks * (HEAD_WORDS + 1) + counts
        # The mail follows mail_number directly, before what pads the struct.
        mail_at = _Words.mail_number.offset + 4
        self._pinned = torch.zeros(
            ctypes.sizeof(_Words) + 4 * room, dtype=torch.uint8, pin_memory=True
        )
        self.address: int = self._pinned.data_ptr()
        self._words: Any = _Words.from_address(self.address)
        self._mail = (ctypes.c_int32 * room).from_address(self.address + mail_at)
        self._dead: str | None = None
        self.set_timeout(timeout_s)

    def set_timeout(self, timeout_s: float) -> None:
        """Bounds later waits, in seconds; waits under way see it too."""
        self.timeout_s = timeout_s
        self._words.timeout_ns = min(int(timeout_s * 1e9), 1 << 54)  # kernels multiply it

    def revive(self) -> None:
        """Forgets earlier failures: all ranks begin anew."""
        self._words.reported = self._words.overflowed = 0
        self._dead = None

    def check(self, call: int) -> None:
        """Raises what the device has reported since the last look, if anything.

        Raises:
            PeerTimeoutError: a wait of an earlier call expired.
            CapacityError: with static shapes, an earlier dispatch found no room for its rows.
            PeerError: with static shapes, the ranks were in different calls.
            ClosedError: one of the first kind has been raised before.
        """
        words = self._words
        if self._dead is not None:
            raise ClosedError(f"this communicator is unusable after a failure: {self._dead}")
        if words.reported:
            error = self._expired(call)
            self._dead = str(error)
            raise error
        if words.overflowed:
            rank, rows, room = words.overflow_rank, words.overflow_rows, words.overflow_capacity
            words.overflowed = 0
            raise CapacityError(
                f"rank {rank} received {rows} rows in an earlier dispatch with static shapes but "
                f"has room for {room} (max_recv_tokens_per_rank or its output_buffer); rows were "
                "dropped and that call's results are wrong on every rank",
                rank=rank,
                rows=rows,
                capacity=room,
            )

    def _expired(self, call: int) -> PeerTimeoutError | PeerError:
        words = self._words
        phase = int(words.phase)
        operation = _title(words.operation)
        if phase == _PHASE_AGREEMENT:
            return PeerError(
                f"the ranks were not in the same call when rank {self._rank} was in {operation} "
                f"(transfer {words.reported}); all ranks make the same calls in the same order, "
                "with rows and scales of the same width",
                ranks=(),
            )
        peer = int(words.peer)
        missing = (peer,) if 0 <= peer < self._num_ranks and peer != self._rank else ()
        what = f"rank {peer}" if missing else "unknown"
        row = f", row {words.index}" if phase == 4 else ""
        return PeerTimeoutError(
            f"rank {self._rank} waited {words.waited_ms / 1e3:.1f} s of at most "
            f"{self.timeout_s:g} s in {operation} (transfer {words.reported}) "
            f"{_PHASES.get(phase, 'unknown')}{row}: epoch {words.expected} expected, "
            f"{words.seen} seen; missing: {what}. Close this communicator",
            rank=self._rank,
            missing=missing,
            phase=operation,
            call=call,
            waited_s=words.waited_ms / 1e3,
        )

    @property
    def mail_number(self) -> int:
        """Transfer that the last mail belongs to; changes when a new one is complete."""
        return int(self._words.mail_number)

    def wait_for_mail(self, before: int, *, call: int, num_local: int) -> Mail:
        """Waits until the mail's number differs from `before`; it has `num_local` counts.

        Raises:
            PeerTimeoutError: a peer did not come, or the GPU never got to the call.
        """
        words = self._words
        spins = 0
        started = time.monotonic()
        while words.mail_number == before:
            spins += 1
            if spins < _SPINS:
                continue
            time.sleep(_PAUSE_S)  # also lets other threads of the process run
            if words.reported:
                self.check(call)
            waited = time.monotonic() - started
            if waited > self.timeout_s + _MARGIN_S:
                self._dead = "the GPU did not get to a call"
                raise PeerTimeoutError(
                    f"rank {self._rank} waited {waited:.1f} s for its own GPU to count the tokens "
                    f"of dispatch #{call}: earlier work on the stream does not end",
                    rank=self._rank,
                    missing=(),
                    phase="dispatch",
                    call=call,
                    waited_s=waited,
                )
        return self._read(num_local)

    def _read(self, num_local: int) -> Mail:
        ranks = self._num_ranks
        values = self._mail[: len(_MAIL_FIELDS) + ranks * (HEAD_WORDS + 1) + num_local]
        fields, rest = values[: len(_MAIL_FIELDS)], values[len(_MAIL_FIELDS) :]
        heads = [rest[r * HEAD_WORDS : r * HEAD_WORDS + NUM_FIELDS] for r in range(ranks)]
        rest = rest[ranks * HEAD_WORDS :]
        return Mail(
            *fields,
            heads=heads if fields[0] == DISAGREE else [],
            rows_from=rest[:ranks],
            counts=rest[ranks:],
        )


def _title(operation: int) -> str:
    try:
        return Operation(operation).title
    except ValueError:
        return "a call"
