"""Events that calls wait for and return: `EventHandle` and `EventOverlap`."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from expertlink.compat.deep_ep.errors import CallError, expect


class EventHandle:
    """A CUDA event, recorded on the current stream when it is made.

    Without a GPU there is nothing to wait for: calls have finished when they return.
    """

    __slots__ = ("__weakref__", "event")

    def __init__(self) -> None:
        self.event: torch.cuda.Event | None = None
        if torch.cuda.is_initialized():  # else no stream has any work
            self.event = torch.cuda.Event()
            self.event.record()

    def current_stream_wait(self) -> None:
        """Orders the stream that is current now after the event. Safe to repeat."""
        if self.event is not None:
            self.event.wait()


class EventOverlap:
    """An `EventHandle` or None, and what must live until it has been waited for.

    As a context manager it waits at the end of the block, if it has an event.

    Attributes:
        event: None where the call had finished when it returned.
        extra_tensors: kept alive with this object.
        hook_after_wait: called once, after the next wait.
    """

    def __init__(self, event: EventHandle | None = None, extra_tensors: Any = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self.hook_after_wait: Callable[[], object] | None = None

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Orders the stream that is current now after the event.

        Args:
            release_handle: drop the event and the tensors afterwards.

        Raises:
            CallError: there is no event (an AssertionError).
        """
        expect(self.event is not None, "this EventOverlap has no event to wait for")
        assert self.event is not None
        self.event.current_stream_wait()
        if release_handle:
            self.event = self.extra_tensors = None
        if self.hook_after_wait is not None:
            hook, self.hook_after_wait = self.hook_after_wait, None
            hook()

    def register_hook_after_wait(self, hook: Callable[[], object]) -> None:
        """Calls `hook` once, after the next wait. There can be one at a time."""
        expect(self.hook_after_wait is None, "there is a hook already; it has not been called yet")
        self.hook_after_wait = hook

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        """Waits, and returns itself."""
        self.current_stream_wait(release_handle)
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.event is not None:
            self.current_stream_wait()


AnyEvent = EventOverlap | EventHandle
"""What calls take as `previous_event`."""


def handle_of(event: Any) -> EventHandle | None:
    """The handle of an event of either kind; None where there is nothing to wait for.

    Raises:
        CallError: it is no event.
    """
    if event is None:
        return None
    if isinstance(event, EventOverlap):
        event = event.event
    if event is None or isinstance(event, EventHandle):
        return event
    raise CallError(f"an EventOverlap or an EventHandle is expected, not {type(event).__name__}")
