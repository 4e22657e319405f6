"""The demo: what it learns from, its model, its check against one rank, and its command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import RankPools, interruptible
from expertlink import MoECommunicator, __main__
from expertlink.demo.model import LanguageModel, ModelConfig
from expertlink.demo.report import Check
from expertlink.demo.text import Batches, Corpus
from expertlink.demo.train import RankReport, TrainConfig, train_rank
from expertlink.errors import InputError
from expertlink.launch import RankContext
from expertlink.workloads.trace import RoutingTrace

SMALL = ModelConfig(
    hidden_size=32, num_layers=2, num_heads=2, sequence=16, num_experts=5, expert_width=16
)
LAYOUTS = ("flat", "token_major", "rank_major", "expert_major")
CORPUS = Corpus.from_bytes(bytes(range(256)) * 64, name="counting", sample_bytes=17)
ALONE = RankContext(rank=0, num_ranks=1, device=torch.device("cpu"))


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "expertlink", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


# -- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_ranks_together_draw_the_batch_of_one_rank(num_ranks: int) -> None:
    batches = Batches(CORPUS.train, sequence=16, batch=7, seed=3)
    inputs, targets = batches.draw(5)
    shares = [batches.draw(5, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    assert torch.equal(torch.cat([share[0] for share in shares]), inputs)
    assert torch.equal(torch.cat([share[1] for share in shares]), targets)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_batches_differ_between_steps_and_seeds() -> None:
    batches = Batches(CORPUS.train, sequence=16, batch=4, seed=0)
    other_seed = Batches(CORPUS.train, sequence=16, batch=4, seed=1)
    first = batches.draw(0)[0]
    assert not torch.equal(first, batches.draw(1)[0])
    assert not torch.equal(first, other_seed.draw(0)[0])


def test_standard_library_is_a_fixed_text_with_a_held_out_part() -> None:
    one, two = (Corpus.from_standard_library(sample_bytes=65) for _ in range(2))
    assert torch.equal(one.train, two.train)
    assert 10 * len(one.held_out) < len(one.train)
    assert len(one.held_out) > 65


def test_text_may_be_any_bytes_but_not_too_few(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(bytes(range(256)) * 5)
    assert len(Corpus.from_file(path, sample_bytes=65).train) == 1200
    with pytest.raises(InputError, match=r"1280 bytes; accepted: at least 1296"):
        Corpus.from_file(path, sample_bytes=81)


# -- model and training ---------------------------------------------------------------------------


def outputs_and_gradients(layout: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    config = TrainConfig(model=SMALL, batch=3, layout=layout)
    with MoECommunicator(config.communicator_config(1, ALONE.device)) as comm:
        model = LanguageModel(SMALL, comm)
        logits, _ = model(Batches(CORPUS.train, sequence=16, batch=3, seed=0).draw(0)[0])
        logits.square().mean().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return logits.detach(), gradients


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_all_layouts_give_the_same_outputs_and_gradients(layout: str) -> None:
    logits, gradients = outputs_and_gradients(layout)
    expected_logits, expected_gradients = outputs_and_gradients("flat")
    torch.testing.assert_close(logits, expected_logits)
    assert any("router" in name for name in gradients)
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize(("num_ranks", "layout"), [(2, "flat"), (3, "token_major")])
def test_training_does_not_depend_on_the_number_of_ranks(
    rank_pools: RankPools, num_ranks: int, layout: str
) -> None:
    # Neither the 5 experts nor the 7 samples can be dealt out evenly.
    config = TrainConfig(model=SMALL, steps=4, batch=7, layout=layout, trace_every=1)
    reports: list[RankReport] = rank_pools(num_ranks).run(train_rank, config, CORPUS)
    alone = train_rank(ALONE, config, CORPUS)
    for report in reports:
        losses = [record.loss for record in report.records]
        assert losses == pytest.approx([record.loss for record in alone.records], rel=1e-5)
    assert reports[0].records[-1].validation_loss == pytest.approx(
        alone.records[-1].validation_loss, rel=1e-5
    )
    assert sorted(e for report in reports for e in report.local_experts) == [0, 1, 2, 3, 4]
    trace = torch.cat([report.trace for report in reports], dim=2)
    assert (trace[0] == alone.trace[0]).float().mean() > 0.99


def test_training_lowers_the_loss() -> None:
    config = TrainConfig(model=SMALL, steps=30, batch=8, warmup=5, learning_rate=1e-2)
    records = train_rank(ALONE, config, CORPUS).records
    assert records[-1].loss < 0.8 * records[0].loss


def test_check_refuses_losses_that_rounding_does_not_explain() -> None:
    assert Check([2.0, 1.0], [2.0, 1.00001], torch.float32).passed
    assert not Check([2.0, 1.0], [2.0, 1.001], torch.float32).passed
    assert not Check([2.0, float("nan")], [2.0, 1.0], torch.float32).passed


# -- command line ---------------------------------------------------------------------------------


def test_demo_writes_all_its_results(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"to be, or not to be, that is the question; " * 200)
    out = tmp_path / "new" / "folder"
    done = run_command(
        *("demo", "--ranks", "2", "--steps", "3", "--layout", "rank_major"),
        *("--device", "cpu", "--text", str(text), "--out", str(out)),
    )
    assert done.returncode == 0, done.stderr
    assert "agrees" in done.stdout
    for name in ("loss.png", "expert_load.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["one_rank_check"]["passed"] is True
    assert (summary["ranks"], summary["steps"], summary["layout"]) == (2, 3, "rank_major")
    assert sum(summary["forward_shares"].values()) == pytest.approx(1)
    trace = RoutingTrace.load(out / "routing_trace.npz")
    assert (trace.num_ranks, trace.num_experts, trace.topk) == (2, ModelConfig.num_experts, 2)
    assert trace.num_ranks * trace.tokens_per_rank == summary["tokens_per_step"]
    assert sorted(path.name for path in out.iterdir()) == [
        "expert_load.png",
        "loss.png",
        "routing_trace.npz",
        "summary.json",
    ]


@pytest.mark.gpu(2)
def test_demo_on_gpus_agrees_with_one_gpu(tmp_path: Path) -> None:
    done = run_command("demo", "--device", "cuda", "--steps", "6", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["device"], summary["dtype"]) == ("cuda", "bfloat16")
    assert summary["ranks"] == min(torch.cuda.device_count(), ModelConfig.num_experts)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ranks", "0"], "--ranks 0 is not possible; accepted: 1 to 16"),
        (["--ranks", "99"], "--ranks 99 is not possible; accepted: 1 to 16"),
        (["--steps", "0"], "--steps 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--balance-weight", "nan"], "--balance-weight nan"),
        (["--layout", "diagonal"], "'diagonal' is not possible; accepted: one of flat"),
        (["--mode", "fast"], "'fast' is not possible; accepted: one of ht, ll"),
        (["--device", "abacus"], "--device abacus"),
        (["--text", "no/such/file"], "cannot read no/such/file"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--device", "cpu", "--out", str(tmp_path), *arguments]
    monkeypatch.setattr(sys, "argv", ["expertlink", "demo", *options])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_an_output_folder_that_is_a_file_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    monkeypatch.setattr(sys, "argv", ["expertlink", "demo", "--out", str(taken)])
    with pytest.raises(SystemExit):
        __main__.main()
    assert "cannot be written to" in capsys.readouterr().err


def test_a_bad_text_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    arguments = ["--text", "no/such/file", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["expertlink", "demo", *arguments])
    with pytest.raises(SystemExit):
        __main__.main()
    assert not out.exists()


def test_a_full_disk_ends_the_demo_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loss.png").symlink_to("/dev/full")
    text = tmp_path / "text"
    text.write_bytes(b"to be, or not to be, that is the question; " * 200)
    options = ["--ranks", "1", "--steps", "1", "--device", "cpu", "--text", str(text)]
    monkeypatch.setattr(sys, "argv", ["expertlink", "demo", *options, "--out", str(tmp_path)])
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as ended:
            __main__.main()
    finally:
        torch.set_num_threads(threads)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert f"--out {tmp_path}: cannot be written to: No space left on device" in error
    assert error.count("\n") == 1


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(__main__, "NEEDED", ("numpy", "no_such_package"))
    monkeypatch.setattr(sys, "argv", ["expertlink", "demo"])
    with pytest.raises(SystemExit, match=r"needs no_such_package: pip install 'expertlink\[bench]"):
        __main__.main()


def test_interrupt_ends_the_demo_and_its_ranks(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--ranks", "2", "--out", str(tmp_path)]
    running = subprocess.Popen(
        interruptible([sys.executable, "-m", "expertlink", "demo", *options]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert running.stdout is not None
        assert running.stdout.readline().startswith(b"Training on")
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to the whole group
        # The ranks hold the other ends of the pipes: this returns once the last one is gone.
        _, errors = running.communicate(timeout=60)
    except BaseException:
        os.killpg(running.pid, signal.SIGKILL)
        raise
    assert running.returncode == 130
    assert b"Traceback" not in errors
