"""The disk cache of kernels: compiled once, and never loaded from where others could write."""

from __future__ import annotations

import fcntl
import importlib
import multiprocessing
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from expertlink import ConfigurationError, EngineUnavailableError
from expertlink.jit import cache, compiler
from expertlink.jit.compiler import CompiledKernel, compile_kernel, compile_source, constants

ARCH = "sm_90a"
EMPTY = 'extern "C" __global__ void k() {}\n'
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
not_as_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("EXPERTLINK_CACHE_DIR", str(path))
    return path


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Instances that the compiler was asked for, instead of being run."""
    asked: list[str] = []

    def translate(source: str, instance: str, arch: str) -> CompiledKernel:
        asked.append(instance)
        return CompiledKernel(f"{source} {arch}".encode(), "lowered", instance, "report")

    monkeypatch.setattr(compiler, "_translate", translate)
    return asked


def test_a_kernel_is_compiled_once(compilations: list[str], cache_dir: Path) -> None:
    first = compile_source(EMPTY, "k", ARCH)
    assert compile_source(EMPTY, "k", ARCH) == first
    assert compilations == ["k"]
    assert cache_dir.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in cache_dir.iterdir()} == {0o600}


def test_what_is_loaded_is_what_was_compiled() -> None:
    compiled = compile_source(EMPTY, "k", ARCH)
    assert compiled.cubin[:4] == b"\x7fELF"
    assert "registers" in compiled.report
    assert compile_source(EMPTY, "k", ARCH) == compiled


def test_whatever_matters_is_in_the_key(
    compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_all() -> int:
        before = len(compilations)
        for prelude in ("", constants({"kRanks": 4})):
            name, instance = "collective/send_order", "count_rows<int>"
            compile_kernel.__wrapped__(name, instance, ARCH, prelude=prelude)
        for source in (EMPTY, EMPTY + "\n"):
            for instance in ("k", "l"):
                for arch in (ARCH, "sm_100a"):
                    compile_source(source, instance, arch)
        return len(compilations) - before

    assert compile_all() == 10
    assert compile_all() == 0
    monkeypatch.setattr("expertlink.about.__version__", "0")
    assert compile_all() == 10
    monkeypatch.setitem(compiler._OPTIONS, "std", "c++20")
    assert compile_all() == 10
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    monkeypatch.setattr(nvrtc, "nvrtcVersion", lambda: (0, 13, 99))
    assert compile_all() == 10


def test_a_compilation_that_fails_leaves_nothing(cache_dir: Path) -> None:
    for _ in range(2):
        with pytest.raises(EngineUnavailableError, match="undefined"):
            compile_source(EMPTY.replace("{}", "{ x = 1; }"), "k", ARCH)
    assert [path.suffix for path in cache_dir.iterdir()] == [".lock"]


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def _foreign_key(path: Path) -> None:
    cache.fetch("other", lambda: b"other")
    path.with_name("other").rename(path)


SPOILS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "first byte": lambda path: _flip(path, 0),
    "checksum": lambda path: _flip(path, 25),
    "last byte": lambda path: _flip(path, -1),
    "another kernel's": _foreign_key,
    "readable": lambda path: path.chmod(0o640),
    "writable": lambda path: path.chmod(0o602),
    "link": _link,
    "pipe": _pipe,
    "foreign": lambda path: os.chown(path, 65534, -1),
}


@pytest.mark.parametrize(
    "spoil",
    [pytest.param(name, marks=needs_root if name == "foreign" else ()) for name in SPOILS],
)
def test_entries_that_are_not_to_be_trusted(
    spoil: str, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entry = cache_dir / "key"
    assert cache.fetch("key", lambda: b"right") == b"right"
    assert cache.fetch("key", lambda: b"unused") == b"right"
    assert not caplog.records
    SPOILS[spoil](entry)
    assert cache.fetch("key", lambda: b"anew") == b"anew"
    assert "compiled anew" in caplog.text
    # The entry is replaced, and what a link pointed to is left alone.
    assert cache.fetch("key", lambda: b"unused") == b"anew"
    assert not entry.is_symlink()
    assert entry.stat().st_mode & 0o777 == 0o600
    if spoil == "link":
        assert entry.with_name("elsewhere").read_bytes().endswith(b"right")


def _chown(path: Path) -> None:
    path.mkdir(mode=0o700)
    os.chown(path, 65534, -1)


UNUSABLE: dict[str, Callable[[Path], object]] = {
    "readable": lambda path: (path.mkdir(), path.chmod(0o750)),
    "writable": lambda path: (path.mkdir(), path.chmod(0o702)),
    "a file": lambda path: path.write_text(""),
    "foreign": _chown,
}


@pytest.mark.parametrize(
    "spoil",
    [pytest.param(name, marks=needs_root if name == "foreign" else ()) for name in UNUSABLE],
)
def test_directories_that_are_not_used(
    spoil: str, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    UNUSABLE[spoil](cache_dir)
    made = [cache.fetch("key", lambda i=i: b"%d" % i) for i in range(2)]
    assert made == [b"0", b"1"]
    assert not cache_dir.is_dir() or not list(cache_dir.iterdir())
    assert [record.name for record in caplog.records] == ["expertlink"], "one warning"
    assert "kernels are not cached" in caplog.text


def test_a_place_where_no_directory_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EXPERTLINK_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert compile_source(EMPTY, "k", ARCH).lowered_name == "k"
    assert "kernels are not cached" in caplog.text


@not_as_root
def test_a_directory_that_cannot_be_written(
    cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache_dir.mkdir(mode=0o500)
    assert cache.fetch("key", lambda: b"made") == b"made"
    assert "could not be stored" in caplog.text


def test_an_entry_that_cannot_be_stored(cache_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    (cache_dir / "key").mkdir(parents=True)
    cache_dir.chmod(0o700)
    assert cache.fetch("key", lambda: b"made") == b"made"
    assert "could not be stored" in caplog.text
    assert not list(cache_dir.glob("*.tmp"))


def _compile_beside_others(inside: threading.Barrier, log: str, results: Any) -> None:
    translate = compiler._translate

    def counted(source: str, instance: str, arch: str) -> CompiledKernel:
        with open(log, "a") as file:
            file.write("x")
        # Where nothing keeps the others out, all of them come this far.
        with suppress(threading.BrokenBarrierError):
            inside.wait(timeout=3)
        return translate(source, instance, arch)

    compiler._translate = counted
    results.put(compile_source(EMPTY, "k", ARCH))


def test_of_several_processes_one_compiles(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    inside, results, log = context.Barrier(3), context.Queue(), tmp_path / "log"
    jobs = [
        context.Process(target=_compile_beside_others, args=(inside, str(log), results))
        for _ in range(3)
    ]
    for job in jobs:
        job.start()
    compiled = [results.get(timeout=120) for _ in jobs]
    for job in jobs:
        job.join()
    assert compiled[0] == compiled[1] == compiled[2]
    assert log.read_text() == "x"


def test_a_lock_that_is_never_freed(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LOCK_TIMEOUT_S", 0.0)
    cache_dir.mkdir(mode=0o700)
    with open(cache_dir / "key.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert cache.fetch("key", lambda: b"made") == b"made"
    assert cache.fetch("key", lambda: b"unused") == b"made"


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> None:
    assert cache.location() == cache_dir
    monkeypatch.setenv("EXPERTLINK_CACHE_DIR", "~/kernels")
    assert cache.location() == Path.home() / "kernels"
    monkeypatch.setenv("EXPERTLINK_CACHE_DIR", "kernels")
    with pytest.raises(ConfigurationError, match="an absolute path is expected"):
        cache.fetch("key", lambda: b"unused")
    monkeypatch.delenv("EXPERTLINK_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.location() == Path("/somewhere/expertlink")
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache.location() == Path.home() / ".cache" / "expertlink"
