"""`expertlink bench --drop-in`: calls of the drop-in for `deep_ep`, checked and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from conftest import RankPools
from expertlink.bench import drop_in_calls
from expertlink.bench.cases import Plan
from expertlink.bench.drop_in import DropInRecord, measure_drop_in
from expertlink.bench.drop_in_cases import DropInCase, build_drop_in_cases
from expertlink.bench.inputs import WrongResultError
from expertlink.bench.options import BenchOptions
from expertlink.bench.records import RecordError, latest, read_records, write_records
from expertlink.bench.report import PAGES, page_text
from expertlink.cli import app
from expertlink.compat.deep_ep import pool as pools
from expertlink.engines import select
from expertlink.errors import ConfigurationError
from expertlink.launch import RankContext

NORMAL = ["get_dispatch_layout", "dispatch", "dispatch, cached", "combine", "pair"]
ELASTIC = ["dispatch", "dispatch, no host wait", "dispatch, cached", "combine", "pair"]
FP8 = "e4m3_float32"


def drop_in_case(interface: str, **changes: Any) -> DropInCase:
    low_latency = interface == "low_latency"
    values: dict[str, Any] = {"interface": interface, "ranks": 2, "tokens": 5, "hidden": 512}
    values |= {"topk": 2, "experts": 4, "mode": "ll" if low_latency else "ht", "variant": "eager"}
    values |= {"layout": "expert_major" if low_latency else "token_major"}
    values |= {"max_tokens_per_rank": 8 if low_latency else None}
    return DropInCase(**{**values, **changes})


def measure(
    context: RankContext, cases: list[DropInCase], wrong: bool = False
) -> list[list[DropInRecord]]:
    """Runs on a rank. `wrong`: experts return other rows than they received."""
    returned = drop_in_calls._returned

    with pytest.MonkeyPatch.context() as patch:
        # CPU ranks stay on CPUs where there are GPUs as well.
        patch.setattr(pools, "current_device", lambda: context.device)
        if wrong:
            patch.setattr(drop_in_calls, "_returned", lambda received: 2 * returned(received))
        plan = Plan(iters=1, warmup=0, inputs=1, command="expertlink bench --drop-in")
        return list(measure_drop_in(context, cases, plan, on_progress=lambda _: None))


def test_every_interface_on_cpu_ranks(rank_pools: RankPools, tmp_path: Path) -> None:
    cases = [
        drop_in_case("normal", num_sms_dispatch=24, num_sms_combine=24, routing="masked:0.3"),
        drop_in_case("normal", quantization=FP8, uneven=True),
        drop_in_case("low_latency", quantization=FP8, tokens=1),
        drop_in_case("elastic"),
    ]
    measured, nothing = rank_pools(2).run(measure, cases)
    assert nothing == [[]] * len(cases)
    for case, records in zip(cases, measured, strict=True):
        wanted = {"normal": NORMAL, "elastic": ELASTIC}.get(
            case.interface, ["dispatch", "combine", "pair"]
        )
        assert [one.call for one in records] == wanted
        for one in records:
            assert (one.interface, one.tokens, one.engine) == (
                case.interface,
                case.tokens,
                "collective",
            )
            assert (one.quantization, one.uneven) == (case.quantization, case.uneven)
            assert (one.iterations, one.inputs) == (1, 1)
            assert one.idle_us is None  # of GPUs
            assert one.loop_us is not None
            assert one.loop_us > 0
            assert one.host_us is not None
            has_own = one.call in ("dispatch", "dispatch, cached", "combine")
            assert (one.library_host_us is not None) == has_own
            if one.library_host_us is not None:
                difference = one.host_us - one.library_host_us
                assert one.added_us == pytest.approx(difference, abs=0.02)
    sms = {one.call: one.num_sms for one in measured[0]}
    assert sms == {name: None if name.startswith("get") else 24 for name in NORMAL}
    # Records are read as they were written, and make a page.
    every = [one for records in measured for one in records]
    path = write_records(tmp_path / "drop-in-here.jsonl", every)
    assert read_records(path, DropInRecord) == latest(every) == every
    assert read_records(path) == []
    [page] = [page for page in PAGES if page.name == "drop-in"]
    text = page_text(page, tmp_path, pictures_at="records") or ""
    assert "| dispatch, no host wait |" in text
    assert "| low_latency · T=1 H=512 K=2 E=4 R=2 · e4m3_float32 · balanced |" in text


def test_virtual_hosts_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "drop-in-hosts.jsonl"
    shape = ("--tokens", "4", "--hidden", "512", "--topk", "2", "--experts", "4")
    arguments = (*shape, "--quantization", "none", "--iters", "1", "--warmup", "0", "--inputs", "1")
    hosts = ("--ranks", "2", "--virtual-hosts", "2", "--device", "cpu", "--out", str(path))
    result = CliRunner().invoke(app, ["bench", "--drop-in", *arguments, *hosts])
    assert result.exit_code == 0, result.output
    records = read_records(path, DropInRecord)
    calls = [(one.interface, one.call) for one in records]
    wanted = [("normal", name) for name in NORMAL]
    wanted += [("low_latency", name) for name in ("dispatch", "combine", "pair")]
    assert calls == [*wanted, *(("elastic", name) for name in ELASTIC)]
    for one in records:
        assert (one.engine, one.hosts, one.rail) == ("collective", 2, "sockets")
        assert one.rail_ctas is None
        assert one.time_us.min > 0
    [page] = [page for page in PAGES if page.name == "drop-in"]
    text = page_text(page, tmp_path, pictures_at="records") or ""
    assert "| normal · T=4 H=512 K=2 E=4 R=2 · 2 hosts, sockets · bfloat16 · balanced |" in text


def test_hosts_that_nccl_does_not_see(rank_pools: RankPools) -> None:
    """With NVLink for a rail NCCL sees one host, and the drop-in those that are asked for."""
    cases = [drop_in_case("normal", hosts=2, rail="nvlink")]
    measured, _ = rank_pools(2).run(measure, cases)
    assert [{one.hosts for one in records} for records in measured] == [{2}]
    with pytest.raises(Exception, match=r"finds hosts \(0, 0\).*not \(0, 1\)"):
        rank_pools(2).run(measure, [drop_in_case("normal", hosts=2, rail="network")])


def test_wrong_sums_are_noticed(rank_pools: RankPools) -> None:
    for interface in ("low_latency", "elastic"):
        with pytest.raises(Exception, match=WrongResultError.__name__):
            rank_pools(2).run(measure, [drop_in_case(interface)], True)


def test_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = build_drop_in_cases(BenchOptions(num_sms="24"), device="cuda", ranks=4)
    low_latency = [case for case in gpu if case.interface == "low_latency"]
    assert {(case.tokens, case.variant, case.quantization) for case in low_latency} == {
        (tokens, variant, quantization)
        for tokens in (1, 16, 128)
        for variant in ("eager", "graph")
        for quantization in (None, FP8)
    }
    assert {case.max_tokens_per_rank for case in low_latency} == {128}
    others = [case for case in gpu if case.interface != "low_latency"]
    assert [(case.interface, case.quantization) for case in others] == [
        *(("normal", None), ("normal", FP8), ("elastic", None), ("elastic", FP8))
    ]
    assert {(case.tokens, case.num_sms_dispatch) for case in others} == {(4096, 24)}
    cpu = build_drop_in_cases(BenchOptions(interface="low_latency"), device="cpu", ranks=2)
    assert {case.variant for case in cpu} == {"eager"}
    hosts = BenchOptions(virtual_hosts=2, rail="nvlink", rail_ctas=4)
    for case in build_drop_in_cases(hosts, device="cuda", ranks=4):
        assert (case.hosts, case.rail, case.rail_ctas, case.variant) == (2, "nvlink", 4, "eager")
    monkeypatch.setattr(select, "AUTO_TAKES_HYBRID", True)  # whose calls can be captured
    assert "graph" in {case.variant for case in build_drop_in_cases(hosts, device="cuda", ranks=4)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interface": "rdma"}, "interface='rdma'"),
        ({"variant": "cached"}, "variant='cached'"),
        ({"variant": "graph", "interface": "normal"}, "needs --interface low_latency"),
        ({"variant": "graph"}, "variant='graph' cannot be measured on CPU ranks"),
        ({"quantization": "e4m3_pow2"}, "quantization='e4m3_pow2'"),
        ({"hidden": "640"}, "hidden=640"),
        ({"experts": "7"}, "experts=7"),
        ({"layout": "flat"}, "layout='flat'"),
        ({"mode": "ll"}, "accepted: --interface"),
        ({"num_sms_dispatch": "8", "num_sms_combine": "16"}, "one number of SMs"),
        ({"virtual_hosts": 3}, "virtual_hosts=3 cannot be measured on 2 ranks"),
        ({"rail": "nvlink"}, "rail='nvlink' needs --virtual-hosts"),
        ({"variant": "graph", "virtual_hosts": 2}, "across hosts"),
    ],
)
def test_cases_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_drop_in_cases(BenchOptions(**options), device="cpu", ranks=2)


def test_a_record_says_what_it_is_of() -> None:
    with pytest.raises(RecordError, match="lacks the field"):
        DropInRecord.from_json('{"kind": "drop_in"}')


def test_one_kind_at_a_time() -> None:
    result = CliRunner().invoke(app, ["bench", "--drop-in", "--backward", "--device", "cpu"])
    assert result.exit_code == 2
    assert "either --drop-in or --backward" in result.output
    result = CliRunner().invoke(app, ["bench", "--interface", "normal", "--device", "cpu"])
    assert "interface='normal' needs --drop-in" in result.output


@pytest.mark.gpu(2)
def test_two_gpus(rank_pools: RankPools) -> None:
    cases = [
        drop_in_case("normal"),
        drop_in_case("normal", quantization=FP8),
        drop_in_case("low_latency", variant="graph", quantization=FP8),
        drop_in_case("low_latency", variant="graph"),
        drop_in_case("low_latency"),
        drop_in_case("elastic"),
    ]
    measured, _ = rank_pools(2, "cuda").run(measure, cases)
    for case, records in zip(cases, measured, strict=True):
        for one in records:
            assert one.engine == "nvlink"
            assert (one.idle_us is None) == (case.variant == "graph")
            assert (one.calls_per_graph is None) == (case.variant == "eager")


@pytest.mark.gpu(2)
def test_two_gpus_as_two_hosts(rank_pools: RankPools) -> None:
    cases = [
        drop_in_case("normal", hosts=2, rail="nvlink"),
        drop_in_case("normal", hosts=2, rail="nvlink", quantization=FP8),
        drop_in_case("low_latency", hosts=2, rail="nvlink", quantization=FP8),
        drop_in_case("elastic", hosts=2, rail="nvlink"),
    ]
    measured, _ = rank_pools(2, "cuda").run(measure, cases)
    for records in measured:
        assert {(one.engine, one.hosts, one.rail) for one in records} == {
            ("collective", 2, "nvlink")
        }


def test_ranks_of_another_device_are_refused() -> None:
    buffer = mock.Mock()
    buffer.runtime.device = torch.device("cuda", 0)
    with (
        mock.patch.object(drop_in_calls, "Buffer", return_value=buffer),
        mock.patch.object(drop_in_calls, "dist"),
        pytest.raises(ConfigurationError, match="CUDA_VISIBLE_DEVICES="),
    ):
        drop_in_calls.DropIn(drop_in_case("normal"), torch.device("cpu"))
    buffer.destroy.assert_called_once()
