"""Statistics as metrics: what is counted arrives, once, and nothing goes on without being asked."""

from __future__ import annotations

import logging
import sys
import threading
from typing import Any

import pytest
import torch

from expertlink import ClosedError, ConfigurationError, MoECommunicator
from expertlink.metrics import Reporter, Sample, report
from support.small_calls import make

H = 8


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.arrived = threading.Event()
        self.closed = 0

    def put(self, sample: Sample) -> None:
        self.samples.append(sample)
        self.arrived.set()

    def close(self) -> None:
        self.closed += 1

    def total(self, field: str) -> list[int]:
        return [sum(values) for values in zip(*(s.added[field] for s in self.samples), strict=True)]


def call(comm: MoECommunicator, *experts: int) -> None:
    x_TH = torch.ones(len(experts), H, dtype=comm.config.dtype, device=comm.device)
    ids_TK = torch.tensor([[expert, -1] for expert in experts], device=comm.device)
    received, handle = comm.dispatch(x_TH, ids_TK)
    comm.combine(received.tokens, handle)


def small(**fields: Any) -> MoECommunicator:
    return make(num_experts=3, hidden_size=H, topk=2, max_tokens_per_rank=8, **fields)


def test_samples_say_what_was_added() -> None:
    sink = Kept()
    with small() as comm:
        reporter = report(comm, to=sink, every_s=1000)
        call(comm, 0, 2, 2)
        first = reporter.sample()
        call(comm, 1)
        second = reporter.sample()
        assert first is not None
        assert second is not None
        assert [first.added["tokens_per_expert"], second.added["tokens_per_expert"]] == [
            [1, 0, 2],
            [0, 1, 0],
        ]
        assert first.added["rows_sent"] == [6]  # 3 there, 3 back
        comm.enable_statistics().tokens_per_expert.zero_()
        call(comm, 2)
        third = reporter.sample()
        assert third is not None
        assert third.added["tokens_per_expert"] == [0, 0, 1]
        call(comm, 0)
    reporter.stop()  # also when the communicator is closed
    reporter.stop()
    assert sink.total("tokens_per_expert") == [2, 1, 3]
    assert sink.closed == 1
    assert reporter.sample() is None
    with pytest.raises(ConfigurationError, match="was stopped"):
        reporter.start()


def test_a_thread_reads_between_start_and_stop_alone() -> None:
    sink = Kept()
    with small() as comm:
        before = threading.active_count()
        reporter = report(comm, to=sink, every_s=0.01)
        assert threading.active_count() == before
        with reporter:
            reporter.start()  # once more
            assert threading.active_count() == before + 1
            for _ in range(5):
                sink.arrived.clear()
                call(comm, 0, 1)
                assert sink.arrived.wait(30)
        assert threading.active_count() == before
        call(comm, 0)
    assert sink.total("tokens_per_expert") == [5, 5, 0]


def test_readers_of_several_threads_count_everything_once() -> None:
    sink = Kept()
    with small() as comm, report(comm, to=sink, every_s=0.001) as reporter:
        threads = [
            threading.Thread(target=lambda: [reporter.sample() for _ in range(20)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for _ in range(10):
            call(comm, 2)
        for thread in threads:
            thread.join(30)
    assert sink.total("tokens_per_expert") == [0, 0, 10]


def test_a_sink_that_fails_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Kept):
        def put(self, sample: Sample) -> None:
            super().put(sample)
            raise RuntimeError("no room")

    sink = Failing()
    with small() as comm, report(comm, to=sink, every_s=0.001):
        for _ in range(2):
            sink.arrived.clear()
            assert sink.arrived.wait(30)
    assert "statistics were not reported: no room" in caplog.text
    assert sink.closed == 1


def test_lines_of_a_log(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("mine")
    caplog.set_level(logging.INFO, "mine")
    with small() as comm:
        reporter = report(comm, logger=logger, name="layer 3", every_s=1000)
        call(comm, 0, 2, 2, 2)
        reporter.sample()
        reporter.stop()
    first = caplog.messages[0]
    assert first.startswith("layer 3: rank 0, ")
    assert first.endswith("4 tokens, busiest expert 2 (2.25 of the mean), 0 B sent, 0 B received")
    line = str(
        Sample(
            2.0,
            {
                "tokens_per_expert": [0, 0],
                "rows_sent": [1, 1],
                "rows_received": [1, 1],
                "bytes_sent": [0, 1_234_567],
                "bytes_received": [0, 999],
                "longest_wait_ns": [0, 2_500_000],
            },
            (4, 9),
            0,
            "x",
        )
    )
    assert line == (
        "x: rank 0, 2.0 s: 0 tokens, 1.23 MB sent, 999 B received, longest wait 2.5 ms, for rank 1"
    )


def test_metrics_of_prometheus() -> None:
    prometheus = pytest.importorskip("prometheus_client")
    registry = prometheus.CollectorRegistry()

    def value(metric: str, **labels: str) -> float | None:
        return registry.get_sample_value(metric, {"name": "a", "rank": "0", **labels})

    with small() as one, small() as two:
        reporter = report(one, registry=registry, name="a", every_s=1000)
        other = report(two, to="prometheus", registry=registry, name="b", every_s=1000)
        for _ in range(2):
            call(one, 0, 2, 2)
            reporter.sample()
        other.sample()
        assert value("expertlink_expert_tokens_total", expert="2") == 4
        assert value("expertlink_rows_sent_total", peer="0") == 12
        assert value("expertlink_bytes_sent_total", peer="0") == 0
        assert value("expertlink_longest_wait_seconds", peer="0") == 0
        assert b'name="b"' in prometheus.generate_latest(registry)
        with pytest.raises(ConfigurationError, match="name='a' is taken"):
            report(one, registry=registry, name="a")
        reporter.stop()
        assert value("expertlink_expert_tokens_total", expert="2") is None
        again = report(one, registry=registry, name="a", every_s=1000)
        again.stop()
        other.stop()
    assert b'name="' not in prometheus.generate_latest(registry)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"every_s": 0}, "every_s=0 is not possible"),
        ({"every_s": float("nan")}, "every_s=nan"),
        ({"to": "carrier pigeon"}, "accepted: auto, prometheus or log"),
        ({"to": "prometheus"}, "prometheus_client is not installed"),
    ],
)
def test_impossible_reports_are_refused(
    options: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with small() as comm, pytest.raises(ConfigurationError) as refused:
        report(comm, **options)
    assert says in str(refused.value)


def test_closed_communicators_have_no_reporter() -> None:
    comm = small()
    comm.close()
    with pytest.raises(ClosedError):
        report(comm, to="log")


@pytest.mark.gpu
def test_a_capture_goes_on_beside_a_reporter() -> None:
    """In the strictest mode, in which other threads may spoil it."""
    sink = Kept()
    config: dict[str, Any] = {"mode": "ll", "dtype": torch.bfloat16, "device": "cuda"}
    with small(**config, engine="nvlink") as comm:
        reporter: Reporter = report(comm, to=sink, every_s=0.001)
        buffers = comm.create_buffers()
        x_TH = torch.ones(4, H, dtype=torch.bfloat16, device="cuda")
        ids_TK = torch.zeros(4, 2, dtype=torch.int64, device="cuda")
        ids_TK[:, 1] = -1

        def step() -> None:
            received, handle = comm.dispatch(x_TH, ids_TK, output_buffer=buffers)
            comm.combine(received.tokens, handle)

        with torch.no_grad(), reporter:
            step()
            sink.arrived.wait(30)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="global"):
                for _ in range(50):
                    step()
            graph.replay()
            torch.cuda.synchronize()
    assert sink.total("tokens_per_expert")[0] == 4 * 51
