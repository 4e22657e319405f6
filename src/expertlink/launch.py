"""Local ranks: worker processes with torch.distributed set up, shared by demo, bench and tests.

In: a picklable function and its arguments. Out: one result per rank, or one error that says what
every rank did. A rank that raises, dies or hangs neither hangs the caller nor leaves a process
behind.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch
import torch.distributed as dist

from expertlink.errors import ExpertlinkError
from expertlink.launch_folder import RankFolder
from expertlink.launch_worker import (
    STACK_SIGNAL,
    STOP,
    STORE_HOST,
    DeviceType,
    RankContext,
    RankFailure,
    WorkerSpec,
    default_backend,
    keep_freed_memory,
    torchrun_context,
    worker_main,
)

__all__ = [
    "DeviceType",
    "LaunchError",
    "RankContext",
    "RankError",
    "RankFailure",
    "RankPool",
    "RanksHungError",
    "keep_freed_memory",
    "torchrun_context",
]

T = TypeVar("T")

_CLOSE_GRACE_S = 5.0
_STACK_GRACE_S = 3.0
_STACK_POLL_S = 0.05


class LaunchError(ExpertlinkError, RuntimeError):
    """Ranks cannot be started here, or the pool is closed."""


class RankError(LaunchError):
    """Some ranks failed.

    Attributes:
        failures: what happened, by rank; ranks that returned a result are absent.
        notes: further paragraphs of the message.
    """

    def __init__(self, failures: Mapping[int, RankFailure], *notes: str) -> None:
        self.failures = dict(sorted(failures.items()))
        self.notes = notes
        super().__init__("\n\n".join([*_paragraphs(self.failures), *notes]))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.failures, *self.notes)


class RanksHungError(RankError, TimeoutError):
    """Some ranks did not finish in time. All ranks were killed; the message has their stacks."""


class RankPool:
    """Worker processes, one per rank, that run functions together until the pool is closed.

    When the constructor returns, every rank has joined the default process group. The pool is a
    context manager. It closes itself after a rank has died or hung, because the group is lost.

    Args:
        num_ranks: processes to start.
        device: "cpu", or "cuda" for rank r on GPU r.
        backend: of torch.distributed. Default: "gloo" on CPUs, "cpu:gloo,cuda:nccl" on GPUs.
        threads: CPU threads of each rank.
        environments: variables of each rank beside those of this process.
        startup_timeout_s: seconds until every rank must have joined.
        group_timeout_s: time-out of the default process group, in seconds.

    Raises:
        LaunchError: `num_ranks` is not positive, or there are fewer GPUs than ranks.
        RankError: a rank failed to start.
        RanksHungError: a rank did not join in time.
    """

    def __init__(
        self,
        *,
        num_ranks: int,
        device: DeviceType = "cpu",
        backend: str | None = None,
        threads: int = 1,
        environments: Sequence[Mapping[str, str]] | None = None,
        startup_timeout_s: float = 300.0,
        group_timeout_s: float = 600.0,
    ) -> None:
        if num_ranks < 1:
            raise LaunchError(f"num_ranks={num_ranks} is not possible; accepted: at least 1")
        if device == "cuda" and torch.cuda.device_count() < num_ranks:
            found = torch.cuda.device_count()
            raise LaunchError(
                f"num_ranks={num_ranks} is not possible: every rank needs a GPU, there are {found}"
            )
        self.num_ranks = num_ranks
        self.device: DeviceType = device
        self._closed = False
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self._finalizer = weakref.finalize(self, _kill, self._processes)
        self._folder = RankFolder()
        # The parent hosts the store, so that it outlives every rank.
        self._store = dist.TCPStore(STORE_HOST, 0, is_master=True, wait_for_workers=False)
        with self._killed_on_error():
            for rank in range(num_ranks):
                self._start(
                    WorkerSpec(
                        rank=rank,
                        num_ranks=num_ranks,
                        device=device,
                        backend=backend or default_backend(device),
                        threads=threads,
                        environment={} if environments is None else dict(environments[rank]),
                        store_port=self._store.port,
                        startup_timeout_s=startup_timeout_s,
                        group_timeout_s=group_timeout_s,
                        stack_file=self._stack_file(rank),
                    )
                )
            # A rank that fails to join keeps the others waiting: the first failure ends the start.
            _, failures = self._gather(startup_timeout_s, until_failure=True)
            if failures:
                raise RankError(failures)

    @property
    def alive(self) -> bool:
        """True if the pool can run functions: not closed, and every rank's process alive."""
        return not self._closed and all(process.is_alive() for process in self._processes)

    @property
    def pids(self) -> list[int]:
        """Process id of every rank."""
        return [process.pid for process in self._processes if process.pid is not None]

    @overload
    def run(
        self,
        fn: Callable[..., T],
        *args: Any,
        timeout_s: float = ...,
        on_message: Callable[[int, Any], None] | None = ...,
        return_exceptions: Literal[False] = ...,
        **kwargs: Any,
    ) -> list[T]: ...

    @overload
    def run(
        self,
        fn: Callable[..., T],
        *args: Any,
        timeout_s: float = ...,
        on_message: Callable[[int, Any], None] | None = ...,
        return_exceptions: bool,
        **kwargs: Any,
    ) -> list[T | BaseException]: ...

    def run(
        self,
        fn: Callable[..., T],
        *args: Any,
        timeout_s: float = 300.0,
        on_message: Callable[[int, Any], None] | None = None,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Call `fn(rank_context, *args, **kwargs)` on every rank; return the results by rank.

        Function, arguments and results are pickled, so `fn` must be a module-level function. Every
        rank has until the time-out, even after another one has failed. An exception leaves the pool
        usable; `fn` must then leave the process group in step.

        Args:
            timeout_s: seconds until every rank must have returned or raised.
            on_message: called here, as `on_message(rank, obj)`, for every `RankContext.send(obj)`.
            return_exceptions: put exceptions into the list instead of raising. A rank that died,
                or whose exception cannot be pickled, gives a `RankError`.

        Raises:
            RankError: ranks raised or died.
            RanksHungError: ranks exceeded `timeout_s`; raised also with `return_exceptions`.
            LaunchError: the pool is closed.
        """
        if self._closed:
            raise LaunchError(
                "this pool is closed, by its owner or because a rank was lost: start a new one"
            )
        call = pickle.dumps((fn, args, kwargs))
        # Also on ctrl-C and on errors in on_message: the ranks are in the middle of a call then.
        with self._killed_on_error():
            dead = [rank for rank, process in enumerate(self._processes) if not process.is_alive()]
            if dead:  # the other ranks could only wait for them
                results, failures = {}, {rank: self._death(rank) for rank in dead}
                raise RankError(failures)
            for connection in self._connections:
                with contextlib.suppress(ConnectionError):  # died just now: _gather finds out
                    connection.send_bytes(call)
            results, failures = self._gather(timeout_s, on_message=on_message)
        if any(failure.kind == "died" for failure in failures.values()):
            self.kill()
        if failures and not return_exceptions:
            first = failures[min(failures)]
            raise RankError(failures) from first.exception
        for rank, failure in failures.items():
            results[rank] = failure.exception or RankError({rank: failure})
        return [results[rank] for rank in range(self.num_ranks)]

    def close(self) -> None:
        """End all ranks; those that do not end in a few seconds are killed. Safe to repeat."""
        if not self._closed:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.send_bytes(STOP)
            deadline = time.monotonic() + _CLOSE_GRACE_S
            for process in self._processes:
                process.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End all ranks at once. Safe to repeat."""
        self._closed = True
        self._finalizer()
        for connection in self._connections:
            connection.close()
        self._folder.remove()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _killed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.kill()
            raise

    def _stack_file(self, rank: int) -> Path:
        return self._folder.path / f"rank{rank}.txt"

    def _start(self, spec: WorkerSpec) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=worker_main, args=(spec, theirs), name=f"rank{spec.rank}", daemon=True
        )
        # A child inherits the signal mask, so ctrl-C does not end it in the middle of its imports.
        # The tracker starts first, because its start would lift the mask.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
            self._processes.append(process)
            self._connections.append(ours)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()  # so that the pipe ends when the child does

    def _gather(
        self,
        timeout_s: float,
        *,
        on_message: Callable[[int, Any], None] | None = None,
        until_failure: bool = False,
    ) -> tuple[dict[int, Any], dict[int, RankFailure]]:
        """Read reports until every rank has returned, raised or died."""
        results: dict[int, Any] = {}
        failures: dict[int, RankFailure] = {}
        pending = set(range(self.num_ranks))
        deadline = time.monotonic() + timeout_s
        while pending and not (until_failure and failures):
            owners: dict[Any, int] = {self._connections[rank]: rank for rank in pending}
            owners |= {self._processes[rank].sentinel: rank for rank in pending}
            left_s = deadline - time.monotonic()
            ready = wait(owners, left_s) if left_s > 0 else []  # a message does not extend the time
            if not ready:
                self._raise_hung(timeout_s, pending, failures)
            for rank in sorted({owners[item] for item in ready}):
                kind, payload = self._receive(rank)
                if kind == "message":
                    if on_message is not None:
                        on_message(rank, payload)
                    continue
                pending.discard(rank)
                if kind == "failure":
                    failures[rank] = payload
                else:
                    results[rank] = payload
        return results, failures

    def _receive(self, rank: int) -> tuple[str, Any]:
        # Reports that a rank sent before it died are still in the pipe: read them first.
        connection = self._connections[rank]
        try:
            if connection.poll():
                return pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):  # OSError: it died in the middle of a report
            pass
        return "failure", self._death(rank)

    def _death(self, rank: int) -> RankFailure:
        process = self._processes[rank]
        process.join(_CLOSE_GRACE_S)
        code = process.exitcode
        signals = {-entry.value: f"killed by {entry.name}" for entry in signal.Signals}
        message = "closed its pipe" if code is None else signals.get(code, f"exit code {code}")
        stack = _read(self._stack_file(rank))
        return RankFailure(rank=rank, kind="died", message=message, traceback=stack)

    def _raise_hung(
        self, timeout_s: float, pending: set[int], failures: Mapping[int, RankFailure]
    ) -> None:
        stacks = self._dump_stacks()
        message = f"not finished within {timeout_s:g} s"
        hung = {
            rank: RankFailure(rank=rank, kind="hung", message=message, traceback=stacks[rank])
            for rank in pending
        }
        idle = [
            f"rank {rank} had finished and is idle:\n{stack}"
            for rank, stack in stacks.items()
            if rank not in pending
        ]
        raise RanksHungError({**hung, **failures}, *idle, "All ranks were killed.")

    def _dump_stacks(self) -> dict[int, str]:
        """Stacks of all threads of every rank that answers."""
        waiting = set(range(self.num_ranks))
        for rank in waiting:
            pid = self._processes[rank].pid
            if pid is not None and self._processes[rank].is_alive():
                os.kill(pid, STACK_SIGNAL)
        stacks = dict.fromkeys(waiting, "")
        deadline = time.monotonic() + _STACK_GRACE_S
        while waiting and time.monotonic() < deadline:
            time.sleep(_STACK_POLL_S)
            for rank in list(waiting):
                # Complete once it no longer grows.
                text = _read(self._stack_file(rank))
                if text and text == stacks[rank]:
                    waiting.discard(rank)
                stacks[rank] = text
        return {rank: stack or "(no stack: it did not answer)" for rank, stack in stacks.items()}


def _kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join(_CLOSE_GRACE_S)


def _read(path: Path) -> str:
    return path.read_text(errors="replace").strip() if path.exists() else ""


def _paragraphs(failures: Mapping[int, RankFailure]) -> list[str]:
    """One line per failed rank, then the tracebacks, each with all ranks that have it."""
    sharers: dict[str, list[str]] = {}
    for rank, failure in failures.items():
        sharers.setdefault(failure.traceback, []).append(str(rank))
    summaries = "\n".join(failure.summary() for failure in failures.values())
    return [
        summaries,
        *(f"rank {', '.join(ranks)}:\n{text}" for text, ranks in sharers.items() if text),
    ]
