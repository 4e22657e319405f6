"""Routing traces: what is saved comes back, nothing else is accepted, and any ranks can replay."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertlink.errors import InputError
from expertlink.workloads.trace import MAX_IDS, RoutingTrace


def draw_trace(*shape: int, num_experts: int = 6, seed: int = 0) -> RoutingTrace:
    """A trace `[steps, layers, ranks, tokens, K]` of distinct experts, with some -1."""
    generator = np.random.default_rng(seed)
    every_expert = np.broadcast_to(np.arange(num_experts), (*shape[:-1], num_experts))
    ids = generator.permuted(every_expert, axis=-1)
    ids = np.where(generator.random(ids.shape) < 0.1, -1, ids)[..., : shape[-1]]
    return RoutingTrace(np.ascontiguousarray(ids, dtype=np.int32), num_experts, {"text": "drawn"})


def good_arrays() -> dict[str, Any]:
    return {
        "version": np.array(1),
        "num_experts": np.array(6),
        "topk_ids": draw_trace(2, 1, 2, 4, 2).topk_ids,
        "meta": np.frombuffer(b"{}", np.uint8),
    }


def test_saved_trace_comes_back(tmp_path: Path) -> None:
    trace = draw_trace(3, 2, 2, 5, 3)
    loaded = RoutingTrace.load(trace.save(tmp_path / "trace.npz"))
    assert np.array_equal(loaded.topk_ids, trace.topk_ids)
    assert (loaded.num_experts, loaded.meta) == (trace.num_experts, trace.meta)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.npz"]


def test_numpy_reads_a_trace_without_pickle(tmp_path: Path) -> None:
    path = draw_trace(1, 1, 1, 2, 2).save(tmp_path / "trace.npz")
    with np.load(path, allow_pickle=False) as archive:
        assert archive["topk_ids"].dtype == np.int32


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("version", None, "'version' is missing"),
        ("topk_ids", None, "'topk_ids' is missing"),
        ("meta", None, "'meta' is missing"),
        ("version", np.array(7), "version is 7"),
        ("version", np.array("1"), "'version' is <U1"),
        ("num_experts", np.array(0), "num_experts=0"),
        ("num_experts", np.array(3), "expected -1 to 2"),
        ("topk_ids", np.zeros((2, 1, 2, 4, 2)), "'topk_ids' is float64"),
        ("topk_ids", np.zeros((2, 4, 2), np.int32), "with 3 dimensions"),
        ("topk_ids", np.zeros((2, 1, 2, 0, 2), np.int32), "nothing is recorded"),
        ("topk_ids", np.zeros((1, 1, 1, 4, 2), np.int32), "names an expert twice"),
        ("topk_ids", np.full((1, 1, 1, 4, 1), -2, np.int32), "range from -2 to -2"),
        ("topk_ids", np.array([print, None]), "'topk_ids' is object"),
        ("meta", np.frombuffer(b"[1]", np.uint8), "meta is no JSON object"),
        ("meta", np.frombuffer(b"{", np.uint8), "cannot be read"),
        ("meta", np.zeros(2**20, np.uint8), "'meta' takes"),
    ],
)
def test_bad_archives_are_refused_with_a_reason(
    tmp_path: Path, name: str, value: npt.NDArray[Any] | None, says: str
) -> None:
    arrays = good_arrays()
    if value is None:
        del arrays[name]
    else:
        arrays[name] = value
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=r"bad\.npz: ") as refused:
        RoutingTrace.load(path)
    assert says in str(refused.value)


def test_size_in_the_header_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **good_arrays())
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    ids = members["topk_ids.npy"]
    members["topk_ids.npy"] = ids.replace(b"(2, 1, 2, 4, 2), }     ", b"(9999999, 1, 2, 4, 2), }")
    assert members["topk_ids.npy"] != ids
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(InputError, match="cut off"):
        RoutingTrace.load(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not an archive at all"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"other\.npz: cannot be read"):
        RoutingTrace.load(path)
    with pytest.raises(InputError, match="no such file"):
        RoutingTrace.load(tmp_path / "missing.npz")


def test_damaged_bytes_are_found(tmp_path: Path) -> None:
    path = draw_trace(3, 2, 2, 50, 3).save(tmp_path / "trace.npz")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(InputError, match="cannot be read"):
        RoutingTrace.load(path)


def test_meta_must_be_plain_json(tmp_path: Path) -> None:
    trace = RoutingTrace(good_arrays()["topk_ids"], 6, {"path": tmp_path})
    with pytest.raises(InputError, match="meta is not plain JSON"):
        trace.save(tmp_path / "trace.npz")


@given(
    shape=st.tuples(*[st.integers(1, 4)] * 4),
    num_ranks=st.integers(1, 7),
    tokens=st.integers(1, 9) | st.none(),
)
def test_replay_on_other_ranks_keeps_every_layers_stream(
    shape: tuple[int, int, int, int], num_ranks: int, tokens: int | None
) -> None:
    trace = draw_trace(*shape, 3)
    replay = trace.for_ranks(num_ranks, tokens)
    assert replay.num_ranks == num_ranks
    assert tokens is None or replay.tokens_per_rank == tokens
    assert replay.num_experts == trace.num_experts
    for layer in range(trace.num_layers):
        recorded = trace.topk_ids[:, layer].reshape(-1, 3)
        dealt = replay.topk_ids[:, layer].reshape(-1, 3)
        repeats = -(-len(dealt) // len(recorded))
        assert np.array_equal(dealt, np.concatenate([recorded] * repeats)[: len(dealt)])
        assert replay.num_steps == 1 or len(dealt) <= len(recorded)


@pytest.mark.parametrize(("num_ranks", "tokens"), [(0, 1), (1, 0), (2, MAX_IDS)])
def test_impossible_replays_are_refused(num_ranks: int, tokens: int) -> None:
    with pytest.raises(InputError):
        draw_trace(1, 1, 1, 2, 2).for_ranks(num_ranks, tokens)
