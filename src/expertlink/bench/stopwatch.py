"""How long the host spends in some functions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

IN_A_ROW = 20  # calls, or pairs, without a host wait: their launches fit into the GPU's queue
_CALIBRATIONS = 1000


class Stopwatch:
    """Adds up how long functions take."""

    def __init__(self) -> None:
        self.spent = 0.0
        self._idle = 0.0
        begin = time.perf_counter()
        for _ in range(_CALIBRATIONS):
            self.take(begin)
        self._idle = (time.perf_counter() - begin) / _CALIBRATIONS
        self.spent = 0.0

    def take(self, begin: float) -> None:
        """Ends what began then."""
        self.spent += time.perf_counter() - begin - self._idle

    def read(self) -> float:
        """Seconds since the last reading, not negative."""
        spent, self.spent = self.spent, 0.0
        return max(spent, 0.0)

    @contextmanager
    def around(self, owner: type, name: str) -> Iterator[None]:
        """Runs in every call of a method of a class."""
        method = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*args, **options)
            finally:
                self.take(begin)

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, method)
