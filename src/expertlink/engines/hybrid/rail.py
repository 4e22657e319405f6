"""Rails: what moves rows between hosts. A rail joins the ranks of one index, one on every host.

In: rows for every other host, as bytes, with their numbers. Out: the rows of every other host. What
the rows are, and who gets them inside a host, is not known here.

`NcclRail` moves them through a process group of its own, `CopyRail` between threads of one process.
Both are called by the host, which says how many rows go where. A transport whose kernels start
transfers themselves, such as NCCL's GIN, would be another class here, and another answer of
the one function in the kernels that says whether the rows of a source have arrived. There is none
yet.
"""

from __future__ import annotations

import contextlib
import datetime
import enum
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, AllToAllOptions

from expertlink.engines.hybrid import ending
from expertlink.engines.hybrid.words import Marks
from expertlink.engines.nvlink.capture import is_capturing
from expertlink.engines.ranks.wire import WAIT_SLICE

logger = logging.getLogger("expertlink")

_CLOSING_S = 10.0
_HELD_S = 0.3  # where a CUDA graph may hold calls of the rail: it can live for long
_ABORTING_S = 1.0
_FOREVER = datetime.timedelta(days=3650)  # the monitor bounds the waits of a rail
_SHORT = datetime.timedelta(milliseconds=1)
_UNUSED_TAG = 0x7EADBEF
_QUIET = {
    # When an operation fails or expires, torch by default ends the process. The monitor reports
    # failures of a rail instead, and ends its operations.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_BLOCKING_WAIT": "0",
    # It ends the process, too, where an aborted communicator stays for minutes: in a CUDA graph.
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}
_environment = threading.Lock()


class RailError(RuntimeError):
    """Rows do not arrive: a connection is lost, or the rail was aborted."""


class Marked(enum.Flag):
    """What kernels beside a step of the rail say of it, so that the rail does not."""

    NOT = 0
    BEGUN = enum.auto()
    """The kernel before it, which waits for no rank, says that it has begun."""
    DONE = enum.auto()
    """The kernel behind it, which is launched at once, says that it is done."""


class Rail(Protocol):
    """One rail, as one of its ranks sees it. Calls are collective over the rail, in one order.

    Attributes:
        index: this rank's place on the rail: its host.
        size: N, ranks of the rail.
        capturable: calls can be captured in CUDA graphs.
        exact_sizes_in_graphs: a replay moves as many rows as there are then. False: as many as
            there were in the capture.
        marks: for kernels that say themselves that steps have begun, or are done; None: nobody
            counts steps.
    """

    @property
    def marks(self) -> Marks | None: ...

    @property
    def index(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def capturable(self) -> bool: ...

    @property
    def exact_sizes_in_graphs(self) -> bool: ...

    def gather(self, row: Tensor, rows: Tensor, stream: torch.cuda.Stream | None = None) -> None:
        """Every rank gets the row of every rank, its own included.

        Args:
            row: `[W]` uint8, contiguous; W is the same on all ranks.
            rows: `[N, W]` uint8, contiguous, in the order of the rail.
            stream: as in `exchange`.

        Raises:
            RailError: on CPUs, where the call waits.
        """
        ...

    def exchange(
        self,
        send: Tensor,
        receive: Tensor,
        send_rows: Sequence[int],
        receive_rows: Sequence[int],
        stream: torch.cuda.Stream | None = None,
        *,
        marked: Marked = Marked.NOT,
    ) -> None:
        """Sends rows to every other rank of the rail, and receives theirs.

        Nothing goes to the own rank: those rows need no rail, and the caller leaves them out.

        Args:
            send: `[sum(send_rows), row_bytes]` uint8, contiguous, one receiver after the other.
            receive: `[sum(receive_rows), row_bytes]` uint8, contiguous, one sender after the other.
            send_rows: `[N]` rows for each rank of the rail; may be 0, is 0 for the own one.
            receive_rows: `[N]` rows from each; what rank b receives from a is what a sends to b.
            stream: CUDA stream on which it happens; None: the current one. Both tensors are in use
                until the stream has got that far. CPU: ignored, it has happened on return.
            marked: which of the `marks` kernels write.

        Raises:
            RailError: on CPUs, where the call waits.
        """
        ...

    def abort(self) -> None:
        """Ends what is under way, on the device too; nothing works afterwards. From any thread.

        Takes a bounded time and raises nothing.
        """
        ...

    def close(self) -> None:
        """Releases everything. Nothing may be under way. Local, bounded; safe to repeat."""
        ...


class NcclRail:
    """A rail over a process group of its own: NCCL for tensors on GPUs, gloo for tensors on CPUs.

    The group is none of those that torch.distributed knows by name: `destroy_process_group` does
    not reach it, and its name cannot clash. `connect` makes it.

    Args:
        backend: of torch.distributed, with this rank's index and the rail's size.
        device: where the tensors live.
    """

    exact_sizes_in_graphs = False
    marks = None

    def __init__(self, backend: Any, *, device: torch.device) -> None:
        self.index: int = backend.rank()
        self.size: int = backend.size()
        self.capturable = self._on_gpu = device.type == "cuda"
        self._device = device
        self._backend: Any = backend
        self._process = os.getpid()
        self._ended: str | None = None
        self._captured = False  # a CUDA graph may hold calls of this rail
        self._under_way: Any = None  # CPU
        self._exchange_options, self._gather_options = AllToAllOptions(), AllgatherOptions()
        for options in (self._exchange_options, self._gather_options):
            options.asyncOp = not self._on_gpu  # GPU: on the current stream, without one more
            options.timeout = _FOREVER
        self._dropped: Any = None
        if self._on_gpu:
            self._dropped = weakref.finalize(self, _drop, backend, self._process)
            self._dropped.atexit = False
            ending.end_with_the_process(self)

    @classmethod
    def connect(
        cls,
        store: Any,
        *,
        index: int,
        size: int,
        device: torch.device,
        max_ctas: int | None,
        timeout_s: float,
    ) -> NcclRail:
        """Meets the other ranks of the rail and moves a row to each. Collective over the rail.

        Args:
            store: key-value store of the rail's ranks, that nobody else uses.
            index: this rank's place on the rail.
            size: N.
            device: where the tensors live.
            max_ctas: most thread blocks, and so SMs, of NCCL's kernels; None: NCCL decides.
            timeout_s: bound of the meeting.

        Raises:
            RailError: it failed, or took longer.
        """

        def meet() -> NcclRail:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # of this thread
                backend = _nccl(store, index, size, device, max_ctas)
            else:
                seconds = datetime.timedelta(seconds=timeout_s)
                backend = dist.ProcessGroupGloo(store, index, size, seconds)
            rail = cls(backend, device=device)
            _warm_up(rail, device)
            return rail

        return _within(timeout_s, meet)

    def gather(self, row: Tensor, rows: Tensor, stream: torch.cuda.Stream | None = None) -> None:
        """See `Rail`."""
        backend, options = self._backend, self._gather_options
        self._run(lambda: backend._allgather_base(rows.view(-1), row, options), stream)

    def exchange(
        self,
        send: Tensor,
        receive: Tensor,
        send_rows: Sequence[int],
        receive_rows: Sequence[int],
        stream: torch.cuda.Stream | None = None,
        *,
        marked: Marked = Marked.NOT,
    ) -> None:
        """See `Rail`."""
        assert send_rows[self.index] == receive_rows[self.index] == 0
        backend, options = self._backend, self._exchange_options
        splits = (list(receive_rows), list(send_rows))
        self._run(lambda: backend.alltoall_base(receive, send, *splits, options), stream)

    def _run(self, issue: Callable[[], Any], stream: torch.cuda.Stream | None) -> None:
        if self._ended is not None:
            raise RailError(self._ended)
        try:
            if not self._on_gpu:
                self._complete(issue())
            elif stream is None or stream == torch.cuda.current_stream(self._device):
                self._issue(issue)
            else:
                with torch.cuda.stream(stream):
                    self._issue(issue)
        except RuntimeError as error:
            if isinstance(error, RailError):
                raise
            raise RailError(self._ended or _first_line(error)) from error

    def _issue(self, issue: Callable[[], Any]) -> None:
        self._captured = self._captured or is_capturing()
        issue()

    def _complete(self, work: Any) -> None:
        """Waits on the host, for ever: the monitor aborts what takes too long."""
        self._under_way = work
        while not work.is_completed():
            if self._ended is not None:
                raise RailError(self._ended)
            with contextlib.suppress(RuntimeError):  # this part of the wait is over
                work.wait(WAIT_SLICE)
        work.wait()  # raises if the operation failed
        self._under_way = None

    def abort(self) -> None:
        """See `Rail`."""
        if self._ended is not None:
            return
        self._ended = "the rail was aborted"
        if self._on_gpu:
            ending.end(self._backend.abort, "expertlink rail abort", _ABORTING_S)
            return
        with contextlib.suppress(RuntimeError):
            self._disconnect()

    def close(self) -> None:
        """See `Rail`. What CUDA graphs hold of it goes with the last of them."""
        if os.getpid() != self._process:  # a fork shares the connections, and has no threads
            return
        backend, self._backend = self._backend, None
        if backend is None:
            return
        ended, self._ended = self._ended, "the rail is closed"
        if not self._on_gpu:
            self._disconnect(backend)
            return
        self._dropped.detach()
        if ended is not None:  # aborted communicators are gone, or a thread waits for their graphs
            return
        seconds = _HELD_S if self._captured else _CLOSING_S
        if ending.end(backend.shutdown, "expertlink rail end", seconds):
            return
        if self._captured:
            logger.info("NCCL holds the memory of a rail until no CUDA graph has calls of it")
        else:
            logger.warning("NCCL did not release a rail within %g s", seconds)

    def end_at_exit(self) -> None:
        """See `ending.Endable`. As torch does with groups that nobody destroyed."""
        backend = self._backend
        if backend is None:
            return
        self._dropped.detach()
        if os.getpid() != self._process:
            ending.keep(backend)
        elif self._ended is None:
            self._ended = "the process ends"
            ending.end(backend.abort, "expertlink rail abort", 0.0)

    def _disconnect(self, backend: Any = None) -> None:
        """Ends an operation of gloo, which has no abort: a receive that expires closes connections.

        A receive from a rank that has closed its connection fails at once and closes nothing, so
        every rank is tried.
        """
        backend, work = backend or self._backend, self._under_way
        word = torch.empty(1, dtype=torch.uint8, device="cpu")
        for step in range(1, self.size):
            if work is None or work.is_completed():
                return
            with contextlib.suppress(RuntimeError):
                backend.recv([word], (self.index + step) % self.size, _UNUSED_TAG).wait(_SHORT)


class CopyRail:
    """A rail between threads of one process, which copy rows from each other's tensors.

    For ranks hosted in one process. `connected` makes all ends. Calls cannot be captured: threads
    meet in them.
    """

    capturable = False
    exact_sizes_in_graphs = False
    marks = None

    def __init__(self, index: int, meeting: _Meeting) -> None:
        self.index, self.size = index, meeting.size
        self._meeting = meeting

    @classmethod
    def connected(cls, size: int, *, timeout_s: float) -> list[CopyRail]:
        """All ends of a rail of `size` ranks, whose calls wait for each other so long."""
        meeting = _Meeting(size, timeout_s)
        return [cls(index, meeting) for index in range(size)]

    def gather(self, row: Tensor, rows: Tensor, stream: torch.cuda.Stream | None = None) -> None:
        """See `Rail`."""
        with self._swapped(row, stream) as sources:
            for index, source in enumerate(sources):
                rows[index].copy_(source, non_blocking=True)

    def exchange(
        self,
        send: Tensor,
        receive: Tensor,
        send_rows: Sequence[int],
        receive_rows: Sequence[int],
        stream: torch.cuda.Stream | None = None,
        *,
        marked: Marked = Marked.NOT,
    ) -> None:
        """See `Rail`."""
        assert send_rows[self.index] == receive_rows[self.index] == 0
        assert send.shape[0] == sum(send_rows)
        assert receive.shape[0] == sum(receive_rows)
        with self._swapped(list(send.split(list(send_rows))), stream) as sources:
            for source, target in zip(sources, receive.split(list(receive_rows)), strict=True):
                assert source[self.index].shape == target.shape or not target.shape[0]
                target.copy_(source[self.index], non_blocking=True)

    @contextlib.contextmanager
    def _swapped(self, mine: Any, stream: torch.cuda.Stream | None) -> Iterator[list[Any]]:
        """What all ranks pass, to be read on the stream; they may write to it again afterwards."""
        first = mine[0] if isinstance(mine, list) else mine
        if not first.is_cuda:
            yield [value for value, _ in self._meeting.swap(self.index, (mine, None))]
            self._meeting.swap(self.index, None)
            return
        stream = stream or torch.cuda.current_stream(first.device)
        with torch.cuda.stream(stream):
            written = self._meeting.swap(self.index, (mine, stream.record_event()))
            for _, event in written:
                stream.wait_event(event)
            yield [value for value, _ in written]
            for event in self._meeting.swap(self.index, stream.record_event()):
                stream.wait_event(event)

    def abort(self) -> None:
        """See `Rail`. Ends the calls of all ranks."""
        self._meeting.end()

    def close(self) -> None:
        """See `Rail`."""


def _drop(backend: Any, process: int) -> None:
    """Ends the group of a rail that nobody closed; its destructor could wait for a CUDA graph."""
    if os.getpid() != process:
        ending.keep(backend)
    else:
        ending.end(backend.shutdown, "expertlink rail end", 0.0)


class _Meeting:
    """Where threads exchange values."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.size = size
        self._timeout_s = timeout_s
        self._values: list[Any] = [None] * size
        self._everyone: list[Any] = []
        self._barrier = threading.Barrier(size, self._collect)

    def _collect(self) -> None:
        # Replaced as a whole: nobody comes to the next exchange before all have left this one.
        self._everyone = list(self._values)

    def swap(self, index: int, value: Any) -> list[Any]:
        self._values[index] = value
        try:
            self._barrier.wait(self._timeout_s)
        except threading.BrokenBarrierError:
            raise RailError("a rank of the rail did not come, or has failed") from None
        return self._everyone

    def end(self) -> None:
        self._barrier.abort()


def _nccl(store: Any, index: int, size: int, device: torch.device, max_ctas: int | None) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _FOREVER
    if max_ctas is not None:
        options.config.max_ctas = max_ctas
    with _environment:  # torch reads it when it makes the group, and only then
        before = {name: os.environ.get(name) for name in _QUIET}
        os.environ.update(_QUIET)
        try:
            backend = dist.ProcessGroupNCCL(store, index, size, options)
        finally:
            for name, text in before.items():
                if text is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = text
    backend.eager_connect_single_device(device)
    return backend


def _warm_up(rail: NcclRail, device: torch.device) -> None:
    """Moves a row to each rank: NCCL connects them at the first use, which cannot be captured."""
    mine = torch.full((16,), rail.index, dtype=torch.uint8, device=device)
    rows = torch.empty((rail.size, 16), dtype=torch.uint8, device=device)
    rail.gather(mine, rows)
    splits = [int(index != rail.index) for index in range(rail.size)]
    received = torch.empty((rail.size - 1, 16), dtype=torch.uint8, device=device)
    rail.exchange(mine.expand(rail.size - 1, -1).contiguous(), received, splits, splits)
    others = [index for index in range(rail.size) if index != rail.index]
    if rows[:, 0].tolist() != list(range(rail.size)) or received[:, 0].tolist() != others:
        raise RailError("rows of the first exchange arrived where they do not belong")


def _within(timeout_s: float, meet: Callable[[], NcclRail]) -> NcclRail:
    """What `meet` returns; in a thread of its own, since it may never end.

    Raises:
        RailError: it failed, or took longer.
    """
    rails: list[NcclRail] = []
    errors: list[BaseException] = []
    lock = threading.Lock()
    given_up = False

    def run() -> None:
        try:
            rail = meet()
        except BaseException as error:  # raised where it is waited for
            errors.append(error)
            return
        with lock:
            if not given_up:
                rails.append(rail)
                return
        rail.close()

    thread = threading.Thread(target=run, daemon=True, name="expertlink-rail")
    started = time.monotonic()
    thread.start()
    waited = False
    try:
        while thread.is_alive() and time.monotonic() - started < timeout_s:
            thread.join(0.05)  # signals are served in between
        waited = True
    finally:  # one of them may end the wait: nobody will have the rail
        with lock:
            given_up = True
        if rails and not waited:
            rails[0].close()
    if rails:
        return rails[0]
    if errors:
        raise RailError(_first_line(errors[0])) from errors[0]
    raise RailError(f"no connection within {timeout_s:g} s")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
