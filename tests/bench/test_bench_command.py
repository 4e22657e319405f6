"""`expertlink bench` and `expertlink plot`, as they are typed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from typer.models import OptionInfo
from typer.testing import CliRunner

from expertlink.bench import command
from expertlink.bench.host_time import HostTimeRecord
from expertlink.bench.overlap import hidden_part
from expertlink.bench.records import PHASES, read_records, write_records
from expertlink.cli import app
from expertlink.types import DispatchLayout
from expertlink.workloads.trace import RoutingTrace
from support.bench_records import make_record

TINY = ("--ranks", "2", "--tokens", "16", "--hidden", "64", "--topk", "2", "--experts", "4")
QUICK = (*TINY, "--iters", "3", "--warmup", "1", "--device", "cpu")


def test_options_are_spelled_out_where_a_placeholder_is_named_alike() -> None:
    """Typer 0.27.0 takes a metavar that is the name in capitals for the option's own name."""
    for registered in app.registered_commands:
        assert registered.callback is not None
        hints = get_type_hints(registered.callback, include_extras=True)
        for name, hint in hints.items():
            for option in getattr(hint, "__metadata__", ()):
                if isinstance(option, OptionInfo) and option.metavar == name.upper():
                    assert option.default == f"--{name}"  # where typer keeps what comes first


def test_two_ranks_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    layouts = "flat,token_major,rank_major,expert_major"
    result = CliRunner().invoke(app, ["bench", *QUICK, "--layout", layouts, "--out", str(path)])
    assert result.exit_code == 0, result.output
    records = read_records(path)
    assert len(records) == 4 * 2 * len(PHASES)
    assert len({record.key() for record in records}) == len(records)
    for record in records:
        assert record.engine == "collective"
        assert record.iterations == 3
        assert record.raw_ratio > 0
        assert record.time_us.min <= record.time_us.median <= record.time_us.p99
        assert record.time_us_mean_rank.mean <= record.time_us.mean
        assert record.environment.backend == "gloo"
        assert record.wire_bytes <= record.wire_bytes_max
    for layout in DispatchLayout:
        dispatch, combine, pair = (
            next(r for r in records if (r.layout, r.phase) == (layout.value, phase))
            for phase in PHASES
        )
        # Per (token, other rank) one row each way, at most T of them.
        assert 0 < dispatch.wire_bytes == combine.wire_bytes <= 16 * 64 * 2
        assert pair.wire_bytes == dispatch.wire_bytes + combine.wire_bytes
        # 2 ids and 2 weights of 4 bytes beside a row of 64 elements of 2 bytes.
        assert dispatch.metadata_bytes is not None
        assert dispatch.metadata_bytes * 8 == dispatch.wire_bytes
    for word in ("token_major", "cached", "pair", "x raw", "24 records"):
        assert word in result.output


def test_uneven_quantized_skewed_and_appended(tmp_path: Path) -> None:
    path = write_records(tmp_path / "r.jsonl", [make_record()])
    result = CliRunner().invoke(
        app,
        [
            *("bench", *QUICK, "--uneven", "--routing", "zipf:1.5,one_hot,masked:0.5"),
            *("--quantization", "e4m3_float32", "--variant", "cached", "--mode", "ll"),
            *("--layout", "expert_major", "--hidden", "200", "--inputs", "1"),
            *("--out", str(path), "--append"),
        ],
    )
    assert result.exit_code == 0, result.output
    records = read_records(path)[1:]
    assert {record.routing for record in records} == {"zipf:1.5", "one_hot", "masked:0.5"}
    for record in records:
        assert record.uneven
        assert record.quantization == "e4m3_float32"
        assert record.metadata_bytes == 0
        # 200 e4m3 elements and 2 scales one way, 200 bfloat16 elements the other.
        row = {"dispatch": 208, "combine": 400, "pair": 8}[record.phase]
        assert record.wire_bytes_max % row == 0


def test_a_recorded_trace_brings_its_shape(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).permuted(
        np.tile(np.arange(6, dtype=np.int32), (1, 2, 2, 16, 1)), axis=-1
    )
    trace = RoutingTrace(np.ascontiguousarray(ids[..., :3]), num_experts=6)
    trace.save(tmp_path / "seen.npz")
    path = tmp_path / "r.jsonl"
    shape = ("--ranks", "2", "--tokens", "16", "--hidden", "64", "--iters", "2")
    arguments = ["bench", *shape, "--device", "cpu", "--trace", str(tmp_path / "seen.npz")]
    result = CliRunner().invoke(app, [*arguments, "--variant", "uncached", "--out", str(path)])
    assert result.exit_code == 0, result.output
    assert {(r.routing, r.topk, r.experts) for r in read_records(path)} == {
        ("trace:seen.npz", 3, 6)
    }
    result = CliRunner().invoke(app, [*arguments, "--topk", "2"])
    assert result.exit_code == 2
    assert "topk=3" in result.output


def test_a_sweep_of_sm_budgets_goes_pairwise(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    budgets = ("--num-sms-dispatch", "8,16", "--num-sms-combine", "24")
    arguments = ["bench", *QUICK, *budgets, "--variant", "cached", "--out", str(path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert [(r.phase, r.num_sms) for r in read_records(path)] == [
        *(("dispatch", 8), ("combine", 24), ("pair", 24)),
        *(("dispatch", 16), ("combine", 24), ("pair", 24)),
    ]
    pairs = [r for r in read_records(path) if r.phase == "pair"]
    assert [(r.num_sms_dispatch, r.num_sms_combine) for r in pairs] == [(8, 24), (16, 24)]
    assert pairs[0].key() != pairs[1].key()
    assert pairs[0].ceiling is None
    assert pairs[0].ceiling_note is not None
    assert f"no ceilings: {pairs[0].ceiling_note}" in result.output


def test_overlap_with_a_matrix_product(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    product = ("--overlap", "--gemm", "16,32,8")
    result = CliRunner().invoke(app, ["bench", *QUICK, *product, "--out", str(path)])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["case"]["variant"] for line in lines] == ["uncached", "cached"]
    for line in lines:
        assert line["kind"] == "overlap"
        assert line["gemm"] == [16, 32, 8]
        assert line["iterations"] == 3
        times = [line[f"{name}_us"]["median"] for name in ("gemm", "dispatch", "both")]
        assert line["hidden"] == pytest.approx(hidden_part(*times), abs=1e-3)
    assert "hidden" in result.output


def test_host_time(tmp_path: Path) -> None:
    """Parts add up; replays of graphs have no host time to split."""
    path = tmp_path / "r.jsonl"
    case = ("--host-time", "--layout", "flat", "--variant", "cached", "--out", str(path))
    result = CliRunner().invoke(app, ["bench", *QUICK, *case])
    assert result.exit_code == 0, result.output
    records = read_records(path, HostTimeRecord)
    assert [(one.phase, one.outputs) for one in records] == [
        (phase, outputs)
        for outputs in ("own", "prepared", "tracked")
        for phase in ("dispatch", "combine")
    ]
    for one in records:
        assert one.iterations == 3
        assert 0 < one.torch_us <= one.host_us
        assert one.wait_us == one.launch_us == 0, "no kernels of this library"
        assert one.python_us == pytest.approx(one.host_us - one.torch_us, abs=0.02)
        assert one.host_hot_us.min <= one.host_us <= one.host_hot_us.p99
    assert "Python" in result.output
    assert read_records(path) == []


def test_what_overlap_hides() -> None:
    assert hidden_part(10.0, 4.0, 10.0) == 1.0
    assert hidden_part(4.0, 10.0, 12.0) == 0.5
    assert hidden_part(10.0, 4.0, 14.0) == 0.0


@pytest.mark.gpu(2)
def test_two_gpus_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    arguments = [*QUICK, "--device", "cuda", "--out", str(path)]
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 0, result.output
    for record in read_records(path):
        assert record.environment.gpu is not None
        assert record.environment.backend == "nccl"
        assert record.aligned == "device"
        assert record.idle_us is not None
        assert record.memory_peak_bytes is not None


def test_a_failing_case_does_not_end_the_run(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    result = CliRunner().invoke(
        app,
        [
            *("bench", *QUICK, "--engine", "nvlink,collective", "--variant", "uncached"),
            *("--out", str(path)),
        ],
    )
    assert result.exit_code == 1
    assert "failed:" in result.output
    assert "nvlink" in result.output
    assert "Traceback" not in result.output
    assert [record.engine for record in read_records(path)] == ["collective"] * 3


def test_as_ranks_of_torchrun(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "expertlink", "bench", *QUICK),
            *("--variant", "cached", "--engine", "nvlink,collective", "--out", str(path)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
    )
    records = read_records(path)
    assert [record.phase for record in records] == list(PHASES)
    assert records[0].command.startswith("torchrun --nproc-per-node=2 -m expertlink bench")
    assert done.returncode == 1  # for the case that failed
    assert done.stdout.count("failed:") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layout", "rows"), "layout='rows'"),
        (("--topk", "9", "--experts", "8"), "at most num_experts=8"),
        (("--tokens", "1,x"), "tokens='1,x'"),
        (("--tokens", ","), "tokens=',' cannot be measured"),
        (("--mode", ","), "mode=',' cannot be measured"),
        (("--mode", "ll", "--overlap"), "variant='eager' cannot be measured with --overlap"),
        (("--mode", "ll", "--host-time", "--variant", "halves"), "measured with --host-time"),
        (("--host-time", "--overlap"), "either --host-time or --overlap"),
        (("--routing", "zipf:big"), "zipf"),
        (("--routing", "trace"), "--trace"),
        (("--trace", "missing.npz"), "missing.npz"),
        (("--device", "tpu"), "device='tpu'"),
        (("--ranks", "0"), "ranks=0"),
        (("--iters", "0"), "iters=0"),
        (("--timeout", "0"), "timeout=0"),
        (("--threads", "0"), "threads=0"),
        (("--seed", "-1"), "seed=-1"),
        (("--variant", "graph"), "variant='graph' cannot be measured on CPU ranks"),
        (("--variant", "zero_copy"), "layout='flat'"),
        (("--variant", "static", "--engine", "collective"), "engine='collective'"),
        (("--num-sms", "8", "--num-sms-combine", "8"), "num_sms='8'"),
        (("--num-sms-dispatch", "8,16", "--num-sms-combine", "8,16,24"), "pairwise"),
        (("--ceiling-sms", "0"), "ceiling_sms=0"),
        (("--overlap", "--gemm", "8,8"), "gemm='8,8'"),
        (("--out", "no/such/folder.jsonl"), "No such file or directory"),
    ],
)
def test_bad_arguments_end_in_a_sentence(arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "--device", "cpu", *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


def bench_that_must_not_start(
    monkeypatch: pytest.MonkeyPatch, *arguments: str | Path
) -> tuple[int, str]:
    def started(*_: object) -> None:
        raise AssertionError("measuring has begun")

    monkeypatch.setattr(command, "_measure", started)
    result = CliRunner().invoke(app, ["bench", *QUICK, *map(str, arguments)])
    assert isinstance(result.exception, SystemExit), result.output
    return result.exit_code, result.output


def test_a_place_that_cannot_be_written_to_is_found_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench_that_must_not_start(monkeypatch, "--out", "/proc/x") == (
        2,
        "error: --out /proc/x: cannot be written to: No such file or directory\n",
    )
    os.mkfifo(tmp_path / "pipe")
    code, output = bench_that_must_not_start(monkeypatch, "--out", tmp_path / "pipe")
    assert (code, "is no ordinary file" in output) == (2, True)

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(command, "try_folder", full)
    code, output = bench_that_must_not_start(monkeypatch, "--out", tmp_path / "r.jsonl")
    assert (code, "cannot be written to: No space left on device" in output) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_folder_is_tried_with_more_than_a_few_bytes(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; "
        "from expertlink.files import try_folder; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); try_folder(Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert "File too large" in done.stderr  # stands for a full disk
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_ends_the_run_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.jsonl"
    write = Path.write_text

    def fill(self: Path, text: str, *more: object) -> int:
        write(self, text[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill)
    result = CliRunner().invoke(app, ["bench", *QUICK, "--out", str(path)])
    assert result.exit_code == 2
    assert f"error: --out {path}: cannot be written to: No space left" in result.output
    assert "pair" in result.output  # what was measured until then
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
    assert list(tmp_path.iterdir()) == []


def test_the_command_takes_several_files(tmp_path: Path) -> None:
    files = [
        write_records(tmp_path / f"{tokens}.jsonl", [make_record(tokens=tokens)])
        for tokens in (1, 2)
    ]
    out = tmp_path / "plots"
    result = CliRunner().invoke(app, ["plot", *map(str, files), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert [path.name for path in out.iterdir()] == ["time.png"]


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, message in (("bad", "bad.jsonl:1"), ("empty", "no records"), ("no", "no.jsonl")):
        path = tmp_path / f"{name}.jsonl"
        result = CliRunner().invoke(app, ["plot", str(path), "--out", str(tmp_path)])
        assert result.exit_code == 2
        assert message in result.output
