"""Bounded exchanges over a torch process group, and finding out who is missing when one fails.

Everything the collective engine sends goes through `Wire.exchange`, an all-to-all. A wait that
fails or expires ends in `PeerTimeoutError`: the ranks that are still there say so in the group's
key-value store, the ones that do not are missing.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, AllToAllOptions

from expertlink.errors import ClosedError, PeerTimeoutError

_GRACE_S = 2.0  # how long a rank whose wait failed listens for the others' signs of life
_POLL_S = 0.02
_TEXT_BYTES = 2048


@dataclass(frozen=True)
class Peer:
    """What identifies a rank's process."""

    host: str
    pid: int

    @staticmethod
    def here() -> Peer:
        """This process."""
        return Peer(socket.gethostname(), os.getpid())

    def fate(self) -> str:
        """What can be said about the process from here."""
        if self.host != socket.gethostname():
            return f"process {self.pid} on {self.host}"
        try:
            os.kill(self.pid, 0)
            with open(f"/proc/{self.pid}/stat") as stat:
                exited = stat.read().rpartition(")")[2].split()[0] in "ZX"
        except ProcessLookupError:
            exited = True
        except OSError:
            exited = False
        return f"process {self.pid} has exited" if exited else f"process {self.pid} is alive"


class Transfer:
    """An exchange under way."""

    def __init__(self, wait: Callable[[], None], keep: object = None) -> None:
        self._wait = wait
        self._keep = keep  # what refers to the tensors, which must outlive the transfer

    def wait(self) -> None:
        """CPU: blocks until the data is there. CUDA: orders the current stream after it."""
        self._wait()


class Wire:
    """All-to-all exchanges of one communicator; without a group, of a single rank with itself."""

    def __init__(self, group: Any | None, *, device: torch.device, timeout_s: float) -> None:
        self.group = group
        self.rank: int = 0 if group is None else group.rank()
        self.num_ranks: int = 1 if group is None else group.size()
        self.device = device
        self.timeout_s = timeout_s
        self.peers: list[Peer] = []
        self.key = "expertlink"
        self.number = 0  # of the communicator, the same on all ranks
        self.phase = "start"
        self.call = 0  # sequence number of the current call, counted alike on all ranks
        self._pinned: dict[tuple[torch.Size, torch.dtype], Tensor] = {}
        self._broken: str | None = None
        self._closed = False

    def enter(self, phase: str, call: int) -> None:
        """Names what the following exchanges belong to, for error messages.

        Raises:
            ClosedError: an earlier wait failed; the process group cannot be used any more.
        """
        self._refuse_if_broken()
        self.phase, self.call = phase, call

    def _refuse_if_broken(self) -> None:
        if self._closed:
            raise ClosedError("this communicator is closed")
        if self._broken is not None:
            raise ClosedError(
                f"this communicator is unusable after an earlier failure: {self._broken}"
            )

    def close(self) -> None:
        """Lets go of the group, also where results of old calls still refer to this wire.

        A process group that outlives `destroy_process_group` can abort the process at its exit.
        """
        self._closed = True
        self.group = None

    def exchange(
        self,
        send: Tensor,
        receive: Tensor,
        send_splits: Sequence[int] = (),
        receive_splits: Sequence[int] = (),
    ) -> Transfer:
        """Starts an all-to-all over the first dimension; no splits: equal parts.

        `send` and `receive` must stay referenced until the transfer has been waited for.
        """
        if self.group is None or self.num_ranks == 1:
            receive.copy_(send)
            return Transfer(lambda: None)
        group, options = self.group, self._bounded(AllToAllOptions())
        splits = (list(receive_splits), list(send_splits))
        return self._start(lambda: group.alltoall_base(receive, send, *splits, options))

    def gather(self, row: Tensor, rows: Tensor) -> Transfer:
        """Starts sending `row` to every rank; `rows [R, ...]` receives one from each."""
        if self.group is None or self.num_ranks == 1:
            rows.copy_(row)
            return Transfer(lambda: None)
        if not row.is_cuda:  # gloo gathers in a ring, one neighbour after another
            return self.exchange(row.repeat(self.num_ranks, 1), rows)
        group, options = self.group, self._bounded(AllgatherOptions())
        return self._start(lambda: group._allgather_base(rows, row, options))

    def _bounded(self, options: Any) -> Any:
        options.asyncOp = True
        options.timeout = datetime.timedelta(seconds=self.timeout_s)
        return options

    def _start(self, issue: Callable[[], Any]) -> Transfer:
        phase, call, started = self.phase, self.call, time.monotonic()
        try:
            work = issue()
        except RuntimeError as error:
            raise self._diagnose(error, phase=phase, call=call, started=started) from error

        def wait() -> None:
            self._refuse_if_broken()
            try:
                work.wait()
            except RuntimeError as error:
                raise self._diagnose(error, phase=phase, call=call, started=started) from error

        return Transfer(wait, keep=issue)

    def to_host(self, values: Tensor, after: Transfer | None = None) -> Tensor:
        """Waits for `after` and copies `values` to the host, within the time-out.

        The result is good until the next call with the same shape.
        """
        if after is not None:
            after.wait()
        if not values.is_cuda or self.num_ranks == 1:
            return values.cpu()
        key = (values.shape, values.dtype)
        host = self._pinned.get(key)
        if host is None:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._pinned[key] = host
        host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        started = time.monotonic()
        announced = False
        while not arrived.query():
            waited = time.monotonic() - started
            if waited > min(1.0, self.timeout_s / 4) and not announced:
                announced = True
                with contextlib.suppress(RuntimeError):  # a lost store is found out in due course
                    self._post(waited)
            if waited > self.timeout_s:
                error = TimeoutError(f"no answer for {waited:.1f} s")
                raise self._diagnose(error, phase=self.phase, call=self.call, started=started)
        return host

    def assemble(self, attempt: int) -> None:
        """Waits until every rank is here, through the store: nothing is lost if one is not.

        A first collective cannot be bounded everywhere: NCCL connects all ranks before it looks at
        the clock.
        """
        if self.group is None or self.num_ranks == 1:
            return
        self.call = attempt
        started = time.monotonic()
        try:
            self._post(0.0)
            store = self._store()
            silent = list(range(self.num_ranks))
            while silent := [rank for rank in silent if not store.check([self._sign(rank)])]:
                waited = time.monotonic() - started
                if waited > self.timeout_s:
                    store.delete_key(self._sign(self.rank))  # a later attempt starts afresh
                    names = ", ".join(f"rank {rank}" for rank in silent)
                    raise PeerTimeoutError(
                        f"rank {self.rank} waited {waited:.1f} s of at most {self.timeout_s:g} s "
                        f"in {self.phase}; missing: {names}",
                        rank=self.rank,
                        missing=silent,
                        phase=self.phase,
                        call=attempt,
                        waited_s=waited,
                    )
                time.sleep(_POLL_S / 10)
        except RuntimeError as error:
            raise self._diagnose(error, phase=self.phase, call=attempt, started=started) from error

    def gather_text(self, text: str) -> list[str]:
        """Every rank's text, cut to 2048 bytes. Collective; blocks."""
        raw = text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
        row = torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(self.device)
        received = torch.empty((self.num_ranks, _TEXT_BYTES), dtype=torch.uint8, device=self.device)
        rows = self.to_host(received, self.gather(row, received))
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows.unbind()]

    def _diagnose(
        self, cause: BaseException, *, phase: str, call: int, started: float
    ) -> PeerTimeoutError:
        """Builds the error for a failed wait and marks the wire unusable."""
        waited = time.monotonic() - started
        self.phase, self.call = phase, call
        missing, note = self._find_missing(waited)
        names = ", ".join(
            f"rank {rank}" + (f" ({self.peers[rank].fate()})" if self.peers else "")
            for rank in missing
        )
        ended = "timed out" if waited >= 0.9 * self.timeout_s else "connection lost"
        message = (
            f"rank {self.rank} waited {waited:.1f} s of at most {self.timeout_s:g} s in {phase} "
            f"#{call} ({ended}); missing: {names or 'unknown'}{note}. "
            f"Close this communicator and its process group. Cause: {cause}"
        )
        self._broken = message
        if self.group is not None and self.device.type == "cuda":
            # A collective that will never end would block the stream and every later wait.
            with contextlib.suppress(RuntimeError, AttributeError):
                self.group.abort()
        return PeerTimeoutError(
            message, rank=self.rank, missing=missing, phase=phase, call=call, waited_s=waited
        )

    def _find_missing(self, waited: float) -> tuple[list[int], str]:
        """Ranks without a sign of life in this call, and a remark about them."""
        others = [rank for rank in range(self.num_ranks) if rank != self.rank]
        try:
            self._post(waited)
            store = self._store()
            deadline = time.monotonic() + _GRACE_S
            silent = others
            while silent and time.monotonic() < deadline:
                silent = [rank for rank in silent if not store.check([self._sign(rank)])]
                time.sleep(_POLL_S)
            if silent:
                return silent, ""
            late = [r for r in others if float(store.get(self._sign(r)).decode()) < waited / 2]
        except (RuntimeError, ValueError, AttributeError) as error:
            return [], (
                " (the group's store does not answer, so the process that hosts it, usually rank 0 "
                f"or the launcher, is gone: {str(error).splitlines()[0]})"
            )
        if late:
            return late, " (arrived, but too late)"
        return [], " (every rank arrived; this one may have been the late one)"

    def _post(self, waited: float) -> None:
        self._store().set(self._sign(self.rank), f"{waited:.3f}")

    def _sign(self, rank: int) -> str:
        return f"{self.key}/{self.call}/{self.phase}/{rank}"

    def _store(self) -> Any:
        assert self.group is not None
        return self.group.get_group_store()
