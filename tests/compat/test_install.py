"""The drop-in under the name `deep_ep`: installing, plug-ins, programs, import without a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertlink import ConfigurationError
from expertlink.compat.deep_ep import Buffer, EventOverlap, installing
from expertlink.compat.deep_ep.installing import OtherDeepEPError, install, install_if_asked
from expertlink.integrations import sglang

NAMES = [
    "Buffer",
    "Config",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "__version__",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "topk_idx_t",
    "utils",
]


@pytest.fixture(autouse=True)
def modules() -> Iterator[None]:
    """Nothing called deep_ep is loaded, before and after."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "deep_ep"]:
            del sys.modules[name]

    forget()
    yield
    forget()


def python(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )


def test_modules_can_be_found_and_imported() -> None:
    assert importlib.util.find_spec("deep_ep") is None
    for _ in range(2):
        install()
    for name in ("deep_ep", "deep_ep.utils", "deep_ep.utils.event"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.name == name
        assert importlib.import_module(name).__name__ == name
    deep_ep = importlib.import_module("deep_ep")
    utils = importlib.import_module("deep_ep.utils")
    assert deep_ep.utils is utils
    assert utils.event is sys.modules["deep_ep.utils.event"]
    for name in NAMES:
        assert hasattr(deep_ep, name)
    assert deep_ep.Buffer is Buffer
    assert utils.EventOverlap is deep_ep.EventOverlap is EventOverlap
    assert utils.EventHandle is deep_ep.EventHandle
    assert not hasattr(deep_ep, "HybridEPBuffer")
    with pytest.raises(ImportError):
        importlib.import_module("deep_ep.hybrid_ep_buffer")


def test_a_folder_can_be_added_to_utils(tmp_path: Path) -> None:
    (tmp_path / "gate.py").write_text("from deep_ep import Buffer\n")
    install()
    utils = importlib.import_module("deep_ep.utils")
    utils.__path__.append(str(tmp_path))
    assert importlib.import_module("deep_ep.utils.gate").Buffer is Buffer


def test_another_one_that_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.ModuleType("deep_ep")
    monkeypatch.setitem(sys.modules, "deep_ep", other)
    with pytest.raises(OtherDeepEPError, match="another deep_ep is loaded"):
        install()
    assert sys.modules["deep_ep"] is other
    install(replace=True)
    assert sys.modules["deep_ep"].Buffer is Buffer


def test_another_one_that_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep_ep").mkdir()
    (tmp_path / "deep_ep" / "__init__.py").write_text("raise RuntimeError('not to be imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(OtherDeepEPError, match="another deep_ep is installed, at .*__init__.py"):
        install()
    assert "deep_ep" not in sys.modules
    install(replace=True)
    assert importlib.import_module("deep_ep").Buffer is Buffer


@pytest.mark.parametrize(("value", "wanted"), [("1", True), ("0", False), ("", False)])
def test_plug_ins_heed_the_environment(
    monkeypatch: pytest.MonkeyPatch, value: str, wanted: bool
) -> None:
    monkeypatch.setenv("EXPERTLINK_DEEP_EP", value)
    for _ in range(2):
        install_if_asked()
    assert ("deep_ep" in sys.modules) == wanted


def test_a_value_that_is_no_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTLINK_DEEP_EP", "yes")
    with pytest.raises(ConfigurationError, match="EXPERTLINK_DEEP_EP='yes': 0 or 1 is expected"):
        install_if_asked()


def test_entry_points_name_the_plug_in() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    targets = {
        "vllm.general_plugins": f"{installing.__name__}:{install_if_asked.__name__}",
        "sglang.srt.plugins": f"{sglang.__name__}:{sglang.plugin.__name__}",
    }
    for group, target in targets.items():
        _, _, after = text.partition(f'[project.entry-points."{group}"]\n')
        assert after.splitlines()[0] == f'expertlink_deep_ep = "{target}"'


def test_import_touches_no_gpu(tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "from expertlink.compat import deep_ep\n"
        "deep_ep.install()\n"
        "import deep_ep\n"
        "deep_ep.Buffer.set_num_sms(20)\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not [name for name in set(sys.modules) - before if name.startswith('cuda')]\n"
    )
    done = python("-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("by_module", [False, True])
def test_programs(tmp_path: Path, by_module: bool) -> None:
    (tmp_path / "program.py").write_text(
        "import sys, deep_ep\n"
        "print(__name__, deep_ep.Buffer.__module__.split('.')[0], sys.argv[1:])\n"
    )
    program = ["-m", "program"] if by_module else ["program.py"]
    done = python("-m", "expertlink.compat.deep_ep", *program, "a", "-b", folder=tmp_path)
    assert done.stdout == "__main__ expertlink ['a', '-b']\n", done.stderr


def test_a_program_by_its_name(tmp_path: Path) -> None:
    program = tmp_path / "serve"
    program.write_text("import deep_ep\nprint(deep_ep.__version__)\n")
    program.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = python("-m", "expertlink.compat.deep_ep", "serve", folder=Path("/"), PATH=path)
    assert done.stdout == "2.1.0\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"), [([], "usage: python -m"), (["no-such"], "no such file")]
)
def test_no_program(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = python("-m", "expertlink.compat.deep_ep", *arguments, folder=tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
