"""The routings of the benchmark: what each name promises, over drawn shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from expertlink.errors import InputError
from expertlink.workloads.routings import RoutingSpec, draw_routing, draw_token_counts
from expertlink.workloads.trace import RoutingTrace

SPECS = ("balanced", "zipf", "zipf:0", "zipf:2.5", "one_hot", "masked", "masked:0", "masked:1")


@st.composite
def shapes(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    """Tokens per rank, experts, top-k, seed."""
    tokens = draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
    experts = draw(st.integers(1, 24))
    topk = draw(st.integers(1, min(experts, 9)))
    return tokens, experts, topk, draw(st.integers(0, 2**16))


def draw_ids(
    text: str, tokens: list[int], experts: int, topk: int, seed: int, index: int = 0
) -> torch.Tensor:
    """`[sum of tokens, K]`: choices of all ranks, in their order."""
    routings = draw_routing(
        RoutingSpec.parse(text),
        tokens_per_rank=tokens,
        experts=experts,
        topk=topk,
        seed=seed,
        index=index,
    )
    assert [len(routing.topk_ids_TK) for routing in routings] == tokens
    return torch.cat([routing.topk_ids_TK for routing in routings])


@given(shape=shapes(), text=st.sampled_from(SPECS))
def test_every_routing_chooses_distinct_experts_of_the_model(
    shape: tuple[list[int], int, int, int], text: str
) -> None:
    tokens, experts, topk, _ = shape
    ids = draw_ids(text, *shape)
    assert ids.dtype is torch.int64
    assert ids.shape == (sum(tokens), topk)
    for chosen in ids.tolist():
        present = [expert for expert in chosen if expert != -1]
        assert len(set(present)) == len(present)
        assert all(0 <= expert < experts for expert in present)
        assert text.startswith("masked") or len(present) == topk


@given(shape=shapes(), text=st.sampled_from(SPECS), index=st.integers(0, 5))
def test_a_seed_decides_everything(
    shape: tuple[list[int], int, int, int], text: str, index: int
) -> None:
    tokens, experts, topk, seed = shape
    first, second = (
        draw_routing(
            RoutingSpec.parse(text),
            tokens_per_rank=tokens,
            experts=experts,
            topk=topk,
            seed=seed,
            index=index,
        )
        for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.topk_ids_TK, other.topk_ids_TK)
        assert torch.equal(one.topk_weights_TK, other.topk_weights_TK)


def test_seed_and_index_change_the_routing() -> None:
    base = draw_ids("balanced", [64, 64], 16, 4, seed=1)
    assert not torch.equal(base, draw_ids("balanced", [64, 64], 16, 4, seed=2))
    assert not torch.equal(base, draw_ids("balanced", [64, 64], 16, 4, seed=1, index=1))


@given(shape=shapes())
def test_balanced_experts_are_chosen_equally_often(
    shape: tuple[list[int], int, int, int],
) -> None:
    _, experts, _, _ = shape
    ids = draw_ids("balanced", *shape)
    counts = torch.bincount(ids.flatten(), minlength=experts)
    assert int(counts.max() - counts.min()) <= 1
    if ids.numel() % experts == 0:
        assert int(counts.max()) == int(counts.min())


@given(shape=shapes(), fraction=st.floats(0, 1))
@example(shape=([26], 5, 5, 0), fraction=0.45)  # between two numbers
def test_masked_hits_its_fraction_and_whole_tokens(
    shape: tuple[list[int], int, int, int], fraction: float
) -> None:
    _, _, topk, _ = shape
    ids = draw_ids(f"masked:{fraction:.6f}", *shape)
    masked = int((ids == -1).sum())
    assert masked == round(float(f"{fraction:.6f}") * ids.numel())
    whole = int((ids == -1).all(dim=1).sum())
    assert whole >= masked // 2 // topk


def test_masked_drops_whole_tokens_and_single_choices() -> None:
    absent = draw_ids("masked", [200, 200], 16, 4, seed=0) == -1
    assert bool(absent.all(dim=1).any())
    assert bool((absent.any(dim=1) & ~absent.all(dim=1)).any())


@given(shape=shapes())
def test_one_hot_has_one_first_choice_and_balances_the_rest(
    shape: tuple[list[int], int, int, int],
) -> None:
    tokens, experts, topk, _ = shape
    ids = draw_ids("one_hot", *shape)
    assert len(set(ids[:, 0].tolist())) == min(1, sum(tokens))
    if topk > 1 and sum(tokens):
        counts = torch.bincount(ids[:, 1:].flatten(), minlength=experts).tolist()
        assert counts.pop(int(ids[0, 0])) == 0
        assert max(counts) - min(counts) <= 1


def test_zipf_skew_moves_choices_to_few_experts() -> None:
    shares = []
    for text in ("zipf:0", "zipf:1", "zipf:2"):
        ids = draw_ids(text, [2000, 2000], 64, 2, seed=3)
        counts = torch.bincount(ids.flatten(), minlength=64)
        shares.append(float(counts.sort(descending=True).values[:8].sum() / counts.sum()))
    assert shares == sorted(shares)
    assert shares[0] < 0.2 < 0.5 < shares[2]


@given(shape=shapes(), text=st.sampled_from(SPECS))
def test_weights_are_positive_and_sum_to_one(
    shape: tuple[list[int], int, int, int], text: str
) -> None:
    tokens, experts, topk, seed = shape
    for routing in draw_routing(
        RoutingSpec.parse(text), tokens_per_rank=tokens, experts=experts, topk=topk, seed=seed
    ):
        weights = routing.topk_weights_TK
        assert weights.dtype is torch.float32
        assert weights.shape == routing.topk_ids_TK.shape
        assert bool((weights > 0).all())
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(weights)))


@given(ranks=st.integers(1, 9), tokens=st.integers(1, 500), seed=st.integers(0, 999))
def test_uneven_counts_have_a_full_and_an_empty_rank(ranks: int, tokens: int, seed: int) -> None:
    counts = draw_token_counts(ranks=ranks, tokens=tokens, uneven=True, seed=seed)
    assert len(counts) == ranks
    assert max(counts) == tokens
    assert ranks == 1 or min(counts) == 0
    assert counts == draw_token_counts(ranks=ranks, tokens=tokens, uneven=True, seed=seed)
    assert (
        draw_token_counts(ranks=ranks, tokens=tokens, uneven=False, seed=seed) == [tokens] * ranks
    )


def recorded(path: Path) -> RoutingTrace:
    generator = np.random.default_rng(0)
    ids = generator.permuted(np.tile(np.arange(8, dtype=np.int32), (3, 2, 2, 5, 1)), axis=-1)
    trace = RoutingTrace(np.ascontiguousarray(ids[..., :2]), num_experts=8)
    trace.save(path)
    return trace


def test_a_trace_is_replayed_step_by_step_and_layer_by_layer(tmp_path: Path) -> None:
    trace = recorded(tmp_path / "t.npz")
    for index in range(8):
        routings = draw_routing(
            RoutingSpec.parse("trace"),
            tokens_per_rank=[5, 3],
            experts=8,
            topk=2,
            seed=0,
            trace=tmp_path / "t.npz",
            index=index,
        )
        step, layer = divmod(index % 6, 2)
        for rank, count in enumerate((5, 3)):
            recorded_ids = trace.topk_ids[step, layer, rank, :count]
            assert routings[rank].topk_ids_TK.tolist() == recorded_ids.tolist()


def test_a_trace_of_another_shape_is_refused(tmp_path: Path) -> None:
    recorded(tmp_path / "t.npz")
    spec = RoutingSpec.parse("trace")
    with pytest.raises(InputError, match=r"topk=2, experts=8.*topk=3, experts=8"):
        draw_routing(spec, tokens_per_rank=[5], experts=8, topk=3, seed=0, trace=tmp_path / "t.npz")
    with pytest.raises(InputError, match="--trace"):
        draw_routing(spec, tokens_per_rank=[5], experts=8, topk=2, seed=0)


@pytest.mark.parametrize(
    "text", ["", "zip", "zipf:", "zipf:-1", "zipf:nan", "zipf:inf", "masked:1.1", "balanced:1"]
)
def test_bad_routings_are_named(text: str) -> None:
    with pytest.raises(InputError, match="routing"):
        RoutingSpec.parse(text)


def test_more_choices_than_experts_are_refused() -> None:
    with pytest.raises(InputError, match="topk=3"):
        draw_ids("balanced", [1], 2, 3, seed=0)
