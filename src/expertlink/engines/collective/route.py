"""What a dispatch of the collective engine has under way, and what it remembers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlink.engines.ranks.wire import Transfer
from expertlink.layouts import LayoutPlan


@dataclass(frozen=True)
class Splits:
    """Rows exchanged with each rank, own rank included."""

    send: list[int]
    receive: list[int]

    def reversed(self) -> Splits:
        """The way back."""
        return Splits(self.receive, self.send)


@dataclass(frozen=True)
class Packed:
    """Rows ready to be sent.

    Attributes:
        token_of_row: `[n]` source token of every row.
        rows: `[n, words]`, borrowed.
        extras: `[n, bytes]` uint8 what travels beside them, or None.
    """

    token_of_row: Tensor
    rows: Tensor
    extras: Tensor | None


@dataclass(frozen=True)
class Flight:
    """Rows under way.

    Attributes:
        tokens: where they end up.
        rows_out: packed rows, borrowed.
        rows_in: `[N, W]` in order of arrival; `tokens` itself, or borrowed.
        rows_move: their transfer.
        extras_in: what travels beside them, or None.
        extras_move: its transfer.
    """

    tokens: Tensor
    rows_out: Tensor
    rows_in: Tensor
    rows_move: Transfer
    extras_in: Tensor | None
    extras_move: Transfer | None


@dataclass
class Route:
    """What a dispatch leaves behind for combine, backward and cached dispatches.

    n rows sent, N rows received. `local_ids_NK`, `weights_NK` and `plan` appear when the dispatch
    finishes.

    Attributes:
        call: number of the dispatch that made it, the same on all ranks.
        num_tokens: T.
        splits: rows exchanged with each rank.
        token_of_row: `[n]` source token of every row sent.
        rows_of_token: `[T, D]` see `routing.ReturnPaths`.
        row_of_choice: `[T, K]` see `routing.ReturnPaths`.
        tokens_per_expert: choices of each local expert.
        tokens_per_source: `[R][E_loc]` choices of each local expert by the tokens of each rank.
        choices: choices exchanged with each rank; they are what `combine_precision="exact"` moves.
        local_ids_NK: `[N, K]` int32.
        weights_NK: `[N, K]` float32 or None.
        plan: slots of the arrivals.
    """

    call: int
    num_tokens: int
    splits: Splits
    token_of_row: Tensor
    rows_of_token: Tensor
    row_of_choice: Tensor
    tokens_per_expert: list[int]
    tokens_per_source: list[list[int]]
    choices: Splits
    local_ids_NK: Tensor | None = None
    weights_NK: Tensor | None = None
    plan: LayoutPlan | None = None

    def slot_weights(self) -> Tensor | None:
        """Expanded layouts: routing weight of every slot, in the rows' leading shape.

        0 where no slot is filled; None for an unweighted dispatch.
        """
        assert self.plan is not None
        if self.weights_NK is None:
            return None
        slots = self.plan.slots_of_row.view(-1)
        total = math.prod(self.plan.shape)
        weights = self.weights_NK.new_zeros(total + 1)  # the last entry takes what has no slot
        weights[torch.where(slots >= 0, slots, total)] = self.weights_NK.view(-1)
        return weights[:total].view(self.plan.shape)


def finished(state: object) -> Route:
    """The state of a dispatch whose rows have arrived."""
    assert isinstance(state, Route)
    assert state.plan is not None
    return state
