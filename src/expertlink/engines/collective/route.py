"""What a dispatch of the collective engine leaves behind: the rows' ways there and back."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlink.engines.collective.exchange import Splits
from expertlink.layouts import LayoutPlan, source_ranges
from expertlink.types import DispatchLayout


@dataclass
class Route:
    """The routing of one dispatch, kept for combine, backward and cached dispatches.

    n rows sent, N rows received. `local_ids_NK`, `weights_NK` and `plan` are set when the dispatch
    finishes.

    Attributes:
        call: number of the dispatch that made it, the same on all ranks.
        maker: number of the communicator of that dispatch, likewise.
        num_tokens: T.
        splits: rows exchanged with each rank.
        rows_per_rank: `[R]` rows for each rank, on the device.
        token_of_row: `[n]` source token of every row sent.
        rows_of_token: `[T, D]` see `routing.ReturnPaths`.
        row_of_choice: `[T, K]` see `routing.ReturnPaths`.
        tokens_per_expert: choices of each local expert.
        tokens_per_source: `[R][E_loc]` choices of each local expert by the tokens of each rank.
        choices: choices exchanged with each rank: the rows of an "exact" combine.
        local_ids_NK: `[N, K]` int32.
        weights_NK: `[N, K]` float32 or None.
        plan: slots of the arrivals.
    """

    call: int
    maker: int
    num_tokens: int
    splits: Splits
    rows_per_rank: Tensor
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

    def arrivals(self) -> Tensor:
        """See `Tables`."""
        assert self.plan is not None
        if self.plan.layout.expanded:
            return self.plan.slots_of_row.clone()
        assert self.local_ids_NK is not None
        return self.local_ids_NK.to(torch.int64)

    def expert_ranges(self, layout: DispatchLayout, alignment: int) -> tuple[Tensor, Tensor]:
        """See `Tables`."""
        starts, counts = source_ranges(layout, self.tokens_per_source, alignment)
        both = torch.tensor([starts, counts], dtype=torch.int32, device="cpu")
        both = both.view(2, len(counts), len(self.tokens_per_source))
        starts_ER, counts_ER = both.to(self.rows_per_rank.device)
        return starts_ER, counts_ER

    def source_tokens(self, shape: tuple[int, ...]) -> None:
        """They come with the rows or not at all."""


def finished(state: object, weight_dtype: torch.dtype | None = None) -> Route:
    """The route of a dispatch whose rows have arrived, with weights of that type.

    The dispatch may be of a communicator with other weights.
    """
    assert isinstance(state, Route)
    assert state.plan is not None
    if weight_dtype is None or state.weights_NK is None or state.weights_NK.dtype is weight_dtype:
        return state
    return dataclasses.replace(state, weights_NK=state.weights_NK.to(weight_dtype))
