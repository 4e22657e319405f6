"""The folder that the ranks of one launcher share, and the removal of abandoned folders.

A launcher locks the file `owner` in its folder while it lives. The system releases the lock when
the process ends, however it ends. So a process that gets the lock of a folder knows that its
launcher has ended. A process id would not tell: it may be in use again, or be another container's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

PREFIX = "expertlink-ranks-"
_NEW_PREFIX = ".expertlink-new-"  # until the lock is held, so that no launcher removes it
_OWNER = "owner"
_OLD_S = 3600.0  # a folder is made in far less


class RankFolder:
    """A private folder in the directory of temporary files.

    It is removed by `remove`, with this object, or at the end of the process. After a kill, the
    ranks or the next launch remove it.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self) -> None:
        remove_abandoned()
        made = tempfile.mkdtemp(prefix=_NEW_PREFIX)
        # Other programs do not inherit it: the lock ends with this process.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._owner = os.open(os.path.join(made, _OWNER), flags, 0o600)
        with contextlib.suppress(OSError):  # a file system without locks: the folder stays
            fcntl.flock(self._owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(self._owner, f"{os.getpid()}\n".encode())  # for people
        self.path = Path(made).with_name(PREFIX + made.rpartition(_NEW_PREFIX)[2])
        os.rename(made, self.path)
        self._finalizer = weakref.finalize(self, _discard, self.path, self._owner, os.getpid())

    def remove(self) -> None:
        """Removes the folder and its contents. Safe to repeat."""
        self._finalizer()


def remove_abandoned() -> None:
    """Removes this user's folders whose launcher is known to have ended."""
    for path in _own(PREFIX):
        with contextlib.suppress(OSError), _lock_of(path) as abandoned:
            if abandoned:
                shutil.rmtree(path, ignore_errors=True)
    for path in _own(_NEW_PREFIX):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _OLD_S:
                shutil.rmtree(path, ignore_errors=True)


def _own(prefix: str) -> Iterator[Path]:
    """This user's directories, links excluded, whose names start so."""
    with contextlib.suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if (
                    entry.name.startswith(prefix)
                    and entry.is_dir(follow_symlinks=False)
                    and entry.stat(follow_symlinks=False).st_uid == os.geteuid()
                ):
                    yield Path(entry.path)


@contextlib.contextmanager
def _lock_of(path: Path) -> Iterator[bool]:
    """Holds the lock of a folder's owner file; False if another process holds it.

    Raises:
        OSError: the folder has no owner file, or was removed.
    """
    owner = os.open(path / _OWNER, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        # Another launch may have removed the folder meanwhile, and a third made one of that name.
        ours, there = os.fstat(owner), os.stat(path / _OWNER, follow_symlinks=False)
        yield stat.S_ISREG(ours.st_mode) and os.path.samestat(ours, there)
    finally:
        os.close(owner)


def _discard(path: Path, owner: int, pid: int) -> None:
    if os.getpid() == pid:  # a fork of the launcher does not own the folder
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.close(owner)
