"""Writes what the pages take from the code: docs/reference, and tables of figures from records.

python docs/generate.py, or `make docs`. A test holds the pages equal to what this makes.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path

from expertlink import config, settings
from expertlink.bench.report import read_folder, readme_table
from expertlink.workloads.balance import simulate
from expertlink.workloads.balance_report import rows_of
from expertlink.workloads.trace import RoutingTrace

ROOT = Path(__file__).parents[1]
NOTE = "<!-- Written by docs/generate.py. Change the source, then run `make docs`. -->"


def pages() -> dict[Path, str]:
    """Every generated page, by its path."""
    folder = ROOT / "docs" / "reference"
    return {
        folder / "configuration.md": configuration_page(),
        folder / "environment.md": environment_page(),
        ROOT / "README.md": readme(),
        ROOT / "docs" / "guide" / "placement.md": placement_page(),
    }


def readme() -> str:
    """The README with the figures of the records."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    begin, end = "<!-- figures -->\n", "<!-- /figures -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return before + begin + readme_table(read_folder(ROOT / "benchmarks" / "results")) + end + after


def placement_page() -> str:
    """The guide with what the recorded traces give."""
    text = (ROOT / "docs" / "guide" / "placement.md").read_text(encoding="utf-8")
    begin, end = "<!-- balance -->\n", "<!-- /balance -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    lines = [
        "| trace | ranks | redundant | before | worst step | after | worst step |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("demo", "demo-unbalanced"):
        trace = RoutingTrace.load(ROOT / "benchmarks" / "traces" / f"{name}.npz")
        for ranks, redundant in ((4, 0), (4, 4), (8, 0), (8, 8)):
            _, rows = rows_of(simulate(trace, num_ranks=ranks, redundant=redundant))
            figures = " | ".join(rows[-1][1:5])
            lines.append(f"| `{name}.npz` | {ranks} | {redundant} | {figures} |")
    return before + begin + "\n".join(lines) + "\n" + end + after


def configuration_page() -> str:
    """Fields of `MoECommunicatorConfig` with types, defaults and docstrings, as they are."""
    tree = ast.parse(inspect.getsource(config.MoECommunicatorConfig))
    body = tree.body[0]
    assert isinstance(body, ast.ClassDef)
    lines = [
        "# Configuration",
        "",
        NOTE,
        "",
        f"`{body.name}` and its fields, in the order of the source.",
        "",
        as_markdown(ast.get_docstring(body) or ""),
        "",
        "## Fields",
        "",
    ]
    for field, text in zip(body.body, body.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign):
            continue
        assert isinstance(field.target, ast.Name)
        default = "" if field.value is None else f" = {ast.unparse(field.value)}"
        kind = ast.unparse(field.annotation)
        lines += [f"### {field.target.id}", "", f"`{kind}{default}`", ""]
        assert isinstance(text, ast.Expr), f"{field.target.id} has no docstring"
        assert isinstance(text.value, ast.Constant), f"{field.target.id} has no docstring"
        lines += [inspect.cleandoc(str(text.value.value)), ""]
    return "\n".join(lines)


def environment_page() -> str:
    """The table of `settings.VARIABLES`."""
    lines = [
        "# Environment variables",
        "",
        NOTE,
        "",
        as_markdown(inspect.getdoc(settings) or ""),
        "",
    ]
    for variable in settings.VARIABLES:
        default = "none" if variable.default is None else f"{variable.default:g}"
        lines += [f"## {variable.name}", "", f"Default: {default}.", ""]
        lines += textwrap.wrap(variable.meaning[0].upper() + variable.meaning[1:] + ".", 100)
        lines += [""]
    return "\n".join(lines)


def as_markdown(docstring: str) -> str:
    """A docstring whose sections, such as `Raises:`, are lists."""
    out: list[str] = []
    for line in docstring.splitlines():
        if line.endswith(":") and line[:-1].isalpha():
            out += [f"**{line[:-1]}**", ""]
        elif line.startswith("    ") and not line.startswith("     "):
            out.append(f"- {line.strip()}")
        else:
            out.append(line)
    return "\n".join(out)


def main() -> None:
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
