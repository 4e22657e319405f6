"""Host memory that the kernels write: the counts that the host waits for, and reports of failures.

The words are those of `Control` in kernels/common/sync.cuh. Every wait on the device is bounded by
`timeout_ns`; the first that expires writes its report here and lets all others of this rank end.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from expertlink.engines.nvlink.arena import HEAD_WORDS
from expertlink.engines.ranks.agreement import difference, width_difference
from expertlink.engines.ranks.header import NUM_FIELDS, HeaderWord, Operation, title_of
from expertlink.errors import (
    AbortError,
    CapacityError,
    ClosedError,
    ExpertlinkError,
    InputError,
    PeerError,
    PeerTimeoutError,
)

logger = logging.getLogger("expertlink")
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
_PHASE_AGREEMENT, _PHASE_ABORTED, _PHASE_HALVES = 5, 6, 7
FINE, DISAGREE, OVERFLOW = 0, 1, 2
_FORM_MAILS = 2  # of a head's last field but one: the host waits for the counts

# Words of communicators that nobody has closed: a kernel may still read them, so they are kept.
_abandoned: list[torch.Tensor] = []


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
        heads: `[R][HEAD_WORDS]` what every rank said of its call.
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
        self._noted = 0  # transfer of the overflow that the log has
        self._order = threading.Lock()
        self._forget = weakref.finalize(self, _abandoned.append, self._pinned)
        self._forget.atexit = False
        # Of all communicators that share the memory: how to post why one aborts, and to read it.
        self._boards: list[tuple[Callable[[str], None], Callable[[int], str]]] = []
        # What an interrupted wait calls. Weak: dropping a communicator frees its memory at once.
        self.interrupted: Callable[[], Callable[[str], None] | None] = lambda: None
        self.set_timeout(timeout_s)

    def attach(self, post: Callable[[str], None], read: Callable[[int], str]) -> None:
        """Another communicator uses this; the same ones do on all ranks."""
        self._boards.append((post, read))

    def post_abort(self, reason: str) -> None:
        """Leaves word of why this rank aborts, for the others to read."""
        for post, _ in self._boards:
            post(reason)

    def _reason_of(self, rank: int) -> str:
        reasons = (read(rank) for _, read in reversed(self._boards))
        return next((reason for reason in reasons if reason), "")

    def release(self) -> None:
        """Lets the memory go. No kernel may be under way any more."""
        self._forget.detach()

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
            PeerError, InputError: the ranks were in different calls, or passed other rows.
            AbortError: a rank has called `abort`.
            ClosedError: one of these has been raised before.
        """
        words = self._words
        if self._dead is not None:
            raise ClosedError(f"this communicator is unusable after a failure: {self._dead}")
        if words.reported:
            with self._order:  # the words below were written before `reported`
                error = self._expired(call)
            self._dead = str(error)
            raise error
        if words.overflowed and words.overflowed != self._noted:
            # Ranks come to know of it at different calls, so no call raises it.
            self._noted = int(words.overflowed)
            logger.error("%s; check_health() raises this", self._overflow())

    def check_overflow(self) -> None:
        """Raises an overflow that has not been raised yet.

        Raises:
            CapacityError: with static shapes, an earlier dispatch found no room for its rows.
        """
        if self._words.overflowed:
            error = self._overflow()
            self._words.overflowed = 0
            raise error

    def fail(self, reason: str) -> None:
        """No call is possible any more."""
        if self._dead is None:
            self._dead = reason

    @property
    def dead(self) -> bool:
        """Whether a failure has been raised, or `fail` called."""
        return self._dead is not None

    def _overflow(self) -> CapacityError:
        with self._order:
            words = self._words
            rank, rows, room = words.overflow_rank, words.overflow_rows, words.overflow_capacity
        return CapacityError(
            f"rank {rank} received {rows} rows in an earlier dispatch with static shapes but "
            f"has room for {room} (max_recv_tokens_per_rank or its output_buffer); rows were "
            "dropped and that call's results are wrong on every rank",
            rank=rank,
            rows=rows,
            capacity=room,
        )

    def _expired(self, call: int) -> ExpertlinkError:
        words = self._words
        phase = int(words.phase)
        operation = title_of(words.operation)
        if phase == _PHASE_AGREEMENT:
            return self.disagreement(self._heads())
        if phase == _PHASE_ABORTED:
            reason = self._reason_of(int(words.peer))
            return AbortError(
                f"rank {words.peer} called abort: {reason or 'its reason could not be read'}. "
                "Close this communicator",
                rank=int(words.peer),
                reason=reason,
            )
        if phase == _PHASE_HALVES:
            return InputError(
                f"a call began between the halves of another one ({operation}, transfer "
                f"{words.expected} to send, {words.seen} to receive): a graph that was replayed "
                "there, or a half that is missing. Close this communicator"
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

    def _heads(self) -> list[list[int]]:
        room = len(_MAIL_FIELDS)
        words = self._mail[room : room + self._num_ranks * HEAD_WORDS]
        return [words[r * HEAD_WORDS : (r + 1) * HEAD_WORDS] for r in range(self._num_ranks)]

    def disagreement(self, heads: Sequence[Sequence[int]]) -> PeerError | InputError:
        """The error of ranks that said this of their calls; the same text on all of them."""
        fields = [words[:NUM_FIELDS] for words in heads]
        communicators = {words[HeaderWord.COMMUNICATOR] for words in fields}
        text = difference(fields, communicator=min(communicators))
        if text is not None:
            own = fields[self._rank]
            same = (HeaderWord.OPERATION, HeaderWord.COMMUNICATOR, HeaderWord.SUBJECT)
            odd = [
                rank
                for rank, words in enumerate(fields)
                if words[HeaderWord.STATUS] or any(words[i] != own[i] for i in same)
            ]
            return PeerError(f"{text}. Close this communicator", ranks=odd)
        what = width_difference(fields) or "some ranks pass weights, others do not"
        return InputError(
            f"{title_of(fields[0][HeaderWord.OPERATION])} #{fields[0][HeaderWord.CALL]} did not "
            f"happen: {what}"
        )

    @staticmethod
    def is_fatal(heads: Sequence[Sequence[int]]) -> bool:
        """Whether some rank cannot go on: its call does not wait for what all say."""
        return any(
            words[HeaderWord.OPERATION] != Operation.DISPATCH or not words[NUM_FIELDS] & _FORM_MAILS
            for words in heads
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
        try:
            return self._await_mail(before, call=call, num_local=num_local)
        except ExpertlinkError:
            raise
        except BaseException as error:  # Ctrl-C, a signal handler: the call is half done
            reason = f"interrupted by {type(error).__name__}"
            (self.interrupted() or self.fail)(reason)
            raise

    def _await_mail(self, before: int, *, call: int, num_local: int) -> Mail:
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
                self.fail("the GPU did not get to a call")
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
        with self._order:  # the mail was written before its number
            values = self._mail[: len(_MAIL_FIELDS) + ranks * (HEAD_WORDS + 1) + num_local]
        fields, rest = values[: len(_MAIL_FIELDS)], values[len(_MAIL_FIELDS) :]
        rest = rest[ranks * HEAD_WORDS :]
        return Mail(
            *fields,
            heads=self._heads() if fields[0] == DISAGREE else [],
            rows_from=rest[:ranks],
            counts=rest[ranks:],
        )
