"""README.md keeps its word: its code runs, its tables match the library."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from expertlink.settings import VARIABLES

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8")
EXAMPLE, *SNIPPETS = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def run(code: str, folder: Path, *, num_ranks: int) -> str:
    """Runs a script as one process without any launcher, or as that many ranks of torchrun."""
    script = folder / "example.py"
    script.write_text(code, encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    done = subprocess.run(
        [sys.executable, *(launcher if num_ranks > 1 else []), str(script)],
        capture_output=True,
        text=True,
        timeout=200,
        # On CPUs everywhere: the machine may have fewer GPUs than the ranks asked for.
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("number", range(len(SNIPPETS) + 1))
def test_every_block_compiles(number: int) -> None:
    compile([EXAMPLE, *SNIPPETS][number], f"README.md, python block {number + 1}", "exec")


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_example_runs(num_ranks: int, tmp_path: Path) -> None:
    output = run(EXAMPLE, tmp_path, num_ranks=num_ranks)
    for rank in range(num_ranks):
        assert f"rank {rank} of {num_ranks}: experts [{rank * 8 // num_ranks}" in output


@pytest.mark.parametrize("change", ["num_experts=2", "num_experts=8, expert_alignment=4"])
def test_the_example_runs_for_other_models(change: str, tmp_path: Path) -> None:
    """A rank without experts, and groups with padding."""
    assert "num_experts=8," in EXAMPLE
    code = EXAMPLE.replace("num_experts=8,", f"{change},")
    code = code.replace("(16, 8,", "(16, config.num_experts,")
    assert run(code, tmp_path, num_ranks=3).count("rank ") == 3


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_snippets_go_on_from_the_example(num_ranks: int, tmp_path: Path) -> None:
    begin, end, rest = EXAMPLE.partition("comm.close()")
    assert end, "the example closes its communicator; the snippets come before that"
    last = 'print("done")\n'
    code = "\n".join([begin, *SNIPPETS, last, end + rest])
    assert run(code, tmp_path, num_ranks=num_ranks).count("done") == num_ranks


def test_the_example_is_short() -> None:
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= 24


def test_environment_variables_are_all_there() -> None:
    section = TEXT.split("## Environment variables\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (.*) \|$", section, flags=re.MULTILINE)
    assert {
        name: (None if default == "\u2013" else float(default), meaning)
        for name, default, meaning in rows
    } == {variable.name: (variable.default, variable.meaning) for variable in VARIABLES}


def test_links_lead_somewhere() -> None:
    for page in (README, *(README.parent / "docs").glob("*.md")):
        for target, anchor in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", page.read_text()):
            goal = page.parent / target if target else page
            assert goal.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(goal), f"{page.name}: {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """Headings of a page as links spell them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
