"""On which stream calls of the drop-in run, and after what, without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from expertlink.compat.deep_ep import EventHandle, EventOverlap, streams
from expertlink.compat.deep_ep.low_latency import ReceivingHalf
from expertlink.compat.deep_ep.streams import Streams

GPU = torch.device("cuda", 0)


class Queue:
    """Stands for a stream: notes what it waits for."""

    device = GPU

    def __init__(self, name: str) -> None:
        self.name = name
        self.waits: list[str] = []

    @property
    def cuda_stream(self) -> int:
        return id(self)

    def wait_stream(self, other: Queue) -> None:
        self.waits.append(other.name)

    def wait_event(self, event: Event) -> None:
        self.waits.append(f"event on {event.stream.name}")


class Event:
    """Stands for an event."""

    def __init__(self) -> None:
        self.stream = Gpu.current

    def record(self) -> None:
        self.stream = Gpu.current

    def wait(self) -> None:
        Gpu.current.wait_event(self)


class Gpu:
    """The current stream, and whether it is in a capture."""

    current: Queue
    capturing = False


@contextlib.contextmanager
def made_current(stream: Queue) -> Iterator[None]:
    before, Gpu.current = Gpu.current, stream
    try:
        yield
    finally:
        Gpu.current = before


@pytest.fixture(autouse=True)
def comm(monkeypatch: pytest.MonkeyPatch) -> Queue:
    """The communication stream; "main" is current."""
    stream = Queue("comm")
    Gpu.current, Gpu.capturing = Queue("main"), False
    patch = monkeypatch.setattr
    patch(torch.cuda, "is_initialized", lambda: True)
    patch(torch.cuda, "Event", Event)
    patch(torch.cuda, "current_stream", lambda *_: Gpu.current)
    patch(torch.cuda, "current_device", lambda: GPU.index)
    patch(torch.cuda, "set_stream", lambda queue: setattr(Gpu, "current", queue))
    patch(torch.cuda, "stream", made_current)
    patch(streams, "raw_stream", lambda _: lambda: Gpu.current.cuda_stream)
    patch(torch.cuda, "is_current_stream_capturing", lambda: Gpu.capturing)
    patch(streams, "comm_stream", lambda _: stream)
    return stream


def run(order: Streams, **options: Any) -> tuple[str, EventOverlap]:
    """The stream that a call ran on, and its event."""
    return order.run(lambda: Gpu.current.name, (), **options)


def test_a_plain_call_runs_on_the_current_stream(comm: Queue) -> None:
    where, event = run(Streams(GPU))
    assert (where, event.event) == ("main", None)
    assert Gpu.current.waits == comm.waits == []


def test_an_asynchronous_call_runs_beside_the_current_stream(comm: Queue) -> None:
    where, event = run(Streams(GPU), async_finish=True)
    assert where == "comm"
    assert comm.waits == ["main"]
    assert Gpu.current.waits == [], "nobody waits before the caller does"
    event.current_stream_wait()
    event.current_stream_wait()
    assert Gpu.current.waits == ["event on comm"] * 2


@pytest.mark.parametrize("kind", [EventHandle, lambda: EventOverlap(EventHandle())])
def test_a_call_waits_for_its_event_alone(comm: Queue, kind: Any) -> None:
    with made_current(Queue("other")):
        event = kind()
    where, after = run(Streams(GPU), previous_event=event)
    assert where == "comm"
    assert comm.waits == ["event on other"]
    assert after.event is None
    assert Gpu.current.waits == ["event on comm"], "it has finished for the current stream"


def test_an_event_of_a_finished_call_means_the_current_stream() -> None:
    where, _ = run(Streams(GPU), previous_event=EventOverlap())
    assert where == "main"


def test_calls_on_different_streams_take_turns(comm: Queue) -> None:
    order = Streams(GPU)
    run(order, async_finish=True)
    run(order)
    assert Gpu.current.waits == ["comm"]
    run(order)
    assert Gpu.current.waits == ["comm"], "the stream orders its own calls"
    with made_current(Queue("other")):
        run(order)
        assert Gpu.current.waits == ["main"]


def test_a_capture_waits_for_nothing_outside(comm: Queue) -> None:
    order = Streams(GPU)
    run(order, async_finish=True)
    Gpu.capturing = True
    run(order)
    assert Gpu.current.waits == []
    run(order, async_finish=True)
    assert comm.waits == ["main"] * 2, "the communication stream joins the capture"


def test_what_is_no_event_is_refused() -> None:
    with pytest.raises(AssertionError, match="an EventOverlap or an EventHandle is expected"):
        run(Streams(GPU), previous_event=object())


def test_a_call_that_fails_keeps_the_order(comm: Queue) -> None:
    def fail() -> None:
        raise KeyError("x")

    order = Streams(GPU)
    with pytest.raises(KeyError):
        order.run(fail, (), async_finish=True)
    assert Gpu.current.name == "main"
    run(order)
    assert Gpu.current.waits == ["comm"]


def test_a_hook_runs_on_the_stream_of_its_call() -> None:
    seen: list[str] = []
    half: Any = ReceivingHalf(
        lambda: seen.append(Gpu.current.name),
        Streams(GPU),
        lambda: seen.append("counted"),
    )
    with made_current(Queue("other")):
        half()
    half()
    assert seen == ["main", "counted", "main"]
