"""From expert choices to rows: which rank gets which token, and in which order rows leave.

Pure torch, no communication, no host waits. With layouts.py this file is the single definition of
order; every engine is checked against it.

A row is one token's copy at one destination rank, however many of the token's experts live there.
Rows leave ordered by (destination rank, token), so they arrive ordered by (source rank, token).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlink.errors import ConfigurationError


@dataclass(frozen=True)
class Placement:
    """Which rank holds which expert.

    Attributes:
        num_ranks: R.
        experts_of_rank: per rank its global expert ids, ascending.
        rank_of_E: `[E + 1]` int64, rank of each expert; entry E stands for "no expert" and is R.
        local_of_E: `[E + 1]` int32, index of each expert on its rank; -1 at entry E.
    """

    num_ranks: int
    experts_of_rank: tuple[tuple[int, ...], ...]
    rank_of_E: Tensor
    local_of_E: Tensor

    @property
    def num_experts(self) -> int:
        """E."""
        return self.rank_of_E.numel() - 1

    @staticmethod
    def from_ranks(
        rank_of_expert: Sequence[int], *, num_ranks: int, device: torch.device | str = "cpu"
    ) -> Placement:
        """Placement in which expert `e` lives on rank `rank_of_expert[e]`."""
        experts: list[list[int]] = [[] for _ in range(num_ranks)]
        local: list[int] = []
        for expert, rank in enumerate(rank_of_expert):
            if not 0 <= rank < num_ranks:
                raise ConfigurationError(
                    f"expert_map puts expert {expert} on rank {rank}; ranks are 0..{num_ranks - 1}"
                )
            local.append(len(experts[rank]))
            experts[rank].append(expert)
        return Placement(
            num_ranks=num_ranks,
            experts_of_rank=tuple(map(tuple, experts)),
            rank_of_E=torch.tensor([*rank_of_expert, num_ranks], dtype=torch.int64, device=device),
            local_of_E=torch.tensor([*local, -1], dtype=torch.int32, device=device),
        )


def even_blocks(num_experts: int, num_ranks: int) -> list[int]:
    """Rank of every expert for contiguous blocks whose sizes differ by at most one."""
    base, extra = divmod(num_experts, num_ranks)
    sizes = [base + (rank < extra) for rank in range(num_ranks)]
    return [rank for rank, size in enumerate(sizes) for _ in range(size)]


@dataclass(frozen=True)
class SendPlan:
    """The rows that leave one rank. n rows; copies of a token are at most D = min(R, K).

    Row positions count from 0 in send order. Tensors sized by an upper bound carry meaning only in
    their first n entries, so that no host wait is needed to build them.

    Attributes:
        expert_TK: `[T, K]` int64 global expert, E where there is none.
        rank_TK: `[T, K]` int64 destination rank, R where there is none.
        rows_per_rank: `[R]` int64.
        tokens_per_expert: `[E]` int64, choices of each global expert.
        token_of_row: `[T * D]` int64 source token of each row.
        rank_of_row: `[T * D]` int64 destination of each row.
        rows_of_token: `[T, D]` int64 the token's rows in ascending destination rank, -1 at the end.
        row_of_choice: `[T, K]` int64 row that carries each choice, -1 where there is none.
    """

    expert_TK: Tensor
    rank_TK: Tensor
    rows_per_rank: Tensor
    tokens_per_expert: Tensor
    token_of_row: Tensor
    rank_of_row: Tensor
    rows_of_token: Tensor
    row_of_choice: Tensor


def known_experts(topk_ids_TK: Tensor, num_experts: int) -> Tensor:
    """Ids as int64 with everything outside `0..E-1` (thus -1 as well) replaced by E."""
    ids = topk_ids_TK.to(torch.int64)
    return torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)


def count_choices(expert_TK: Tensor, num_experts: int) -> Tensor:
    """`[E]` int64: how often each expert was chosen."""
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_TK.device)
    flat = expert_TK.reshape(-1)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]


def plan_send(topk_ids_TK: Tensor, placement: Placement) -> SendPlan:
    """Order of the rows that leave this rank for the given choices.

    Args:
        topk_ids_TK: `[T, K]` int32 or int64 global ids; values outside `0..E-1` mean no expert.
        placement: where the experts live, on the same device.
    """
    num_tokens, topk = topk_ids_TK.shape
    num_ranks = placement.num_ranks
    device = topk_ids_TK.device
    copies = min(num_ranks, topk)
    bound = num_tokens * copies

    expert_TK = known_experts(topk_ids_TK, placement.num_experts)
    rank_TK = placement.rank_of_E[expert_TK]
    member_TR = torch.zeros((num_tokens, num_ranks + 1), dtype=torch.bool, device=device)
    member_TR.scatter_(1, rank_TK, True)
    member_RT = member_TR[:, :num_ranks].t().contiguous()

    position_RT = member_RT.view(-1).cumsum(0).view(num_ranks, num_tokens) - 1
    # One scatter fills both per-row tables: code = rank * T + token. Absent pairs land in the
    # extra last entry, which nobody reads.
    codes = torch.empty(bound + 1, dtype=torch.int64, device=device)
    target = torch.where(member_RT, position_RT, bound).view(-1)
    codes.scatter_(0, target, torch.arange(target.numel(), device=device))
    codes = codes[:bound].clamp_(0, max(num_ranks * num_tokens - 1, 0))

    position_TR = torch.where(member_RT, position_RT, bound).t()
    rows_of_token = position_TR.sort(dim=1).values[:, :copies]
    row_of_choice = torch.nn.functional.pad(position_TR, (0, 1), value=bound).gather(1, rank_TK)
    return SendPlan(
        expert_TK=expert_TK,
        rank_TK=rank_TK,
        rows_per_rank=member_RT.sum(dim=1),
        tokens_per_expert=count_choices(expert_TK, placement.num_experts),
        token_of_row=codes % max(num_tokens, 1),
        rank_of_row=codes // max(num_tokens, 1),
        rows_of_token=torch.where(rows_of_token < bound, rows_of_token, -1),
        row_of_choice=torch.where(row_of_choice < bound, row_of_choice, -1),
    )


def local_ids_of_rows(plan: SendPlan, num_rows: int, placement: Placement) -> Tensor:
    """`[n, K]` int32: for every row its token's expert indices local to the row's destination.

    -1 for the choices that live on other ranks.
    """
    token = plan.token_of_row[:num_rows]
    here = plan.rank_TK[token] == plan.rank_of_row[:num_rows, None]
    return torch.where(here, placement.local_of_E[plan.expert_TK[token]], -1)


def has_duplicates(topk_ids_TK: Tensor) -> Tensor:
    """`[T]` bool: tokens that choose the same expert twice (-1 may repeat)."""
    ordered = topk_ids_TK.sort(dim=1).values
    return ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(dim=1)


def out_of_range(topk_ids_TK: Tensor, num_experts: int) -> Tensor:
    """`[T]` bool: tokens with an id that is neither -1 nor in `0..E-1`."""
    return ((topk_ids_TK < -1) | (topk_ids_TK >= num_experts)).any(dim=1)
