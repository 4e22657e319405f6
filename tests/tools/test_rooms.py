"""Imports follow the map of docs/architecture.md: down only, and in no circle."""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "expertlink"


def name_of(path: Path) -> str:
    """The module in a file: `expertlink.jit.cache`."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


@cache
def imports(path: Path, *, deep: bool) -> set[str]:
    """Modules of the package that a file imports, not only for types; `deep`: in functions too."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name.name}" for name in node.names]
            found |= {name if name in MODULES else str(node.module) for name in names}
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo.extend(node.orelse)
        elif deep or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo.extend(ast.iter_child_nodes(node))
    return found & set(MODULES) - {name_of(path), "expertlink"}


@cache
def floors() -> list[list[str]]:
    """Patterns of the modules on each floor of the map, from the top."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed: list[list[str]] = []
    for floor in re.split(r"^-{20,}$", page.split("```")[1], flags=re.MULTILINE):
        tops = [line for line in floor.splitlines() if line and not line.startswith(" ")]
        names = re.findall(r"(?<![\w/])([a-z_]+[*]?)(?:\.py\b|/)", "\n".join(tops))
        listed.append(["engines"] if "engines/" in floor.split("\n", 2)[1] else names)
    return listed


def floor_of(module: str) -> int:
    """The floor that a module is on."""
    top = module.split(".")[1]
    found = [
        index
        for index, names in enumerate(floors())
        if any(re.fullmatch(name.replace("*", ".*"), top) for name in names)
    ]
    assert len(found) == 1, f"{module} is on the floors {found}"
    return found[0]


FLOOR = {module: floor_of(module) for module in MODULES if module != "expertlink"}


def test_imports_go_down_only() -> None:
    up = [
        f"{module} imports {other}"
        for module, floor in FLOOR.items()
        for other in imports(MODULES[module], deep=True)
        if FLOOR[other] < floor
    ]
    assert not up


def test_modules_import_each_other_in_no_circle() -> None:
    graph = {module: imports(path, deep=False) for module, path in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_modes_know_nothing_of_each_other() -> None:
    for engine in ("nvlink", "hybrid"):
        for own, other in (("ht", "ll"), ("ll", "ht")):
            modules = [name for name in MODULES if f".{engine}.{own}." in name]
            assert modules
            for module in modules:
                seen = imports(MODULES[module], deep=True)
                assert not [name for name in seen if f".{other}." in name], module
