"""What building the hybrid engine agrees on, without a GPU; groups of hosts over gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from expertlink import ConfigurationError, EngineUnavailableError, MoECommunicatorConfig
from expertlink.domains import Domains
from expertlink.engines.hybrid import build
from expertlink.engines.ranks.wire import Wire
from expertlink.launch import RankContext
from expertlink.routing import Placement, even_blocks

CPU = torch.device("cpu")
HOST_OF = (0, 1, 0, 1)


def wire_of(texts: list[str]) -> Wire:
    """A wire over which the others say these texts."""
    wire = Wire(None, device=CPU, timeout_s=1.0)
    wire.gather_text = lambda text: [text, *texts]  # type: ignore[method-assign]
    return wire


def test_what_hinders_one_rank_hinders_all() -> None:
    build.all_or_none(wire_of(["", ""]), None)
    with pytest.raises(EngineUnavailableError, match="rank 2: no memory"):
        build.all_or_none(wire_of(["", "no memory"]), None)
    with pytest.raises(EngineUnavailableError, match="rank 0: mine"):
        build.all_or_none(wire_of(["", "no memory"]), "mine")


def test_ranks_agree_about_the_rails_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTLINK_RAIL_CTAS", "4")
    assert build._agreed_ctas(wire_of(["4"])) == 4
    with pytest.raises(ConfigurationError, match="rank 0: 4, rank 1: unset"):
        build._agreed_ctas(wire_of([""]))
    monkeypatch.setenv("EXPERTLINK_RAIL_CTAS", "65")
    with pytest.raises(ConfigurationError, match="from 1 to 64"):
        build._agreed_ctas(wire_of(["4"]))
    monkeypatch.delenv("EXPERTLINK_RAIL_CTAS")
    assert build._agreed_ctas(wire_of(["", ""])) is None
    with pytest.raises(ConfigurationError, match="rank 1: unreadable"):
        build._agreed_ctas(wire_of(["unreadable"]))


def test_what_no_mode_can_serve_is_refused() -> None:
    domains = Domains(HOST_OF)
    placement = Placement.from_ranks(even_blocks(8, 4), num_ranks=4, device=CPU)
    fields: dict[str, Any] = {"num_experts": 8, "hidden_size": 64, "topk": 2}
    config = MoECommunicatorConfig(
        **fields, max_tokens_per_rank=8, mode="ll", combine_precision="exact"
    )
    with pytest.raises(EngineUnavailableError, match="exact"):
        build.mode_of(config, placement, domains)


def host_groups(ctx: RankContext) -> tuple[list[int], int, int]:
    """Joins the group of the own host and leaves it; ranks have unequal numbers of other groups."""
    others = [dist.new_group([ctx.rank], use_local_synchronization=True) for _ in range(ctx.rank)]
    wire = Wire(dist.group.WORLD, device=CPU, timeout_s=30.0)
    wire.number = 12345
    before = len(dist.distributed_c10d._world.pg_names)
    with build._host_group(wire, Domains(HOST_OF)) as group:
        everyone = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
        dist.all_gather(everyone, torch.tensor([ctx.rank]), group=group)
    after = len(dist.distributed_c10d._world.pg_names)
    for other in others:
        dist.destroy_process_group(other)  # type: ignore[arg-type]
    return [int(each) for each in everyone], before, after


def test_hosts_have_groups_of_their_own(rank_pools) -> None:
    for rank, (everyone, before, after) in enumerate(rank_pools(4).run(host_groups, timeout_s=60)):
        assert everyone == ([0, 2] if HOST_OF[rank] == 0 else [1, 3])
        assert before == after
