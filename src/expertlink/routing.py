"""From expert choices to rows: which rank gets which token, and in which order rows leave.

In: the experts that tokens choose, and where the experts live. Out: index tensors.

Pure torch, no communication, no host waits. This file and layouts.py are the only definition of
order; every engine is tested against them.

A row is a token's copy for one destination rank, whatever number of its experts live there. Rows
leave ordered by (destination rank, token), so they arrive ordered by (source rank, token).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlink.errors import ConfigurationError, InputError


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
class Membership:
    """Which rank needs which token: enough to count rows.

    Attributes:
        expert_TK: `[T, K]` int64 global expert, E where there is none.
        rank_TK: `[T, K]` int64 destination rank, R where there is none.
        member_RT: `[R, T]` bool: rank r receives token t.
        rows_per_rank: `[R]` int64.
    """

    expert_TK: Tensor
    rank_TK: Tensor
    member_RT: Tensor
    rows_per_rank: Tensor


@dataclass(frozen=True)
class SendOrder:
    """Rows in the order in which they leave; n rows, a token has at most D = min(R, K).

    Tables per row have T * D entries, the upper bound, so that building them needs no host wait.
    Only the first n entries are valid.

    Attributes:
        position_RT: `[R, T]` int64 row of token t for rank r, T * D where there is none.
        token_of_row: `[T * D]` int64.
        rank_of_row: `[T * D]` int64.
    """

    position_RT: Tensor
    token_of_row: Tensor
    rank_of_row: Tensor


@dataclass(frozen=True)
class ReturnPaths:
    """Where a token finds the rows that come back for it.

    Attributes:
        rows_of_token: `[T, D]` int64 its rows by ascending destination rank, then -1.
        row_of_choice: `[T, K]` int64 row that carries each choice, or -1.
    """

    rows_of_token: Tensor
    row_of_choice: Tensor


def known_experts(topk_ids_TK: Tensor, num_experts: int) -> Tensor:
    """Ids as int64, with E in place of everything outside `0..E-1`, -1 included."""
    ids = topk_ids_TK.to(torch.int64)
    return torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)


def count_choices(expert_TK: Tensor, num_experts: int) -> Tensor:
    """`[E]` int64: how often each expert was chosen."""
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_TK.device)
    flat = expert_TK.reshape(-1)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]


def hosts_of_experts(placement: Placement, host_of: Sequence[int], *, rank: int) -> Tensor:
    """`[E + 1]` int64 host of every expert; the number of hosts for those of a rank's own host.

    So for "no expert", entry E: what goes there does not leave the host. `host_of`: by rank.
    """
    hosts = [len(set(host_of)) if host == host_of[rank] else host for host in host_of]
    host_of_R = placement.rank_of_E.new_tensor([*hosts, len(set(host_of))])
    return host_of_R[placement.rank_of_E]


def rows_per_host(host_TX: Tensor, num_hosts: int) -> Tensor:
    """`[N]` int64 rows that cross the network to every host: one per (token, host).

    `host_TX`: `[T, X]` int64 hosts of each token's choices, N for those that do not count.
    """
    goes_TN = host_TX.new_zeros(host_TX.shape[0], num_hosts + 1).scatter_(1, host_TX, 1)
    return goes_TN[:, :num_hosts].sum(dim=0)


def find_members(topk_ids_TK: Tensor, placement: Placement) -> Membership:
    """Destination ranks of every token.

    Args:
        topk_ids_TK: `[T, K]` int32 or int64 global ids; values outside `0..E-1` mean no expert.
        placement: where the experts live, on the same device.
    """
    num_tokens, num_ranks = topk_ids_TK.shape[0], placement.num_ranks
    expert_TK = known_experts(topk_ids_TK, placement.num_experts)
    rank_TK = placement.rank_of_E[expert_TK]
    member_TR = torch.zeros(
        (num_tokens, num_ranks + 1), dtype=torch.bool, device=topk_ids_TK.device
    )
    member_RT = member_TR.scatter_(1, rank_TK, True)[:, :num_ranks].t().contiguous()
    return Membership(expert_TK, rank_TK, member_RT, rows_per_rank=member_RT.sum(dim=1))


def order_rows(members: Membership) -> SendOrder:
    """Rows by (destination rank, token)."""
    num_ranks, num_tokens = members.member_RT.shape
    bound = num_tokens * min(num_ranks, members.rank_TK.shape[1])
    member = members.member_RT.view(-1)
    position = torch.where(member, member.cumsum(0) - 1, bound)
    # One scatter fills both tables: code = rank * T + token. Absent pairs are written to an extra
    # last entry, which is dropped. Zeros keep unused entries within bounds.
    codes = torch.zeros(bound + 1, dtype=torch.int64, device=member.device)
    codes.scatter_(
        0, position, torch.arange(len(position), dtype=torch.int64, device=member.device)
    )
    codes = codes[:bound]
    return SendOrder(
        position_RT=position.view(num_ranks, num_tokens),
        token_of_row=codes % max(num_tokens, 1),
        rank_of_row=codes // max(num_tokens, 1),
    )


def return_paths(members: Membership, order: SendOrder) -> ReturnPaths:
    """Rows of every token and of every choice."""
    num_ranks, num_tokens = members.member_RT.shape
    copies = min(num_ranks, members.rank_TK.shape[1])
    bound = num_tokens * copies
    position_TR = order.position_RT.t()
    # Row numbers ascend with the destination rank: sorting puts present rows first, by rank.
    rows_of_token = position_TR.sort(dim=1).values[:, :copies]
    row_of_choice = torch.nn.functional.pad(position_TR, (0, 1), value=bound).gather(
        1, members.rank_TK
    )
    return ReturnPaths(
        rows_of_token=torch.where(rows_of_token < bound, rows_of_token, -1),
        row_of_choice=torch.where(row_of_choice < bound, row_of_choice, -1),
    )


def order_of_choices(row_of_choice_TK: Tensor) -> Tensor:
    """`[T, K]` position of every choice when all choices are sorted by (row, choice).

    Args:
        row_of_choice_TK: see `ReturnPaths`; -1 stays -1.
    """
    row = row_of_choice_TK.reshape(-1)
    last = row.numel()  # more than any row, so that absent choices sort last
    order = torch.where(row < 0, last, row).sort(stable=True).indices
    position = torch.empty_like(order)
    position[order] = torch.arange(last, dtype=torch.int64, device=row.device)
    return torch.where(row < 0, -1, position).view(row_of_choice_TK.shape)


def local_ids_of_rows(
    members: Membership, order: SendOrder, num_rows: int, placement: Placement
) -> Tensor:
    """`[n, K]` int32: for every row, its token's choices as indices of local experts there.

    -1 for choices whose expert lives on another rank.
    """
    token = order.token_of_row[:num_rows]
    here = members.rank_TK[token] == order.rank_of_row[:num_rows, None]
    return torch.where(here, placement.local_of_E[members.expert_TK[token]], -1)


def has_duplicates(topk_ids_TK: Tensor) -> Tensor:
    """`[T]` bool: tokens that choose the same expert twice (-1 may repeat)."""
    ordered = topk_ids_TK.sort(dim=1).values
    return ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(dim=1)


def out_of_range(topk_ids_TK: Tensor, num_experts: int) -> Tensor:
    """`[T]` bool: tokens with an id that is neither -1 nor in `0..E-1`."""
    return ((topk_ids_TK < -1) | (topk_ids_TK >= num_experts)).any(dim=1)


def explain_ids(topk_ids_TK: Tensor, num_experts: int) -> InputError:
    """The error for ids that are out of range or repeated: names the first such token."""
    outside = out_of_range(topk_ids_TK, num_experts)
    faulty = outside if bool(outside.any()) else has_duplicates(topk_ids_TK)
    token = int(faulty.nonzero()[0])
    ids = topk_ids_TK[token].tolist()
    count = int(faulty.sum())
    others = f" ({count} tokens in all)" if count > 1 else ""
    if faulty is outside:
        return InputError(
            f"topk_ids[{token}]={ids}: ids must be 0..{num_experts - 1}, or -1 for none{others}"
        )
    return InputError(f"topk_ids[{token}]={ids}: an expert is chosen twice by one token{others}")
