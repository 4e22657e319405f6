"""What processes left in the kernel cache that were killed while they stored a kernel."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from expertlink.jit import cache

LONG_AGO = time.time() - 24 * 3600


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("EXPERTLINK_CACHE_DIR", str(path))
    return path


def test_old_leftovers_go_and_all_else_stays(directory: Path) -> None:
    cache.fetch("e" * 64, lambda: b"an entry")
    names = {"old": f"{'a' * 64}.0123.tmp", "fresh": f"{'b' * 64}.4567.tmp"}
    for name in names.values():
        (directory / name).write_bytes(b"half a ker")
    for path in directory.iterdir():
        if path.name != names["fresh"]:
            os.utime(path, (LONG_AGO, LONG_AGO))
    before = {path.name for path in directory.iterdir()}
    assert cache.fetch("c" * 64, lambda: b"another") == b"another"
    gone = before - {path.name for path in directory.iterdir()}
    assert gone == {names["old"]}
    assert cache.fetch("e" * 64, pytest.fail) == b"an entry"


def test_a_leftover_that_cannot_be_removed_is_no_obstacle(directory: Path) -> None:
    (directory / "folder.tmp").mkdir()
    os.utime(directory / "folder.tmp", (LONG_AGO, LONG_AGO))
    assert cache.fetch("c" * 64, lambda: b"content") == b"content"
    assert cache.fetch("c" * 64, pytest.fail) == b"content"
