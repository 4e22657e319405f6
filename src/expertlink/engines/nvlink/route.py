"""What a dispatch of the nvlink engine leaves behind for combine, backward and cached dispatches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Route:
    """Tables of one routing, on the device. T tokens, N rows received, D = min(R, K).

    Attributes:
        shape: leading dimensions of `tokens`.
        expanded: a row per choice rather than per token.
        max_tokens: T_max, the stride of slots.
        num_ranks: R.
        ids_TK: `[T, K]` the routing, this engine's own copy.
        slots_of_token: `[T, D]` int32, rank * T_max + position there, ascending, then -1.
        own_tokens: `[T]` int32 tokens of the rows that stay on this rank.
        per_rank: `[3, R]` int32: rows from each rank, rows from the ranks before, and where this
            rank's rows start at each rank.
        choices_of_row: `[N, K]` int32 slot (expanded) or local expert of each choice, or -1.
        weights_of_row: `[N, K]` float32 or None.
        tokens_per_expert: `[E_loc]` int32.
        expert_offsets: `[E_loc + 1]` int32, FLAT.
        counts: choices of each local expert, where the host knows them.
    """

    shape: tuple[int, ...]
    expanded: bool
    max_tokens: int
    num_ranks: int
    ids_TK: Tensor
    slots_of_token: Tensor
    own_tokens: Tensor
    per_rank: Tensor
    choices_of_row: Tensor
    weights_of_row: Tensor | None
    tokens_per_expert: Tensor
    expert_offsets: Tensor | None
    counts: list[int] | None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.slots_of_token.shape[0]

    def wire_rows(self) -> tuple[list[int], list[int]]:
        """Rows sent to and received from each rank, own rank included. Waits for the device."""
        slots = self.slots_of_token.reshape(-1)
        ranks = slots[slots >= 0].div(self.max_tokens, rounding_mode="floor")
        sent = torch.bincount(ranks.to(torch.int64), minlength=self.num_ranks)
        return sent.tolist(), self.per_rank[0].tolist()

    def filled_rows(self) -> Tensor:
        """`[rows of the tables]` bool: rows that arrived; the others hold nothing."""
        total = self.choices_of_row.shape[0]
        row = torch.arange(total, device=self.per_rank.device)
        if self.shape == (self.num_ranks, self.max_tokens):  # kept by source rank
            position = row.remainder(self.max_tokens)
            source = row.div(self.max_tokens, rounding_mode="floor")
            return position < self.per_rank[0][source]
        return row < self.per_rank[0].sum()

    def slot_weights(self) -> Tensor | None:
        """Expanded layouts: routing weight of every slot, 0 where none is filled."""
        if self.weights_of_row is None:
            return None
        total = math.prod(self.shape)
        slots = torch.where(self.filled_rows()[:, None], self.choices_of_row, -1).reshape(-1)
        weights = self.weights_of_row.new_zeros(total + 1)  # the last entry takes what has no slot
        weights[torch.where(slots >= 0, slots, total).to(torch.int64)] = (
            self.weights_of_row.reshape(-1)
        )
        return weights[:total].view(self.shape)
