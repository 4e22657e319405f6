"""The examples run as their first lines say: alone, and on several ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, *arguments: str, num_ranks: int = 1) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [sys.executable, *(launcher if num_ranks > 1 else []), str(EXAMPLES / name)]
    done = subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_moe_layer(num_ranks: int) -> None:
    output = run_example("moe_layer.py", num_ranks=num_ranks)
    for rank in range(num_ranks):
        assert f"rank {rank} of {num_ranks}" in output


@pytest.mark.parametrize(("mode", "results"), [("ht", 4), ("ll", 2)])
def test_two_micro_batches_in_turn_give_the_bits_of_one_after_the_other(
    mode: str, results: int
) -> None:
    for num_ranks in (1, 3):
        output = run_example("two_micro_batches.py", "--mode", mode, num_ranks=num_ranks)
        for rank in range(num_ranks):
            assert re.search(f"rank {rank} of {num_ranks} .*: {results} results", output)


def test_megatron_calls_over_deep_ep_on_one_rank_and_on_two() -> None:
    for num_ranks in (1, 2):
        output = run_example("deep_ep_megatron.py", num_ranks=num_ranks)
        for rank in range(num_ranks):
            assert f"rank {rank} of {num_ranks}: output (64, 256)" in output


def test_language_model_learns_alike_on_one_rank_and_on_two(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"to be, or not to be, that is the question; " * 200)
    options = ["--text", str(text), "--steps", "4", "--batch", "5"]
    alone = run_example("train_language_model.py", *options)
    together = run_example("train_language_model.py", *options, num_ranks=2)
    losses = [re.findall(r"step +(\d+)  loss (\d+\.\d+)", output) for output in (alone, together)]
    assert losses[0][-1][0] == "4"
    assert float(losses[1][-1][1]) == pytest.approx(float(losses[0][-1][1]), abs=2e-3)
