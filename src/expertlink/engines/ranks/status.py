"""What ranks post for each other in the process group's key-value store.

The store may be hosted by a rank that has stopped, and its client waits for an answer without a
bound and without serving signals. So it is asked from threads, and given up when it is silent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")

ANSWER_S = 2.0  # how long the store is listened to
_FIRST_LOOK_S = 0.05
_NEXT_LOOK_S = 0.2


class StoreSilentError(RuntimeError):
    """The store has not answered in time."""


class _Errand(threading.Thread, Generic[_T]):
    """Asks the store; a daemon, so that a silent store does not keep the process."""

    def __init__(self, ask: Callable[[], _T]) -> None:
        super().__init__(daemon=True, name="expertlink-store")
        self._ask = ask
        self._answer: list[_T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._answer.append(self._ask())
        except BaseException as error:  # raised where the answer is awaited
            self._error = error

    def answer(self) -> _T:
        """Only once the thread has ended."""
        if self._error is not None:
            raise self._error
        return self._answer[0]


class StatusStore:
    """Texts under names; `key` is put before all names and tells communicators apart.

    Every method asks the store and raises RuntimeError where it cannot be reached or is silent.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._silent: threading.Thread | None = None
        self.key = "expertlink"

    def post(self, name: str, text: str) -> None:
        """Replaces what has been posted under that name."""
        full = self._full(name)
        self._within(lambda: self._store.set(full, text))

    def post_first(self, name: str, text: str) -> None:
        """Leaves alone what has been posted under that name."""
        full = self._full(name)

        def ask() -> None:
            if not self._store.check([full]):
                self._store.set(full, text)

        self._within(ask)

    def missing(self, names: Sequence[str]) -> list[str]:
        """Names under which nothing is posted."""
        full = {name: self._full(name) for name in names}
        return self._within(lambda: [name for name in names if not self._store.check([full[name]])])

    def read(self, name: str) -> str | None:
        """What is posted under a name."""
        full = self._full(name)
        return self._within(lambda: self._read(full))

    def take_back(self, name: str) -> None:
        """Removes what is posted under a name, if anything."""
        full = self._full(name)
        self._within(lambda: self._store.delete_key(full))

    def watch(self, name: str) -> Watch:
        """Looks whether something has been posted, while this rank waits for something else."""
        full = self._full(name)
        return Watch(lambda: self._read(full))

    def _read(self, full: str) -> str | None:
        return self._store.get(full).decode() if self._store.check([full]) else None

    def _full(self, name: str) -> str:
        return f"{self.key}/{name}"

    def _within(self, ask: Callable[[], _T]) -> _T:
        if self._silent is not None and self._silent.is_alive():
            raise StoreSilentError("an earlier question has not been answered")
        errand = _Errand(ask)
        errand.start()
        errand.join(ANSWER_S)
        if errand.is_alive():
            self._silent = errand
            raise StoreSilentError(f"no answer for {ANSWER_S:g} s")
        return errand.answer()


class Watch:
    """Asks now and then, beside a wait; not in the first moments, so that short waits are free."""

    def __init__(self, ask: Callable[[], str | None]) -> None:
        self._ask = ask
        self._errand: _Errand[str | None] | None = None
        self._next = time.monotonic() + _FIRST_LOOK_S

    def look(self) -> str | None:
        """What has been posted, as far as known; returns at once."""
        now = time.monotonic()
        if now < self._next:
            return None
        if self._errand is None:
            self._errand = _Errand(self._ask)
            self._errand.start()
        if self._errand.is_alive():
            return None
        errand, self._errand = self._errand, None
        self._next = now + _NEXT_LOOK_S
        try:
            return errand.answer()
        except RuntimeError:  # the wait itself ends in an error that says more
            return None
