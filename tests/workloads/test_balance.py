"""`expertlink balance`: what it simulates is what a program would see; its table, its picture."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from expertlink.cli import app
from expertlink.errors import ExpertlinkError
from expertlink.placement import ExpertPlacement
from expertlink.workloads.balance import busiest_over_mean, count_loads, simulate
from expertlink.workloads.trace import RoutingTrace


def skewed(steps: int = 4, ranks: int = 2, experts: int = 8) -> RoutingTrace:
    """Three layers whose busy experts are neighbours; some choices are none."""
    generator = np.random.default_rng(1)
    popularity = np.log(1.0 / (1 + np.arange(experts)))
    scores = popularity + generator.gumbel(size=(steps, 3, ranks, 64, experts))
    ids = np.argsort(-scores, axis=-1)[..., :2].astype(np.int32)
    ids[generator.random(ids.shape) < 0.1] = -1
    return RoutingTrace(np.ascontiguousarray(ids), experts)


def loads_in_loops(
    trace: RoutingTrace, step: int, layer: int, placement: ExpertPlacement
) -> list[int]:
    """Choices that arrive at every rank, one by one."""
    loads: Counter[int] = Counter()
    for rank in range(trace.num_ranks):
        for token in range(trace.tokens_per_rank):
            for expert in trace.topk_ids[step, layer, rank, token]:
                if expert >= 0:
                    copies = placement.physical_ids[expert]
                    loads[placement.expert_map[copies[(token + rank) % len(copies)]]] += 1
    return [loads[rank] for rank in range(placement.num_ranks)]


def test_the_simulation_counts_what_arrives() -> None:
    trace = skewed()
    for redundant in (0, 3):
        balance = simulate(trace, num_ranks=2, redundant=redundant)
        even = ExpertPlacement.even(8, 2)
        for layer, found in enumerate(balance.layers):
            for step in range(trace.num_steps):
                assert found.before[step].tolist() == loads_in_loops(trace, step, layer, even)
                assert found.after[step].tolist() == loads_in_loops(
                    trace, step, layer, found.placement
                )
    assert count_loads(trace).sum() == (trace.topk_ids >= 0).sum()


def test_proposals_know_the_first_steps_alone() -> None:
    trace = skewed()
    changed = trace.topk_ids.copy()
    changed[2:] = np.where(changed[2:] < 0, -1, 7 - changed[2:])
    other = RoutingTrace(changed, trace.num_experts)
    one, two = (simulate(t, num_ranks=2, redundant=2) for t in (trace, other))
    assert [x.placement for x in one.layers] == [x.placement for x in two.layers]
    assert one.history == 2
    assert len(one.judged(one.layers[0].after)) == 2
    one, two = (simulate(t, num_ranks=2, redundant=2, history=1.0) for t in (trace, other))
    assert [x.placement for x in one.layers] != [x.placement for x in two.layers]
    assert len(one.judged(one.layers[0].after)) == 4


def test_busy_neighbours_are_spread() -> None:
    for ranks, hosts in ((2, 1), (4, 2)):
        balance = simulate(skewed(8), num_ranks=ranks, redundant=4, num_hosts=hosts)
        for layer in balance.layers:
            before, after = (balance.judged(loads) for loads in (layer.before, layer.after))
            assert busiest_over_mean(before).mean() > 1.4
            assert busiest_over_mean(after).mean() < 1.15
            assert busiest_over_mean(balance.by_host(after)).mean() < 1.1
            assert (layer.before.sum(axis=1) == layer.after.sum(axis=1)).all()


def test_nothing_chosen_is_even() -> None:
    trace = RoutingTrace(np.full((1, 1, 1, 2, 2), -1, dtype=np.int32), 4)
    balance = simulate(trace, num_ranks=2)
    assert busiest_over_mean(balance.layers[0].after).tolist() == [1.0]


def test_the_command_prints_a_table_and_draws(tmp_path: Path) -> None:
    path, picture = skewed().save(tmp_path / "t.npz"), tmp_path / "new" / "p.png"
    options = ["--ranks", "4", "--redundant", "4", "--hosts", "2", "--plot", str(picture)]
    result = CliRunner().invoke(app, ["balance", str(path), *options])
    assert result.exit_code == 0, result.output
    assert "8 experts, top 2, 4 ranks on 2 hosts, 4 redundant" in result.output
    lines = [line.split() for line in result.output.splitlines()]
    figures = {words[0]: words for words in lines if words and words[0] in ("0", "1", "2", "all")}
    assert list(figures) == ["0", "1", "2", "all"]
    assert all(len(words) == 8 for words in figures.values())
    assert float(figures["all"][1]) > 1.4 > 1.2 > float(figures["all"][3])
    assert picture.read_bytes().startswith(b"\x89PNG")
    result = CliRunner().invoke(app, ["balance", str(path)])
    assert "8 experts, top 2, 2 ranks" in result.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--ranks", "0"], "ranks=0 is not possible; accepted: at least 1"),
        (["--ranks", "4", "--hosts", "3"], "hosts=3 is not possible; accepted: a divisor of 4"),
        (["--redundant", "9"], "redundant=9 is not possible; accepted: 0 to 8"),
        (["--history", "0"], "history=0"),
        (["--plot", "/proc/p.png"], "--plot /proc/p.png: cannot be written"),
    ],
)
def test_impossible_options_are_refused(options: list[str], says: str, tmp_path: Path) -> None:
    path = skewed().save(tmp_path / "t.npz")
    result = CliRunner().invoke(app, ["balance", str(path), *options])
    assert isinstance(result.exception, ExpertlinkError)
    assert says in str(result.exception)


def test_a_trace_that_is_none_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["balance", str(tmp_path / "no.npz")])
    assert isinstance(result.exception, ExpertlinkError)
    assert "no such file" in str(result.exception)
