"""`get_dispatch_layout`: plain torch against loops, and the kernel against plain torch."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from expertlink.compat.deep_ep.layout import KernelCounter, LayoutCounter, counts_by_torch
from support.depth import deep


def draw(seed: int, device: torch.device) -> tuple[Tensor, int, int]:
    """Ids with repetitions and with numbers of no expert; E and R."""
    rng = random.Random(seed)
    num_ranks = rng.randint(1, 8)
    num_experts = num_ranks * rng.choice([1, 2, 7, 32, 64])
    tokens, topk = rng.choice([0, 1, 31, 33, 1023, 2500]), rng.choice([1, 2, 5, 8, 32])
    dtype = rng.choice([torch.int32, torch.int64])
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-2, num_experts + 2, (tokens, topk), generator=generator, dtype=dtype)
    if dtype is torch.int64 and ids.numel():
        ids.view(-1)[0] = 2**32 + 1  # is no expert, though its lower half looks like one
    return ids.to(device), num_experts, num_ranks


@pytest.mark.parametrize("seed", range(deep(6)))
def test_counts(seed: int) -> None:
    ids, num_experts, num_ranks = draw(seed, torch.device("cpu"))
    counts = counts_by_torch(ids, num_experts, num_ranks)
    per_expert = [0] * num_experts
    members: list[list[bool]] = []
    for choices in ids.tolist():
        ranks = set()
        for expert in choices:
            if 0 <= expert < num_experts:
                per_expert[expert] += 1
                ranks.add(expert // (num_experts // num_ranks))
        members.append([rank in ranks for rank in range(num_ranks)])
    assert counts.per_expert.tolist() == per_expert
    assert counts.is_token_in_rank.tolist() == members
    per_rank = [sum(member[rank] for member in members) for rank in range(num_ranks)]
    assert counts.per_rank.tolist() == per_rank


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(deep(20)))
def test_the_kernel_gives_the_bits_of_plain_torch(seed: int) -> None:
    device = torch.device("cuda", 0)
    ids, num_experts, num_ranks = draw(seed, device)
    count = KernelCounter(device, num_ranks)
    assert count.takes(ids, num_experts)
    for _ in range(2):  # its arguments are used again
        expected = counts_by_torch(ids, num_experts, num_ranks)
        for one, other in zip(count(ids, num_experts), expected, strict=True):
            assert torch.equal(one, other)
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert one.is_contiguous()


@pytest.mark.gpu
def test_more_experts_than_a_block_counts() -> None:
    device = torch.device("cuda", 0)
    count = LayoutCounter(device, 2)
    for num_experts in (64, 40_000):
        ids = torch.randint(0, num_experts, (50, 4), device=device)
        expected = counts_by_torch(ids, num_experts, 2)
        for one, other in zip(count(ids, num_experts), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.gpu
def test_the_first_call_may_be_in_a_capture() -> None:
    device = torch.device("cuda", 0)
    ids = torch.zeros((40, 2), dtype=torch.int64, device=device)
    counts_by_torch(ids, 8, 2)
    count, graph = LayoutCounter(device, 2), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = count(ids, 8)
    for expert in (3, 7):
        ids.fill_(expert)
        graph.replay()
        for one, other in zip(captured, count(ids, 8), strict=True):
            assert torch.equal(one, other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = count(ids, 8)
    ids.fill_(1)
    graph.replay()
    assert captured.per_expert.tolist() == [0, 80, 0, 0, 0, 0, 0, 0]
