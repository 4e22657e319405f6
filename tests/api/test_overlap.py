"""Where asynchronous calls run, in which order, and with which settings; streams are stand-ins."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from expertlink import (
    ClosedError,
    CommOverlapConfig,
    ConfigurationError,
    InputError,
    MoECommunicatorConfig,
)
from expertlink.engines.base import CombineCall, Combined
from expertlink.overlap import make_stream, queued, wait_of
from expertlink.requests import Life
from support.small_calls import good, make


class Steps(list[str]):
    """What happens, in order; gives out stand-ins that note what is done with them."""

    def tensor(self, name: str) -> torch.Tensor:
        steps = self

        class OnGpu(torch.Tensor):
            is_cuda = True  # type: ignore[assignment]

            def record_stream(self, s: Any) -> None:
                steps.append(f"{name} recorded on {s.name}")

        return torch.zeros(1).as_subclass(OnGpu)

    def stream(self, name: str) -> Any:
        steps = self

        class Stream:
            device = "cuda:0"

            def __init__(self) -> None:
                self.name = name

            def wait_stream(self, other: Any) -> None:
                steps.append(f"{name} waits for {other.name}")

            def wait_event(self, event: Any) -> None:
                steps.append(f"{name} waits for {event.name}")

        return Stream()

    def event(self, name: str) -> Any:
        steps = self

        class Event:
            def __init__(self) -> None:
                self.name = name

            def record(self, stream: Any) -> None:
                steps.append(f"{name} recorded on {stream.name}")

            def wait(self) -> None:
                steps.append(f"the current stream waits for {name}")

        return Event()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    steps = Steps()
    current = steps.stream("current")

    @contextlib.contextmanager
    def entered(stream: Any) -> Iterator[None]:
        steps.append(f"enter {stream.name}")
        try:
            yield
        finally:
            steps.append(f"leave {stream.name}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "Event", lambda: steps.event("done"))
    return steps


def call_and_result(steps: Steps) -> tuple[CombineCall, Combined]:
    rows, out = steps.tensor("rows"), steps.tensor("result")

    def finish() -> None:
        assert not torch.is_grad_enabled()
        steps.append("finish")

    return CombineCall(rows, None, False, out), Combined(out, None, finish)


def test_on_a_stream_all_work_is_queued_at_once(steps: Steps) -> None:
    call, started = call_and_result(steps)
    stream, event = steps.stream("side"), steps.event("event")
    with queued(call, stream=stream, wait_events=(event,)):
        steps.append("start")
        wait = wait_of(started, stream=stream, life=Life())
    assert steps == [
        "side waits for current",
        "side waits for event",
        "enter side",
        "start",
        "finish",
        "done recorded on side",
        "rows recorded on side",
        "result recorded on side",
        "leave side",
    ]
    steps.clear()
    wait()
    assert steps == ["current waits for done", "result recorded on current"]


@pytest.mark.parametrize("where", ["start", "finish"])
def test_a_call_that_fails_leaves_its_tensors_recorded(steps: Steps, where: str) -> None:
    call, started = call_and_result(steps)
    stream = steps.stream("side")

    def fail() -> None:
        raise RuntimeError("no launch")

    def run() -> None:
        with queued(call, stream=stream, wait_events=()):
            if where == "start":
                fail()
            wait_of(started, stream=stream, life=Life())

    started.finish = fail
    with pytest.raises(RuntimeError, match="no launch"):
        run()
    assert steps[-3:] == ["rows recorded on side", "result recorded on side", "leave side"]
    assert "done recorded on side" not in steps


def test_in_line_the_wait_does_the_rest(steps: Steps) -> None:
    call, started = call_and_result(steps)
    with queued(call, stream=None, wait_events=(steps.event("event"),)):
        steps.append("start")
        wait = wait_of(started, stream=None, life=Life())
    assert steps == ["the current stream waits for event", "start"]
    wait()
    assert steps[2:] == ["finish"]


@pytest.mark.parametrize("on_stream", [False, True])
def test_nothing_is_waited_for_after_the_end(steps: Steps, on_stream: bool) -> None:
    call, started = call_and_result(steps)
    life, stream = Life(), steps.stream("side") if on_stream else None
    with queued(call, stream=stream, wait_events=()):
        wait = wait_of(started, stream=stream, life=life)
    steps.clear()
    life.over = "this communicator is closed"
    with pytest.raises(ClosedError, match="is closed"):
        wait()
    assert steps == []


@pytest.mark.parametrize(
    ("beside", "order"),
    [
        ("dispatch", ["cached dispatch", "experts", "shared", "combine"]),
        ("combine", ["shared", "cached dispatch", "experts", "combine"]),
    ],
)
def test_other_work_is_beside_the_same_call_in_backward(
    monkeypatch: pytest.MonkeyPatch, beside: str, order: list[str]
) -> None:
    """It is queued before the call that it is beside, or before what waits for that call."""
    happened: list[str] = []

    def noted(value: torch.Tensor, name: str) -> torch.Tensor:
        value.register_hook(lambda _: happened.append(name))
        return value

    with make() as comm:
        fields = good()
        x = fields.pop("input").requires_grad_()
        dispatching = comm.dispatch_async(x, **fields)
        shared = noted(x.sin(), "shared") if beside == "dispatch" else x
        received, handle = dispatching.wait()
        combining = comm.combine_async(noted(received.tokens.cos(), "experts"), handle)
        if beside == "combine":
            shared = noted(x.sin(), "shared")
        y = shared + combining.wait()
        engine: Any = comm._engine
        for name, title in (("dispatch", "cached dispatch"), ("combine", "combine")):
            start = getattr(engine, name)

            def started(call: Any, start: Any = start, title: str = title) -> Any:
                happened.append(title)
                return start(call)

            monkeypatch.setattr(engine, name, started)
        y.sum().backward()
    assert happened == order


# -- the communicator's own stream ----------------------------------------------------------------

CONFIG = MoECommunicatorConfig(num_experts=2, hidden_size=8, topk=1, max_tokens_per_rank=4)


def test_the_stream_of_a_communicator_has_high_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[torch.device, int]] = []
    monkeypatch.setattr(
        torch.cuda, "Stream", lambda device, priority=0: made.append((device, priority))
    )
    gpu = torch.device("cuda", 1)
    make_stream(CONFIG, gpu)
    assert made == [(gpu, -1)]
    make_stream(CONFIG, torch.device("cpu"))
    make_stream(dataclasses.replace(CONFIG, enable_overlap=False), gpu)
    assert len(made) == 1


@pytest.mark.gpu(1)
@pytest.mark.parametrize("engine", ["collective", "nvlink"])
def test_asynchronous_calls_run_at_high_priority(engine: str) -> None:
    fields: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "engine": engine}
    with make(**fields) as comm:
        stream = comm.create_overlap_config("dispatch").stream
        assert stream is not None
        assert stream.priority < torch.cuda.Stream(comm.device).priority
        sms = torch.cuda.get_device_properties(comm.device).multi_processor_count
        taken = 0 if engine == "collective" else 5
        for op in ("dispatch", "combine"):
            assert comm.compute_sms(op, num_sms=5) == sms - taken


# -- settings -------------------------------------------------------------------------------------


def test_settings_come_from_the_configuration() -> None:
    with make(num_sms_dispatch=7, num_sms_combine=9) as comm:
        assert comm.create_overlap_config("dispatch") == CommOverlapConfig("dispatch", num_sms=7)
        assert comm.create_overlap_config("combine") == CommOverlapConfig("combine", num_sms=9)
        assert comm.create_overlap_config("combine", num_sms=2).num_sms == 2
        event: Any = object()
        for wrong in ({"stream": object()}, {"wait_events": [event]}):
            with pytest.raises(InputError, match="need a CUDA device, not cpu"):
                comm.create_overlap_config("dispatch", **wrong)  # type: ignore[arg-type]


def test_a_cpu_has_no_sms_to_leave() -> None:
    with make() as comm:
        with pytest.raises(ConfigurationError, match="SMs of a GPU; tensors live on cpu"):
            comm.compute_sms("dispatch")
        for call, message in ((("send",), "op='send'"), (("combine", 0), "num_sms=0")):
            op, *given = call
            with pytest.raises(InputError, match=message):
                comm.compute_sms(op, num_sms=given[0] if given else None)
    with pytest.raises(ClosedError, match="closed"):
        comm.compute_sms("dispatch")


def test_collective_leaves_all_sms_since_nccl_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda _: types.SimpleNamespace(multi_processor_count=132),
    )
    with make(num_sms_dispatch=7) as comm:
        comm.initialize()
        engine: Any = comm._engine
        monkeypatch.setattr(engine._wire, "device", torch.device("cuda", 0))
        assert comm.compute_sms("dispatch") == comm.compute_sms("combine", num_sms=9) == 132


def test_settings_of_the_other_operation_are_refused() -> None:
    with make() as comm:
        fields = good()
        dispatch, combine = (comm.create_overlap_config(op) for op in ("dispatch", "combine"))
        with pytest.raises(InputError, match="created for combine; this is dispatch"):
            comm.dispatch_async(**fields, overlap=combine)
        out, handle = comm.dispatch_async(**fields, overlap=dispatch).wait()
        with pytest.raises(InputError, match="created for dispatch; this is combine"):
            comm.combine_async(out.tokens, handle, overlap=dispatch)
        comm.combine_async(out.tokens, handle, overlap=combine).wait()
        with pytest.raises(InputError, match="created for send; this is dispatch"):
            comm.dispatch_async(**fields, overlap=CommOverlapConfig("send"))


def test_events_are_waited_for_in_line(steps: Steps) -> None:
    event = steps.event("event")
    with make() as comm:
        overlap = CommOverlapConfig("dispatch", wait_events=(event,))
        comm.dispatch_async(**good(), overlap=overlap).wait()
    assert steps == ["the current stream waits for event"]
