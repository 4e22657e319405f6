"""Hundreds of mixed calls of several communicators: bits stay right, memory stays where it was."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from conftest import RankPools
from expertlink import MoECommunicator
from expertlink.domains import Domains
from support.across_hosts import pool_on
from support.depth import deep
from support.hosted import DEVICE, Fleet, HostedCommunicator, run_hosted
from support.hosted_hosts import HostsFleet
from support.soak import runs
from support.soak.items import Ledger
from support.soak.settings import Setting, config_for, settings, settings_across

CALLS = deep(300)
RANKS = 4


@pytest.mark.gpu(1)
@pytest.mark.parametrize("seed", range(4))
def test_hosted_ranks(seed: int) -> None:
    """Communicators of threads; calls cannot be captured, so static ones are made eagerly."""
    gc.collect()
    before = torch.cuda.memory_allocated(DEVICE)
    hosted_soak(CALLS, seed)
    gc.collect()
    assert torch.cuda.memory_allocated(DEVICE) <= before


def hosted_soak(calls: int, seed: int) -> None:
    chosen = settings(RANKS, seed)
    fleets: list[Fleet] = []
    for setting in chosen:
        host = None if setting.host is None else fleets[setting.host]
        fleets.append(Fleet(config_for(setting, DEVICE), RANKS, host=host))
    run_fleets(fleets, chosen, calls, seed)


def run_fleets(fleets: Sequence[Fleet], chosen: list[Setting], calls: int, seed: int) -> None:
    order = runs.streams_for(chosen, DEVICE)

    def job(first: MoECommunicator) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            comms: list[Any] = [first]
            for fleet, setting in zip(fleets[1:], chosen[1:], strict=True):
                host = None if setting.host is None else comms[setting.host]
                comms.append(
                    stack.enter_context(HostedCommunicator(fleet, first.rank, share_with=host))
                )
            runs.run_lines(
                comms, chosen, order, calls=calls, seed=seed, capture=False, training=False
            )

    run_hosted(fleets[0], job)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("hosts", [(0, 0, 1, 1), (0, 1, 2)], ids=["2x2", "3x1"])
def test_hosted_ranks_of_several_hosts(hosts: tuple[int, ...]) -> None:
    seed = len(set(hosts))
    chosen = settings_across(hosts, seed, engine="hybrid")
    fleets = [HostsFleet(config_for(one, DEVICE), Domains(hosts)) for one in chosen]
    run_fleets(fleets, chosen, CALLS, seed)


@pytest.mark.parametrize("seed", range(deep(1)))
def test_on_cpus(rank_pools: RankPools, seed: int) -> None:
    """Every kind of call with `collective` on two hosts, training included."""
    assert rank_pools(RANKS).run(runs.soak, 1, seed, 2, timeout_s=200) == [1] * RANKS


def test_differences_are_noticed() -> None:
    ledger, ones = Ledger(torch.device("cpu")), torch.ones(3, dtype=torch.bfloat16)
    ledger.compare(ones, ones.clone(), "the same")
    ledger.settle()
    ledger.compare(ones, ones, "still the same")
    ledger.compare(torch.zeros(3), -torch.zeros(3), "the sign of zero")
    with pytest.raises(AssertionError, match="1 of 2 comparisons failed, first: the sign of zero"):
        ledger.settle()


@pytest.mark.gpu(4)
@pytest.mark.parametrize("hosts", [2, 4])
def test_processes_of_several_hosts(hosts: int) -> None:
    with pool_on(hosts, RANKS, "cuda") as pool:
        done = pool.run(runs.soak, CALLS, hosts, hosts, timeout_s=200 + CALLS)
    assert done == [CALLS] * RANKS


@pytest.mark.gpu(4)
@pytest.mark.parametrize("seed", range(2))
def test_processes(rank_pools, seed: int) -> None:
    """The same with graphs, several of them between each other's replays and eager calls."""
    pool = rank_pools(RANKS, "cuda")
    assert pool.run(runs.soak, CALLS, seed, timeout_s=200 + CALLS) == [CALLS] * RANKS
