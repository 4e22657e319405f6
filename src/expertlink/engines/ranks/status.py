"""What ranks publish for each other in the process group's key-value store: signs of life, aborts.

In: texts under names. Out: what other ranks have published.

A rank may host the store, and that rank may have stopped. The store's client then waits without a
bound and serves no signals. So threads ask the store, and give up when it does not answer.

A store waits for a name that is not there, and serves no other query of the process meanwhile. So
no name is ever deleted while another rank may be about to read it: what is removed becomes empty.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch.distributed as dist

_T = TypeVar("_T")

ABORT = "abort"  # name under which a rank publishes its abort
ANSWER_S = 2.0  # how long a query waits for the store
_FIRST_POLL_S = 0.05
_NEXT_POLL_S = 0.2


class StoreSilentError(RuntimeError):
    """The store has not answered in time."""


class _Query(threading.Thread, Generic[_T]):
    """Asks the store; a daemon, so that a silent store does not keep the process alive."""

    def __init__(self, ask: Callable[[], _T]) -> None:
        super().__init__(daemon=True, name="expertlink-store")
        self._ask = ask
        self._answer: list[_T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._answer.append(self._ask())
        except BaseException as error:  # raised where the answer is read
            self._error = error

    def answer(self) -> _T:
        """Only after the thread has ended."""
        if self._error is not None:
            raise self._error
        return self._answer[0]


class StatusStore:
    """Texts under names. No text is empty.

    Every method raises RuntimeError where the store cannot be reached or does not answer.

    Args:
        store: of a process group.
        answer_s: how long a query waits for it; None: `ANSWER_S`.

    Attributes:
        key: prefix of all names; it tells communicators apart.
    """

    def __init__(self, store: Any, *, answer_s: float | None = None) -> None:
        self._store = store
        self._answer_s = ANSWER_S if answer_s is None else answer_s
        self._unanswered: threading.Thread | None = None
        self.key = "expertlink"

    @contextlib.contextmanager
    def patient(self, answer_s: float) -> Iterator[None]:
        """Within it a query waits longer: where nothing else has to be said meanwhile."""
        before, self._answer_s = self._answer_s, max(self._answer_s, answer_s)
        try:
            yield
        finally:
            self._answer_s = before

    def publish(self, name: str, text: str) -> None:
        """Replaces what is published under that name."""
        full = self._full(name)
        self._query(lambda: self._store.set(full, text))

    def publish_first(self, name: str, text: str) -> str:
        """Publishes, unless something is published under that name; what is published then."""
        return self.replace(name, None, text)

    def replace(self, name: str, before: str | None, text: str) -> str:
        """Publishes where `before` is what is published (None: nothing); what is published then.

        Of several ranks at once, one replaces. A store that cannot compare and set in one step is
        asked to do both in turn; then two ranks may.
        """
        full = self._full(name)
        return self._query(lambda: self._replace(full, before or "", text))

    def missing(self, names: Sequence[str]) -> list[str]:
        """Names under which nothing is published."""
        full = {name: self._full(name) for name in names}
        return self._query(lambda: [name for name in names if not self._read(full[name])])

    def read(self, name: str) -> str | None:
        """What is published under a name."""
        full = self._full(name)
        return self._query(lambda: self._read(full))

    def remove(self, name: str) -> None:
        """Removes what is published under a name, if anything."""
        full = self._full(name)

        def ask() -> None:
            if self._read(full):
                self._store.set(full, "")

        self._query(ask)

    def watch(self, name: str) -> Watch:
        """Polls a name while this rank waits for something else."""
        full = self._full(name)
        return Watch(lambda: self._read(full))

    def _read(self, full: str) -> str | None:
        text = self._store.get(full).decode() if self._store.check([full]) else ""
        return text or None

    def _replace(self, full: str, before: str, text: str) -> str:
        try:
            return self._store.compare_set(full, before, text).decode()
        except dist.DistError:
            raise
        except (AttributeError, RuntimeError):  # a store of other makers need not have it
            found = self._read(full) or ""
            if found != before:
                return found
            self._store.set(full, text)
            return text

    def _full(self, name: str) -> str:
        return f"{self.key}/{name}"

    def _query(self, ask: Callable[[], _T]) -> _T:
        if self._unanswered is not None and self._unanswered.is_alive():
            raise StoreSilentError("an earlier query has not been answered")
        query = _Query(ask)
        query.start()
        query.join(self._answer_s)
        if query.is_alive():
            self._unanswered = query
            raise StoreSilentError(f"no answer for {self._answer_s:g} s")
        return query.answer()


class Watch:
    """Polls a name now and then during a wait. It starts late, so that short waits cost nothing."""

    def __init__(self, ask: Callable[[], str | None]) -> None:
        self._ask = ask
        self._query: _Query[str | None] | None = None
        self._next = time.monotonic() + _FIRST_POLL_S

    def poll(self) -> str | None:
        """What is published, as far as known; returns at once."""
        now = time.monotonic()
        if now < self._next:
            return None
        if self._query is None:
            self._query = _Query(self._ask)
            self._query.start()
        if self._query.is_alive():
            return None
        query, self._query = self._query, None
        self._next = now + _NEXT_POLL_S
        try:
            return query.answer()
        except RuntimeError:  # the wait itself ends in an error that says more
            return None
