"""Notices steps of a rail that do not end, says who is missing, and ends them.

In: the words of one rank (words.py) and what other ranks post in the group's store. Out: the error
that the next call raises.

Kernels of NCCL wait for ever for a host that is gone, and replays of CUDA graphs have no host code
that could notice. So a thread compares the words with the clock. A rank that waits for long posts
signs of life, and asks the others of its rail for theirs: those between two steps look now and then
whether somebody asks. When its time is over it looks for the signs of the others, posts whom it
misses, and ends the operations of its rail. Ranks that wait elsewhere read that, and end their
waits too.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from expertlink.domains import Domains
from expertlink.engines.hybrid.rail import RailError
from expertlink.engines.hybrid.words import RANGE, Words
from expertlink.engines.ranks.status import ABORT, StatusStore
from expertlink.errors import AbortError, ClosedError, ExpertlinkError, PeerTimeoutError

logger = logging.getLogger("expertlink")
_POLL_S = 0.05  # between two polls of the words, or less where the time-out is short
_POLLS_PER_TIMEOUT = 20
_BEAT_S = 0.2  # between two signs of life of a rank that waits
_FIRST_BEAT_S = 0.25  # after which it posts the first one: short waits cost nothing
_LOOK_S = 2.0  # between two looks of an idle rank, or less where the time-out is short
_LOOKS_PER_TIMEOUT = 8
_BEATS_PER_QUESTION = 5  # that an idle rank posts after a question that it had not seen
_LONGEST_STEP_S = 1.0  # that one poll counts: a process that was stopped gets its time
_EXPIRED_GRACE_S = 0.5  # for signs, when a wait has expired: every rank had its time
_LOST_GRACE_S = 2.0  # when a connection broke: other ranks may be on their way
_FOLLOW_S = 0.3  # for what missing ranks post themselves
_LONGEST_TEXT = 2048
_FAILED = "rail failed"  # name under which the first failure is posted


@dataclass(frozen=True)
class Neighbours:
    """The ranks of a communicator, as messages name them.

    Attributes:
        rank: this rank.
        domains: hosts of all ranks.
        describe: a rank's process.
        has_exited: whether a rank's process is known to have ended.
    """

    rank: int
    domains: Domains
    describe: Callable[[int], str]
    has_exited: Callable[[int], bool]

    @property
    def rail(self) -> tuple[int, ...]:
        """Ranks of this rank's rail, hosts ascending."""
        return self.domains.rail(self.domains.local_of(self.rank))

    def name(self, rank: int) -> str:
        """Host, rank and process."""
        return f"host {self.domains.host_of[rank]}, rank {rank} ({self.describe(rank)})"


class Monitor:
    """Watches the rail of one rank from a thread of its own, which ends with this object.

    Args:
        words: steps of the rail.
        ranks: who the ranks are.
        status: where ranks post; None: nowhere, so nobody can be named.
        timeout_s: bound of a step, in seconds.
        doing: what the host does, for messages: the call's name and its number.
        fault: a failure inside this host that the kernels have reported, or None.
        end: called once, from any thread, when the rail has failed: ends what is under way.

    Attributes:
        timeout_s: as given; may be changed at any time.
        done_inside: kernels that may wait inside the host say when steps are done. So a step that
            seems open may be a wait inside the host.
    """

    def __init__(
        self,
        *,
        words: Words,
        ranks: Neighbours,
        status: StatusStore | None,
        timeout_s: float,
        doing: Callable[[], tuple[str, int]],
        fault: Callable[[], PeerTimeoutError | None] = lambda: None,
        end: Sequence[Callable[[], None]] = (),
    ) -> None:
        self._words, self._ranks, self._status = words, ranks, status
        self._doing, self._fault, self._end = doing, fault, list(end)
        self.timeout_s, self.done_inside = timeout_s, False
        self._failure: ExpertlinkError | None = None
        self._raised = False
        self._judging = threading.Lock()  # held while somebody finds out why
        self._step = (0, 0)
        self._waited = 0.0
        self._polled = time.monotonic()
        self._next_beat, self._beats = 0.0, 0
        self._next_look, self._next_judgement = 0.0, 0.0
        self._asked: str | None = None  # the last question that this rank has seen
        self._answers = 0  # beats that are left of the answer
        stop = threading.Event()
        thread = threading.Thread(
            target=_watch, args=(weakref.ref(self), stop), daemon=True, name="expertlink-monitor"
        )
        # Also at the interpreter's end, when a thread that still runs would be cut off.
        self._stop = weakref.finalize(self, _halt, stop, thread, os.getpid())
        thread.start()

    def stop(self) -> None:
        """Ends the thread. Safe to repeat."""
        self._stop()

    # -- for the engine ---------------------------------------------------------------------------

    @property
    def failure(self) -> ExpertlinkError | None:
        """Why no further step is possible; None: one is."""
        return self._failure

    def check(self) -> None:
        """Raises what has been found out since the last check, if anything.

        Raises:
            PeerTimeoutError, AbortError: the rail has failed; raised once.
            ClosedError: that has been raised before.
        """
        if self._failure is None:
            return
        if self._raised:
            raise ClosedError(
                f"this communicator is unusable after an earlier failure: {self._failure}"
            )
        self._raised = True
        raise self._failure

    def lost(self, error: RailError) -> ExpertlinkError:
        """What to raise for a step that failed on the host. Waits until it is known."""
        began = time.monotonic()
        with self._judging:
            if self._failure is None:
                # This thread may have been in the step for longer than the monitor knows.
                waited = self._waited + time.monotonic() - self._polled
                waited += time.monotonic() - began
                text = str(error)
                found = self._judge(waited, text) or self._error(waited, missing=(), text=text)
                self._fail(found)
        assert self._failure is not None
        self._raised = True
        return self._failure

    def explain(self, error: Exception) -> Exception:
        """What to raise for a wait inside this host that ended so. Waits until it is known.

        `error`: of another kind only where there is a `failure`.
        """
        with self._judging:
            if self._failure is None:
                assert isinstance(error, AbortError | PeerTimeoutError)
                self._fail(self._trace(error))
        assert self._failure is not None
        self._raised = True
        return self._failure

    # -- the thread -------------------------------------------------------------------------------

    @property
    def interval_s(self) -> float:
        """Time between two polls."""
        return min(_POLL_S, self.timeout_s / _POLLS_PER_TIMEOUT)

    def poll(self) -> None:
        """Compares the words with the clock, once."""
        now = time.monotonic()
        passed, self._polled = min(now - self._polled, _LONGEST_STEP_S), now
        if self._failure is not None:
            return
        fault = self._fault()
        if fault is not None:
            with self._judging:
                if self._failure is None:
                    self._fail(self._trace(fault))
            return
        step = self._words.read()
        if step != self._step:
            self._step, self._waited = step, 0.0
            self._next_look = min(self._next_look, now + self._look_s)  # a silent store may answer
            return
        if step[0] == step[1]:
            self._waited = 0.0
            if now >= self._next_look:
                with self._judging:
                    self._answer()
            return
        self._waited += passed
        if self._waited > self.timeout_s and now >= self._next_judgement:
            with self._judging:
                if self._failure is None and self._words.read() == step:
                    error = self._judge(self._waited, None)
                    if error is not None:
                        self._fail(error)
            self._next_judgement = time.monotonic() + _FOLLOW_S
        elif self._waited > min(_FIRST_BEAT_S, self.timeout_s / 4) and now > self._next_beat:
            with self._judging:
                found = self._news()
                if found is not None and self._failure is None:
                    self._fail(found)

    def give_up(self, error: Exception) -> None:
        """Ends the rail of a monitor that cannot go on: nobody would bound its steps."""
        with self._judging:
            if self._failure is None:
                text = f"The monitor failed: {error!r}"
                self._fail(self._error(self._waited, missing=(), text=text))

    @property
    def _look_s(self) -> float:
        return min(_LOOK_S, self.timeout_s / _LOOKS_PER_TIMEOUT)

    def _answer(self) -> None:
        """Posts signs of life of a rank that is in no step, while another one asks for them."""
        status = self._status
        if status is None:
            return
        try:
            asked = status.read(_question(self._ranks))
            if asked != self._asked:
                self._asked, self._answers = asked, _BEATS_PER_QUESTION
            if self._answers > 0:
                self._answers -= 1
                self._beat(status)
        except RuntimeError:  # the store may be gone: it is asked again after the next step
            self._next_look = math.inf
            return
        wait_s = min(_BEAT_S, self._look_s) if self._answers else self._look_s
        self._next_look = time.monotonic() + wait_s

    def _news(self) -> ExpertlinkError | None:
        """Posts a sign of life; what other ranks have posted of a failure or an abort."""
        status = self._status
        if status is None:
            return None
        try:
            self._beat(status)
            self._ask(status)
            return self._posted(status)
        except RuntimeError:  # the time-out ends the wait, with an error that says more
            return None
        finally:
            self._next_beat = time.monotonic() + _BEAT_S

    def _beat(self, status: StatusStore) -> None:
        self._beats += 1
        status.publish(_sign(self._ranks.rank), f"{self._words.read()[0]} {self._beats}")

    def _ask(self, status: StatusStore) -> None:
        """Idle ranks of the rail post signs of life for a while. After a `_beat`."""
        status.publish(_question(self._ranks), f"{self._ranks.rank} {self._beats}")

    def _posted(self, status: StatusStore) -> ExpertlinkError | None:
        aborted = status.read(ABORT)
        if aborted is not None:
            rank, _, reason = aborted.split(":", 2)
            return AbortError(
                f"rank {rank} aborted while rank {self._ranks.rank} was in a step of its rail: "
                f"{reason}",
                rank=int(rank),
                reason=reason,
            )
        failed = status.read(_FAILED)
        if failed is None:
            return None
        rank, missing, text = failed.split(":", 2)
        others = [other for other in _ranks_in(missing) if other != self._ranks.rank]
        if len(others) < len(_ranks_in(missing)):
            text = f"rank {rank} has given up this rank as late: {text}"
        return self._error(self._waited, missing=others, text=f"rank {rank} reports: {text}")

    def _fail(self, error: ExpertlinkError) -> None:
        """Posts the failure and ends what is under way; `_judging` is held."""
        status, missing = self._status, getattr(error, "missing", ())
        if status is not None and isinstance(error, PeerTimeoutError):
            text = f"{self._ranks.rank}:{_text_of(missing)}:{error}"[:_LONGEST_TEXT]
            with contextlib.suppress(RuntimeError):
                status.publish(_verdict(self._ranks.rank), _text_of(missing))
                if status.publish_first(_FAILED, text) != text:  # another rank was first
                    first = self._posted(status)
                    error = error if first is None or _are_alike(first, error) else first
        self._failure = error
        for end in self._end:
            with contextlib.suppress(Exception):  # each of them has to be tried
                end()

    # -- who is missing ---------------------------------------------------------------------------

    def _judge(self, waited: float, cause: str | None) -> ExpertlinkError | None:
        """The error of a step that failed (`cause`), or has taken too long.

        None: every rank came, and the step has ended meanwhile, or may be waiting inside the host.
        Such a wait began later than the step, so its time is not over yet.
        """
        status = self._status
        if status is None:
            return self._error(waited, missing=[], text="nothing is known of the others")
        text = "" if cause is None else f" Cause: {cause}."
        are_known = True
        try:
            posted = self._posted(status)
            if posted is not None:
                return posted
            grace_s = _EXPIRED_GRACE_S if cause is None else _LOST_GRACE_S
            missing = self._without_sign(status, grace_s)
            missing = self._follow(status, missing)
            # Another rank may have been first, and all say the same.
            posted = self._posted(status)
            if posted is not None:
                return posted
        except RuntimeError as error:
            are_known = False
            missing = [rank for rank in self._others if self._ranks.has_exited(rank)]
            text += (
                " The group's store does not answer: the process that hosts it, usually rank 0 or "
                f"the launcher, has ended or cannot be reached: {str(error).splitlines()[0]}."
            )
        if not missing:
            if cause is None and (self._may_wait_inside(waited) or self._has_ended()):
                return None
            if are_known:
                text += " Every rank of the rail came"
                text += ", and no wait inside the host expired" if self.done_inside else ""
                text += ": the network between the hosts moves nothing."
        return self._error(waited, missing=missing, text=text)

    def _has_ended(self) -> bool:
        """Whether the step ends within a moment: the last rank may have come just now."""
        deadline = time.monotonic() + _FOLLOW_S
        while self._words.read() == self._step:
            if time.monotonic() > deadline:
                return False
            if self._status is not None:
                with contextlib.suppress(RuntimeError):
                    self._beat(self._status)  # others look for this rank meanwhile
            time.sleep(self.interval_s)
        return True

    def _may_wait_inside(self, waited: float) -> bool:
        return self.done_inside and waited < 2 * self.timeout_s + _EXPIRED_GRACE_S

    def _trace(self, error: AbortError | PeerTimeoutError) -> ExpertlinkError:
        """The error of a wait inside this host; whom it misses may be waiting for another host.

        A rank whose rail has failed ends the waits of its host, which then seem to be aborted.
        """
        status = self._status
        missing = list(error.missing) if isinstance(error, PeerTimeoutError) else []
        if status is None:
            return error
        try:
            posted = self._posted(status)
            found = missing
            if posted is None and missing:
                # A rank that waits for its rail says for whom when it has looked for signs.
                found = self._follow(status, missing, _EXPIRED_GRACE_S + 2 * _FOLLOW_S)
                posted = self._posted(status)
        except RuntimeError:  # the store does not answer: no more is known
            return error
        if posted is not None:
            return error if _are_alike(posted, error) else posted
        if found == missing:
            return error
        return self._error(getattr(error, "waited_s", 0.0), missing=found, text=str(error))

    @property
    def _others(self) -> list[int]:
        return [rank for rank in self._ranks.rail if rank != self._ranks.rank]

    def _without_sign(self, status: StatusStore, grace_s: float) -> list[int]:
        """Ranks of the rail that did not come to this step, or live no more.

        A rank that came posts a new sign now and then, or a verdict behind its sign. A verdict
        alone is of a rank that waits inside its host. New signs of a rank that did not come show
        that it lives: it may be waiting for one that does not, so only that one is named.
        """
        step, silent = self._words.read()[0], self._others
        before = {rank: status.read(_sign(rank)) for rank in silent}
        late: set[int] = set()
        deadline = time.monotonic() + grace_s
        while True:
            self._beat(status)
            self._ask(status)
            elsewhere: set[int] = set()
            for rank in list(silent):
                sign = status.read(_sign(rank))
                has_come = sign is not None and came(sign, step)
                has_said = status.read(_verdict(rank)) is not None
                if has_come and (has_said or sign != before[rank]):
                    silent.remove(rank)
                elif has_said:
                    elsewhere.add(rank)
                elif sign != before[rank]:
                    late.add(rank)
            if not silent or time.monotonic() > deadline:
                break
            if all(rank in elsewhere or self._ranks.has_exited(rank) for rank in silent):
                break
            time.sleep(self.interval_s)
        late -= elsewhere
        if late | elsewhere >= set(silent):
            return silent
        return [rank for rank in silent if rank not in late]

    def _follow(
        self, status: StatusStore, missing: list[int], grace_s: float | None = None
    ) -> list[int]:
        """Whom those that are missing miss themselves, where they say so in time.

        A rank that did not come to a step may be waiting inside its host for one that is gone.
        """
        if not missing:
            return missing
        status.publish(_verdict(self._ranks.rank), _text_of(missing))
        verdicts: dict[int, list[int]] = {self._ranks.rank: missing}
        deadline = time.monotonic() + (_FOLLOW_S if grace_s is None else grace_s)
        while True:
            for rank in {other for ranks in verdicts.values() for other in ranks} - set(verdicts):
                text = None if self._ranks.has_exited(rank) else status.read(_verdict(rank))
                if text is not None:
                    verdicts[rank] = _ranks_in(text)
            found = follow(self._ranks.rank, verdicts)
            if time.monotonic() > deadline or all(map(self._ranks.has_exited, found)):
                return found
            time.sleep(self.interval_s)

    def _error(self, waited: float, *, missing: Sequence[int], text: str) -> PeerTimeoutError:
        phase, call = self._doing()
        ranks = self._ranks
        names = "; ".join(ranks.name(rank) for rank in missing)
        rail = ranks.domains.local_of(ranks.rank)
        return PeerTimeoutError(
            f"rank {ranks.rank} waited {waited:.1f} s of at most {self.timeout_s:g} s for other "
            f"hosts on rail {rail} (step {self._words.read()[0]}, last call {phase} #{call}); "
            f"missing: {names or 'unknown'}. {text.strip()}".rstrip(". ")
            + ". Close this communicator",
            rank=ranks.rank,
            missing=missing,
            phase=phase,
            call=call,
            waited_s=waited,
        )


def came(sign: str, step: int) -> bool:
    """Whether a rank with that sign has begun a step. Numbers wrap around."""
    return (int(sign.split()[0]) - step) % RANGE < RANGE // 2


def follow(rank: int, verdicts: Mapping[int, Sequence[int]]) -> list[int]:
    """The ranks at the end of who misses whom, beginning with those that `rank` misses.

    Ranks that miss each other in a circle, or nobody, are missed themselves: they live, but do not
    come. The same for all ranks that know the same verdicts and reach the same ends.
    """
    ends: set[int] = set()
    reached = {rank}
    ahead = [*verdicts[rank]]
    while ahead:
        other = ahead.pop()
        if other in reached:
            continue
        reached.add(other)
        further = verdicts.get(other, ())
        if not further:
            ends.add(other)
        ahead += further
    return sorted(ends) or sorted(set(verdicts[rank]) - {rank})


def _are_alike(one: ExpertlinkError, other: ExpertlinkError) -> bool:
    """Whether two errors name the same ranks."""
    if type(one) is not type(other):
        return False
    return tuple(getattr(one, "missing", ())) == tuple(getattr(other, "missing", ()))


def _sign(rank: int) -> str:
    return f"rail sign/{rank}"


def _verdict(rank: int) -> str:
    return f"rail verdict/{rank}"


def _question(ranks: Neighbours) -> str:
    return f"rail asked/{ranks.domains.local_of(ranks.rank)}"


def _text_of(ranks: Sequence[int]) -> str:
    return ",".join(map(str, ranks))


def _ranks_in(text: str) -> list[int]:
    return [int(rank) for rank in text.split(",") if rank]


def _watch(monitor: Callable[[], Monitor | None], stop: threading.Event) -> None:
    """Polls until stopped, or until nobody holds the monitor any more."""
    interval_s = 0.0
    while not stop.wait(interval_s):
        alive = monitor()
        if alive is None:
            return
        try:
            alive.poll()
        except Exception as error:
            logger.exception("the monitor of a rail failed")
            alive.give_up(error)
        interval_s = alive.interval_s
        del alive


def _halt(stop: threading.Event, thread: threading.Thread, process: int) -> None:
    if os.getpid() != process:  # a fork has no such thread
        return
    stop.set()
    if thread is not threading.current_thread():
        thread.join(2 * _LOST_GRACE_S)
