"""Hundreds of mixed calls of several communicators: bits stay right, memory stays where it was."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import pytest
import torch

from expertlink import MoECommunicator
from support import soak
from support.depth import deep
from support.hosted import DEVICE, Fleet, HostedCommunicator, run_hosted

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
    chosen = soak.settings(RANKS, seed)
    fleets: list[Fleet] = []
    for setting in chosen:
        host = None if setting.host is None else fleets[setting.host]
        fleets.append(Fleet(soak.config_for(setting, DEVICE), RANKS, host=host))
    order = soak.streams_for(chosen, DEVICE)

    def job(first: MoECommunicator) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            comms: list[Any] = [first]
            for fleet, setting in zip(fleets[1:], chosen[1:], strict=True):
                host = None if setting.host is None else comms[setting.host]
                comms.append(
                    stack.enter_context(HostedCommunicator(fleet, first.rank, share_with=host))
                )
            soak.run_lines(comms, chosen, order, calls=calls, seed=seed, capture=False)

    run_hosted(fleets[0], job)


@pytest.mark.gpu(4)
@pytest.mark.parametrize("seed", range(2))
def test_processes(rank_pools, seed: int) -> None:
    """The same with graphs, several of them between each other's replays and eager calls."""
    pool = rank_pools(RANKS, "cuda")
    assert pool.run(soak.soak, CALLS, seed, timeout_s=200 + CALLS) == [CALLS] * RANKS
