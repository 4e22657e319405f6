"""What stands for operations that were started and are still to be finished."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
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


class ReceiveHook:
    """Launches the receiving half of a call, on the stream that is current then.

    The tensors of the call must not be read before. Safe to call again.

    Args:
        finish: `finish` of the started operation.
    """

    __slots__ = ("_finish",)

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish: Callable[[], None] | None = finish

    def __call__(self) -> None:
        if self._finish is not None:
            without_gradients(self._finish)
            self._finish = None  # a failed one stays failed


def without_gradients(finish: Callable[[], None]) -> None:
    """Finishes an operation whose gradients, if any, autograd.py has taken care of."""
    if torch.is_grad_enabled():
        with torch.no_grad():
            finish()
    else:  # entering no_grad takes longer than many a `finish`
        finish()


DispatchRequest = Request[tuple[DispatchOutput, DispatchHandle]]
"""What `dispatch_async` returns."""

CombineRequest = Request[Tensor | tuple[Tensor, Tensor]]
"""What `combine_async` returns."""
