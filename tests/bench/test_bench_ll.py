"""The benchmark of mode "ll": cases that share a communicator, prepared calls, their records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conftest import RankPools
from expertlink.bench.cases import Case, Plan, batches, recorded_as
from expertlink.bench.ceilings import Floor
from expertlink.bench.clock import Clock
from expertlink.bench.flag_latency import FlagLatency
from expertlink.bench.measured import Measured, make_records
from expertlink.bench.options import BenchOptions, build_cases
from expertlink.bench.records import PHASES, Record, latest, read_records
from expertlink.bench.runner import CaseResult, Job, run_on_own_ranks
from expertlink.bench.tables import LISTINGS
from expertlink.cli import app
from expertlink.errors import ConfigurationError, InputError
from expertlink.launch import RankContext
from support.bench_records import latency_case, make_record

TINY = ("--mode", "ll", "--ranks", "2", "--hidden", "256", "--topk", "2", "--experts", "4")
QUICK = (*TINY, "--iters", "2", "--warmup", "1", "--inputs", "2")


class TestCases:
    def test_what_a_communicator_can_serve_is_a_batch(self) -> None:
        shared = [
            latency_case(tokens=tokens, variant=variant, max_tokens_per_rank=32)
            for tokens in (1, 16)
            for variant in ("eager", "halves", "graph")
        ]
        others = [
            latency_case(layout="rank_major"),
            latency_case(tokens=9),
            latency_case(num_sms_combine=4),
        ]
        fresh = [latency_case(variant="uncached"), latency_case(variant="uncached", tokens=9)]
        cases = [*shared, *others, *fresh]
        assert batches(cases) == [shared, *([case] for case in (*others, *fresh))]

    def test_variants_are_those_of_the_mode(self) -> None:
        for variant in ("static", "zero_copy"):
            with pytest.raises(ConfigurationError, match=f"variant='{variant}'.*graph_single"):
                latency_case(variant=variant)
        with pytest.raises(ConfigurationError, match="variant='halves'"):
            latency_case(variant="halves", mode="ht")
        for variant in ("graph", "graph_single"):
            with pytest.raises(ConfigurationError, match=f"variant='{variant}'.*nvlink"):
                latency_case(variant=variant, engine="collective")

    def test_rows_have_to_find_room(self) -> None:
        with pytest.raises(ConfigurationError, match="max_tokens_per_rank=7.*at least 8"):
            latency_case(max_tokens_per_rank=7)

    def test_defaults_of_the_mode(self) -> None:
        options = BenchOptions(mode="ll", engine="nvlink,collective")
        cases = build_cases(options, device="cuda", ranks=4)
        assert len(batches(cases)) == 2 * 2 * 2
        for engine, variants in (
            ("nvlink", {"graph", "graph_single", "eager", "halves"}),
            ("collective", {"eager"}),
        ):
            own = [case for case in cases if case.engine == engine]
            assert {case.variant for case in own} == variants
            assert {case.tokens for case in own} == {1, 8, 16, 32, 64, 128, 256, 512}
            assert {case.max_tokens_per_rank for case in own} == {512}
            assert {case.layout for case in own} == {"expert_major", "rank_major"}
            assert {case.quantization for case in own} == {None, "e4m3_float32"}
        [few, *_] = build_cases(BenchOptions(mode="ll", tokens="1,4"), device="cpu", ranks=2)
        assert few.max_tokens_per_rank == 128

    def test_ordinary_cases_stay_as_they_are(self) -> None:
        cases = build_cases(BenchOptions(), device="cuda", ranks=4)
        assert [(case.layout, case.variant) for case in cases] == [
            ("flat", "uncached"),
            ("flat", "cached"),
        ]
        assert cases[0].max_tokens_per_rank is None


def one_host(context: RankContext) -> bool:
    return Clock(context.device).on_one_host()


def test_ranks_of_one_host_read_one_clock(rank_pools: RankPools) -> None:
    assert rank_pools(2).run(one_host) == [True, True]


# -- records --------------------------------------------------------------------------------------


def measured_of(*variants: str, floor: Floor | None = None) -> Measured:
    """Two ranks, of which the second sends and receives twice as much and takes twice as long."""
    kinds: dict[str, Sequence[str]] = dict.fromkeys(
        variants, ("time", "host", "hot host", "memory")
    )
    kinds[""] = ("raw", "put", "get")
    traffic = torch.tensor([[[1e6, 2e6, 8.0]] * 3, [[3e6, 1e6, 8.0]] * 3], dtype=torch.float64)
    traffic[:, 2] *= 2
    return Measured(
        device=torch.device("cpu"),
        engine="nvlink",
        num_inputs=1,
        times={
            (name, phase, kind): torch.tensor([[20.0], [40.0]], dtype=torch.float64)
            for name, own in kinds.items()
            for phase in PHASES
            for kind in own
        },
        traffic=traffic,
        ceiling_note=None,
        floor=floor,
    )


def test_the_floor_is_bytes_of_the_busiest_rank_and_two_flags() -> None:
    floor = Floor(gbps=300.0, flag_us=1.5)
    assert floor.of(0) == 3.0
    assert floor.of(3e6) == pytest.approx(13.0)
    case = latency_case(variant="graph", max_tokens_per_rank=64)
    dispatch, combine, pair = make_records(case, Plan(), measured_of("graph", floor=floor))
    for record in (dispatch, combine):
        assert record.floor_us == 13.0
        assert record.floor_ratio == pytest.approx(13 / 40)
        assert (record.floor_gbps, record.flag_us) == (300.0, 1.5)
        assert (record.calls_per_graph, record.max_tokens_per_rank) == (20, 64)
    assert pair.floor_us == 26.0
    assert pair.host_hot_us is not None


def test_nothing_leaves_in_a_receiving_half() -> None:
    case = latency_case(variant="halves")
    assert recorded_as("halves") == ("send", "recv")
    measured = measured_of("send", "recv", floor=Floor(gbps=300.0, flag_us=1.5))
    records = make_records(case, Plan(), measured)
    send, recv = (one for one in records if one.phase == "dispatch")
    assert (send.variant, recv.variant) == ("send", "recv")
    assert send.wire_bytes == 2e6
    assert recv.wire_bytes == recv.wire_bytes_max == recv.metadata_bytes == 0
    assert send.ceiling == "put"
    assert recv.ceiling is None
    assert recv.ceiling_note is not None
    assert send.floor_us is recv.floor_us is None
    assert send.key() != recv.key()


def test_results_of_earlier_versions_are_read() -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "results"
    files = sorted(folder.glob("*.jsonl"))
    assert files
    for path in files:
        named = (one.record for one in LISTINGS if path.name.startswith(one.prefix))
        kind: Any = next(named, Record)
        records = read_records(path, kind)
        assert records, path.name
        assert kind is not Record or latest(records)


# -- the command ----------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_two_ranks_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    result = run(*QUICK, "--device", "cpu", "--tokens", "1,16", "--out", str(path))
    assert result.exit_code == 0, result.output
    records = read_records(path)
    # 2 layouts, with and without quantization, 2 T: three phases eager, two halves of two calls.
    assert len(records) == 2 * 2 * 2 * (3 + 4)
    assert len({record.key() for record in records}) == len(records)
    for record in records:
        assert (record.engine, record.mode) == ("collective", "ll")
        assert record.max_tokens_per_rank == 128
        assert record.calls_per_graph is None
        assert record.floor_us is None
        assert (record.host_hot_us is not None) == (record.variant == "eager")
        assert (record.wire_bytes > 0) == (record.variant != "recv")
    by_format = {
        record.quantization: record.wire_bytes_max
        for record in records
        if (record.phase, record.variant, record.tokens) == ("dispatch", "eager", 16)
    }
    # 256 e4m3 elements with 2 scales, 256 bfloat16 elements.
    assert by_format["e4m3_float32"] * 512 == (by_format[None] or 0) * 264
    assert "hot" in result.output


def test_graphs_are_refused_on_cpus() -> None:
    for variant in ("graph", "graph_single"):
        result = run(*TINY, "--device", "cpu", "--variant", variant)
        assert result.exit_code == 2
        assert f"variant='{variant}' cannot be measured on CPU ranks" in result.output


def broken_after_one(
    context: RankContext, cases: Sequence[Case], plan: Plan, **_: Any
) -> Iterator[list[Record]]:
    """Measures the first case of a batch, then fails."""
    for number, case in enumerate(cases):
        if number == 1:
            raise InputError("no more")
        yield [make_record(tokens=case.tokens)] if context.rank == 0 else []


def test_what_a_batch_has_measured_is_kept() -> None:
    cases = [latency_case(tokens=tokens, max_tokens_per_rank=8) for tokens in (1, 2, 3)]
    seen: list[CaseResult] = []
    job = Job(
        cases=[*cases, latency_case(tokens=4)],
        plan=Plan(timeout_s=30.0),
        measure=broken_after_one,
        on_result=seen.append,
    )
    results = run_on_own_ranks(job, device="cpu", timeout_s=60.0)
    assert results == seen
    assert [result.case.tokens for result in results] == [1, 2, 3, 4]
    first, second, third, other = results
    assert [len(result.records) for result in results] == [1, 0, 0, 1]
    assert first.error is None
    assert second.error is not None
    assert "no more (rank 0, 1)" in second.error
    assert third.error == "not run: an earlier case of the same communicator failed"
    assert other.error is None


@pytest.mark.gpu(2)
@pytest.mark.parametrize("quantization", ["none", "e4m3_float32"])
def test_two_gpus_end_to_end(tmp_path: Path, quantization: str) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the nvlink engine needs sm_90 or later")
    path = tmp_path / "r.jsonl"
    result = run(
        *(*QUICK, "--device", "cuda", "--tokens", "1,16", "--out", str(path)),
        *("--quantization", quantization, "--calls-per-graph", "3"),
    )
    assert result.exit_code == 0, result.output
    records = read_records(path)
    # 2 layouts, 2 T: three phases of three variants, two halves of two calls.
    assert len(records) == 2 * 2 * (3 * 3 + 4)
    for record in records:
        assert record.engine == "nvlink"
        assert record.aligned == "device"
        assert record.calls_per_graph == {"graph": 3, "eager": None}.get(record.variant, 1)
        single = record.variant in ("eager", "graph_single")
        assert (record.idle_us is not None) == single
        assert (record.idle_loop_us is not None) == (single and record.phase == "pair")
        assert (record.host_hot_us is not None) == (record.variant == "eager")
        assert (record.put_us is not None) == (record.variant != "recv")
        assert (record.floor_us is not None) == (record.variant not in ("send", "recv"))
        if record.floor_us is not None and record.flag_us is not None:
            calls = 2 if record.phase == "pair" else 1
            assert record.flag_us > 0
            # Both are rounded.
            assert record.floor_us >= 2 * calls * record.flag_us - 0.01


@pytest.mark.gpu(2)
def test_nccl_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    result = run(
        *(*QUICK, "--device", "cuda", "--tokens", "16", "--engine", "collective"),
        *("--variant", "eager,halves", "--layout", "rank_major", "--out", str(path)),
    )
    assert result.exit_code == 0, result.output
    assert {record.variant for record in read_records(path)} == {"eager", "send", "recv"}


@pytest.mark.gpu
def test_a_flag_that_nobody_answers_is_not_waited_for_for_long() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    words = torch.zeros(2, dtype=torch.int32, device=device)
    mine, theirs = words[0].data_ptr(), words[1].data_ptr()
    for leads in (True, False):
        end = FlagLatency(device, mine=mine, theirs=theirs, leads=leads, limit_s=0.05)
        assert end.measure() == 0.0


@pytest.mark.gpu
def test_flags_go_back_and_forth() -> None:
    """Both ends on one GPU, each on a stream of its own."""
    device = torch.device("cuda", torch.cuda.current_device())
    words = torch.zeros(2, dtype=torch.int32, device=device)
    first, second = words[0].data_ptr(), words[1].data_ptr()
    ends = [
        FlagLatency(device, mine=first, theirs=second, leads=True, limit_s=20.0),
        FlagLatency(device, mine=second, theirs=first, leads=False, limit_s=20.0),
    ]
    torch.cuda.synchronize()

    def measure(end: FlagLatency) -> list[float]:
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):
            return [end.measure() for _ in range(3)]

    with ThreadPoolExecutor(len(ends)) as threads:
        for times in threads.map(measure, ends):
            assert min(times) > 0
