"""Rails: what moves rows between hosts. A rail joins the ranks of one index, one on every host.

In: rows for every other host, as bytes, with their numbers. Out: the rows of every other host. What
the rows are, and who gets them inside a host, is not known here.

`NcclRail` (nccl_rail.py) joins GPUs, `GlooRail` (gloo_rail.py) CPUs, `CopyRail` threads of one
process; connect.py makes them. All are called by the host, which says how many rows go where. A
transport whose kernels start transfers themselves, such as NCCL's GIN, would be another class, and
another answer of the one function in the kernels that says whether the rows of a source have
arrived. There is none yet.
"""

from __future__ import annotations

import contextlib
import enum
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from expertlink.engines.hybrid.words import Marks


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
