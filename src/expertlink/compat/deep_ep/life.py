"""The end of the process: buffers that nobody has destroyed let go of their groups.

A process group that lives on after `destroy_process_group()` can abort the process at its exit, and
most callers keep a buffer in a global variable for as long as the process lives.
"""

from __future__ import annotations

import atexit
import contextlib
import weakref
from typing import Any, Protocol


class Owner(Protocol):
    """A buffer."""

    group: Any
    runtime: Any


_alive: weakref.WeakSet[Any] = weakref.WeakSet()


def until_exit(buffer: Owner) -> None:
    """Lets a buffer go at the end of the process, if it is still there."""
    _alive.add(buffer)


@atexit.register
def _let_go() -> None:
    for buffer in list(_alive):
        runtime, buffer.runtime, buffer.group = buffer.runtime, None, None
        if runtime is not None:
            with contextlib.suppress(RuntimeError):  # the device may be gone
                runtime.close()
