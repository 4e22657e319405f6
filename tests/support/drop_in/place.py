"""Ranks for tests of the drop-in: processes on CPUs or GPUs, or threads that share one GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist

from expertlink import MoECommunicator, MoECommunicatorConfig
from expertlink.compat.deep_ep import Buffer, install
from expertlink.compat.deep_ep import pool as pools
from expertlink.domains import Domains
from expertlink.engines import select
from expertlink.engines.hybrid.discovery import HOST_ID
from expertlink.engines.ranks.handshake import check_common
from expertlink.engines.select import EngineChoice
from expertlink.errors import PeerError
from expertlink.launch import RankContext
from support import hosted
from support.cases import MANY_RANKS
from support.hosted_hosts import HostsFleet

EVERYWHERE = [
    "cpu",
    pytest.param("hosted", marks=pytest.mark.gpu),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
"""Where ranks run; "cuda" needs a GPU for each of them."""

HOSTED_SMS = 8
# A rank that refuses a call launches what its configuration says: as many blocks as the others.
HOSTED_BUDGETS = {"num_sms_dispatch": HOSTED_SMS, "num_sms_combine": HOSTED_SMS}


@dataclass(frozen=True)
class Place:
    """A rank as jobs see it.

    Attributes:
        domains: hosts of the ranks.
        kernels: calls are made by kernels that address the memory of other ranks.
    """

    rank: int
    num_ranks: int
    device: torch.device
    group: Any
    domains: Domains
    kernels: bool

    def tensor(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.device)


Job = Callable[..., Any]


def run(rank_pools: Any, where: str, num_ranks: int, job: Job, *args: Any) -> list[Any]:
    """`job(place, *args)` on every rank, all on one host; results by rank."""
    return run_on(rank_pools, where, (0,) * num_ranks, job, *args)


def run_on(rank_pools: Any, where: str, hosts: tuple[int, ...], job: Job, *args: Any) -> list[Any]:
    """`job(place, *args)` on ranks of these hosts, which are pretended; results by rank."""
    if where == "hosted":
        return _run_hosted(Domains(hosts), job, args)
    pool = rank_pools(len(hosts), where)
    try:
        return pool.run(_in_process, hosts, job, args, timeout_s=100)
    except BaseException:
        pool.kill()  # its ranks are no longer in step
        raise


def _in_process(ctx: RankContext, hosts: tuple[int, ...], job: Job, args: tuple[Any, ...]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        # CPU ranks stay on CPUs where there are GPUs as well.
        patch.setattr(pools, "current_device", lambda: ctx.device)
        patch.setenv(HOST_ID, f"host {hosts[ctx.rank]}")
        patch.setenv("EXPERTLINK_TIMEOUT", "20")  # a rank that fails does not keep the others
        patch.setenv("EXPERTLINK_STARTUP_TIMEOUT", "20")
        patch.setattr(select, "AUTO_TAKES_HYBRID", True)  # of ranks with GPUs
        kernels = ctx.device.type == "cuda"
        group = dist.group.WORLD
        place = Place(ctx.rank, ctx.num_ranks, ctx.device, group, Domains(hosts), kernels)
        return job(place, *args)


# -- ranks as threads on one GPU ------------------------------------------------------------------


class HostedGroup:
    """Stands for the process group of a thread."""

    def __init__(self, rank: int, fleets: Fleets) -> None:
        self._rank, self.fleets = rank, fleets
        self.made = 0

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self.fleets.num_ranks


class Fleets:
    """The common launches of all communicators that the threads make, in the same order."""

    def __init__(self, domains: Domains) -> None:
        self.domains = domains
        self.num_ranks = num_ranks = domains.num_ranks
        self.meeting = hosted.Meeting(num_ranks)
        self._made: list[hosted.Fleet] = []
        self._lock = threading.Lock()

    def get(self, number: int, fields: dict[str, Any], host: hosted.Fleet | None) -> hosted.Fleet:
        with self._lock:
            if number == len(self._made):
                several = self.domains.num_hosts > 1
                engine = "hybrid" if several else "nvlink"
                config = MoECommunicatorConfig(**{**HOSTED_BUDGETS, **fields, "engine": engine})
                warps = None if self.num_ranks <= MANY_RANKS else 4
                if config.mode == "ht":
                    warps = 4
                options: dict[str, Any] = {
                    "max_warps": warps,
                    "host": host,
                    "first_number": 1 + 1000 * number,
                }
                if several:
                    fleet = HostsFleet(config, self.domains, **options)
                else:
                    fleet = hosted.Fleet(config, self.num_ranks, **options)
                self._made.append(fleet)
            return self._made[number]

    def break_up(self) -> None:
        self.meeting.break_up()
        for fleet in self._made:
            fleet.break_up()


@dataclass
class HostedRanks:
    """What a pool asks of ranks that are threads."""

    group: HostedGroup

    def hosts(self, device: torch.device, common: Mapping[str, object]) -> Domains:
        check_common(self._meet(common), what="buffer")
        return self.group.fleets.domains

    def largest(self, number: int, device: torch.device) -> int:
        return max(self._meet(number))

    def communicator(
        self, fields: dict[str, Any], share_with: MoECommunicator | None
    ) -> MoECommunicator:
        group = self.group
        self._meet(0)
        host = None
        if share_with is not None:
            assert isinstance(share_with, hosted.HostedCommunicator)
            host = share_with._fleet
        fleet = group.fleets.get(group.made, fields, host)
        group.made += 1
        comm = hosted.HostedCommunicator(
            fleet,
            group.rank(),
            share_with=share_with,  # type: ignore[arg-type]
        )
        if group.fleets.domains.num_hosts > 1:
            comm._choice = EngineChoice("hybrid", "its ranks are hosted")
        comm.initialize()
        return comm

    def refuse(self, error: Exception, device: torch.device) -> NoReturn:
        self.group.fleets.meeting.swap(self.group.rank(), str(error))
        raise error

    def _meet(self, value: Any) -> list[Any]:
        """All ranks' values."""
        said = self.group.fleets.meeting.swap(self.group.rank(), value)
        refused = [rank for rank, one in enumerate(said) if isinstance(one, str)]
        if refused:
            reasons = "; ".join(f"rank {rank} refused it: {said[rank]}" for rank in refused)
            raise PeerError(reasons, ranks=refused)
        return said


def _run_hosted(domains: Domains, job: Job, args: tuple[Any, ...]) -> list[Any]:
    fleets, num_ranks = Fleets(domains), domains.num_ranks
    install()  # here, since threads would do it at once
    stream = torch.cuda.current_stream(hosted.DEVICE)

    def one(rank: int) -> Any:
        group = HostedGroup(rank, fleets)
        place = Place(rank, num_ranks, hosted.DEVICE, group, domains, kernels=True)
        try:
            with torch.cuda.device(hosted.DEVICE), torch.cuda.stream(stream):
                result = job(place, *args)
                torch.cuda.synchronize(hosted.DEVICE)
                return result
        except BaseException:
            fleets.break_up()
            raise

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(num_ranks) as threads:
        patch.setattr(pools, "GroupRanks", HostedRanks)
        patch.setattr(pools, "current_device", lambda: hosted.DEVICE)
        patch.setattr(Buffer, "num_sms", HOSTED_SMS)
        futures = [threads.submit(one, rank) for rank in range(num_ranks)]
        return hosted.results_of(futures)
