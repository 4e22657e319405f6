"""The plug-in for torchtitan: inside torchtitan where it is installed, else its signatures."""

from __future__ import annotations

import importlib

import pytest

from expertlink.integrations.versions import FrameworkVersionError
from support import frameworks


@pytest.mark.parametrize(
    ("num_ranks", "pad", "mesh"), [(2, None, True), (4, None, True), (2, 4, True), (2, None, False)]
)
def test_the_override_gives_a_dispatcher(
    rank_pools, num_ranks: int, pad: int | None, mesh: bool
) -> None:
    """Steps of more tokens than before, of fewer, and of none."""
    results = rank_pools(num_ranks).run(
        frameworks.titan_layer, pad, mesh, [5, 9, 0, 3], timeout_s=60
    )
    for replaced in results:
        assert len(replaced) == 1
        assert "token_dispatcher" in replaced[0]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, "torchtitan is not installed; expertlink was tested with torchtitan >=0.3.0,<0.4"),
        ({"torchtitan": "0.2.9"}, "torchtitan 0.2.9 is installed; .* >=0.3.0,<0.4"),
        ({"torchtitan": "0.4.0.dev1"}, "torchtitan 0.4.0.dev1 is installed"),
    ],
)
def test_other_versions(found: dict[str, str], said: str) -> None:
    with (
        frameworks.importable("torchtitan", "torchtitan.models.common.token_dispatcher") as module,
        frameworks.versions_are(found),
    ):
        module.dispatcher_class.cache_clear()
        for call in (module.dispatcher_class, lambda: module.expertlink_dispatch(None)):
            with pytest.raises(FrameworkVersionError, match=said):
                call()


@pytest.mark.skipif(frameworks.installed("torchtitan"), reason="torchtitan is installed")
def test_without_torchtitan() -> None:
    module = importlib.import_module("expertlink.integrations.torchtitan")
    module.dispatcher_class.cache_clear()
    with pytest.raises(FrameworkVersionError, match="torchtitan is not installed"):
        module.expertlink_dispatch(None)
