"""Handles of operations that were started and are still to be waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

from expertlink.types import DispatchHandle, DispatchOutput

Result = TypeVar("Result")


class Request(Generic[Result]):
    """An operation under way. Its result may be read after `wait()`."""

    def __init__(self, result: Result, wait: Callable[[], None]) -> None:
        self._result = result
        self._wait: Callable[[], None] | None = wait

    def wait(self) -> Result:
        """Completes the operation as far as the caller's stream is concerned; returns the result.

        CPU: blocks until rows have arrived and are in place. CUDA: orders the current stream after
        the operation. Safe to call again.

        Raises:
            PeerTimeoutError: a peer did not take part within the time-out.
        """
        if self._wait is not None:
            self._wait()
            self._wait = None  # a failed wait stays failed
        return self._result


DispatchRequest = Request[tuple[DispatchOutput, DispatchHandle]]
"""What `dispatch_async` returns."""

CombineRequest = Request[Tensor | tuple[Tensor, Tensor]]
"""What `combine_async` returns."""
