"""Folders of launchers: none of a living one is removed, none of a dead one stays."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest

from expertlink import launch_folder
from expertlink.launch_folder import RankFolder, remove_abandoned

LONG_AGO = time.time() - 24 * 3600


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def abandoned(folder: Path) -> Path:
    """A folder as a launcher leaves it that was killed."""
    folder.mkdir()
    (folder / "owner").write_text("1\n")  # a process that lives: its number says nothing
    (folder / "rank0.txt").touch()
    return folder


def test_a_folder_exists_until_it_is_removed(tmp_path: Path) -> None:
    one, two = RankFolder(), RankFolder()
    assert {path.name for path in tmp_path.iterdir()} == {one.path.name, two.path.name}
    assert (one.path / "owner").read_text() == f"{os.getpid()}\n"
    one.remove()
    one.remove()
    assert list(tmp_path.iterdir()) == [two.path]
    two.remove()


def test_folders_of_dead_launchers_are_removed(tmp_path: Path) -> None:
    abandoned(tmp_path / "expertlink-ranks-dead")
    other = abandoned(tmp_path / "another-programs")
    mine = RankFolder()
    assert set(tmp_path.iterdir()) == {mine.path, other}
    mine.remove()


def test_folders_of_living_launchers_stay_however_old(tmp_path: Path) -> None:
    living = RankFolder()
    for path in (living.path, living.path / "owner"):
        os.utime(path, (LONG_AGO, LONG_AGO))
    remove_abandoned()
    assert living.path.exists()
    living.remove()


def test_a_folder_that_is_being_made_stays(tmp_path: Path) -> None:
    fresh, old = (abandoned(tmp_path / f".expertlink-new-{name}") for name in ("fresh", "old"))
    os.utime(old, (LONG_AGO, LONG_AGO))
    remove_abandoned()
    assert fresh.exists()
    assert not old.exists()


def test_folders_of_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = abandoned(tmp_path / "target")
    (tmp_path / "expertlink-ranks-link").symlink_to(target)
    (tmp_path / "expertlink-ranks-file").touch()
    (tmp_path / "expertlink-ranks-without-owner").mkdir()
    before = set(tmp_path.iterdir())
    remove_abandoned()
    assert set(tmp_path.iterdir()) == before
    assert (target / "owner").exists()
    foreign = abandoned(tmp_path / "expertlink-ranks-foreign")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    remove_abandoned()
    assert foreign.exists()


def test_a_folder_that_was_replaced_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the owner's file and locking it another launch did the same."""
    path = abandoned(tmp_path / "expertlink-ranks-dead")

    def slow_lock(owner: int, operation: int) -> None:
        (path / "owner").rename(path / "old")
        (path / "owner").touch()  # of the next launcher, to which chance gave the same name

    monkeypatch.setattr(launch_folder.fcntl, "flock", slow_lock)
    remove_abandoned()
    assert (path / "rank0.txt").exists()
