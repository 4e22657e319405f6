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
from torch.distributed.distributed_c10d import AllToAllOptions

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

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait

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
        self.phase = "start"
        self.call = 0
        self._side: torch.cuda.Stream | None = None
        self._broken: str | None = None

    def enter(self, phase: str, call: int) -> None:
        """Names what the following exchanges belong to, for error messages.

        Raises:
            ClosedError: an earlier wait failed; the process group cannot be used any more.
        """
        if self._broken is not None:
            raise ClosedError(
                f"this communicator is unusable after an earlier failure: {self._broken}"
            )
        self.phase, self.call = phase, call

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
        options = AllToAllOptions()
        options.asyncOp = True
        options.timeout = datetime.timedelta(seconds=self.timeout_s)
        phase, call, started = self.phase, self.call, time.monotonic()
        try:
            work = self.group.alltoall_base(
                receive, send, list(receive_splits), list(send_splits), options
            )
        except RuntimeError as error:
            raise self._diagnose(error, phase=phase, call=call, started=started) from error

        def wait(keep: tuple[Tensor, Tensor] = (send, receive)) -> None:
            del keep
            try:
                work.wait()
            except RuntimeError as error:
                raise self._diagnose(error, phase=phase, call=call, started=started) from error

        return Transfer(wait)

    def to_host(self, values: Tensor, after: Transfer | None = None) -> Tensor:
        """Waits for `after` and copies `values` to the host, within the time-out.

        CUDA: on a stream of its own if there is a transfer to wait for, so that work queued
        meanwhile on the current stream is not waited for.
        """
        if not values.is_cuda:
            if after is not None:
                after.wait()
            return values
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        current = torch.cuda.current_stream(self.device)
        if after is None:
            stream = current
        else:
            self._side = stream = self._side or torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            if after is not None:
                after.wait()
            host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(stream)
        started = time.monotonic()
        announced = False
        while not arrived.query():
            waited = time.monotonic() - started
            if waited > min(1.0, self.timeout_s / 4) and not announced:
                announced = True
                self._post(waited)
            if waited > self.timeout_s:
                error = TimeoutError(f"no answer for {waited:.1f} s")
                raise self._diagnose(error, phase=self.phase, call=self.call, started=started)
        if after is not None:
            after.wait()  # the current stream may read the device's copy
        return host

    def gather_text(self, text: str) -> list[str]:
        """Every rank's text, cut to 2048 bytes. Collective; blocks."""
        raw = text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
        row = torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(self.device)
        received = torch.empty((self.num_ranks, _TEXT_BYTES), dtype=torch.uint8, device=self.device)
        rows = self.to_host(received, self.exchange(row.repeat(self.num_ranks, 1), received))
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
