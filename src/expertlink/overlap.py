"""Starting an operation in line with the caller's stream, or beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from expertlink.engines.base import CombineCall, Combined, DispatchCall, Dispatched
from expertlink.errors import InputError
from expertlink.requests import Life, in_present_mode, without_gradients
from expertlink.types import CommOverlapConfig

Started = TypeVar("Started", Dispatched, Combined)


def launch(
    begin: Callable[[], Started],
    *,
    stream: torch.cuda.Stream | None,
    wait_events: Sequence[torch.cuda.Event],
    call: DispatchCall | CombineCall,
    life: Life,
) -> tuple[Started, Callable[[], None]]:
    """Starts an operation and returns it with the function that makes its results readable.

    Without a stream, waiting does the remaining work on the caller's stream (on CPU: in the
    caller's thread, while the transfer runs in the process group's). With one, all work is queued
    there now and waiting only orders the then current stream after it. Waiting raises ClosedError
    once `life` is over.
    """
    if stream is None:
        for event in wait_events:
            event.wait()
        started = begin()
        finish = in_present_mode(started.finish)

        def complete() -> None:
            life.check()
            without_gradients(finish)

        return started, complete

    stream.wait_stream(torch.cuda.current_stream(stream.device))
    for event in wait_events:
        stream.wait_event(event)
    with torch.cuda.stream(stream):
        try:
            started = begin()
            without_gradients(started.finish)
            done = torch.cuda.Event()
            done.record(stream)
        finally:  # what fails may have queued work before
            for tensor in tensors_in(call):
                tensor.record_stream(stream)  # its memory must outlive the work queued here

    def join() -> None:
        life.check()
        current = torch.cuda.current_stream(stream.device)
        current.wait_event(done)
        for tensor in tensors_in(started):  # allocated for the side stream, read on this one
            tensor.record_stream(current)

    return started, join


def check_overlap(op: str, *, device: torch.device, on_stream: bool, sms: int | None) -> None:
    """Refuses settings that no operation can have."""
    if op not in ("dispatch", "combine"):
        raise InputError(f"op={op!r}: dispatch or combine is expected")
    if device.type != "cuda" and on_stream:
        raise InputError(f"stream and wait_events need a CUDA device, not {device}")
    if sms is not None and sms < 1:
        raise InputError(f"num_sms={sms}: at least 1, or None")


def check_operation(overlap: CommOverlapConfig | None, operation: str) -> None:
    """Refuses settings that were made for the other operation."""
    if overlap is not None and overlap.operation != operation:
        raise InputError(f"overlap was created for {overlap.operation}; this is {operation}")


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every CUDA tensor that a record, or a record inside it, holds."""
    if isinstance(value, Tensor):
        if value.is_cuda:
            yield value
    elif dataclasses.is_dataclass(value):
        for member in vars(value).values():
            yield from tensors_in(member)
