"""Which communicators a buffer keeps: handles have to find one that takes them."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from expertlink import MoECommunicator
from expertlink.compat.deep_ep.pool import Pool, Routing
from expertlink.domains import Domains

ROUTING, H = Routing(num_experts=8, topk=2), 128


class Fakes:
    """`pool.Ranks` that make communicators of one engine, which only know their room."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.made: list[Any] = []

    def hosts(self, device: torch.device, common: Mapping[str, object]) -> Domains:
        return Domains((0, 1))

    def largest(self, number: int, device: torch.device) -> int:
        return number

    def communicator(self, fields: dict[str, Any], share_with: MoECommunicator | None) -> Any:
        comm = SimpleNamespace(engine_name=self.engine, fields=fields, open=True)
        comm.config = SimpleNamespace(max_tokens_per_rank=fields["max_tokens_per_rank"])
        comm.close = lambda: setattr(comm, "open", False)
        self.made.append(comm)
        return comm

    def refuse(self, error: Exception, device: torch.device) -> NoReturn:
        raise error


def pool_of(engine: str) -> tuple[Fakes, Pool]:
    ranks = Fakes(engine)
    return ranks, Pool(ranks, torch.device("cpu"), Domains((0, 1)))


@pytest.mark.parametrize("engine", ["nvlink", "collective"])
def test_a_larger_communicator_takes_the_handles_of_a_smaller_one(engine: str) -> None:
    ranks, pool = pool_of(engine)
    small, large = (pool.member(ROUTING, H, room) for room in (64, 128))
    assert (small.open, large.open) == (False, True)  # type: ignore[attr-defined]
    assert pool.has(ROUTING, H, 64)
    assert pool.member(ROUTING, H, 64) is large
    assert not pool.has(ROUTING, H, 129)
    assert len(ranks.made) == 2


def test_handles_of_hybrid_find_a_communicator_of_equal_room() -> None:
    ranks, pool = pool_of("hybrid")
    small, large = (pool.member(ROUTING, H, room) for room in (64, 128))
    assert pool.member(ROUTING, H, 64) is small
    assert pool.member(ROUTING, H, 128) is pool.member(ROUTING, H, 100) is large
    assert len(ranks.made) == 2
    # Rows of another width, first for a handle of much room, then for one of little.
    wide = [pool.member(ROUTING, 2 * H, room) for room in (256, 64, 256, 64)]
    assert [comm.config.max_tokens_per_rank for comm in wide] == [256, 64, 256, 64]
    assert wide[:2] == wide[2:]
    assert not pool.has(ROUTING, 2 * H, 128)
    newest, room = pool.dispatch(ROUTING, 2 * H, 3, lambda comm: comm)
    assert (newest, room) == (wide[0], 256), "new dispatches take the largest"
    assert all(comm.open for comm in ranks.made)
    pool.close()
    assert not any(comm.open for comm in ranks.made)


def test_communicators_know_the_hosts() -> None:
    ranks, pool = pool_of("collective")
    pool.member(ROUTING, H, 64)
    one = Pool(ranks, torch.device("cpu"), Domains.one(2))
    one.member(ROUTING, H, 64)
    assert [comm.fields["domains"] for comm in ranks.made] == [(0, 1), None]
