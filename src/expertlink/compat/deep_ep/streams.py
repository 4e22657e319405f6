"""On which stream a call runs, and after what.

Calls of communicators with memory of their own must not overlap on the GPU: each may wait for SMs
that the other holds. So every call comes after the one before, whatever streams they run on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from expertlink.compat.deep_ep.errors import in_kind
from expertlink.compat.deep_ep.events import EventHandle, EventOverlap, handle_of
from expertlink.compat.deep_ep.handles import Dispatched
from expertlink.engines.nvlink.capture import raw_stream
from expertlink.errors import ExpertlinkError, InputError
from expertlink.overlap import tensors_in
from expertlink.types import DispatchHandle

Result = TypeVar("Result")


@functools.cache
def comm_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of asynchronous calls, one for a device: all buffers take turns on it."""
    return torch.cuda.Stream(device, priority=-1)


class Streams:
    """The streams of one buffer's calls.

    Args:
        device: the buffer's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Handle of the current stream: making a stream object takes microseconds.
        self._current = raw_stream(device) if device.type == "cuda" else None
        self._last: torch.cuda.Stream | None = None  # where the last call ran
        self._last_raw: int | None = None  # its handle
        self._seen: torch.cuda.Stream | None = None  # what `current` returned last
        self._seen_raw: int | None = None

    def run(
        self,
        call: Callable[[], Result],
        inputs: tuple[object, ...],
        previous_event: Any = None,
        async_finish: bool = False,
    ) -> tuple[Result, EventOverlap]:
        """Makes a call; its event is None unless it is asynchronous.

        A call that is asynchronous, or that waits for an event, runs on the communication stream:
        after that event where one is given, else after the current stream. All others run on the
        current stream.

        Args:
            call: queues the call's work on the current stream and returns its results.
            inputs: what it reads, tensors or records that hold some.
            previous_event: of either kind, or None.
            async_finish: return an event, in place of ordering the current stream after the call.
        """
        previous = None if previous_event is None else handle_of(previous_event)
        if self._current is None:
            return without_tracking(call), EventOverlap(EventHandle() if async_finish else None)
        if previous is None and not async_finish:
            self.follow()
            return without_tracking(call), EventOverlap()
        return self._beside(call, inputs, previous, async_finish)

    def follow(self) -> None:
        """Orders the current stream after the last call, if that ran on another one."""
        if (
            self._current is not None
            and self._current() != self._last_raw
            and not torch.cuda.is_current_stream_capturing()
        ):
            stream = self.current()
            assert stream is not None
            self._take_turn(stream)

    def current(self) -> torch.cuda.Stream | None:
        """The current stream; None where there are none."""
        if self._current is None:
            return None
        raw = self._current()
        if raw != self._seen_raw:
            self._seen, self._seen_raw = torch.cuda.current_stream(self._device), raw
        return self._seen

    def refused(self, refuse: Callable[[], NoReturn]) -> ExpertlinkError:
        """Refuses a call in its turn; returns what to raise.

        Without the frames it came through: these hold the error, so it would keep them, and the
        callers' tensors, until the next garbage collection.
        """
        try:
            self.run(refuse, ())
        except ExpertlinkError as final:
            return final.with_traceback(None)
        raise AssertionError("a refusal returned")

    def _beside(
        self,
        call: Callable[[], Result],
        inputs: tuple[object, ...],
        previous: EventHandle | None,
        async_finish: bool,
    ) -> tuple[Result, EventOverlap]:
        device = self._device
        if torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):
                return self._beside(call, inputs, previous, async_finish)
        current, stream = self.current(), comm_stream(device)
        assert current is not None
        if not torch.cuda.is_current_stream_capturing():
            self._take_turn(stream)
        if previous is None or previous.event is None:
            stream.wait_stream(current)
        else:
            stream.wait_event(previous.event)
        torch.cuda.set_stream(stream)  # a context manager takes ten times as long
        try:
            result = without_tracking(call)
            done = EventHandle()
        finally:  # a call that fails may have queued work before
            torch.cuda.set_stream(current)
            record_on(stream, inputs)
        record_on(current, result)
        if async_finish:
            return result, EventOverlap(done)
        done.current_stream_wait()
        return result, EventOverlap()

    def _take_turn(self, stream: torch.cuda.Stream) -> None:
        """Orders a stream after the last call, if that ran on another one."""
        last, self._last, self._last_raw = self._last, stream, stream.cuda_stream
        if last is not None and last != stream:
            stream.wait_stream(last)


def without_tracking(call: Callable[[], Result]) -> Result:
    """Makes a call outside of autograd: callers wrap these calls in functions of their own.

    Raises:
        CallError: an argument does not fit, whoever has noticed it.
    """
    tracking = torch.is_grad_enabled()
    if tracking:  # what torch.no_grad() does, for a tenth of its time
        torch._C._set_grad_enabled(False)
    try:
        return call()
    except InputError as error:
        raise in_kind(error) from None
    finally:
        if tracking:
            torch._C._set_grad_enabled(True)


def record_on(stream: torch.cuda.Stream, values: object) -> None:
    """Keeps the memory of all tensors in `values` until the stream is done with it."""
    for tensor in _tensors_of(values):
        tensor.record_stream(stream)


def _tensors_of(value: object) -> Iterator[Tensor]:
    if value is None or isinstance(value, int):
        return
    if isinstance(value, Tensor):
        if value.is_cuda:
            yield value
        return
    kept = getattr(value, "kept", None)
    if kept is not None:  # a handle: its other tensors are made of these when somebody looks
        yield from _tensors_of((value.known, *kept))  # type: ignore[attr-defined]
    elif isinstance(value, (tuple, list)):
        if value and isinstance(value[0], int):  # counts, which may be many
            return
        for member in value:
            yield from _tensors_of(member)
    elif isinstance(value, Dispatched):
        yield from value.tensors()
    elif dataclasses.is_dataclass(value) and not isinstance(value, DispatchHandle):
        for member in vars(value).values():
            yield from _tensors_of(member)
    else:
        yield from tensors_in(value)


@contextlib.contextmanager
def on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """With that stream as the current one; None leaves it as it is."""
    if stream is None:
        yield
        return
    with torch.cuda.stream(stream):
        yield
