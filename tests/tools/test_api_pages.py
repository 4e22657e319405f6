"""The API reference: built from docstrings without a network, with nothing left out."""

from __future__ import annotations

import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import expertlink
from expertlink.combining import Combining
from expertlink.connection import Connection

pdoc = pytest.importorskip("pdoc", reason="pdoc is not installed")

ROOT = Path(__file__).parents[2]
API: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "api.py"))


def test_pages_are_written_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError(f"a connection to {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    API["write"](tmp_path)
    index = (tmp_path / "index.html").read_text(encoding="utf-8")
    for name in API["MODULES"]:
        path = f"{name.replace('.', '/')}.html"
        assert f'href="{path}"' in index
        assert (tmp_path / path).exists()
    page = (tmp_path / "expertlink.html").read_text(encoding="utf-8")
    for name in expertlink.__all__:
        assert name.startswith("__") or f'id="{name}"' in page
    for name in vars(expertlink.MoECommunicator) | vars(Connection) | vars(Combining):
        assert name.startswith("_") or f'id="MoECommunicator.{name}"' in page
    assert 'id="MoECommunicator.dispatch"' in page
    inside = [path.stem for path in (tmp_path / "expertlink").glob("*.html")]
    assert sorted(inside) == sorted(
        name.split(".")[1] for name in API["MODULES"] if name.count(".") == 1
    )


@pytest.mark.parametrize("name", API["MODULES"])
def test_everything_public_has_a_docstring(name: str) -> None:
    module = pdoc.doc.Module.from_name(name)
    assert not [member.fullname for member in documented(module) if not member.docstring.strip()]


def documented(parent: Any) -> Iterator[Any]:
    """What a page has entries for."""
    yield parent
    is_class = isinstance(parent, pdoc.doc.Class)
    for member in API["members_of"](parent) if is_class else parent.members.values():
        if member.name.startswith("_") or isinstance(member, pdoc.doc.Variable):
            continue
        if isinstance(member, pdoc.doc.Class):
            yield from documented(member)
        elif isinstance(member, pdoc.doc.Function):
            yield member


def test_integrations_import_no_framework() -> None:
    """Those with a socket that is filled at import do so where the framework is installed."""
    names = [name for name in API["MODULES"] if ".integrations." in name]
    code = (
        f"import sys, importlib.util; sys.modules['torchtitan'] = None\n"
        f"for name in {names}: __import__(name)\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'transformers', 'flashinfer', 'vllm', 'sglang'}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
