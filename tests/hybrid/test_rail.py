"""Rails move every row to where it belongs, end in bounded time, and leave other groups alone."""

from __future__ import annotations

import gc
import logging
import random
import subprocess
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from expertlink.engines.hybrid import connect as connecting
from expertlink.engines.hybrid import ending, gloo_rail, nccl_rail
from expertlink.engines.hybrid.connect import connect
from expertlink.engines.hybrid.nccl_rail import NcclRail
from expertlink.engines.hybrid.rail import CopyRail, Rail, RailError
from support.depth import deep

CPU = torch.device("cpu")
SIZES = (1, 2, 3, 5)


def gloo_rail_on(store: Any, index: int, size: int, timeout_s: float = 20.0) -> Rail:
    return connect(store, index=index, size=size, device=CPU, max_ctas=None, timeout_s=timeout_s)


def together(size: int, job: Callable[[int], Any]) -> list[Any]:
    """Runs a job in a thread for every rank."""
    with ThreadPoolExecutor(size) as threads:
        return [future.result(30) for future in [threads.submit(job, i) for i in range(size)]]


def rails_of(kind: str, size: int) -> list[Any]:
    if kind != "copy":
        store = dist.HashStore()
        return together(size, lambda index: gloo_rail_on(store, index, size))
    return list(CopyRail.connected(size, timeout_s=20.0))


def row_of(sender: int, receiver: int, number: int, call: int, width: int) -> list[int]:
    return [(17 * sender + 5 * receiver + 3 * number + call + i) % 251 for i in range(width)]


def use(rail: Rail, calls: list[list[list[int]]], width: int, device: str) -> None:
    """Exchanges as many rows as the tables say, and checks them; a gather before each."""
    me, size = rail.index, rail.size
    for call, counts in enumerate(calls):
        mine = torch.tensor([me, call], dtype=torch.uint8, device=device)
        rows = torch.empty(size, 2, dtype=torch.uint8, device=device)
        rail.gather(mine, rows)
        assert rows.tolist() == [[other, call] for other in range(size)]
        to, of = counts[me], [row[me] for row in counts]
        sent = [row_of(me, d, n, call, width) for d in range(size) for n in range(to[d])]
        received = [row_of(s, me, n, call, width) for s in range(size) for n in range(of[s])]

        def table(rows: list[list[int]]) -> Tensor:
            flat = torch.tensor(rows, dtype=torch.uint8).view(len(rows), width)
            return flat.to(device)

        send, target = table(sent), torch.zeros(len(received), width, dtype=torch.uint8)
        target = target.to(device)
        rail.exchange(send, target, to, of)
        send.fill_(255)  # it may be used again at once
        assert torch.equal(target, table(received))


def drawn_calls(draw: random.Random, size: int) -> list[list[list[int]]]:
    def rows(s: int, d: int) -> int:
        return 0 if s == d else draw.choice((0, 0, 1, 3, draw.randrange(40)))

    return [[[rows(s, d) for d in range(size)] for s in range(size)] for _ in range(4)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("kind", "device"),
    [("copy", "cpu"), ("gloo", "cpu"), pytest.param("copy", "cuda", marks=pytest.mark.gpu)],
)
def test_rows_arrive(kind: str, device: str, size: int) -> None:
    """Uneven, none, and none at all; in the order of the peers."""
    rails = rails_of(kind, size)
    for seed in range(deep(3)):
        calls = drawn_calls(random.Random(seed), size)
        together(size, lambda index: use(rails[index], calls, 16 + seed, device))  # noqa: B023
    for rail in rails:
        rail.close()
        rail.close()


@pytest.mark.parametrize("kind", ["copy", "gloo"])
def test_an_abort_ends_a_call(kind: str) -> None:
    rails = rails_of(kind, 2)
    rows = torch.zeros(2, 4, dtype=torch.uint8)
    ender = threading.Timer(0.2, rails[0].abort)
    ender.start()
    with pytest.raises(RailError):
        rails[0].gather(rows[0], rows)  # nobody else comes
    ender.join()
    with pytest.raises(RailError):
        rails[0].gather(rows[0], rows)
    began = time.monotonic()
    while rails:
        rails.pop().close()
    assert time.monotonic() - began < 10, "the end of the rail waited for what was aborted"


def test_a_rank_that_leaves_is_noticed() -> None:
    """gloo tells the others when a rank closes its connections, without waiting."""
    rails = rails_of("gloo", 3)
    rails.pop().close()
    rows = torch.zeros(3, 4, dtype=torch.uint8)

    def gather(index: int) -> None:
        with pytest.raises(RailError):
            rails[index].gather(rows[0].clone(), rows.clone())
        rails[index].abort()

    together(2, gather)
    for rail in rails:
        rail.close()


def test_a_meeting_is_bounded() -> None:
    with pytest.raises(RailError):
        gloo_rail_on(dist.HashStore(), 0, 2, timeout_s=0.3)


def test_copies_need_everybody_in_time() -> None:
    rail = CopyRail.connected(2, timeout_s=0.1)[0]
    with pytest.raises(RailError, match="did not come"):
        rail.gather(torch.zeros(4), torch.zeros(2, 4))


def test_own_groups_only() -> None:
    """No group by name appears, and none goes, in a process that has others."""
    before = dict(dist.distributed_c10d._world.pg_names)
    store = dist.HashStore()
    rails = together(2, lambda index: gloo_rail_on(dist.PrefixStore("a", store), index, 2))
    others = together(2, lambda index: gloo_rail_on(dist.PrefixStore("b", store), index, 2))
    assert dict(dist.distributed_c10d._world.pg_names) == before
    for rail in rails:
        rail.close()
    calls = drawn_calls(random.Random(7), 2)
    together(2, lambda index: use(others[index], calls, 8, "cpu"))
    for rail in others:
        rail.close()


class FakeGloo:
    """A group whose operations end when connections are closed, if `ends`."""

    made: list[FakeGloo]
    ends = True

    def __init__(self, *_: object) -> None:
        self.closed, self.used = threading.Event(), list[Any]()
        self.at_the_end: Callable[[], None] = lambda: None
        self.made.append(self)

    def alltoall_base(self, receive: Tensor, send: Tensor, *_: object) -> Any:
        self.used = [weakref.ref(receive), weakref.ref(send)]

        def wait(*_: object) -> None:
            time.sleep(0.01)
            raise RuntimeError("not yet")

        closed, ends = self.closed, self.ends  # the work does not hold the group
        return types.SimpleNamespace(is_completed=lambda: closed.is_set() and ends, wait=wait)

    def recv(self, *_: object) -> None:
        self.closed.set()
        raise RuntimeError("expired")

    def __del__(self) -> None:
        self.at_the_end()


@pytest.mark.parametrize("ends", [True, False])
def test_tensors_of_an_operation_outlive_gloos_group(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ends: bool
) -> None:
    """Its destructor waits for threads, with Python's lock, which letting go of a tensor needs."""
    monkeypatch.setattr(gloo_rail, "_ENDING_S", 0.05)
    monkeypatch.setattr(dist, "ProcessGroupGloo", FakeGloo)
    monkeypatch.setattr(FakeGloo, "made", [], raising=False)
    monkeypatch.setattr(FakeGloo, "ends", ends)
    rail = gloo_rail.GlooRail(None, index=0, size=2, timeout_s=1.0)
    threading.Timer(0.05, rail.abort).start()
    with pytest.raises(RailError):
        rail.exchange(torch.zeros(1, 8), torch.zeros(1, 8), [0, 1], [0, 1])
    [group] = FakeGloo.made
    gc.collect()
    alive: list[bool] = []
    used = group.used
    group.at_the_end = lambda: alive.extend(each() is not None for each in used)
    FakeGloo.made.clear()
    del group
    with caplog.at_level(logging.WARNING, logger="expertlink"):
        rail.close()
    # One that does not end is kept for ever: Python would wait with it.
    assert alive == ([True, True] if ends else [])
    assert bool(caplog.records) == (not ends)


GPU = torch.device("cuda")


class FakeGroup:
    """Of NCCL, as far as rails of two ranks use it. Ends when no graph holds it any more."""

    def __init__(self) -> None:
        self.gone, self.calls = threading.Event(), list[str]()
        self.rank, self.size = 0, 2

    def _end(self, name: str) -> None:
        self.calls.append(name)
        self.gone.wait(30)

    def destroy(self) -> None:
        self._end("destroy")

    def abort(self) -> None:
        self._end("abort")

    def gather(self, *_: object) -> None:
        self.calls.append("gather")

    def exchange(self, *_: object) -> None:
        self.calls.append("exchange")


def test_a_rail_that_nothing_holds_is_closed_at_once(caplog: pytest.LogCaptureFixture) -> None:
    group: Any = FakeGroup()
    group.gone.set()
    rail = NcclRail(group, device=GPU)
    with caplog.at_level(logging.INFO, logger="expertlink"):
        rail.close()
        rail.close()
    assert group.calls == ["destroy"]
    assert not caplog.records


@pytest.mark.parametrize("captured", [True, False])
def test_a_close_does_not_wait_for_graphs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, captured: bool
) -> None:
    """A graph may live as long as the caller likes. Without one, something is wrong."""
    monkeypatch.setattr(nccl_rail, "_CLOSING_S", 0.1)
    monkeypatch.setattr(nccl_rail, "is_capturing", lambda: captured)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda _=None: types.SimpleNamespace(cuda_stream=0)
    )
    group: Any = FakeGroup()
    rail = NcclRail(group, device=GPU)
    rail.gather(torch.zeros(4), torch.zeros(2, 4))
    began = time.monotonic()
    with caplog.at_level(logging.INFO, logger="expertlink"):
        rail.close()
    assert time.monotonic() - began < 5
    assert group.calls == ["gather", "destroy"]
    assert [record.levelname for record in caplog.records] == ["INFO" if captured else "WARNING"]
    with pytest.raises(RailError, match="closed"):
        rail.gather(torch.zeros(4), torch.zeros(2, 4))
    group.gone.set()


@pytest.mark.parametrize("aborted", [True, False])
def test_a_rail_that_nobody_closes_does_not_wait_for_graphs(
    monkeypatch: pytest.MonkeyPatch, aborted: bool
) -> None:
    """The destructor of a group of NCCL does, so a thread ends it first."""
    monkeypatch.setattr(nccl_rail, "_ABORTING_S", 0.05)
    group: Any = FakeGroup()
    rail = NcclRail(group, device=GPU)
    if aborted:
        rail.abort()
    began = time.monotonic()
    del rail
    assert time.monotonic() - began < 5
    assert "destroy" in group.calls
    group.gone.set()


END_OF_A_PROCESS = """
import functools, time, types
import torch, torch.distributed as dist
from expertlink.engines.hybrid import nccl_rail as rail
rail._HELD_S = 0.05
store = dist.HashStore()

class Graph:  # stands for torch.cuda.CUDAGraph; two groups wait for its end
    def __del__(self, write=store.set, sleep=time.sleep):
        write("gone", "1")
        sleep(0.5)

torch.cuda.CUDAGraph = Graph
# Waits as torch's groups do, in C++ that comes back to Python. No function of this module, whose
# frame would keep what the module has.
wait = functools.partial(store.wait, ["gone"])
group = functools.partial(
    types.SimpleNamespace, rank=0, size=2, destroy=wait, abort=wait
)
graph = Graph()
closed = rail.NcclRail(group(), device=torch.device("cuda"))
forgotten = rail.NcclRail(group(), device=torch.device("cuda"))
closed._captured = True
closed.close()
"""


def test_a_process_ends_while_graphs_hold_rails() -> None:
    """One rail is closed, one is not. Threads must not come back while Python ends."""
    ended = subprocess.run(
        [sys.executable, "-c", END_OF_A_PROCESS],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_graphs_are_found_that_a_server_has_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers call `gc.freeze()` when they have captured their graphs."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("Graph", (), {}))
    graph = torch.cuda.CUDAGraph()
    gc.freeze()
    try:
        assert ending.live_graphs() == [graph]
    finally:
        gc.unfreeze()


def test_a_process_ends_where_no_thread_can_be_started() -> None:
    """As since Python 3.12 while the interpreter ends: nothing is ended, graphs may go."""
    refuses = """
import atexit, threading
def refuse(thread):
    raise RuntimeError("can't create new thread at interpreter shutdown")
atexit.register(setattr, threading.Thread, "start", refuse)
"""
    before, after = END_OF_A_PROCESS.split("closed._captured = True")
    ended = subprocess.run(
        [sys.executable, "-c", f"{before}{refuses}closed._captured = True{after}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_rail_that_is_collected_while_another_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its finalizer may run in the thread that starts the other one's end."""
    start = threading.Thread.start
    groups: list[Any] = [FakeGroup(), FakeGroup()]
    first, rails = NcclRail(groups[0], device=GPU), [NcclRail(groups[1], device=GPU)]

    def collect(thread: threading.Thread) -> None:
        start(thread)
        rails.clear()

    for group in groups:
        group.gone.set()
    monkeypatch.setattr(threading.Thread, "start", collect)
    closing = threading.Thread(target=first.close, daemon=True)
    start(closing)
    closing.join(10)
    assert not closing.is_alive()
    for thread in threading.enumerate():
        if thread.name == "expertlink rail end":
            thread.join(10)
    assert [group.calls for group in groups] == [["destroy"]] * 2


def test_an_abort_does_not_wait_for_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL ends its kernels first, and then waits until no CUDA graph holds one."""
    released, begun = threading.Event(), threading.Event()

    def abort() -> None:
        begun.set()
        released.wait(30)

    communicator: Any = types.SimpleNamespace(rank=0, size=2, abort=abort)
    monkeypatch.setattr(nccl_rail, "_ABORTING_S", 0.05)
    rail = NcclRail(communicator, device=torch.device("cuda"))
    began = time.monotonic()
    rail.abort()
    rail.close()
    seconds = time.monotonic() - began
    released.set()
    assert begun.is_set()
    assert seconds < 5


@pytest.mark.parametrize("is_late", [True, False])
def test_a_rail_that_nobody_waits_for_any_more_is_closed(
    monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    """A signal handler may raise in the meeting."""
    met, closed = threading.Event(), threading.Event()
    if not is_late:
        met.set()

    def meet() -> Any:
        met.wait(20)
        return types.SimpleNamespace(close=closed.set)

    def interrupted() -> float:
        raise KeyboardInterrupt

    times = iter([lambda: 0.0, interrupted])
    clock = types.SimpleNamespace(monotonic=lambda: next(times)())
    monkeypatch.setattr(connecting, "time", clock)
    if not is_late:  # the meeting ends before the signal comes
        slow = threading.Thread.is_alive
        monkeypatch.setattr(
            threading.Thread, "is_alive", lambda thread: thread.join(20) or not slow(thread)
        )
    with pytest.raises(KeyboardInterrupt):
        connecting._within(5.0, meet)
    monkeypatch.undo()
    met.set()
    assert closed.wait(20)
