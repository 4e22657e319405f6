"""Fixtures and marker handling that every test shares."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import settings

from expertlink import launch
from expertlink.launch import DeviceType, RankPool
from support.depth import deep
from support.forked import ForkedRanks

# The first example of a test may start processes, so examples have no deadline of their own. On CI
# the examples are the same in every run: a red run is then about the change at hand.
_examples = deep(100)  # of tests that name no number themselves
settings.register_profile("local", deadline=None, max_examples=_examples)
settings.register_profile(
    "ci", deadline=None, max_examples=_examples, derandomize=True, print_blob=True
)
settings.load_profile("ci" if os.environ.get("CI") else "local")


# Ranks on streams of one GPU wait for each other, so their streams must not share queues.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

if "EXPERTLINK_CACHE_DIR" not in os.environ:
    # Rank processes inherit it: kernels are compiled once per run, beside the user's own cache.
    _cache = tempfile.mkdtemp(prefix="expertlink-tests-")
    os.environ["EXPERTLINK_CACHE_DIR"] = _cache
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)


_HEED_CTRL_C = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


def interruptible(command: Sequence[str]) -> list[str]:
    """A command that heeds ctrl-C also where these tests were started to ignore it.

    A background job of a script ignores SIGINT, its children inherit that, and a Python that starts
    so never raises KeyboardInterrupt.

    Args:
        command: path of an executable, then its arguments.
    """
    return [sys.executable, "-c", _HEED_CTRL_C, *command]


class RankPools:
    """Pools of local ranks that live for the whole session, started when first asked for."""

    def __init__(self) -> None:
        self._pools: dict[tuple[int, DeviceType], RankPool] = {}

    def __call__(self, num_ranks: int, device: DeviceType = "cpu") -> RankPool:
        """The pool of this size; a new one where the last one lost a rank. Skips without GPUs."""
        if device == "cuda":
            _require_gpus(num_ranks)
        pool = self._pools.get((num_ranks, device))
        if pool is None or not pool.alive:
            if pool is not None:
                pool.close()
            pool = self._pools[num_ranks, device] = RankPool(num_ranks=num_ranks, device=device)
        return pool

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


@pytest.fixture(scope="session")
def rank_pools() -> Iterator[RankPools]:
    """`rank_pools(num_ranks, device="cpu")` gives a running `RankPool` of that size."""
    pools = RankPools()
    yield pools
    pools.close()


@pytest.fixture(scope="session", autouse=True)
def forked_ranks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Rank processes on CPUs start without importing torch; those of the launcher's own tests do.

    Nor do they import what tests mark with `preload`. Commands and examples that tests run as
    processes of their own start ranks as users do.
    """
    marks = [item.get_closest_marker("preload") for item in request.session.items]
    modules = {name: None for mark in marks if mark is not None for name in mark.args}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "multiprocessing", ForkedRanks(list(modules)))
        yield


@pytest.fixture
def spawned_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank processes start as users start them."""
    monkeypatch.setattr(launch, "multiprocessing", multiprocessing)


# Files that take longest. They begin first, so that no process of `pytest -n` ends long after the
# others.
_LONG = [
    "test_nvlink_kernels",
    "test_examples",
    "test_launch",
    "test_readme",
    "test_compiled_ranks",
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in _LONG)
    # More cases take longer: the net under a test that hangs is hung lower.
    if deep(1) > 1:
        seconds = deep(int(float(config.getini("timeout") or 0)))
        for item in items:
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(seconds))


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("gpu")
    if marker is not None:
        _require_gpus(int(marker.args[0]) if marker.args else 1)


def _require_gpus(needed: int) -> None:
    found = torch.cuda.device_count()
    if found < needed:
        pytest.skip(f"needs {needed} CUDA GPU{'s' if needed > 1 else ''}, {found} found")
