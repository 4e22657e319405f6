"""The process of a local rank: it joins the process group, then serves calls until it is stopped.

In: a `WorkerSpec` and, through a pipe, pickled calls. Out: reports (messages, results, failures).
launch.py starts and ends these processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

DeviceType = Literal["cpu", "cuda"]
ReportKind = Literal["ready", "message", "result", "failure"]

STORE_HOST = "127.0.0.1"
STOP = b""  # ends a worker; a pickled call is never empty
STACK_SIGNAL = signal.SIGUSR1  # makes a worker write the stacks of its threads


# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


@dataclass(frozen=True, kw_only=True)
class RankContext:
    """A rank's number, group size and device; first argument of functions that run on ranks."""

    rank: int
    num_ranks: int
    device: torch.device
    listener: Callable[[object], None] | None = field(default=None, repr=False, compare=False)

    def send(self, message: object) -> None:
        """Send a picklable object to the caller's `on_message`; dropped if there is none."""
        if self.listener is not None:
            self.listener(message)

    def __getstate__(self) -> dict[str, object]:
        # The listener belongs to this process. Without it, a context can be pickled.
        return {**self.__dict__, "listener": None}


@dataclass(frozen=True, kw_only=True)
class RankFailure:
    """How one rank failed.

    Attributes:
        kind: "raised" an exception, "died" (exit or signal), or "hung" past the time-out.
        exception_type: class name of the exception; empty unless raised.
        message: text of the exception, or how the process ended.
        traceback: traceback (raised), Python stack at the fatal signal, if any (died), or stacks of
            all threads at the time-out (hung).
        exception: the exception itself; None if there is none, or it cannot be pickled.
    """

    rank: int
    kind: Literal["raised", "died", "hung"]
    exception_type: str = ""
    message: str = ""
    traceback: str = ""
    exception: BaseException | None = None

    def summary(self) -> str:
        """One line: what happened, without the traceback."""
        detail = ": ".join(part for part in (self.exception_type, self.message) if part)
        return f"rank {self.rank} {self.kind}" + (f": {detail}" if detail else "")


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What a worker needs to start; times in seconds."""

    rank: int
    num_ranks: int
    device: DeviceType
    backend: str
    threads: int
    store_port: int
    startup_timeout_s: float
    group_timeout_s: float
    stack_file: Path
    environment: Mapping[str, str] = field(default_factory=dict)


def torchrun_context(*, backend: str | None = None) -> RankContext | None:
    """Join the process group that torchrun describes in the environment, if there is one.

    The caller owns the process group. The device is GPU `LOCAL_RANK` where GPUs exist, else the
    CPU; messages are dropped.

    Args:
        backend: of torch.distributed. Default: "cpu:gloo,cuda:nccl" with GPUs, else "gloo".

    Returns:
        None where RANK, WORLD_SIZE or MASTER_ADDR is not set.
    """
    if not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")):
        return None
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if not dist.is_initialized():
        # Optimizers import it. If that happens after gloo has started (seen with torch 2.13), the
        # group is kept alive, and the process may abort when it exits.
        importlib.import_module("torch._dynamo")
        dist.init_process_group(
            backend or default_backend("cuda" if device.type == "cuda" else "cpu"),
            device_id=device if device.type == "cuda" else None,
        )
    return RankContext(rank=dist.get_rank(), num_ranks=dist.get_world_size(), device=device)


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for this process instead of returning it to the system.

    Otherwise a tensor of some megabytes takes a page fault for every 4 KiB, in every call. With
    several ranks on one host those cost more than the copies into it. Call it in CPU ranks, before
    they allocate. Without glibc it does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc accepts
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 64 << 20)


def default_backend(device: DeviceType) -> str:
    """Backend of torch.distributed for ranks on this kind of device."""
    return "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"


def worker_main(spec: WorkerSpec, connection: Connection) -> None:
    """Entry point of a worker process."""
    os.environ |= spec.environment  # before anything reads it
    # Ctrl-C reaches the whole terminal group; the parent alone decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    folder = spec.stack_file.parent
    try:
        stacks = spec.stack_file.open("w")
    except FileNotFoundError:  # the parent has ended, and another rank has removed the folder
        return
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    with stacks:
        # Written in C, so it works while the main thread is blocked outside of Python.
        faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True)
        faulthandler.enable(file=stacks)
        try:
            _serve(spec, connection)
        except (EOFError, ConnectionError):  # the parent has ended
            _tidy_up(folder)
        faulthandler.disable()
        faulthandler.unregister(STACK_SIGNAL)


def _end_with_parent(folder: Path) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    _tidy_up(folder)
    os._exit(1)


def _tidy_up(folder: Path) -> None:
    # For a parent that was killed. Several ranks may do it at the same time.
    shutil.rmtree(folder, ignore_errors=True)


def _serve(spec: WorkerSpec, connection: Connection) -> None:
    lock = threading.Lock()

    def report(kind: ReportKind, payload: object) -> None:
        frame = pickle.dumps((kind, payload))  # bytes, which outlive this process
        with lock:
            connection.send_bytes(frame)

    context = RankContext(
        rank=spec.rank,
        num_ranks=spec.num_ranks,
        device=torch.device("cpu" if spec.device == "cpu" else f"cuda:{spec.rank}"),
        listener=lambda message: report("message", message),
    )
    try:
        _join(spec, context.device)
        report("ready", None)
    except BaseException as error:
        report("failure", _failure(spec.rank, error))
        return
    while (call := connection.recv_bytes()) != STOP:
        _answer(call, context, report)
    dist.destroy_process_group()


def _answer(
    call: bytes, context: RankContext, report: Callable[[ReportKind, object], None]
) -> None:
    # Unpickled in a frame that ends with the call, so that nothing of it stays alive.
    try:
        fn, args, kwargs = pickle.loads(call)
        report("result", fn(context, *args, **kwargs))
    except BaseException as error:  # SystemExit too: the caller must learn of it
        report("failure", _failure(context.rank, error))


def _join(spec: WorkerSpec, device: torch.device) -> None:
    torch.set_num_threads(spec.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if any(name == "lo" for _, name in socket.if_nameindex()):
        # Otherwise gloo binds to what the host name resolves to, and it may not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        spec.backend,
        store=dist.TCPStore(
            STORE_HOST,
            spec.store_port,
            is_master=False,
            timeout=timedelta(seconds=spec.startup_timeout_s),
        ),
        rank=spec.rank,
        world_size=spec.num_ranks,
        timeout=timedelta(seconds=spec.group_timeout_s),
        device_id=device if device.type == "cuda" else None,
    )


def _failure(rank: int, error: BaseException) -> RankFailure:
    exception: BaseException | None = error
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        exception = None
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next  # frames of this file do not explain the error
    text = traceback.format_exception(type(error), error, frames or error.__traceback__)
    return RankFailure(
        rank=rank,
        kind="raised",
        exception_type=type(error).__name__,
        message=str(error),
        traceback="".join(text).strip(),
        exception=exception,
    )
