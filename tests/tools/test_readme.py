"""README.md and docs/ keep their word: code runs, generated pages are current, names exist."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from support.pages import marked_blocks

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "docs" / "guide").glob("*.md"))
OTHERS = sorted(
    page
    for page in (ROOT / "docs").rglob("*.md")
    if page not in GUIDES and "```python" in page.read_text(encoding="utf-8")
)
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = runpy.run_path(str(ROOT / "docs" / "generate.py"))["pages"]()


def blocks(page: Path, *, gpu: bool) -> list[str]:
    """Python blocks of a page; those that need GPUs only where asked for."""
    return [code for mark, code in marked_blocks(page) if not mark or (gpu and mark == "GPU")]


EXAMPLE = blocks(README, gpu=False)[0]


def script(page: Path, *, gpu: bool) -> str:
    """A page's blocks as one script, which goes on from the README's example."""
    return "\n".join(code for code in blocks(page, gpu=gpu) if code != EXAMPLE)


def all_scripts(folder: Path, *, gpu: bool) -> str:
    """The README's example; before it closes its communicator, every page, each for itself."""
    begin, end, rest = EXAMPLE.partition("comm.close()")
    assert end, "the example closes its communicator; the blocks of guides come before that"
    loop = []
    for page in (README, *GUIDES):
        path = folder / f"{page.stem}_page.py"  # not the name of a module that it imports
        path.write_text(script(page, gpu=gpu), encoding="utf-8")
        loop.append(f"path = {str(path)!r}")
        loop.append("exec(compile(open(path).read(), path, 'exec'), dict(globals()))")
        loop.append(f"print('ran {page.stem}')")
    return "\n".join([begin, *loop, end + rest])


def run(code: str, folder: Path, *, num_ranks: int, gpus: bool = False) -> str:
    """Runs a script under torchrun."""
    path = folder / "example.py"
    path.write_text(code, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not gpus:  # also where there are some: fewer, perhaps, than the ranks asked for
        environment["CUDA_VISIBLE_DEVICES"] = ""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    done = subprocess.run(
        [sys.executable, *launcher, str(path)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- code ------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("page", OTHERS, ids=lambda page: page.stem)
def test_blocks_of_other_pages_run(page: Path) -> None:
    """On one rank, each page for itself."""
    code = "\n".join(blocks(page, gpu=False))
    exec(compile(code, page.name, "exec"), {})


def test_marks_are_known() -> None:
    """Blocks of frameworks run in tests/integrations/test_frameworks_page.py."""
    marks = {page.stem: {mark for mark, _ in marked_blocks(page)} for page in (README, *GUIDES)}
    frameworks = marks.pop("frameworks")
    assert frameworks == {"torchrun", "torchtitan", "flashinfer"}
    assert set().union(*marks.values()) <= {"", "GPU"}


def test_guides_go_on_from_the_example(tmp_path: Path) -> None:
    output = run(all_scripts(tmp_path, gpu=False), tmp_path, num_ranks=2)
    assert output.count("ran ") == 2 * (1 + len(GUIDES))


@pytest.mark.gpu(2)
def test_all_blocks_run_on_gpus(tmp_path: Path) -> None:
    output = run(all_scripts(tmp_path, gpu=True), tmp_path, num_ranks=2, gpus=True)
    assert output.count("ran ") == 2 * (1 + len(GUIDES))


def test_all_blocks_pass_the_type_checker(tmp_path: Path) -> None:
    """Blocks that need GPUs run on few machines; names, arguments and types hold everywhere."""
    pyright = [sys.executable, "-m", "pyright"]
    if subprocess.run([*pyright, "--version"], capture_output=True, timeout=200).returncode:
        pytest.skip("pyright does not start here")
    begin, _, _ = EXAMPLE.partition("comm.close()")
    for page in (README, *GUIDES):
        code = "\n".join([begin, script(page, gpu=True)])
        (tmp_path / f"{page.stem.lower()}_page.py").write_text(code, encoding="utf-8")
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(dict.fromkeys(RELAXED, False)))
    done = subprocess.run(
        [*pyright, "--pythonpath", sys.executable, "--project", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout


# Blocks define `step` again, and know which fields of an output their layout fills.
RELAXED = ("reportRedeclaration", "reportOptionalMemberAccess", "reportOptionalSubscript")


def test_the_example_is_short() -> None:
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= 27


# -- figures and generated pages -------------------------------------------------------------------


@pytest.mark.parametrize("page", GENERATED, ids=lambda page: page.stem)
def test_generated_text_is_current(page: Path) -> None:
    """The reference is that of the code, the README's figures are those of the records."""
    assert page.read_text(encoding="utf-8") == GENERATED[page], "run `make docs`"


def test_pages_stay_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 180
    architecture = ROOT / "docs" / "architecture.md"
    assert len(architecture.read_text(encoding="utf-8").splitlines()) <= 250


# -- links and names -------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", prose(page)):
        goal = page.parent / target if target else page
        assert goal.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(goal), f"{page.name}: {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_pages_name_exist(page: Path) -> None:
    """`engines/base.py`, `tests/soak.py`, `dispatch.cu`: in the tree, or the package."""
    package = ROOT / "src" / "expertlink"
    roots = [ROOT, page.parent, package]
    roots += [package / part for part in ("engines", "engines/nvlink", "kernels")]
    known = {path.name for top in ("src", "tests") for path in (ROOT / top).rglob("*.*")}
    named = re.findall(r"`([\w./-]+\.(?:py|cuh?|md|toml|jsonl))`", prose(page))
    missing = [
        name
        for name in named
        if not any((root / name).exists() for root in roots) and name not in known
    ]
    assert not [name for name in missing if not re.search(r"NAME|example\.py", name)]


def test_the_rooms_are_those_of_the_source() -> None:
    page = ROOT / "docs" / "architecture.md"
    rooms = page.read_text(encoding="utf-8").split("```")[1]
    package = ROOT / "src" / "expertlink"
    known = {path.name for path in package.rglob("*.*")}
    listed = set(re.findall(r"(\w+\.py)\b", rooms))
    assert listed <= known
    folders = [".", "engines", "engines/ranks", "engines/collective", "engines/nvlink", "jit"]
    folders += ["engines/hybrid", "ops", "integrations", "compat/deep_ep"]
    files = {path.name for part in folders for path in (package / part).glob("*.py")}
    unlisted = files - listed
    assert not {name for name in unlisted if not name.startswith(("_", "launch", "buffer"))}


def test_names_that_pages_name_exist() -> None:
    """Names in backticks are words of the sources, of the tests, or of torch."""
    folders = [ROOT / "src", ROOT / "tests", ROOT / "docs" / "generate.py", ROOT / "Makefile"]
    files = [file for top in folders for file in ([top] if top.is_file() else top.rglob("*"))]
    words: set[str] = set(NAMES_OF_OTHERS)
    for file in files:
        if file.suffix in (".py", ".cu", ".cuh") or file.name == "Makefile":
            words.update(re.findall(r"[A-Za-z_]\w+", file.read_text(encoding="utf-8")))
    for page in PAGES:
        if page.name in ("tried.md", "CHANGELOG.md") or page.parent.name in (
            "reference",
            "results",
        ):
            continue  # of what is gone, or made from the sources
        code = " ".join(FENCED.findall(page.read_text(encoding="utf-8")))
        named = re.findall(r"`(?:\w+\.)*([A-Za-z_]{2}\w+)(?:\(\))?`", prose(page))
        assert set(named) <= words | set(re.findall(r"\w+", code)), page.name


NAMES_OF_OTHERS = ("acq_rel", "fully_shard", "gradcheck", "GradScaler", "ShardedGradScaler")


def test_options_of_commands_that_pages_name_exist() -> None:
    """Those of every `expertlink ...`, in blocks and in sentences."""
    typer_main = pytest.importorskip("typer.main")
    from expertlink.cli import app

    commands = typer_main.get_command(app).commands
    options = {
        name: {text for parameter in command.params for text in parameter.opts}
        for name, command in commands.items()
    }
    checked = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        fenced = [line for block in FENCED.findall(text) for line in block.splitlines()]
        spoken = re.findall(r"`(expertlink [a-z][^`]*)`", FENCED.sub("", text))
        for line in (*fenced, *spoken):
            found = re.search(r"(?:^\s*|--no-python )expertlink ([a-z]+)([^#|]*)", line)
            if found is not None:
                unknown = set(re.findall(r"--[a-z-]+", found[2])) - options[found[1]] - {"--help"}
                assert not unknown, f"{page.name}: {line}"
                checked += 1
    assert checked > 20


def test_every_constant_that_was_tried_is_one_of_tuning() -> None:
    tried = (ROOT / "docs" / "tried.md").read_text(encoding="utf-8")
    tuning = ROOT / "src" / "expertlink" / "engines" / "nvlink" / "tuning.py"
    source = tuning.read_text(encoding="utf-8")
    constants = set(re.findall(r"^([A-Z][A-Z_\d]+)\b", source, flags=re.MULTILINE))
    assert set(re.findall(r"`((?:HT|LL)_[A-Z_]+)`", tried)) <= constants
    rows = [line.split("|")[1].strip() for line in tried.splitlines() if line.startswith("| ")]
    quoted = re.findall(r'"([^"`]+(?:`[^`]*`)?[^"]*)"', re.sub(r'"""|\n', " ", source))
    for name in quoted:
        if name not in ("SMs", "Not measured"):
            assert any(row.startswith(name) for row in rows), name


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Headings of a page as links spell them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
