"""Where an asynchronous call runs: on a stream of its own, or in line with the caller's work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import CombineCall, Combined, DispatchCall, Dispatched
from expertlink.engines.outputs import LazyOutput
from expertlink.engines.ranks.header import Operation
from expertlink.errors import InputError
from expertlink.gradients import in_current_mode, without_gradients
from expertlink.requests import Life
from expertlink.types import CommOverlapConfig, RoutingScope

_WITHOUT_TENSORS = (type(None), int, str, tuple, list, dict, RoutingScope)
_OPERATIONS = {"dispatch": Operation.DISPATCH, "combine": Operation.COMBINE}


def make_stream(config: MoECommunicatorConfig, device: torch.device) -> torch.cuda.Stream | None:
    """The stream that a communicator's asynchronous calls run on, or None for in line.

    Its priority is high: where blocks of a call and of the caller's kernels wait for SMs, those of
    the call go first. Blocks that run already are not interrupted.
    """
    if not config.enable_overlap or device.type != "cuda":
        return None
    return torch.cuda.Stream(device, priority=-1)


@contextmanager
def queued(
    call: DispatchCall | CombineCall,
    *,
    stream: torch.cuda.Stream | None,
    wait_events: Sequence[torch.cuda.Event],
) -> Iterator[None]:
    """What one asynchronous call is started in, up to and including its `wait_of`.

    On a stream, all work of the call is queued after what the caller's current stream has been
    given so far, and the call's tensors are recorded there, also where the call fails.

    Args:
        call: the call.
        stream: CUDA stream to run on; None: in line with the caller's work, as always on CPU.
        wait_events: CUDA events that the call waits for, besides the caller's current stream.
    """
    if stream is None:
        for event in wait_events:
            event.wait()
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    for event in wait_events:
        stream.wait_event(event)
    with torch.cuda.stream(stream):
        try:
            yield
        finally:  # a call that fails may have queued work before
            for tensor in tensors_in(call):
                tensor.record_stream(stream)  # its memory must outlive the work queued here


def wait_of(
    started: Dispatched | Combined, *, stream: torch.cuda.Stream | None, life: Life
) -> Callable[[], None]:
    """What makes the results of an asynchronous call readable. Made inside `queued`.

    In line: waiting does the remaining work on the stream that is current then (on CPU: in the
    thread that waits, while the transfer runs in the process group's threads). On a stream: all
    work is queued now, and waiting orders the stream that is current then after it.

    Args:
        started: the call.
        stream: that of `queued`.
        life: of the communicator; once it is over, waiting raises ClosedError.
    """
    if stream is None:
        finish = in_current_mode(started.finish)

        def complete() -> None:
            life.check()
            without_gradients(finish)

        return complete

    without_gradients(started.finish)
    done = torch.cuda.Event()
    done.record(stream)

    def join() -> None:
        life.check()
        current = torch.cuda.current_stream(stream.device)
        current.wait_event(done)
        for tensor in tensors_in(started):  # allocated for the call's stream, read on this one
            tensor.record_stream(current)

    return join


def operation_of(op: str) -> Operation:
    """The operation that a caller names: "dispatch" or "combine"."""
    operation = _OPERATIONS.get(op)
    if operation is None:
        raise InputError(f"op={op!r}: dispatch or combine is expected")
    return operation


def check_settings(*, device: torch.device, on_stream: bool, num_sms: int | None) -> None:
    """Refuses settings that no operation can have."""
    if device.type != "cuda" and on_stream:
        raise InputError(f"stream and wait_events need a CUDA device, not {device}")
    if num_sms is not None and num_sms < 1:
        raise InputError(f"num_sms={num_sms}: at least 1, or None")


def check_operation(overlap: CommOverlapConfig | None, operation: Operation) -> None:
    """Refuses settings that were made for the other operation."""
    if overlap is not None and _OPERATIONS.get(overlap.operation) is not operation:
        raise InputError(f"overlap was created for {overlap.operation}; this is {operation.title}")


def place_of(
    overlap: CommOverlapConfig | None, stream: torch.cuda.Stream | None
) -> tuple[torch.cuda.Stream | None, Sequence[torch.cuda.Event]]:
    """The stream of an asynchronous call, None for in line, and what it waits for.

    Args:
        overlap: the caller's settings, if there are any.
        stream: the communicator's own.
    """
    return (stream, ()) if overlap is None else (overlap.stream, overlap.wait_events)


def tensors_in(value: object) -> list[Tensor]:
    """Every CUDA tensor that a record, or a record inside it, holds."""
    found: list[Tensor] = []
    _find_tensors(value, found)
    return found


def _find_tensors(value: object, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        if value.is_cuda:
            found.append(value)
        return
    if isinstance(value, LazyOutput) and value.source is not None:
        members = (value.tokens, value.scales, *value.source.memories)
    elif dataclasses.is_dataclass(value):
        members = tuple(vars(value).values())
    else:
        return
    for member in members:
        if not isinstance(member, _WITHOUT_TENSORS):  # most are: not worth a call
            _find_tensors(member, found)
