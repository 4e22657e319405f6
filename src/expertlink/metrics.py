"""Statistics of a communicator as metrics: for Prometheus' client, or as a line of the log.

In: the running totals of `enable_statistics()`. Out: every few seconds, what has been added to
them. Nothing here is collective, and calls are neither changed nor waited for: totals are copied on
a stream of their own.

| metric | kind | labels |
|---|---|---|
| `expertlink_expert_tokens_total` | counter | name, rank, expert |
| `expertlink_rows_sent_total`, `expertlink_rows_received_total` | counter | name, rank, peer |
| `expertlink_bytes_sent_total`, `expertlink_bytes_received_total` | counter | name, rank, peer |
| `expertlink_rail_bytes_total` | counter | name, rank, host |
| `expertlink_longest_wait_seconds` | gauge | name, rank, peer |
"""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, Literal, Protocol

import torch

from expertlink.communicator import MoECommunicator
from expertlink.errors import ConfigurationError
from expertlink.settings import positive_seconds
from expertlink.types import CallStatistics

_READ_S = 5.0  # how long a copy of the totals may take; it waits for no call
_POLL_S = 0.001
_RELAXED = 2  # cuda's capture mode in which a thread disturbs no capture of other threads

Totals = dict[str, list[int]]
"""Values of every field of `CallStatistics`."""


@dataclass(frozen=True)
class Sample:
    """What was counted between two readings.

    Attributes:
        seconds: between them.
        added: by field of `CallStatistics`, its increase. `longest_wait_ns` is the total itself.
        experts: ids of the local experts, in the order of `tokens_per_expert`.
        rank: this rank.
        name: of the communicator, as given to `report`.
    """

    seconds: float
    added: Totals
    experts: tuple[int, ...]
    rank: int
    name: str

    def __str__(self) -> str:
        tokens, wait = self.added["tokens_per_expert"], self.added["longest_wait_ns"]
        parts = [f"{self.name}: rank {self.rank}, {self.seconds:.1f} s: {sum(tokens)} tokens"]
        if sum(tokens):
            busiest = tokens.index(max(tokens))
            over_mean = tokens[busiest] * len(tokens) / sum(tokens)
            parts.append(f"busiest expert {self.experts[busiest]} ({over_mean:.2f} of the mean)")
        sent, received = (sum(self.added[f"bytes_{way}"]) for way in ("sent", "received"))
        parts.append(f"{_in_bytes(sent)} sent, {_in_bytes(received)} received")
        if any(wait):
            peer = wait.index(max(wait))
            parts.append(f"longest wait {wait[peer] / 1e6:.3g} ms, for rank {peer}")
        return ", ".join(parts)


class Sink(Protocol):
    """Where samples go."""

    def put(self, sample: Sample) -> None:
        """Takes a sample. Called by one thread at a time."""
        ...

    def close(self) -> None:
        """No sample follows."""
        ...


class Reporter:
    """Reads a communicator's totals every few seconds, between `start` and `stop`.

    All methods may be called from any thread. Usable as a context manager, which starts and stops.
    A reading that fails, or does not come to an end in 5 s, is left out with a warning in the log;
    what it would have said is in the next one. Make one per communicator and stop it before the end
    of the process. It keeps the totals' memory, and nothing else of the communicator. Do not zero
    the totals meanwhile: one that has become less is taken to have begun at 0 again, but one that
    has grown beyond its last value cannot be told from one that was left alone.

    Args:
        statistics: the totals, of `enable_statistics()`.
        sink: where samples go.
        every_s: seconds between readings.
        experts: ids of the local experts.
        rank: this rank.
        name: tells communicators apart.
    """

    def __init__(
        self,
        statistics: CallStatistics,
        sink: Sink,
        *,
        every_s: float,
        experts: Sequence[int],
        rank: int,
        name: str,
    ) -> None:
        self._reader = _Reader(statistics)
        self._sink, self._every_s = sink, every_s
        self._experts, self._rank, self._name = tuple(experts), rank, name
        self._lock = threading.Lock()  # of all that follows
        self._last: Totals = {field.name: [] for field in fields(CallStatistics)}
        self._last_at = time.monotonic()
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._closed = False

    def start(self) -> Reporter:
        """Begins to read, in a thread of its own. Repeatable.

        Raises:
            ConfigurationError: it was stopped.
        """
        with self._lock:
            if self._closed:
                raise ConfigurationError("this reporter was stopped: make a new one")
            if self._thread is None:
                name = f"expertlink metrics: {self._name}"
                self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._thread.start()
        return self

    def stop(self) -> None:
        """Reads once more and ends the thread; takes at most about 15 s. Safe to repeat."""
        self._stopping.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(2 * _READ_S)
            if thread.is_alive():  # in a sink of the caller, which has the lock
                _log().warning("%s: the reporter's thread does not end", self._name)
                return
        self._try_sample()
        with self._lock:
            if not self._closed:
                self._closed = True
                self._sink.close()

    def sample(self) -> Sample | None:
        """Reads now, and hands the sample to the sink.

        None where it could not be read in 5 s, in a capture, and after `stop()`.
        """
        with self._lock:
            if self._closed:
                return None
            totals = self._reader.read()
            if totals is None:
                _log().warning("%s: statistics could not be read", self._name)
                return None
            now = time.monotonic()
            added = {
                field: _increase(values, self._last[field]) for field, values in totals.items()
            }
            added["longest_wait_ns"] = totals["longest_wait_ns"]
            found = Sample(now - self._last_at, added, self._experts, self._rank, self._name)
            self._last, self._last_at = totals, now
            self._sink.put(found)
            return found

    def __enter__(self) -> Reporter:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _run(self) -> None:
        self._reader.relax_captures()
        while not self._stopping.wait(self._every_s):
            self._try_sample()

    def _try_sample(self) -> None:
        try:
            self.sample()
        except Exception as error:  # a sink of the caller, or a broken CUDA context
            _log().warning("%s: statistics were not reported: %s", self._name, error)


def report(
    comm: MoECommunicator,
    *,
    every_s: float = 10.0,
    to: Literal["auto", "prometheus", "log"] | Sink = "auto",
    logger: logging.Logger | None = None,
    registry: Any = None,
    name: str = "moe",
) -> Reporter:
    """A reporter of a communicator's statistics, which counts from now on. Local; not yet started.

    Initializes the communicator (collective) if needed. Serve Prometheus' metrics as usual, such as
    by `prometheus_client.start_http_server(port)`.

    Args:
        comm: the communicator.
        every_s: seconds between readings.
        to: "prometheus" for its client, "log" for a line at level INFO, or an object of yours with
            `put(sample)` and `close()`. "auto": the client where it is installed and no `logger` is
            given, else the log.
        logger: of the lines; None: the library's, "expertlink".
        registry: of the client; None: its default one.
        name: label of the metrics. Communicators of one process need different ones.

    Raises:
        ConfigurationError: the client is not installed, the name is taken, or an argument is not
            possible.
    """
    try:
        every_s = positive_seconds(every_s)
    except ValueError as error:
        raise ConfigurationError(f"every_s={every_s!r} is not possible: {error}") from None
    if to == "auto":
        installed = importlib.util.find_spec("prometheus_client") is not None
        to = "prometheus" if logger is None and (registry is not None or installed) else "log"
    if isinstance(to, str) and to not in ("prometheus", "log"):
        raise ConfigurationError(f"to={to!r} is not possible; accepted: auto, prometheus or log")
    statistics = comm.enable_statistics()
    if to == "prometheus":
        to = _Prometheus(registry, name=name, rank=comm.rank)
    elif to == "log":
        to = _Log(logger or _log())
    assert not isinstance(to, str)
    experts = comm.local_experts
    return Reporter(statistics, to, every_s=every_s, experts=experts, rank=comm.rank, name=name)


def _log() -> logging.Logger:
    return logging.getLogger("expertlink")


def _increase(values: list[int], before: list[int]) -> list[int]:
    """What was added; a total that has become less was set to zero in between."""
    before = before or [0] * len(values)
    return [new - old if new >= old else new for new, old in zip(values, before, strict=True)]


def _in_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


# -- reading --------------------------------------------------------------------------------------


class _Reader:
    """Copies totals to the host, beside the calls."""

    def __init__(self, statistics: CallStatistics) -> None:
        self._tensors = {
            field.name: getattr(statistics, field.name) for field in fields(CallStatistics)
        }
        self._device = statistics.rows_sent.device
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))  # zeros are there
            self._host = {
                name: torch.empty_like(tensor, device="cpu", pin_memory=True)
                for name, tensor in self._tensors.items()
            }

    def relax_captures(self) -> None:
        """What this thread does disturbs no capture of a CUDA graph by another one."""
        if self._stream is None:
            return
        try:
            import cuda.bindings.driver as driver
        except ImportError:
            return
        torch.cuda.set_device(self._device)
        driver.cuThreadExchangeStreamCaptureMode(driver.CUstreamCaptureMode(_RELAXED))

    def read(self) -> Totals | None:
        """The totals; None where the device does not answer in time."""
        if self._stream is None:
            return {name: tensor.tolist() for name, tensor in self._tensors.items()}
        if torch.cuda.is_current_stream_capturing():
            return None
        with torch.cuda.stream(self._stream):
            for name, tensor in self._tensors.items():
                self._host[name].copy_(tensor, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        deadline = time.monotonic() + _READ_S
        while not done.query():
            if time.monotonic() > deadline:
                return None
            time.sleep(_POLL_S)
        return {name: tensor.tolist() for name, tensor in self._host.items()}


# -- sinks ----------------------------------------------------------------------------------------


class _Log:
    """A line per sample."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def put(self, sample: Sample) -> None:
        """Writes it."""
        self._logger.info("%s", sample)

    def close(self) -> None:
        """Nothing is left to do."""


_COUNTERS = {
    "tokens_per_expert": ("expertlink_expert_tokens", "expert", "Rows received for an expert."),
    "rows_sent": ("expertlink_rows_sent", "peer", "Rows sent to a rank, the own one included."),
    "rows_received": ("expertlink_rows_received", "peer", "Rows received from a rank."),
    "bytes_sent": ("expertlink_bytes_sent", "peer", "Bytes sent to another rank."),
    "bytes_received": ("expertlink_bytes_received", "peer", "Bytes received from another rank."),
    "rail_bytes": ("expertlink_rail_bytes", "host", "Bytes that calls need between hosts."),
}
_WAIT = ("expertlink_longest_wait_seconds", "Longest time that a call waited for a rank.")


class _Metrics:
    """The metrics of one registry, which takes each name once."""

    def __init__(self, registry: Any) -> None:
        from prometheus_client import Counter, Gauge  # pyright: ignore[reportMissingImports]

        self.counters = {
            field: Counter(name, text, ["name", "rank", label], registry=registry)
            for field, (name, label, text) in _COUNTERS.items()
        }
        self.wait = Gauge(*_WAIT, ["name", "rank", "peer"], registry=registry)
        self.names: set[str] = set()


_metrics: weakref.WeakKeyDictionary[Any, _Metrics] = weakref.WeakKeyDictionary()
_metrics_lock = threading.Lock()


class _Prometheus:
    """Metrics of one communicator, until it is closed."""

    def __init__(self, registry: Any, *, name: str, rank: int) -> None:
        try:
            from prometheus_client import REGISTRY  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ConfigurationError(
                "to='prometheus' is not possible: prometheus_client is not installed; accepted: "
                "'log', or pip install prometheus-client"
            ) from None
        registry = REGISTRY if registry is None else registry
        with _metrics_lock:
            if registry not in _metrics:
                _metrics[registry] = _Metrics(registry)
            self._all = _metrics[registry]
            if name in self._all.names:
                raise ConfigurationError(
                    f"name={name!r} is taken by another reporter; accepted: a name of its own"
                )
            self._all.names.add(name)
        self._own = (name, str(rank))
        self._labels: set[tuple[Any, tuple[str, ...]]] = set()

    def put(self, sample: Sample) -> None:
        """Adds it to the counters."""
        for field, counter in self._all.counters.items():
            values = sample.added[field]
            ids = sample.experts if field == "tokens_per_expert" else range(len(values))
            for one, value in zip(ids, values, strict=True):
                self._child(counter, one).inc(value)
        for peer, nanoseconds in enumerate(sample.added["longest_wait_ns"]):
            self._child(self._all.wait, peer).set(nanoseconds / 1e9)

    def close(self) -> None:
        """Takes the communicator's series away; its name is free."""
        for metric, labels in self._labels:
            metric.remove(*labels)
        self._labels.clear()
        with _metrics_lock:
            self._all.names.discard(self._own[0])

    def _child(self, metric: Any, label: int) -> Any:
        labels = (*self._own, str(label))
        self._labels.add((metric, labels))
        return metric.labels(*labels)
