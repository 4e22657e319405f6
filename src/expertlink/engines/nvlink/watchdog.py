"""Host memory that the kernels write: counts that the host waits for, and reports of failures.

Its layout is `shared.control`. Every wait on the device is bounded by `timeout_ns`. The first one
that expires writes its report here and ends all others of this rank.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from expertlink.engines.nvlink.shared import HEADER_WORDS, ExtraWord, Form, Phase, Verdict, control
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
_POLLS_BEFORE_SLEEP = 4000  # about 400 us
_SLEEP_S = 20e-6
_MARGIN_S = 30.0  # the device reports a missing peer itself; the host only guards against itself

_WAITED_FOR = {
    Phase.BLOCKS: "for this rank's own blocks",
    Phase.CREDIT: "for room at a peer, which has not finished the call before",
    Phase.READY: "for a peer to begin the call",
    Phase.ROW: "for rows of a peer",
    Phase.AGREEMENT: "for agreement",
}

_VERDICTS = {int(verdict): verdict for verdict in Verdict}  # looking one up takes microseconds

# Words of communicators that nobody has closed: a kernel may still read them, so they are kept.
_abandoned: list[torch.Tensor] = []


class Mail(NamedTuple):
    """What a rank learns about an uncached dispatch.

    Attributes:
        verdict: the same on all ranks.
        rank: OVERFLOW: the rank without room.
        rows: OVERFLOW: rows it would receive.
        capacity: OVERFLOW: rows it has room for.
        arrivals: rows this rank receives, each token once.
        slots: rows of this rank's `tokens` in an expanded layout, alignment gaps included.
        headers: `[R][HEADER_WORDS]` DISAGREE: of every rank.
        counts: `[E_loc]` choices of each local expert.
        chunks: across hosts: chunks up to the last one that holds a row of any rank.
        rail: `[C * 2 * N]` across hosts: rows of each chunk to, then from, every host.
    """

    verdict: Verdict
    rank: int
    rows: int
    capacity: int
    arrivals: int
    slots: int
    headers: list[list[int]]
    counts: list[int]
    chunks: int = 0
    rail: Sequence[int] = ()


class _User(NamedTuple):
    """A communicator, as the memory that it uses knows it; see `Watchdog.attach`."""

    post: Callable[[str], None]
    read: Callable[[int], str]
    interrupted: Callable[[], Callable[[str], None] | None]


class Watchdog:
    """The host's end of one rank's control words.

    Args:
        rank: this rank.
        num_ranks: R.
        num_experts: E of the communicator that has most of them.
        timeout_s: bound of every wait of the device.
        peers: ranks whose memory this one's kernels address, in the order in which kernels number
            them. None: all.
        rail_words: as in `shared.control`.
    """

    def __init__(
        self,
        *,
        rank: int,
        num_ranks: int,
        num_experts: int,
        timeout_s: float,
        peers: Sequence[int] | None = None,
        rail_words: int = 0,
    ) -> None:
        self._rank, self._num_ranks = rank, num_ranks
        self._peers, self._rail_words = peers or range(num_ranks), rail_words
        layout = control(num_ranks, num_experts, rail_words)
        self._pinned = torch.zeros(layout.size, dtype=torch.uint8, device="cpu", pin_memory=True)
        self.address: int = self._pinned.data_ptr()
        self._words = layout.at(self.address)
        self._dead: str | None = None
        self._logged = 0  # transfer of the last overflow that was logged
        self._order = threading.Lock()
        self._forget = weakref.finalize(self, _abandoned.append, self._pinned)
        self._forget.atexit = False
        self._users: list[_User] = []  # all communicators that share the memory
        self.set_timeout(timeout_s)

    def attach(
        self,
        post: Callable[[str], None],
        read: Callable[[int], str],
        interrupted: Callable[[], Callable[[str], None] | None] = lambda: None,
    ) -> None:
        """Another communicator uses this; the same ones do on all ranks.

        Args:
            post: posts why this rank aborts.
            read: why another one has aborted.
            interrupted: what an interrupted wait calls. Weak: dropping a communicator frees its
                memory at once.
        """
        self._users.append(_User(post, read, interrupted))

    def detach(self, post: Callable[[str], None]) -> None:
        """The communicator with that `post` does not use this, or no more."""
        self._users = [user for user in self._users if user.post != post]

    def publish_abort(self, reason: str) -> None:
        """Posts why this rank aborts, for the others to read."""
        for user in list(self._users):
            user.post(reason)

    def _reason_of(self, rank: int) -> str:
        reasons = (user.read(rank) for user in reversed(self._users))
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
        """Raises what the device has reported since the last check, if anything.

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
        if words.overflowed and words.overflowed != self._logged:
            # Ranks come to know of it at different calls, so no call raises it.
            self._logged = int(words.overflowed)
            logger.error("%s; check_health() raises this", self._overflow())

    def expired_wait(self, call: int) -> PeerTimeoutError | None:
        """What `check` would raise, if the device has reported a wait that expired."""
        if not self._words.reported:
            return None
        with self._order:
            if self._words.phase >= Phase.AGREEMENT:  # why a peer aborted takes a while to find out
                return None
            error = self._expired(call)
        return error if isinstance(error, PeerTimeoutError) else None

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
        phase = words.phase
        operation = title_of(words.operation)
        if phase == Phase.AGREEMENT:
            return self.disagreement(self._headers())
        peer = self._peers[words.peer] if 0 <= words.peer < len(self._peers) else -1
        if phase == Phase.ABORTED:
            reason = self._reason_of(peer)
            return AbortError(
                f"rank {peer} called abort: {reason or 'its reason could not be read'}. "
                "Close this communicator",
                rank=peer,
                reason=reason,
            )
        if phase == Phase.HALVES:
            return InputError(
                f"a call began between the halves of another one ({operation}, transfer "
                f"{words.expected} to send, {words.seen} to receive): a graph that was replayed "
                "there, or a half that is missing. Close this communicator"
            )
        missing = (peer,) if peer >= 0 and peer != self._rank else ()
        what = f"rank {peer}" if missing else "unknown"
        row = f", row {words.index}" if phase == Phase.ROW else ""
        return PeerTimeoutError(
            f"rank {self._rank} waited {words.waited_ms / 1e3:.1f} s of at most "
            f"{self.timeout_s:g} s in {operation} (transfer {words.reported}) "
            f"{_WAITED_FOR.get(phase, 'unknown')}{row}: epoch {words.expected} expected, "
            f"{words.seen} seen; missing: {what}. Close this communicator",
            rank=self._rank,
            missing=missing,
            phase=operation,
            call=call,
            waited_s=words.waited_ms / 1e3,
        )

    def _headers(self) -> list[list[int]]:
        words = self._words.headers[:]
        return [words[r * HEADER_WORDS :][:HEADER_WORDS] for r in range(self._num_ranks)]

    def disagreement(self, headers: Sequence[Sequence[int]]) -> PeerError | InputError:
        """The error of ranks that said this of their calls; the same text on all of them."""
        fields = [words[:NUM_FIELDS] for words in headers]
        communicators = {words[HeaderWord.COMMUNICATOR] for words in fields}
        text = difference(fields, communicator=min(communicators))
        if text is not None:
            own = fields[self._rank]
            same = (
                HeaderWord.OPERATION,
                HeaderWord.COMMUNICATOR,
                HeaderWord.SUBJECT,
                HeaderWord.MAKER,
            )
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
    def is_fatal(headers: Sequence[Sequence[int]]) -> bool:
        """Whether some rank cannot go on: its call does not wait for the headers of all."""
        return any(
            words[HeaderWord.OPERATION] != Operation.DISPATCH
            or not words[ExtraWord.FORM] & Form.MAIL
            for words in headers
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
            calls = (user.interrupted() for user in reversed(self._users))
            (next((call for call in calls if call is not None), None) or self.fail)(reason)
            raise

    def _await_mail(self, before: int, *, call: int, num_local: int) -> Mail:
        words = self._words
        polls = 0
        started = time.monotonic()
        while words.mail_number == before:
            polls += 1
            if polls < _POLLS_BEFORE_SLEEP:
                continue
            time.sleep(_SLEEP_S)  # also lets other threads of the process run
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
        words = self._words
        with self._order:  # the mail was written before its number
            verdict = _VERDICTS[words.mail_verdict]
            return Mail(
                verdict,
                words.mail_rank,
                words.mail_rows,
                words.mail_capacity,
                words.mail_arrivals,
                words.mail_slots,
                self._headers() if verdict is Verdict.DISAGREE else [],
                words.mail_counts[:num_local],
                words.mail_chunks if self._rail_words else 0,
                words.mail_rail[: self._rail_words] if self._rail_words else (),
            )
