"""Where the tokens of this rank go, in a few tensor operations: `get_dispatch_layout`.

Experts lie in even blocks: rank r holds experts r * E / R up to (r + 1) * E / R.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class DispatchCounts(NamedTuple):
    """What `Buffer.get_dispatch_layout` returns before its event.

    Attributes:
        per_rank: `[R]` int32 tokens for each rank, each once.
        per_expert: `[E]` int32 choices of each expert.
        is_token_in_rank: `[T, R]` bool.
    """

    per_rank: Tensor
    per_expert: Tensor
    is_token_in_rank: Tensor


def dispatch_counts(topk_ids_TK: Tensor, *, num_experts: int, num_ranks: int) -> DispatchCounts:
    """Counts the choices of this rank's tokens; ids outside of 0..E-1 choose nobody."""
    num_tokens, device = topk_ids_TK.shape[0], topk_ids_TK.device
    # 1..E stand for the experts, 0 and E + 1 for nobody; likewise 1..R for their ranks.
    expert_TK = topk_ids_TK.to(torch.int64).clamp(-1, num_experts) + 1
    counts = torch.zeros(num_experts + 2, dtype=torch.int32, device=device)
    counts.scatter_(0, expert_TK.view(-1), 1, reduce="add")
    num_local = num_experts // num_ranks
    member_TR = torch.zeros((num_tokens, num_ranks + 2), dtype=torch.bool, device=device)
    member_TR.scatter_(1, (expert_TK + (num_local - 1)) // num_local, True)
    is_token_in_rank = member_TR[:, 1 : num_ranks + 1].contiguous()
    per_rank = is_token_in_rank.sum(dim=0, dtype=torch.int32)
    return DispatchCounts(per_rank, counts[1 : num_experts + 1], is_token_in_rank)


def ranks_as_experts(is_token_in_rank: Tensor) -> Tensor:
    """`[T, R]` int64 ids for a dispatch in which every rank is one expert."""
    ranks = torch.arange(
        is_token_in_rank.shape[1], dtype=torch.int64, device=is_token_in_rank.device
    )
    return torch.where(is_token_in_rank, ranks, -1)
