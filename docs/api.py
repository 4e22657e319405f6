"""Writes the API reference, pages of HTML made from the docstrings, to build/api.

python docs/api.py [FOLDER], or `make docs`. Needs no network. The pages are not kept in the
repository.
"""

from __future__ import annotations

import html
import importlib
import inspect
import sys
from pathlib import Path

import pdoc
import pdoc.doc

MODULES = (
    "expertlink",
    "expertlink.launch",
    "expertlink.metrics",
    "expertlink.nn",
    "expertlink.ops",
    "expertlink.placement",
    "expertlink.compat.deep_ep",
    "expertlink.integrations.flashinfer",
    "expertlink.integrations.sglang",
    "expertlink.integrations.torchtitan",
    "expertlink.integrations.transformers",
    "expertlink.integrations.versions",
)
"""What users import. All else is the library's own."""

PARTS = tuple(f"expertlink.{name}" for name in ("connection", "dispatching", "combining"))
"""Modules of the classes that MoECommunicator is made of: what is in them is listed as its own."""


def members_of(page: pdoc.doc.Class) -> list[pdoc.doc.Doc]:
    """What the page of a class lists: the constructor, what it has from its parts, its own."""
    inherited = [
        member
        for (module, _), members in page.inherited_members.items()
        for member in members
        if module not in PARTS
    ]

    def place(member: pdoc.doc.Doc) -> int:
        if member.name == "__init__":
            return -1
        module = member.taken_from[0]
        return PARTS.index(module) if module in PARTS else len(PARTS)

    return sorted((m for m in page.members.values() if m not in inherited), key=place)


def write(folder: Path) -> None:
    """Writes a page for every module, and an index."""
    pdoc.doc.Class.own_members = property(members_of)  # type: ignore[assignment]
    pdoc.render.configure(docformat="google", show_source=False, search=True)
    first, *others = MODULES
    pdoc.pdoc(first, rf"!{first}\..*", *others, output_directory=folder)
    (folder / "index.html").write_text(index(), encoding="utf-8")


def index() -> str:
    """Links to all pages, each with the first line of its module's docstring."""
    entries = []
    for name in MODULES:
        line = (inspect.getdoc(importlib.import_module(name)) or "").partition("\n")[0]
        path = name.replace(".", "/")
        entries.append(f'<li><a href="{path}.html">{name}</a>: {html.escape(line)}</li>')
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><meta charset="utf-8"><title>Expertlink: API reference</title>',
            "<h1>API reference</h1>",
            "<ul>",
            *entries,
            "</ul>",
            "</html>",
            "",
        ]
    )


if __name__ == "__main__":
    root = Path(__file__).parents[1]
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else root / "build" / "api")
