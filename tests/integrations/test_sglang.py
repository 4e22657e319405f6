"""SGLang's plug-in, beside dispatcher modules that looked for `deep_ep` before it ran."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import pytest

from expertlink.compat.deep_ep import Buffer, Config, ElasticBuffer
from expertlink.integrations import sglang
from expertlink.integrations.versions import FrameworkVersionError
from support import frameworks

NORMAL, ELASTIC = sglang.DISPATCHERS


def quantize() -> None:
    """Stands for SGLang's function."""


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, types.ModuleType]]:
    """SGLang's dispatchers, imported where there was no `deep_ep`."""
    modules = {}
    for dispatcher in sglang.DISPATCHERS:
        module = modules[dispatcher.module] = types.ModuleType(dispatcher.module)
        vars(module).update({dispatcher.found: False, dispatcher.error: ImportError("none")})
        monkeypatch.setitem(sys.modules, dispatcher.module, module)
    kernels = types.ModuleType(sglang.QUANTIZER_MODULE)
    vars(kernels)[sglang.QUANTIZER] = quantize
    monkeypatch.setitem(sys.modules, sglang.QUANTIZER_MODULE, kernels)
    monkeypatch.setenv("EXPERTLINK_DEEP_EP", "1")
    with frameworks.versions_are({"sglang": "0.5.23"}):
        yield modules
    for name in [name for name in sys.modules if name.split(".")[0] == "deep_ep"]:
        del sys.modules[name]


def test_dispatchers_get_what_they_did_not_find(loaded: dict[str, types.ModuleType]) -> None:
    for _ in range(2):
        sglang.plugin()
    normal, elastic = vars(loaded[NORMAL.module]), vars(loaded[ELASTIC.module])
    assert (normal["Buffer"], normal["Config"]) == (Buffer, Config)
    assert elastic["ElasticBuffer"] is ElasticBuffer
    for dispatcher, names in ((NORMAL, normal), (ELASTIC, elastic)):
        assert names[dispatcher.found] is True
        assert names[dispatcher.error] is None
        assert names[sglang.QUANTIZER] is quantize


def test_nothing_is_done_where_nobody_asks(
    loaded: dict[str, types.ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTLINK_DEEP_EP", "0")
    sglang.plugin()
    assert "deep_ep" not in sys.modules
    assert "Buffer" not in vars(loaded[NORMAL.module])


def test_dispatchers_that_found_one_keep_it(loaded: dict[str, types.ModuleType]) -> None:
    vars(loaded[NORMAL.module]).update({NORMAL.found: True, "Buffer": int})
    sglang.plugin()
    assert vars(loaded[NORMAL.module])["Buffer"] is int


def test_an_sglang_without_its_kernels(
    loaded: dict[str, types.ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, sglang.QUANTIZER_MODULE, None)
    sglang.plugin()
    names = vars(loaded[NORMAL.module])
    assert names[NORMAL.found] is False
    assert "fp8_kernel" in str(names[NORMAL.error])


def test_other_versions(loaded: dict[str, types.ModuleType]) -> None:
    for found, said in (
        ({"sglang": "0.6.0"}, "sglang 0.6.0 is installed; .*<0.5.24"),
        ({}, "sglang is not installed; expertlink was tested with sglang "),
    ):
        with (
            frameworks.versions_are(found),
            pytest.raises(FrameworkVersionError, match=said),
        ):
            sglang.plugin()
    del vars(loaded[ELASTIC.module])[ELASTIC.error]
    with pytest.raises(FrameworkVersionError, match="deepep_v2 has no _deepep_v2_import_error"):
        sglang.plugin()
