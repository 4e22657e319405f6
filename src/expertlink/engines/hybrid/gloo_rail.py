"""A rail between CPUs, over a group of gloo that torch.distributed does not know by name."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, AllToAllOptions

from expertlink.engines.hybrid import ending
from expertlink.engines.hybrid.rail import Marked, RailError
from expertlink.engines.ranks.wire import WAIT_SLICE

_FOREVER = datetime.timedelta(days=3650)  # the monitor bounds the waits of a rail
_SHORT = datetime.timedelta(milliseconds=1)
_UNUSED_TAG = 0x7EADBEF
_ENDING_S = 2.0
_POLL_S = 0.001

logger = logging.getLogger("expertlink")


class GlooRail:
    """See `rail.Rail`. `destroy_process_group` does not reach its group.

    Args:
        store: of the rail's ranks.
        index: this rank's place on the rail.
        size: N.
        timeout_s: bound of the meeting.
    """

    capturable = False
    exact_sizes_in_graphs = False
    marks = None

    def __init__(self, store: Any, *, index: int, size: int, timeout_s: float) -> None:
        self.index, self.size = index, size
        seconds = datetime.timedelta(seconds=timeout_s)
        self._group: Any = dist.ProcessGroupGloo(store, index, size, seconds)
        self._process = os.getpid()
        self._ended: str | None = None
        self._under_way: Any = None
        self._held: tuple[Tensor, ...] = ()  # that the latest operation uses
        self._exchange_options, self._gather_options = AllToAllOptions(), AllgatherOptions()
        for options in (self._exchange_options, self._gather_options):
            options.timeout = _FOREVER

    def gather(self, row: Tensor, rows: Tensor, stream: torch.cuda.Stream | None = None) -> None:
        """See `Rail`."""
        to, options = rows.view(-1), self._gather_options
        self._run(lambda: self._group._allgather_base(to, row, options), to, row)

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
        splits, options = (list(receive_rows), list(send_rows)), self._exchange_options
        self._run(lambda: self._group.alltoall_base(receive, send, *splits, options), send, receive)

    def _run(self, issue: Callable[[], Any], *tensors: Tensor) -> None:
        if self._ended is not None:
            raise RailError(self._ended)
        self._held = tensors
        try:
            self._complete(issue())
        except RuntimeError as error:
            if isinstance(error, RailError):
                raise
            raise RailError(self._ended or str(error).strip().partition("\n")[0]) from error

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
        with contextlib.suppress(RuntimeError):
            self._disconnect(self._group)

    def close(self) -> None:
        """See `Rail`."""
        if os.getpid() != self._process:  # a fork shares the connections, and has no threads
            return
        group, self._group = self._group, None
        if group is None:
            return
        self._ended = "the rail is closed"
        self._disconnect(group)
        work, deadline = self._under_way, time.monotonic() + _ENDING_S
        while work is not None and not work.is_completed():
            if time.monotonic() > deadline:  # the destructor would wait, and Python with it
                ending.keep(group)
                logger.warning("gloo did not end an operation of a rail within %g s", _ENDING_S)
                break
            time.sleep(_POLL_S)
        # The destructor waits for threads that let go of tensors. The last reference to one takes
        # Python's lock, which this thread has, so they must not have it.
        del group
        self._held = ()

    def _disconnect(self, group: Any) -> None:
        """Ends an operation of gloo, which has no abort: a receive that expires closes connections.

        A receive from a rank that has closed its connection fails at once and closes nothing, so
        every rank is tried.
        """
        work = self._under_way
        word = torch.empty(1, dtype=torch.uint8, device="cpu")
        for step in range(1, self.size):
            if work is None or work.is_completed():
                return
            with contextlib.suppress(RuntimeError):
                group.recv([word], (self.index + step) % self.size, _UNUSED_TAG).wait(_SHORT)
