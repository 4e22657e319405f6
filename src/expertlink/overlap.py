"""Starting an operation in line with the caller's stream, or beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from expertlink.engines.base import Combined, Dispatched

Started = TypeVar("Started", Dispatched, Combined)


def launch(
    begin: Callable[[], Started],
    *,
    stream: torch.cuda.Stream | None,
    wait_events: Sequence[torch.cuda.Event],
    inputs: Sequence[Tensor | None],
) -> tuple[Started, Callable[[], None]]:
    """Starts an operation and returns it with the function that makes its results readable.

    Without a stream, waiting does the remaining work on the caller's stream (on CPU: in the
    caller's thread, while the transfer runs in the process group's). With one, all work is queued
    there now and waiting only orders the then current stream after it.
    """
    if stream is None:
        for event in wait_events:
            event.wait()
        started = begin()

        def finish() -> None:
            with torch.no_grad():
                started.finish()

        return started, finish

    stream.wait_stream(torch.cuda.current_stream(stream.device))
    for event in wait_events:
        stream.wait_event(event)
    with torch.cuda.stream(stream):
        started = begin()
        with torch.no_grad():
            started.finish()
        done = torch.cuda.Event()
        done.record(stream)
    for tensor in inputs:
        if tensor is not None:
            tensor.record_stream(stream)  # its memory must outlive the work queued here

    def join() -> None:
        current = torch.cuda.current_stream(stream.device)
        current.wait_event(done)
        for tensor in _tensors(started):
            tensor.record_stream(current)

    return started, join


def _tensors(started: Dispatched | Combined) -> list[Tensor]:
    """Result tensors that were allocated on the side stream and will be read on another."""
    if isinstance(started, Combined):
        found: list[object] = [started.out_TH, started.weight_grads_TK]
    else:
        output = started.output
        found = [*vars(output).values(), *vars(started.state).values()]
        if output.scales is not None:
            found.append(output.scales.tensor)
    return [value for value in found if isinstance(value, Tensor)]
