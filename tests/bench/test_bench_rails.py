"""Cases on several hosts, real or pretended, and what is measured of their rails."""

from __future__ import annotations

import os
import random
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from expertlink.bench import rails
from expertlink.bench.cases import Case, Plan
from expertlink.bench.clock import Clock
from expertlink.bench.options import BenchOptions, build_cases
from expertlink.bench.rails import RailCeiling
from expertlink.bench.records import PHASES, read_records
from expertlink.cli import app
from expertlink.engines.hybrid import schedule
from expertlink.errors import ConfigurationError
from expertlink.launch import RankContext, RankPool
from support.depth import deep

SHAPE: dict[str, Any] = {"ranks": 4, "tokens": 16, "hidden": 64, "topk": 2, "experts": 8}
TINY = ("--tokens", "16", "--hidden", "64", "--topk", "2", "--experts", "4", "--variant", "cached")
QUICK = (*TINY, "--iters", "2", "--warmup", "1", "--device", "cpu", "--layout", "flat")


def test_virtual_hosts_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    arguments = ["--ranks", "2", "--virtual-hosts", "2", "--engine", "collective"]
    result = CliRunner().invoke(app, ["bench", *QUICK, *arguments, "--out", str(path)])
    assert result.exit_code == 0, result.output
    assert "2x1 sockets" in result.output
    assert "/ rail" in result.output
    records = read_records(path)
    assert [record.phase for record in records] == list(PHASES)
    for record in records:
        assert (record.hosts, record.rail, record.rail_ctas) == (2, "sockets", None)
        assert record.rail_us is not None
        assert record.rail_us.min > 0
        assert record.rail_ratio == pytest.approx(
            record.rail_us.median / record.time_us.median, abs=1e-3
        )
    there, back, both = (record.rail_bytes for record in records)
    assert there is not None
    assert 0 < there <= 16 * 64 * 4, "a row of float32 for each token at most"
    assert (back, both) == (there, 2 * there)


def test_options_of_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    def cases(ranks: int = 4, **options: Any) -> list[Case]:
        return build_cases(
            BenchOptions(tokens="16", variant="cached", **options), device="cpu", ranks=ranks
        )

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    [case] = cases(virtual_hosts=2, rail="nvlink", rail_ctas=4)
    assert (case.hosts, case.rail, case.rail_ctas) == (2, "nvlink", 4)
    assert case.config(torch.device("cpu"), timeout_s=1.0).domains == (0, 0, 1, 1)
    [case] = cases()
    assert (case.hosts, case.rail, case.rail_ctas) == (1, None, None)
    assert case.config(torch.device("cpu"), timeout_s=1.0).domains is None
    refused: list[dict[str, Any]] = [{"virtual_hosts": 3}, {"virtual_hosts": 1}]
    refused += [{"rail": "nvlink"}, {"rail_ctas": 2}]
    for options in refused:
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            cases(**options)
    with pytest.raises(ConfigurationError, match="rail='pigeon'"):
        cases(virtual_hosts=2, rail="pigeon")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    [case] = cases()
    assert (case.hosts, case.rail) == (2, "network"), "torchrun on two hosts"
    [case] = cases(ranks=2)
    assert (case.hosts, case.rail) == (1, None)


def test_hosts_divide_ranks() -> None:
    with pytest.raises(ConfigurationError, match="hosts=3"):
        Case(**SHAPE, hosts=3, rail="sockets")
    with pytest.raises(ConfigurationError, match="rail='sockets'"):
        Case(**SHAPE, rail="sockets")
    assert "2 hosts" in Case(**SHAPE, hosts=2, rail="sockets").label()


def bytes_alone(context: RankContext) -> list[dict[str, float]]:
    in_ll = {"ranks": 2, "mode": "ll", "variant": "eager", "layout": "expert_major"}
    few, many = (
        Case(**{**SHAPE, **in_ll, "tokens": tokens}, hosts=2, rail="sockets") for tokens in (1, 5)
    )
    clock = Clock(context.device)
    ids = torch.zeros((5, few.topk), dtype=torch.int64)
    with closing(RailCeiling(few, Plan(iters=1, warmup=0, inputs=1), clock)) as rail:
        [moves] = rail.moves(many, [ids])
        for move in moves.values():
            move()
        return [rail.bytes_sent(few, [ids[:1]]), rail.bytes_sent(many, [ids])]


def test_cases_of_one_rail_have_their_own_bytes(rank_pools) -> None:
    few, many = rank_pools(2).run(bytes_alone, timeout_s=60)[0]
    assert few["dispatch"] > 0
    assert many == {phase: 5 * size for phase, size in few.items()}


def test_nccl_takes_ranks_for_hosts() -> None:
    found = [
        rails.rail_environment(rank, ranks=4, hosts=2, rail="sockets", ctas=None)
        for rank in range(4)
    ]
    assert [each["NCCL_HOSTID"] for each in found] == ["virtual-0"] * 2 + ["virtual-1"] * 2
    assert {each["NCCL_SOCKET_IFNAME"] for each in found} == {"lo"}
    nvlink = rails.rail_environment(3, ranks=4, hosts=2, rail="nvlink", ctas=4)
    assert nvlink == {"EXPERTLINK_RAIL_CTAS": "4"}
    assert rails.rail_environment(3, ranks=4, hosts=1, rail=None, ctas=None) == {}


def variable_of_a_rank(context: RankContext) -> str | None:
    return os.environ.get("NCCL_HOSTID")


def test_ranks_get_variables_of_their_own() -> None:
    with RankPool(num_ranks=1, environments=[{"NCCL_HOSTID": "a"}]) as pool:
        assert pool.run(variable_of_a_rank, timeout_s=60) == ["a"]
    assert "NCCL_HOSTID" not in os.environ


def test_a_host_gets_a_token_once() -> None:
    for seed in range(deep(50)):
        draw = random.Random(seed)
        hosts, topk = draw.choice((1, 2, 4)), draw.randint(1, 6)
        case = Case(
            ranks=4,
            tokens=16,
            hidden=8,
            topk=topk,
            experts=10,
            hosts=hosts,
            rail=None if hosts == 1 else "sockets",
        )
        tokens = draw.randrange(20)
        ids = [[draw.choice((-1, *range(10))) for _ in range(topk)] for _ in range(tokens)]
        starts = (0, 3, 6, 8, 10)  # experts of 4 ranks, as even as possible
        rank_of = [rank for rank in range(4) for _ in range(starts[rank], starts[rank + 1])]
        expected = [0] * hosts
        for row in ids:
            for host in {rank_of[each] * hosts // 4 for each in row if each >= 0}:
                expected[host] += 1
        table = torch.tensor(ids, dtype=torch.int32).view(tokens, topk)
        assert rails.rows_to_hosts(table, case).tolist() == expected


def test_rows_are_in_the_chunk_of_their_token() -> None:
    shape = {**SHAPE, "tokens": 300, "hidden": 1 << 18, "topk": 1, "hosts": 4, "rail": "sockets"}
    case = Case(**shape, dtype="float32", routing="balanced")
    ids = torch.zeros(299, 1, dtype=torch.int64)
    ids[256:] = 7
    assert schedule.chunk_sizes(300, most=300) == [75, 225]
    assert rails.rows_of_chunks(ids, case).tolist() == [[75, 0, 0, 0], [181, 0, 0, 43]]
    shape |= {"tokens": 1024}
    rows = rails.rows_of_chunks(torch.zeros(1024, 1, dtype=torch.int64), Case(**shape))
    assert rows[:, 0].tolist() == schedule.chunk_sizes(1024, most=2048 // 3)
    assert not rows[:, 1:].any()
    few = {**SHAPE, "hosts": 2, "rail": "sockets", "mode": "ll", "variant": "eager"}
    rows = rails.rows_of_chunks(ids[:3], Case(**few, layout="expert_major"))
    assert rows.tolist() == [[16, 16]]
