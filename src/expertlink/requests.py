"""Calls that have been started and are still to be finished: requests and receive hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from expertlink.errors import ClosedError
from expertlink.gradients import in_current_mode, without_gradients
from expertlink.types import DispatchHandle, DispatchOutput

Result = TypeVar("Result", covariant=True)


class Life:
    """Whether a communicator can be used. Objects that outlive it refer to this, not to it.

    Attributes:
        over: why it cannot be used any more, or None.
    """

    __slots__ = ("over",)

    def __init__(self) -> None:
        self.over: str | None = None

    def check(self) -> None:
        """Raises ClosedError once it is over."""
        if self.over is not None:
            raise ClosedError(self.over)


class Request(Generic[Result]):
    """A call that has been started. Its result may be read after `wait()`."""

    def __init__(self, result: Result, wait: Callable[[], None]) -> None:
        self._result = result
        self._wait: Callable[[], None] | None = wait

    def wait(self) -> Result:
        """Makes the result readable on the current stream, and returns it. Safe to repeat.

        CPU: blocks until rows have arrived and are in place. CUDA: orders the current stream after
        the call.

        Raises:
            PeerTimeoutError: a rank did not take part within the time-out.
            ClosedError: the communicator was closed or aborted before.
        """
        if torch.compiler.is_dynamo_compiling():
            from expertlink.uncompiled import uncompiled

            return uncompiled(self.wait)
        if self._wait is not None:
            self._wait()
            self._wait = None  # a failed wait stays failed
        return self._result


class ReceiveHook:
    """Launches the receiving half of a call, on the stream that is current when it is called.

    The tensors that the call returned must not be read before. Safe to repeat.

    Args:
        finish: `finish` of the started operation.
        life: of its communicator.
    """

    __slots__ = ("_finish", "_life")

    def __init__(self, finish: Callable[[], None], life: Life) -> None:
        self._finish: Callable[[], None] | None = in_current_mode(finish)
        self._life = life

    def __call__(self) -> None:
        """Raises ClosedError where the communicator was closed or aborted before."""
        if torch.compiler.is_dynamo_compiling():
            from expertlink.uncompiled import uncompiled

            uncompiled(self)
            return
        if self._finish is not None:
            if self._life.over is not None:
                self._life.check()
            without_gradients(self._finish)
            self._finish = None  # a failed one stays failed


DispatchRequest = Request[tuple[DispatchOutput, DispatchHandle]]
"""What `dispatch_async` returns."""

CombineRequest = Request[Tensor | tuple[Tensor, Tensor]]
"""What `combine_async` returns."""
