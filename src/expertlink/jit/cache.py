"""Compiled kernels on disk: each is compiled once per host, whatever the number of processes.

Machine code from this directory runs on the GPU as the user, so nothing is loaded that someone else
could have written. All checks are made on opened descriptors, never on paths.

An entry is one file, named after its key: `_MAGIC`, 32 bytes of SHA-256 over key and content, and
the content. Beside it lies an empty lock file. Entries may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from expertlink.settings import CACHE_DIR

logger = logging.getLogger("expertlink")

LOCK_TIMEOUT_S = 60.0  # more than any compilation takes; then the other process hangs
_LOCK_POLL_S = 0.02
_TEMPORARY = ".tmp"
_ABANDONED_S = 3600.0  # a file is written in milliseconds
_MAGIC = b"expertlink kernel 1\n"
_OTHERS = 0o077  # permissions of group and other


def fetch(key: str, make: Callable[[], bytes]) -> bytes:
    """Content of the entry `key`; made, and stored for next time, where there is no good one.

    Of several processes that ask at the same time one makes the content and the others wait for it,
    at most `LOCK_TIMEOUT_S` seconds. A cache that cannot be used is a warning, never an error.

    Args:
        key: hexadecimal digest of everything the content depends on.
        make: makes the content. What it raises is passed on, and nothing is stored.

    Raises:
        ConfigurationError: EXPERTLINK_CACHE_DIR is not an absolute path.
    """
    directory = _open_directory()
    if directory is None:
        return make()
    try:
        content = _read(directory, key)
        if content is not None:
            return content
        with _lock(directory, key):
            # Another process may have stored it while this one waited.
            content = _read(directory, key)
            if content is None:
                content = make()
                _write(directory, key, content)
            return content
    finally:
        os.close(directory)


def location() -> Path:
    """Where entries lie. Nothing is created.

    Raises:
        ConfigurationError: EXPERTLINK_CACHE_DIR is not an absolute path.
        RuntimeError: the user has no home directory, and no variable is set.
    """
    chosen = CACHE_DIR.read()
    if chosen is not None:
        return chosen
    # The XDG specification ignores relative paths.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "expertlink"


def _open_directory() -> int | None:
    """Descriptor of the directory, or None with a warning if it is missing or not private."""
    if os.name != "posix":
        return None
    path = "the kernel cache"
    try:
        path = location()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, RuntimeError) as error:
        _warn_once(f"kernels are not cached: {path} cannot be used ({error})")
        return None
    flaw = _flaw(os.fstat(opened))
    if flaw is not None:
        os.close(opened)
        _warn_once(f"kernels are not cached: {path} {flaw}; it must be private (chmod 700)")
        return None
    return opened


def _flaw(status: os.stat_result) -> str | None:
    """Why a file or directory is not this user's alone, or None."""
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}"
    if status.st_mode & _OTHERS:
        return f"is open to others (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def _read(directory: int, key: str) -> bytes | None:
    """Content of an entry, or None if there is none that may be trusted."""
    # O_NONBLOCK: opening a pipe that somebody put there must not wait for a writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(key, flags, dir_fd=directory), "rb") as file:
            status = os.fstat(file.fileno())
            flaw = _flaw(status) if stat.S_ISREG(status.st_mode) else "is no regular file"
            data = file.read() if flaw is None else b""
    except FileNotFoundError:
        return None
    except OSError as error:  # a symbolic link among them
        flaw, data = f"cannot be read ({error})", b""
    header, content = data[: len(_MAGIC) + 32], data[len(_MAGIC) + 32 :]
    if flaw is None and header != _MAGIC + _checksum(key, content):
        flaw = "is damaged"
    if flaw is not None:
        logger.warning("kernel cache: entry %s %s; it is compiled anew", key, flaw)
        return None
    return content


def _write(directory: int, key: str, content: bytes) -> None:
    """Stores an entry, in one step for every reader. A failure is a warning."""
    _remove_abandoned(directory)
    temporary = f"{key}.{secrets.token_hex(8)}{_TEMPORARY}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(temporary, flags, 0o600, dir_fd=directory), "wb") as file:
            file.write(_MAGIC + _checksum(key, content) + content)
        os.replace(temporary, key, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError as error:
        _warn_once(f"kernel cache: a kernel could not be stored ({error})")
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=directory)


def _remove_abandoned(directory: int) -> None:
    """Removes what processes left that were killed while they stored an entry."""
    with contextlib.suppress(OSError):
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries if entry.name.endswith(_TEMPORARY)]
        for name in names:
            with contextlib.suppress(OSError):
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                if time.time() - status.st_mtime > _ABANDONED_S:
                    os.unlink(name, dir_fd=directory)


@contextlib.contextmanager
def _lock(directory: int, key: str) -> Iterator[None]:
    """Holds the lock of a key. Goes on without it after LOCK_TIMEOUT_S, or where locks fail."""
    import fcntl  # POSIX only, and this module is imported everywhere

    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        # The file stays: whoever deleted it could leave two processes with a lock each.
        file = os.open(f"{key}.lock", flags, 0o600, dir_fd=directory)
    except OSError as error:
        _warn_once(f"kernel cache: kernels are compiled without a lock ({error})")
        yield
        return
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    logger.warning("kernel cache: no lock after %g s", LOCK_TIMEOUT_S)
                    break
                time.sleep(_LOCK_POLL_S)
            except OSError as error:  # a file system without locks
                _warn_once(f"kernel cache: kernels are compiled without a lock ({error})")
                break
        yield
    finally:
        os.close(file)  # and with it the lock


def _checksum(key: str, content: bytes) -> bytes:
    # The key is part of it: an entry under another's name is damaged.
    return hashlib.sha256(key.encode() + b"\n" + content).digest()


@cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
