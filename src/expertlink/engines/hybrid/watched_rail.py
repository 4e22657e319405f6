"""A rail whose steps are counted (words.py) and bounded (monitor.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from expertlink.engines.hybrid.monitor import Monitor
from expertlink.engines.hybrid.rail import Marked, Rail, RailError
from expertlink.engines.hybrid.words import Words


class WatchedRail:
    """A rail whose steps are counted and bounded; see `Rail`.

    Args:
        rail: moves the rows.
        words: counts its steps.
        monitor: watches the words.
    """

    def __init__(self, rail: Rail, *, words: Words, monitor: Monitor) -> None:
        self._rail, self._words, self._monitor = rail, words, monitor
        self.marks = words.marks
        self.index, self.size = rail.index, rail.size
        self.capturable = rail.capturable
        self.exact_sizes_in_graphs = rail.exact_sizes_in_graphs

    def gather(self, row: Tensor, rows: Tensor, stream: torch.cuda.Stream | None = None) -> None:
        """See `Rail`.

        Raises:
            PeerTimeoutError, AbortError, ClosedError: as `Monitor.check`.
        """
        self._step(lambda: self._rail.gather(row, rows, stream), stream)

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
        """See `Rail`.

        Raises:
            PeerTimeoutError, AbortError, ClosedError: as `Monitor.check`.
        """
        self._step(
            lambda: self._rail.exchange(send, receive, send_rows, receive_rows, stream),
            stream,
            marked,
        )

    def _step(
        self,
        move: Callable[[], None],
        stream: torch.cuda.Stream | None,
        marked: Marked = Marked.NOT,
    ) -> None:
        self._monitor.check()
        if not marked & Marked.BEGUN:
            self._words.begin(stream)
        try:
            move()
        except RailError as error:
            raise self._monitor.lost(error) from error
        if marked & Marked.DONE:
            self._monitor.done_inside = True
        else:
            self._words.end(stream)

    def abort(self) -> None:
        """See `Rail`."""
        self._rail.abort()

    def close(self) -> None:
        """See `Rail`. Also ends the monitor."""
        self._monitor.stop()
        self._rail.close()
        self._words.release()
