"""The plug-in for flashinfer: inside flashinfer where it is installed, else its signatures."""

from __future__ import annotations

import pytest

from expertlink.integrations import flashinfer
from expertlink.integrations.versions import FrameworkVersionError
from support import frameworks


@pytest.mark.parametrize(("num_ranks", "mode"), [(2, "ll"), (4, "ll"), (2, "ht")])
def test_the_communication_keeps_the_contract(rank_pools, num_ranks: int, mode: str) -> None:
    pool = rank_pools(num_ranks)
    results = pool.run(frameworks.flashinfer_calls, mode, [3, 0, 5], timeout_s=60)
    assert results == ["expertlink"] * num_ranks


@pytest.mark.gpu(4)
@pytest.mark.parametrize("mode", ["ll", "ht"])
def test_on_gpus(rank_pools, mode: str) -> None:
    """bfloat16 rows, so that the nvlink engine serves."""
    pool = rank_pools(4, "cuda")
    assert pool.run(frameworks.flashinfer_calls, mode, [3, 0, 5], timeout_s=100)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, "flashinfer-python is not installed; .* flashinfer-python >=0.7.2,<0.8"),
        ({"flashinfer-python": "0.6.1"}, "flashinfer-python 0.6.1 is installed"),
    ],
)
def test_other_versions(found: dict[str, str], said: str) -> None:
    flashinfer.register.cache_clear()
    with (
        frameworks.versions_are(found),
        pytest.raises(FrameworkVersionError, match=said),
    ):
        flashinfer.register()
