"""Ends communicators of NCCL, which wait for CUDA graphs that hold calls of theirs.

NCCL gives the memory of a communicator back when no CUDA graph holds a call of it any more:
ncclCommFinalize, ncclCommDestroy and ncclCommAbort wait for that. So do `shutdown`, `abort` and the
destructor of torch's process group, whatever its time-out is. Therefore they are called in threads,
which are left behind while a graph lives on.

Such a thread must not come back while the interpreter ends: torch then ends the process
("terminate called without an active exception"). So graphs that live at that time are kept. Since
Python 3.12 no thread can be started at that time: what would be ended is then kept as well.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch

_AT_EXIT_S = 1.0

# Without a lock: finalizers end communicators too, and may run inside any function of this file.
_threads: list[threading.Thread] = []
_lock = threading.Lock()  # of `_open`
_open: weakref.WeakSet[Endable] = weakref.WeakSet()


class Endable(Protocol):
    """What has to end before the interpreter does."""

    def end_at_exit(self) -> None:
        """Begins to end what is still open, or keeps it for ever; does not wait."""
        ...


def end(call: Callable[[], object], name: str, seconds: float) -> bool:
    """Makes a call that ends a communicator, and waits for it so long at most.

    Args:
        call: as said; runs on in a thread.
        name: of the thread.
        seconds: 0: does not wait.

    Returns:
        Whether the call has ended. Where no thread can be started any more, it never begins, and
        what it belongs to is kept.
    """

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            call()

    thread = threading.Thread(target=run, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter ends
        keep(call)
        return False
    _threads.append(thread)
    for each in _threads.copy():
        if not each.is_alive():
            with contextlib.suppress(ValueError):  # another thread has removed it
                _threads.remove(each)
    thread.join(seconds)
    return not thread.is_alive()


def end_with_the_process(member: Endable) -> None:
    """Its `end_at_exit` is called before the interpreter takes objects apart, if it still lives."""
    with _lock:
        _open.add(member)
    atexit.unregister(_at_exit)  # last registered, first called: before torch takes anything apart
    atexit.register(_at_exit)


def keep(value: object) -> None:
    """Its destructor never runs."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


def _at_exit() -> None:
    for member in list(_open):
        member.end_at_exit()
    deadline = time.monotonic() + _AT_EXIT_S
    for thread in _threads.copy():
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in _threads):
        for graph in live_graphs():
            keep(graph)


def live_graphs() -> list[Any]:
    """All CUDA graphs of torch that this process has, for its end."""
    gc.unfreeze()  # what servers have frozen is not listed
    return [each for each in gc.get_objects() if issubclass(type(each), torch.cuda.CUDAGraph)]
