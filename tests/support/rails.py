"""Ranks on rails, each with a monitor: threads of one process, or one rank of a launched group."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from expertlink.domains import Domains
from expertlink.engines.hybrid.connect import connect
from expertlink.engines.hybrid.monitor import Monitor, Neighbours
from expertlink.engines.hybrid.rail import CopyRail
from expertlink.engines.hybrid.watched_rail import WatchedRail
from expertlink.engines.hybrid.words import DeviceWords, HostWords
from expertlink.engines.ranks.status import StatusStore
from expertlink.engines.ranks.wire import Peer
from expertlink.errors import PeerTimeoutError
from expertlink.launch import RankContext

CPU = torch.device("cpu")
Fault = Callable[[], PeerTimeoutError | None]


@dataclass
class Rank:
    """One rank of a hybrid communicator, as far as rails go."""

    number: int
    rail: WatchedRail
    monitor: Monitor
    words: Any
    status: StatusStore

    def step(self) -> list[int]:
        """An exchange of one row with every other host; who sent those that arrived."""
        size = self.rail.size
        splits = [int(index != self.rail.index) for index in range(size)]
        send = torch.full((size - 1, 8), self.number, dtype=torch.uint8, device=CPU)
        receive = torch.zeros_like(send)
        self.rail.exchange(send, receive, splits, splits)
        return receive[:, 0].tolist()

    def timed_step(self) -> tuple[BaseException | None, float]:
        """What the step raises, and after how many seconds."""
        began = time.monotonic()
        try:
            self.step()
        except Exception as error:  # the test looks at it
            return error, time.monotonic() - began
        return None, time.monotonic() - began


def make_rank(
    store: Any,
    number: int,
    domains: Domains,
    *,
    timeout_s: float,
    rail: Any = None,
    fault: Fault = lambda: None,
    peers: list[Peer] | None = None,
    device: torch.device = CPU,
) -> Rank:
    """Local but for the rail, which ranks of it make together where none is given."""
    local = domains.local_of(number)
    if rail is None:
        rail = connect(
            dist.PrefixStore(f"rail {local}", store),
            index=domains.host_of[number],
            size=domains.num_hosts,
            device=device,
            max_ctas=None,
            timeout_s=60.0 if device.type == "cuda" else 20.0,
        )
    words: Any = DeviceWords(device) if device.type == "cuda" else HostWords()
    status = StatusStore(store, answer_s=0.5)
    ranks = Neighbours(
        rank=number,
        domains=domains,
        describe=lambda rank: "a thread" if peers is None else peers[rank].describe(),
        has_exited=lambda rank: peers is not None and peers[rank].has_exited(),
    )
    monitor = Monitor(
        words=words,
        ranks=ranks,
        status=status,
        timeout_s=timeout_s,
        doing=lambda: ("dispatch", 7),
        fault=fault,
        end=[rail.abort],
    )
    watched = WatchedRail(rail, words=words, monitor=monitor)
    return Rank(number, watched, monitor, words, status)


class Ranks:
    """All ranks of a communicator, in threads."""

    def __init__(self, host_of: tuple[int, ...], *, timeout_s: float, kind: str = "nccl") -> None:
        self.domains = Domains(host_of)
        self.threads = ThreadPoolExecutor(len(host_of))
        self.store = dist.HashStore()
        self.faults: dict[int, PeerTimeoutError] = {}
        rails: dict[int, list[CopyRail]] = {}
        if kind == "copy":
            for local in range(self.domains.ranks_per_host or 0):
                rails[local] = CopyRail.connected(self.domains.num_hosts, timeout_s=60.0)

        def make(number: int) -> Rank:
            row = rails.get(self.domains.local_of(number))
            return make_rank(
                self.store,
                number,
                self.domains,
                timeout_s=timeout_s,
                rail=row and row[self.domains.host_of[number]],
                fault=lambda: self.faults.get(number),
            )

        self.all: list[Rank] = list(self.threads.map(make, range(len(host_of))))

    def start(self, *numbers: int) -> dict[int, Future[Any]]:
        """Steps of these ranks."""
        return {number: self.threads.submit(self.all[number].timed_step) for number in numbers}

    def close(self) -> None:
        for rank in self.all:
            rank.rail.close()
        self.threads.shutdown()


@contextlib.contextmanager
def ranks_on(host_of: tuple[int, ...], *, timeout_s: float, kind: str = "nccl") -> Iterator[Ranks]:
    ranks = Ranks(host_of, timeout_s=timeout_s, kind=kind)
    try:
        yield ranks
    finally:
        ranks.close()


# -- jobs for processes ---------------------------------------------------------------------------


def killed_in_an_exchange(
    ctx: RankContext, host_of: tuple[int, ...], culprit: int, timeout_s: float
) -> tuple[Any, ...] | None:
    """Steps together, then one rank dies; the others step, and make new rails without it."""
    group = dist.group.WORLD
    assert group is not None
    store = dist.PrefixStore("test", group.get_group_store())
    peers: list[Any] = [None] * ctx.num_ranks
    dist.all_gather_object(peers, Peer.here())
    domains = Domains(host_of)
    rank = make_rank(store, ctx.rank, domains, timeout_s=timeout_s, peers=peers)
    arrived = [other for other in domains.rail(domains.local_of(ctx.rank)) if other != ctx.rank]
    for _ in range(3):
        assert rank.step() == arrived
    if ctx.rank == culprit:
        os.kill(os.getpid(), signal.SIGKILL)
    error, waited = rank.timed_step()
    again, _ = rank.timed_step()
    threads = {thread.name for thread in threading.enumerate()}
    assert "expertlink-monitor" in threads
    rank.rail.close()
    # Those that are left make rails of their own: of a host less.
    left = [other for other in range(ctx.num_ranks) if host_of[other] != host_of[culprit]]
    found = None
    if ctx.rank in left:
        domains = Domains.of([host_of[other] for other in left])
        store = dist.PrefixStore("later", group.get_group_store())
        rank = make_rank(store, left.index(ctx.rank), domains, timeout_s=timeout_s)
        found = [left[other] for other in rank.step()]
        rank.rail.close()
    missing = getattr(error, "missing", None)
    return type(error).__name__, str(error), missing, waited, type(again).__name__, found


def captured_steps_on_gpus(ctx: RankContext, timeout_s: float) -> tuple[Any, ...]:
    """Rails over NCCL: uneven rows, replays with new data, a replay that one rank makes alone."""
    device, group = ctx.device, dist.group.WORLD
    assert group is not None
    peers: list[Any] = [None] * ctx.num_ranks
    dist.all_gather_object(peers, Peer.here())
    domains = Domains(tuple(range(ctx.num_ranks)))
    store = dist.PrefixStore(f"gpu {timeout_s}", group.get_group_store())
    rank = make_rank(store, ctx.rank, domains, timeout_s=timeout_s, peers=peers, device=device)
    uneven = [
        [0 if s == d else 3 * s + d for d in range(ctx.num_ranks)] for s in range(ctx.num_ranks)
    ]
    to, of = uneven[ctx.rank], [row[ctx.rank] for row in uneven]
    send = torch.zeros(sum(to), 1024, dtype=torch.uint8, device=device)
    receive = torch.zeros(sum(of), 1024, dtype=torch.uint8, device=device)
    from_whom = torch.repeat_interleave(
        torch.arange(ctx.num_ranks, device=device), torch.tensor(of, device=device)
    )
    side = torch.cuda.Stream()

    def exchange() -> None:
        side.wait_stream(torch.cuda.current_stream())
        rank.rail.exchange(send, receive, to, of, side)
        torch.cuda.current_stream().wait_stream(side)

    def check(number: int) -> None:
        torch.cuda.synchronize()
        expected = (from_whom * 10 + number).to(torch.uint8)
        assert torch.equal(receive, expected[:, None].expand_as(receive))

    send.fill_(ctx.rank * 10)
    exchange()
    check(0)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        exchange()
    assert rank.words.read() == (1, 1)  # a capture is no step
    for number in range(1, 5):
        send.fill_(ctx.rank * 10 + number)
        graph.replay()
        check(number)
    assert rank.words.read() == (5, 5)
    dist.barrier()
    if ctx.rank == 1:
        time.sleep(timeout_s + 3)
    graph.replay()  # all but rank 1 wait for it
    began = time.monotonic()
    torch.cuda.synchronize()
    waited, error = time.monotonic() - began, None
    deadline = time.monotonic() + 2 * timeout_s + 5
    while error is None and time.monotonic() < deadline:
        try:
            rank.monitor.check()
        except PeerTimeoutError as found:
            error = found
        time.sleep(0.01)
    assert torch.ones(3, device=device).sum() == 3  # the context lives
    rank.rail.close()
    store = dist.PrefixStore(f"gpu again {timeout_s}", group.get_group_store())
    rank = make_rank(store, ctx.rank, domains, timeout_s=timeout_s, peers=peers, device=device)
    exchange()
    check(4)
    rank.rail.close()
    return str(error), getattr(error, "missing", None), waited
