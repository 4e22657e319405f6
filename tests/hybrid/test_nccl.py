"""NCCL's C interface, in front of a library that notes its calls."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import pytest

from expertlink.engines.hybrid import nccl

STREAM = 77


class FakeLibrary:
    """Returns `codes` by function, else success."""

    def __init__(self, **codes: int) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.codes = codes
        self.in_call, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append((name, *arguments))
            if name == "ncclGroupEnd":
                self.in_call.set()
                self.go_on.wait(20)
            return self.codes.get(name, 0)

        return call

    def ncclGetUniqueId(self, made: Any) -> int:
        ctypes.memmove(made, bytes(range(128)), nccl.ID_BYTES)
        return self.codes.get("ncclGetUniqueId", 0)

    def ncclCommInitRankConfig(
        self, handle: Any, size: int, identity: Any, rank: int, config: Any
    ) -> int:
        told = config._obj
        fields = {name: getattr(told, name) for name, _ in told._fields_}
        self.calls.append(("init", size, bytes(identity), rank, fields))
        handle._obj.value = 4711
        return self.codes.get("init", 0)

    def ncclGetErrorString(self, code: int) -> bytes:
        return f"error {code}".encode()

    def ncclGetLastError(self, handle: int | None) -> bytes:
        return b"a socket\nwas closed" if handle else b""


def fake(monkeypatch: pytest.MonkeyPatch, **codes: int) -> FakeLibrary:
    library = FakeLibrary(**codes)
    monkeypatch.setattr(nccl, "library", lambda: library)
    return library


def communicator(size: int = 3, rank: int = 1, max_ctas: int | None = None) -> nccl.Communicator:
    return nccl.Communicator(nccl.new_id(), rank=rank, size=size, max_ctas=max_ctas)


@pytest.mark.parametrize("max_ctas", [None, 4])
def test_what_nccl_is_told(monkeypatch: pytest.MonkeyPatch, max_ctas: int | None) -> None:
    """An id has zeros in it. The structure is that of 2.17, 40 bytes."""
    library = fake(monkeypatch)
    communicator(max_ctas=max_ctas)
    [(_, size, identity, rank, fields)] = library.calls
    assert (size, identity, rank) == (3, bytes(range(128)), 1)
    undefined = -(2**31)
    assert fields == {
        "size": 40,
        "magic": 0xCAFEBEEF,
        "version": 21700,
        "blocking": 1,
        "cga_cluster_size": undefined,
        "min_ctas": undefined,
        "max_ctas": max_ctas or undefined,
        "net_name": None,
    }


def test_rows_lie_one_behind_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks with nothing to send or receive have no call; both sides leave it out."""
    library = fake(monkeypatch)
    made = communicator()
    library.calls.clear()
    made.exchange(1000, 5000, [(8, 0), (0, 0), (16, 24)], STREAM)
    assert library.calls == [
        ("ncclGroupStart",),
        ("ncclSend", 1000, 8, 1, 0, 4711, STREAM),
        ("ncclSend", 1008, 16, 1, 2, 4711, STREAM),
        ("ncclRecv", 5000, 24, 1, 2, 4711, STREAM),
        ("ncclGroupEnd",),
    ]
    library.calls.clear()
    made.gather(1000, 5000, 12, STREAM)
    assert library.calls == [("ncclAllGather", 1000, 5000, 12, 1, 4711, STREAM)]


def test_failures_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake(monkeypatch)
    made = communicator()
    for name in ("ncclSend", "ncclRecv", "ncclGroupEnd", "ncclGroupStart"):
        library.codes = {name: 6}
        library.calls.clear()
        with pytest.raises(nccl.NcclError, match="error 6 a socket was closed"):
            made.exchange(0, 0, [(8, 8), (0, 0), (8, 8)], STREAM)
        # A group that has begun always ends: else later calls of the thread would join it.
        assert [call[0] for call in library.calls].count("ncclGroupEnd") == (
            name != "ncclGroupStart"
        )
    library.codes = {"ncclAllGather": 2}
    with pytest.raises(nccl.NcclError, match="error 2"):
        made.gather(0, 0, 4, STREAM)
    library.codes = {"init": 5}
    with pytest.raises(nccl.NcclError, match="error 5"):
        communicator()
    library.codes = {"ncclGetUniqueId": 3}
    with pytest.raises(nccl.NcclError, match="error 3"):
        nccl.new_id()


@pytest.mark.parametrize("end", ["abort", "destroy"])
def test_nothing_is_called_after_the_end(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """NCCL has freed what the handle points to."""
    library = fake(monkeypatch)
    made = communicator()
    library.calls.clear()
    getattr(made, end)()
    made.abort()
    made.destroy()
    with pytest.raises(nccl.NcclError, match="ended"):
        made.gather(0, 0, 4, STREAM)
    name = "ncclCommAbort" if end == "abort" else "ncclCommDestroy"
    assert library.calls == [(name, 4711)]


def test_an_abort_ends_a_call_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits a moment for a call of another thread to return, not for ever."""
    monkeypatch.setattr(nccl, "_IN_CALL_S", 0.05)
    library = fake(monkeypatch)
    made = communicator()
    library.go_on.clear()
    calling = threading.Thread(target=made.exchange, args=(0, 0, [(8, 8)], STREAM), daemon=True)
    calling.start()
    assert library.in_call.wait(20)
    made.abort()
    assert library.calls[-1] == ("ncclCommAbort", 4711)
    library.go_on.set()
    calling.join(20)
    assert not calling.is_alive()


def test_a_missing_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(nccl.NcclError, match="libnccl"):
        nccl.library.__wrapped__()
