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


def write(folder: Path) -> None:
    """Writes a page for every module, and an index."""
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
