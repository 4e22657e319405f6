"""A rail between GPUs, over a communicator of NCCL of its own."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from expertlink.engines.hybrid import ending
from expertlink.engines.hybrid.nccl import Communicator, NcclError
from expertlink.engines.hybrid.rail import Marked, RailError
from expertlink.engines.nvlink.capture import is_capturing

logger = logging.getLogger("expertlink")

_CLOSING_S = 10.0
_HELD_S = 0.3  # where a CUDA graph may hold calls of the rail: it can live for long
_ABORTING_S = 1.0


class NcclRail:
    """See `rail.Rail`. Nobody else uses the communicator: torch.distributed does not know of it.

    Args:
        communicator: of the ranks of the rail.
        device: where the tensors live.
    """

    capturable = True
    exact_sizes_in_graphs = False
    marks = None

    def __init__(self, communicator: Communicator, *, device: torch.device) -> None:
        self.index, self.size = communicator.rank, communicator.size
        self._communicator: Communicator | None = communicator
        self._device, self._process = device, os.getpid()
        self._ended: str | None = None
        self._captured = False  # a CUDA graph may hold calls of this rail
        self._dropped = weakref.finalize(self, _drop, communicator, self._process)
        self._dropped.atexit = False
        ending.end_with_the_process(self)

    def gather(self, row: Tensor, rows: Tensor, stream: torch.cuda.Stream | None = None) -> None:
        """See `Rail`."""
        on = self._begin(stream)
        try:
            self._live.gather(row.data_ptr(), rows.data_ptr(), row.numel(), on)
        except NcclError as error:
            raise RailError(self._ended or str(error)) from error

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
        on = self._begin(stream)
        row = send.shape[1]
        sizes = [(to * row, of * row) for to, of in zip(send_rows, receive_rows, strict=True)]
        try:
            self._live.exchange(send.data_ptr(), receive.data_ptr(), sizes, on)
        except NcclError as error:
            raise RailError(self._ended or str(error)) from error

    def _begin(self, stream: torch.cuda.Stream | None) -> int:
        """The stream of a call."""
        self._captured = self._captured or is_capturing()
        return (stream or torch.cuda.current_stream(self._device)).cuda_stream

    @property
    def _live(self) -> Communicator:
        communicator = self._communicator
        if self._ended is not None or communicator is None:
            raise RailError(self._ended)
        return communicator

    def abort(self) -> None:
        """See `Rail`."""
        communicator = self._communicator
        if self._ended is not None or communicator is None:
            return
        self._ended = "the rail was aborted"
        ending.end(communicator.abort, "expertlink rail abort", _ABORTING_S)

    def close(self) -> None:
        """See `Rail`. What CUDA graphs hold of it goes with the last of them."""
        if os.getpid() != self._process:  # a fork shares the connections, and has no threads
            return
        communicator, self._communicator = self._communicator, None
        if communicator is None:
            return
        ended, self._ended = self._ended, "the rail is closed"
        self._dropped.detach()
        if ended is not None:  # aborted communicators are gone, or a thread waits for their graphs
            return
        seconds = _HELD_S if self._captured else _CLOSING_S
        if ending.end(communicator.destroy, "expertlink rail end", seconds):
            return
        if self._captured:
            logger.info("NCCL holds the memory of a rail until no CUDA graph has calls of it")
        else:
            logger.warning("NCCL did not release a rail within %g s", seconds)

    def end_at_exit(self) -> None:
        """See `ending.Endable`. NCCL's threads do not outlive what they use."""
        communicator = self._communicator
        if communicator is None:
            return
        self._dropped.detach()
        if os.getpid() == self._process and self._ended is None:
            self._ended = "the process ends"
            ending.end(communicator.abort, "expertlink rail abort", 0.0)


def _drop(communicator: Communicator, process: int) -> None:
    """Ends the communicator of a rail that nobody closed."""
    if os.getpid() == process:
        ending.end(communicator.destroy, "expertlink rail end", 0.0)
