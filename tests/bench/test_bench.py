"""The parts of the benchmark: cases, statistics, the check, records, pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from conftest import RankPools
from expertlink.bench.cases import Case, Plan
from expertlink.bench.inputs import WireRows, WrongResultError
from expertlink.bench.measure import measure_batch
from expertlink.bench.options import BenchOptions, build_cases, parse_ints
from expertlink.bench.records import (
    Record,
    RecordError,
    Summary,
    latest,
    read_records,
    slowest_rank,
    summarize,
    write_records,
)
from expertlink.communicator import MoECommunicator
from expertlink.errors import ConfigurationError
from expertlink.launch import RankContext
from expertlink.types import DispatchLayout, DispatchOutput
from expertlink.workloads.check import expected_sum, mismatch, scaling_experts
from support.bench_records import make_record

SHAPE: dict[str, Any] = {"ranks": 2, "tokens": 16, "hidden": 64, "topk": 2, "experts": 4}


class TestCases:
    def test_a_case_has_one_spelling(self) -> None:
        case = Case(**SHAPE, routing="zipf")
        assert case == Case(**SHAPE, routing="zipf:1.0")
        assert case == Case(**SHAPE, routing="zipf:1")

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("ranks", 0),
            ("tokens", 0),
            ("hidden", -1),
            ("topk", 5),
            ("topk", True),
            ("experts", 1.5),
            ("dtype", "float64"),
            ("layout", "rows"),
            ("routing", "random"),
            ("routing", "trace"),
            ("mode", "fast"),
            ("engine", "pigeon"),
            ("variant", "best"),
            ("quantization", "int4"),
            ("num_sms_dispatch", 0),
        ],
    )
    def test_what_cannot_be_measured_is_named(self, field: str, value: Any) -> None:
        with pytest.raises(ValueError, match=field.split("_")[0]):
            Case(**{**SHAPE, field: value})

    @pytest.mark.parametrize("variant", ["zero_copy", "zero_copy_cached", "zero_copy_static"])
    def test_views_of_the_pool_need_rows_that_lie_there(self, variant: str) -> None:
        for layout in ("flat", "expert_major"):
            with pytest.raises(ConfigurationError, match=f"variant='{variant}'.*'{layout}'"):
                Case(**SHAPE, variant=variant, layout=layout)
        assert Case(**SHAPE, variant=variant, layout="rank_major").calls.zero_copy

    @pytest.mark.parametrize("variant", ["zero_copy", "static", "graph"])
    def test_variants_of_the_nvlink_engine(self, variant: str) -> None:
        with pytest.raises(ConfigurationError, match=f"variant='{variant}'.*nvlink"):
            Case(**SHAPE, variant=variant, layout="token_major", engine="collective")

    def test_cases_are_all_combinations_once(self) -> None:
        options = BenchOptions(tokens="8,16,8", layout="flat,token_major", variant="uncached")
        cases = build_cases(options, device="cpu", ranks=2)
        assert [(case.tokens, case.layout) for case in cases] == [
            (8, "flat"),
            (8, "token_major"),
            (16, "flat"),
            (16, "token_major"),
        ]
        with pytest.raises(ConfigurationError, match="at least one value"):
            build_cases(BenchOptions(tokens=","), device="cpu", ranks=2)

    def test_a_grid_varies_what_is_not_given(self) -> None:
        options = BenchOptions(grid=True, hidden="64", variant="uncached")
        cases = build_cases(options, device="cpu", ranks=2)
        assert {case.hidden for case in cases} == {64}
        assert len(cases) == len({(case.tokens, case.topk) for case in cases}) == 4
        assert len(build_cases(BenchOptions(grid=True), device="cuda", ranks=4)) == 7 * 4 * 4 * 2

    def test_lists_of_numbers(self) -> None:
        assert parse_ints(" 128, 1024,", name="tokens") == [128, 1024]
        with pytest.raises(ConfigurationError, match="tokens='1x'"):
            parse_ints("1x", name="tokens")


class TestStatistics:
    def test_an_iteration_takes_as_long_as_its_slowest_rank(self) -> None:
        times_RI = torch.tensor([[1.0, 9.0, 3.0], [4.0, 5.0, 2.0]], dtype=torch.float64)
        assert slowest_rank(times_RI) == [4.0, 9.0, 3.0]
        # The median of the slowest is not the slowest of the medians, which is 4.
        assert summarize(slowest_rank(times_RI)).median == 4.0
        assert summarize(slowest_rank(times_RI)).mean == pytest.approx(16 / 3, abs=0.01)

    def test_summary_of_a_known_distribution(self) -> None:
        summary = summarize([float(value) for value in range(200, 0, -1)])
        assert summary == Summary(min=1.0, median=100.5, p99=198.0, mean=100.5)
        assert summarize([7.0]) == Summary(7.0, 7.0, 7.0, 7.0)

    def test_wire_bytes_leave_out_the_own_share(self) -> None:
        wire = WireRows(rank=1, rows_to=[3, 50, 4], rows_from=[1, 50, 1])
        # 5 e4m3 elements and one scale one way, 5 float32 elements the other.
        case = Case(
            ranks=3, tokens=57, hidden=5, topk=4, experts=6, dtype="float32",
            quantization="e4m3_float32",
        )  # fmt: skip
        assert wire.traffic(case) == [
            (7 * 9, 2 * 9, 7 * 4 * 8),
            (2 * 20, 7 * 20, 0),
            (7 * 9 + 2 * 20, 2 * 9 + 7 * 20, 7 * 4 * 8),
        ]
        cached = replace(case, variant="cached")
        assert [metadata for _, _, metadata in wire.traffic(cached)] == [0, 0, 0]


class TestCheck:
    """The check before the clock starts would notice what it is there to notice."""

    x_TH = torch.arange(1.0, 13.0).view(3, 4).to(torch.bfloat16)
    ids_TK = torch.tensor([[0, 1], [1, -1], [-1, -1]])
    weights_TK = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.5, 0.5]])

    def expected(self) -> torch.Tensor:
        return expected_sum(self.x_TH, self.ids_TK, self.weights_TK, num_experts=2)

    def test_one_rank_by_hand(self) -> None:
        out = DispatchOutput(
            tokens=self.x_TH[[0, 0, 1]],
            num_tokens_per_expert=torch.tensor([1, 2], dtype=torch.int32),
            layout=DispatchLayout.FLAT,
            expert_offsets=torch.tensor([0, 1, 3], dtype=torch.int32),
        )
        rows = scaling_experts(out, [0, 1], dtype=torch.bfloat16)
        y_TH = torch.zeros(3, 4)
        y_TH[0] = 0.25 * rows[0] + 0.75 * rows[1]
        y_TH[1] = 0.5 * rows[2]
        y_TH = y_TH.to(torch.bfloat16)
        assert mismatch(y_TH, self.expected(), wire_dtype=torch.bfloat16) is None

    def test_mistakes_are_seen(self) -> None:
        right = self.expected()
        swapped = expected_sum(self.x_TH, 1 - self.ids_TK.abs(), self.weights_TK, num_experts=2)
        missing = right.clone()
        missing[2] = float("nan")
        for wrong in (swapped, missing, right * 1.1, right.roll(1, dims=0)):
            problem = mismatch(wrong.bfloat16(), right, wire_dtype=torch.bfloat16)
            assert problem is not None
            assert "tokens are wrong" in problem
        problem = mismatch(right[:2], right, wire_dtype=torch.bfloat16)
        assert problem is not None
        assert "(2, 4)" in problem

    @pytest.mark.parametrize("layout", list(DispatchLayout))
    def test_rows_that_were_not_received_are_poisoned(self, layout: DispatchLayout) -> None:
        shape = {"flat": (1,), "token_major": (1,), "rank_major": (1, 2), "expert_major": (1, 2)}
        lead = shape[layout.value]
        ids = torch.full((*lead, 1), -1)
        ids.view(-1)[0] = 0
        out = DispatchOutput(
            tokens=torch.ones(*lead, 4),
            num_tokens_per_expert=torch.tensor([1], dtype=torch.int32),
            layout=layout,
            expert_offsets=torch.tensor([0, 1], dtype=torch.int32),
            topk_ids=ids,
            topk_weights=torch.ones(*lead, 1),
        )
        rows = scaling_experts(out, [1], dtype=torch.float32).view(-1, 4)
        assert rows[0].tolist() == [0.25] * 4
        assert bool(rows[1:].isnan().all())

    @pytest.mark.parametrize("layout", list(DispatchLayout))
    def test_rows_beyond_the_counts_do_not_matter(self, layout: DispatchLayout) -> None:
        """With static shapes there is room for more rows than were received."""
        padded = layout in (DispatchLayout.RANK_MAJOR, DispatchLayout.EXPERT_MAJOR)
        lead = (1, 3) if padded else (3,)
        ids = torch.full((*lead, 1), 10**6)  # no id of an expert
        ids.view(-1)[0] = 0
        out = DispatchOutput(
            tokens=torch.ones(*lead, 4),
            num_tokens_per_expert=torch.tensor([1], dtype=torch.int32),
            num_tokens_per_rank=torch.tensor([1], dtype=torch.int32),
            layout=layout,
            expert_offsets=torch.tensor([0, 1], dtype=torch.int32),
            topk_ids=ids,
            topk_weights=torch.full((*lead, 1), 0.5),
        )
        rows = scaling_experts(out, [1], dtype=torch.float32).view(-1, 4)
        assert rows[0].tolist() == [0.25 if layout.expanded else 0.125] * 4
        assert bool(rows[1:].isnan().all())


def measure_a_wrong_combine(context: RankContext) -> str:
    """Runs on a rank: measures with a communicator whose rank 0 doubles every result."""
    combine = MoECommunicator.combine

    def doubled(self: MoECommunicator, *args: Any, **kwargs: Any) -> Any:
        return combine(self, *args, **kwargs) * (2 if self.rank == 0 else 1)

    case = Case(**{**SHAPE, "ranks": context.num_ranks})
    with mock.patch.object(MoECommunicator, "combine", doubled):
        try:
            list(measure_batch(context, [case], Plan(iters=1), on_progress=lambda _: None))
        except WrongResultError as error:
            return str(error)
    return ""


def test_wrong_results_are_not_timed(rank_pools: RankPools) -> None:
    here, elsewhere = rank_pools(2).run(measure_a_wrong_combine)
    assert "tokens are wrong" in here
    assert "ranks [0]" in elsewhere


class TestRecords:
    def test_records_survive_a_file(self, tmp_path: Path) -> None:
        spread = Summary(1.0, 2.0, 3.0, 2.0)
        ceiling: dict[str, Any] = {"ceiling": "put+get", "ceiling_us": spread, "get_us": spread}
        records = [make_record(), make_record(phase="pair", idle_us=spread, **ceiling)]
        path = write_records(tmp_path / "r.jsonl", records)
        assert read_records(path) == records
        assert [json.loads(line)["phase"] for line in path.read_text().splitlines()] == [
            "dispatch",
            "pair",
        ]

    def test_append_adds_and_the_default_replaces(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        write_records(path, [make_record(seed=1)], append=True)
        path.write_text(path.read_text().rstrip("\n"))  # as a writer leaves it that was cut off
        write_records(path, [make_record(seed=2)], append=True)
        assert [record.seed for record in read_records(path)] == [1, 2]
        write_records(path, [make_record(seed=3)])
        assert [record.seed for record in read_records(path)] == [3]

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"phase": "sleep"}, "phase"),
            ({"variant": "best"}, "variant"),
            ({"ceiling": "all"}, "ceiling"),
            ({"put_us": 3.0}, "put_us"),
            ({"mode": "xx"}, "mode"),
            ({"ranks": 0}, "ranks"),
            ({"tokens": "128"}, "tokens"),
            ({"tokens": 1.5}, "tokens"),
            ({"uneven": 1}, "uneven"),
            ({"wire_gbps": -1.0}, "wire_gbps"),
            ({"raw_ratio": None}, "raw_ratio"),
            ({"time_us": 3.0}, "time_us"),
            ({"time_us": {"min": 1.0, "median": 1.0, "p99": 1.0}}, "mean"),
            ({"environment": {}}, "environment"),
            ({"surprise": 1}, "surprise"),
            ({"raw_us": {"min": -1.0, "median": 1.0, "p99": 1.0, "mean": 1.0}}, "raw_us: min"),
        ],
    )
    def test_malformed_lines_are_refused(
        self, tmp_path: Path, change: dict[str, Any], named: str
    ) -> None:
        good = make_record().to_json()
        path = tmp_path / "r.jsonl"
        path.write_text(f"{good}\n\n{json.dumps({**json.loads(good), **change})}\n")
        with pytest.raises(RecordError, match=rf"r\.jsonl:3: .*{named}"):
            read_records(path)

    @pytest.mark.parametrize(
        "line", ["{", "[]", "7", '{"engine": 1e999}', '{"engine": NaN}', "[" * 10_000, "\xff"]
    )
    def test_what_is_no_object_is_refused(self, tmp_path: Path, line: str) -> None:
        path = tmp_path / "r.jsonl"
        path.write_bytes(line.encode("latin-1") + b"\n")
        with pytest.raises(RecordError, match=r"r\.jsonl:1: "):
            read_records(path)

    def test_a_missing_field_and_a_missing_file_are_named(self, tmp_path: Path) -> None:
        values = json.loads(make_record().to_json())
        del values["host_us"]
        with pytest.raises(RecordError, match="host_us"):
            Record.from_json(json.dumps(values))
        with pytest.raises(RecordError, match=r"nothing\.jsonl"):
            read_records(tmp_path / "nothing.jsonl")

    def test_the_latest_record_of_a_key_wins(self) -> None:
        old = make_record(time_us=9.0, date="2030-01-01T00:00:00")
        new = make_record(time_us=1.0, date="2030-01-02T00:00:00")
        other = make_record(tokens=64)
        assert latest([new, other, old]) == [new, other]
        assert latest([old, other, new]) == [new, other]
