"""Bounded exchanges over a torch process group, and a diagnosis when one fails.

In: tensors, texts, and the name of the call that they belong to. Out: what the other ranks sent, or
an error that names the ranks that are missing.

Everything that the collective engine sends goes through `Wire.exchange`, an all-to-all. A wait that
fails or expires ends in `PeerTimeoutError`: ranks that are alive publish a sign of life in the
group's key-value store (status.py), and the others are missing. A rank that aborts publishes that
too, and ranks that wait for it raise `AbortError`.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, AllToAllOptions

from expertlink.engines.ranks.status import ABORT, ANSWER_S, StatusStore, StoreSilentError, Watch
from expertlink.errors import AbortError, ClosedError, ExpertlinkError, PeerTimeoutError

logger = logging.getLogger("expertlink")

_GRACE_S = 2.0  # how long a rank whose wait failed polls for the others' signs of life
_REASON_S = 0.5  # how long to wait for the reason of a known abort
_POLL_S = 0.02
WAIT_SLICE = datetime.timedelta(milliseconds=50)  # of a wait on CPUs; signals are served in between
_MARGIN_S = 5.0  # gloo ends its waits itself; this bound is for the case that it does not
_TEXT_BYTES = 2048
_HANDSHAKES = "handshakes"  # name under which a rank counts those of the group
_MET = "met"
_UNUSED_TAG = 0x7EADBEE

# Aborts that have been raised in this process. A handshake can be repeated under its old name, and
# then those of the earlier attempt do not count.
_raised_aborts: set[str] = set()


@dataclass(frozen=True)
class Peer:
    """What identifies a rank's process."""

    host: str
    pid: int

    @staticmethod
    def here() -> Peer:
        """This process."""
        return Peer(socket.gethostname(), os.getpid())

    def describe(self) -> str:
        """The process, and whether it lives, as far as this host can tell."""
        if self.host != socket.gethostname():
            return f"process {self.pid} on {self.host}"
        return f"process {self.pid} " + ("has exited" if self.has_exited() else "is alive")

    def has_exited(self) -> bool:
        """True if the process is known to have ended."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
            with open(f"/proc/{self.pid}/stat") as stat:
                return stat.read().rpartition(")")[2].split()[0] in "ZX"
        except ProcessLookupError:
            return True
        except OSError:
            return False


class Transfer:
    """An exchange under way."""

    def __init__(self, wait: Callable[[], None], keep: object = None) -> None:
        self._wait = wait
        self._keep = keep  # holds the tensors, which must outlive the transfer

    def wait(self) -> None:
        """CPU: blocks until the data is there. CUDA: orders the current stream after it."""
        self._wait()


def _words_device(group: Any | None, device: torch.device) -> torch.device:
    """The host, if the group can exchange what lies there; see `Wire.words_device`."""
    host = torch.device("cpu")
    if group is None or group.size() == 1 or device.type == "cpu":
        return host
    try:
        group._get_backend(host)
    except (AttributeError, RuntimeError):  # not one of torch's own groups; NCCL alone
        return device
    return host


class Wire:
    """The ranks' connection, for one communicator. Without a group it connects one rank to itself.

    Args:
        group: the process group, or None for a single rank.
        device: where the communicator's tensors live.
        timeout_s: bound of every wait, in seconds.

    Attributes:
        peers: processes of all ranks; known after the handshake.
        number: identifies the communicator, the same on all ranks.
        phase: what this rank is doing, for messages.
        call: sequence number of the current call, counted alike on all ranks.
        words_device: where texts, and headers of calls that move nothing through the group, are
            exchanged: the host, unless the group has a backend for GPUs alone.
    """

    def __init__(self, group: Any | None, *, device: torch.device, timeout_s: float) -> None:
        self.group = group
        self.rank: int = 0 if group is None else group.rank()
        self.num_ranks: int = 1 if group is None else group.size()
        self.device = device
        self.words_device = _words_device(group, device)
        self.timeout_s = timeout_s
        self.peers: list[Peer] = []
        self.number = 0
        self.phase = "start"
        self.call = 0
        self._attempt = 0  # of a handshake
        self._status: StatusStore | None = None
        if group is not None and self.num_ranks > 1:
            self._status = StatusStore(group.get_group_store())
        self._under_way: set[Any] = set()  # CPU: operations that may not have ended
        self._pinned: dict[tuple[torch.Size, torch.dtype], Tensor] = {}
        self._broken: str | None = None
        self._closed = False

    def set_key(self, key: str) -> None:
        """Sets the prefix of this communicator's names in the store."""
        if self._status is not None:
            self._status.key = f"expertlink/{key}"

    def status_store(self, *, answer_s: float) -> StatusStore | None:
        """What the ranks of this communicator publish, for queries beside those of this wire.

        None without a group. `answer_s`: how long a query waits.
        """
        if self.group is None or self._status is None:
            return None
        status = StatusStore(self.group.get_group_store(), answer_s=answer_s)
        status.key = self._status.key
        return status

    def enter(self, phase: str, call: int) -> None:
        """Names what the following exchanges belong to, for error messages.

        Raises:
            ClosedError: an earlier wait failed, a rank aborted, or this is closed.
        """
        if self._closed or self._broken is not None:
            self.check()
        self.phase, self.call = phase, call

    def check(self) -> None:
        """Raises ClosedError if an earlier wait failed, a rank aborted, or this is closed."""
        if self._closed:
            raise ClosedError("this communicator is closed")
        if self._broken is not None:
            raise ClosedError(
                f"this communicator is unusable after an earlier failure: {self._broken}"
            )

    def close(self) -> None:
        """Drops the group, even while results of old calls still refer to this wire.

        A process group that outlives `destroy_process_group` can abort the process at its exit.
        """
        self._closed = True
        self.group = self._status = None

    def abort(self, reason: str) -> None:
        """Refuses later calls here, and ends other ranks' waits for this one with the reason.

        Takes a bounded time and raises nothing.
        """
        if self._broken is None:
            self._broken = f"rank {self.rank} aborted: {reason}"
        self.publish_abort(reason)
        self._disconnect()

    def publish_abort(self, reason: str) -> None:
        """Publishes that this rank aborted. Takes a bounded time and raises nothing."""
        if self._status is None:
            return
        text = f"{self.rank}:{uuid.uuid4().hex}:{reason[:_TEXT_BYTES]}"
        try:
            self._status.publish(f"{ABORT}/{self.rank}", text)
            self._status.publish_first(ABORT, text)
        except RuntimeError as error:
            logger.debug("rank %d: the abort could not be published: %s", self.rank, error)

    def abort_reason(self, rank: int) -> str:
        """Why a rank aborted, once it is known to have aborted; empty if it gave no reason."""
        if self._status is None:
            return ""
        deadline = time.monotonic() + _REASON_S
        with contextlib.suppress(RuntimeError):
            while True:
                text = self._status.read(f"{ABORT}/{rank}")
                if text is not None:
                    return text.split(":", 2)[2]
                if time.monotonic() > deadline:
                    return ""
                time.sleep(_POLL_S)
        return ""

    @contextlib.contextmanager
    def abort_on_error(self) -> Iterator[None]:
        """Around what every rank must finish or refuse alike: aborts if this rank does neither.

        Errors of this library leave the ranks in step, or are raised on all of them. Any other
        error (ctrl-C, out of memory) stops this rank in the middle of a call, and its next call
        would meet the other ranks' current one.
        """
        try:
            yield
        except ExpertlinkError:
            raise
        except BaseException as error:
            if self._broken is None:
                name = type(error).__name__
                self.abort(f"{name}: {error}" if str(error) else name)
            raise

    def exchange(
        self,
        send: Tensor,
        receive: Tensor,
        send_splits: Sequence[int] = (),
        receive_splits: Sequence[int] = (),
    ) -> Transfer:
        """Starts an all-to-all over the first dimension; without splits, in equal parts.

        The group's backend for the tensors' device moves them. The transfer keeps them alive.
        """
        if self.group is None or self.num_ranks == 1:
            receive.copy_(send)
            return Transfer(lambda: None)
        on_host = not send.is_cuda
        group, options = self.group, self._bounded(AllToAllOptions(), on_host=on_host)
        splits = (list(receive_splits), list(send_splits))
        return self._start(
            lambda: group.alltoall_base(receive, send, *splits, options), on_host=on_host
        )

    def gather(self, row: Tensor, rows: Tensor) -> Transfer:
        """Starts an all-gather: `rows [R, ...]` receives the `row` of every rank."""
        if self.group is None or self.num_ranks == 1:
            rows.copy_(row)
            return Transfer(lambda: None)
        if not row.is_cuda:  # gloo gathers in a ring, in R - 1 steps
            return self.exchange(row.repeat(self.num_ranks, 1), rows)
        group, options = self.group, self._bounded(AllgatherOptions(), on_host=False)
        return self._start(lambda: group._allgather_base(rows, row, options), on_host=False)

    def _bounded(self, options: Any, *, on_host: bool) -> Any:
        options.asyncOp = True
        # On GPUs the host bounds its own waits. When an operation of NCCL expires torch ends the
        # process, so that bound is left to the group's owner.
        if on_host:
            options.timeout = datetime.timedelta(seconds=self.timeout_s)
        return options

    def _start(self, issue: Callable[[], Any], *, on_host: bool) -> Transfer:
        phase, call, started = self.phase, self.call, time.monotonic()
        try:
            work = issue()
        except RuntimeError as error:
            raise self._diagnose(error, phase=phase, call=call, started=started) from error
        if on_host:
            self._under_way = {old for old in self._under_way if not old.is_completed()}
            self._under_way.add(work)

        def wait() -> None:
            self.check()
            with self.abort_on_error():
                try:
                    if on_host:
                        self._complete(work, phase=phase, call=call, started=started)
                    else:
                        work.wait()  # orders the current stream
                except ExpertlinkError:
                    raise
                except (RuntimeError, TimeoutError) as error:
                    raise self._diagnose(error, phase=phase, call=call, started=started) from error

        return Transfer(wait, keep=issue)

    def _complete(self, work: Any, *, phase: str, call: int, started: float) -> None:
        """Waits for an operation on the host."""
        watch = self._watch_aborts()
        while True:
            try:
                work.wait(WAIT_SLICE)
            except RuntimeError:
                if work.is_completed():
                    work.wait()  # raises if the operation failed
            if work.is_completed():
                self._under_way.discard(work)
                return
            self._check_abort(watch, phase=phase, call=call)
            waited = time.monotonic() - started
            if waited > self.timeout_s + _MARGIN_S:
                raise TimeoutError(f"not finished after {waited:.1f} s")

    def _watch_aborts(self) -> Watch | None:
        return None if self._status is None else self._status.watch(ABORT)

    def _check_abort(self, watch: Watch | None, *, phase: str, call: int) -> None:
        """Raises AbortError if another rank is known to have aborted. Returns at once."""
        text = None if watch is None else watch.poll()
        if text is not None and text not in _raised_aborts:
            raise self._aborted(text, phase=phase, call=call)

    def _aborted(self, text: str, *, phase: str, call: int) -> AbortError:
        _raised_aborts.add(text)
        rank, _, reason = text.split(":", 2)
        self._broken = f"rank {rank} aborted: {reason}"
        self._disconnect()
        return AbortError(
            f"rank {rank} aborted while rank {self.rank} was in {phase} #{call}: {reason}",
            rank=int(rank),
            reason=reason,
        )

    def _disconnect(self) -> None:
        """Ends operations under way on the host. Those of gloo cannot be continued afterwards.

        Otherwise they would block the group's destructor until their time-out. Operations of NCCL
        are left alone: only the group's owner may abort it. So is a group that carries nothing but
        words: its owner may have other uses for it, and words end by themselves.
        """
        group = self.group
        if group is None or self.num_ranks == 1 or self.device.type != "cpu":
            return
        # gloo has no abort, but a receive that expires closes all connections. A receive from a
        # rank that has closed its connection fails at once and closes nothing: try every rank.
        word = torch.empty(1, dtype=torch.uint8, device="cpu")
        for step in range(1, self.num_ranks):
            if all(work.is_completed() for work in self._under_way):
                break
            with contextlib.suppress(RuntimeError):
                receive = group.recv([word], (self.rank + step) % self.num_ranks, _UNUSED_TAG)
                receive.wait(datetime.timedelta(milliseconds=1))
        self._under_way.clear()

    def to_host(self, values: Tensor, after: Transfer | None = None) -> Tensor:
        """Waits for `after` and copies `values` to the host, within the time-out.

        The result is valid until the next call with the same shape and dtype.
        """
        if after is not None:
            after.wait()
        if not values.is_cuda or self.num_ranks == 1:
            return values.cpu()
        key = (values.shape, values.dtype)
        host = self._pinned.get(key)
        if host is None:
            with torch.inference_mode(False):  # calls in any mode write to it
                host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            self._pinned[key] = host
        host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(values.device))  # which copies
        with self.abort_on_error():
            self._await_event(arrived)
        return host

    def _await_event(self, arrived: torch.cuda.Event) -> None:
        started = time.monotonic()
        watch = self._watch_aborts()
        published = False
        while not arrived.query():
            self._check_abort(watch, phase=self.phase, call=self.call)
            waited = time.monotonic() - started
            if waited > min(1.0, self.timeout_s / 4) and not published:
                published = True
                with contextlib.suppress(RuntimeError):  # the diagnosis reports a lost store
                    self._publish_sign(waited)
            if waited > self.timeout_s:
                error = TimeoutError(f"not finished after {waited:.1f} s")
                raise self._diagnose(error, phase=self.phase, call=self.call, started=started)

    def wait_for_all(self) -> None:
        """Waits, through the store, until every rank has arrived. Can be repeated if one has not.

        A group's first collective has no bound of its own: NCCL connects all ranks before it checks
        a deadline.

        Ranks make the handshakes of a group in the same order, so counting tells them apart. The
        store counts, for each rank: a process may have made handshakes of an earlier group, and its
        peers may be new. One word decides for all ranks how an attempt ends; see "How ranks meet"
        in docs/protocol/collective.md.
        """
        status = self._status
        if status is None:
            return
        started = time.monotonic()
        number = 0
        with self.abort_on_error():
            try:
                store = self.status_store(answer_s=ANSWER_S)
                assert store is not None
                store.key = "expertlink"
                counted = f"{_HANDSHAKES}/{self.rank}"
                with store.patient(self.timeout_s):
                    number = int(store.read(counted) or 0)
                    while store.read(_outcome(number)) == _MET:  # this rank was there, then failed
                        number += 1
                self.call = number
                self.set_key(f"handshake {number}")
                with status.patient(self.timeout_s):
                    if (status.read(ABORT) or "").startswith(f"{self.rank}:"):
                        status.remove(ABORT)  # of an earlier attempt of this rank
                self._await_all(status, store, number, started)
                with store.patient(self.timeout_s):
                    store.publish(counted, str(number + 1))
            except ExpertlinkError:
                raise
            except RuntimeError as error:
                raise self._diagnose(
                    error, phase=self.phase, call=number, started=started
                ) from error
            finally:
                self._attempt = 0

    def _await_all(
        self, status: StatusStore, store: StatusStore, number: int, started: float
    ) -> None:
        """Waits in one attempt after another, until all ranks have come to the same one.

        Args:
            status: has the signs of life of the ranks.
            store: has the word that says how the attempt ends.
            number: of the handshake.
            started: when this rank came.
        """
        watch, outcome = self._watch_aborts(), _outcome(number)
        absent = set(range(self.num_ranks))  # in all attempts so far
        while True:
            with store.patient(self.timeout_s):
                said = store.read(outcome)
            if said == _MET:
                return
            self._attempt = int(said or 0)
            following = str(self._attempt + 1)
            silent = list(range(self.num_ranks))
            try:
                with status.patient(self.timeout_s):
                    self._publish_sign(0.0)
                while True:
                    silence = None
                    try:
                        if store.read(outcome) != said:
                            break
                        signs = {self._sign(rank): rank for rank in silent}
                        silent = [signs[sign] for sign in status.missing(list(signs))]
                        absent.intersection_update(silent)
                        if not silent:
                            store.replace(outcome, said, _MET)
                            break
                    except StoreSilentError as error:
                        silence = error
                    self._check_abort(watch, phase=self.phase, call=number)
                    waited = time.monotonic() - started
                    if waited > self.timeout_s:
                        if silence is not None:
                            raise silence
                        if store.replace(outcome, said, following) == _MET:
                            return
                        raise self._not_met(sorted(absent) or silent, waited, number)
                    time.sleep(_POLL_S / 10)
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the others must not take it for there
                    store.replace(outcome, said, following)
                raise

    def _not_met(self, missing: Sequence[int], waited: float, number: int) -> PeerTimeoutError:
        names = ", ".join(f"rank {rank}" for rank in missing)
        return PeerTimeoutError(
            f"rank {self.rank} waited {waited:.1f} s of at most {self.timeout_s:g} s "
            f"in {self.phase}; missing: {names}",
            rank=self.rank,
            missing=missing,
            phase=self.phase,
            call=number,
            waited_s=waited,
        )

    def gather_text(self, text: str) -> list[str]:
        """Every rank's text, cut to 2048 bytes. Collective; waits."""
        raw = text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
        device = self.words_device
        row = torch.tensor(list(raw), dtype=torch.uint8, device=device)
        received = torch.empty((self.num_ranks, _TEXT_BYTES), dtype=torch.uint8, device=device)
        rows = self.to_host(received, self.gather(row, received))
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows.unbind()]

    def _diagnose(
        self, cause: BaseException, *, phase: str, call: int, started: float
    ) -> PeerTimeoutError | AbortError:
        """Builds the error for a failed wait and marks the wire unusable."""
        waited = time.monotonic() - started
        self.phase, self.call = phase, call
        with contextlib.suppress(RuntimeError):  # `_find_missing` reports a silent store
            text = None if self._status is None else self._status.read(ABORT)
            if text is not None and text not in _raised_aborts:
                return self._aborted(text, phase=phase, call=call)
        missing, note = self._find_missing(waited)
        names = ", ".join(
            f"rank {rank}" + (f" ({self.peers[rank].describe()})" if self.peers else "")
            for rank in missing
        )
        ended = "timed out" if waited >= 0.9 * self.timeout_s else "connection lost"
        message = (
            f"rank {self.rank} waited {waited:.1f} s of at most {self.timeout_s:g} s in {phase} "
            f"#{call} ({ended}); missing: {names or 'unknown'}{note}. "
            f"Close this communicator and its process group. Cause: {cause}"
        )
        self._broken = message
        self._disconnect()
        return PeerTimeoutError(
            message, rank=self.rank, missing=missing, phase=phase, call=call, waited_s=waited
        )

    def _find_missing(self, waited: float) -> tuple[list[int], str]:
        """Ranks without a sign of life in this call, and a note for the message."""
        others = [rank for rank in range(self.num_ranks) if rank != self.rank]
        status = self._status
        assert status is not None
        signs = {self._sign(rank): rank for rank in others}
        try:
            self._publish_sign(waited)
            deadline = time.monotonic() + _GRACE_S
            silent = list(signs)
            while silent and time.monotonic() < deadline:
                silent = status.missing(silent)
                time.sleep(_POLL_S)
            if silent:
                return [signs[sign] for sign in silent], ""
            late = [signs[sign] for sign in signs if float(status.read(sign) or 0) < waited / 2]
        except (RuntimeError, ValueError) as error:
            return self._exited(), (
                " (the group's store does not answer: the process that hosts it, usually rank 0 or "
                f"the launcher, has ended: {str(error).splitlines()[0]})"
            )
        if late:
            return late, " (arrived, but too late)"
        return [], " (every rank arrived; this rank may have been late itself)"

    def _exited(self) -> list[int]:
        """Ranks of this host whose processes have ended."""
        deadline = time.monotonic() + _GRACE_S
        while True:  # connections are lost a little before the process has ended
            gone = [rank for rank, peer in enumerate(self.peers) if peer.has_exited()]
            if gone or time.monotonic() > deadline:
                return gone
            time.sleep(_POLL_S)

    def _publish_sign(self, waited: float) -> None:
        """Publishes that this rank is alive in this call, and for how long it has waited."""
        if self._status is not None:
            self._status.publish(self._sign(self.rank), f"{waited:.3f}")

    def _sign(self, rank: int) -> str:
        return f"{self.call}/{self.phase}/{self._attempt}/{rank}"


def _outcome(number: int) -> str:
    """Name of the word that says how the handshake with that number goes.

    Nothing: its first attempt is under way. A number: that of the attempt under way. `_MET`: all
    ranks have come.
    """
    return f"{_HANDSHAKES}/outcome/{number}"
