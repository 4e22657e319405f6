"""What a low-latency dispatch leaves beyond the tables of every mode, and memory for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.nvlink.tables import Route, TableLayout
from expertlink.jit.kernel import Arguments
from expertlink.types import DispatchOutput


class LlTableLayout(TableLayout):
    """Tables of an `ll` routing: rows are numbered rank * T_max + position there."""

    dense = False

    def _table_shapes(self, config: MoECommunicatorConfig) -> dict[str, tuple[int, ...]]:
        return {
            **super()._table_shapes(config),
            "tokens": (self.rows,),
            "own_weights": (self.max_tokens, config.topk),
        }


@dataclass(eq=False)
class LlRoute(Route):
    """Tables of one `ll` routing. Those in buffers are made once for all dispatches into them.

    Attributes:
        restarts: how often the ranks of its arena have begun anew; see `LlArena`.
        epoch: how often they had when the dispatch was made.
        combine: arguments of combines that name these tables already, or None.
    """

    restarts: Sequence[int] = (0,)
    epoch: int = 0
    combine: Arguments | None = None

    def own_weights_address(self) -> int:
        """Address of the weights of this rank's tokens, where there are any."""
        return self.block.data_ptr() + self.layout.at["own_weights"]

    def source_tokens(self, shape: tuple[int, ...]) -> Tensor:
        """Source token of every row, -1 where there is none: `shape` int32."""
        tokens = torch.empty(shape, dtype=torch.int32, device=self.block.device)
        self.write_source_tokens(tokens)
        return tokens

    def write_source_tokens(self, out: Tensor) -> None:
        """Writes which token of its rank every output row is, -1 where no row is.

        In torch, since decode does not ask for it: the kernel is as if there were no such thing.

        Args:
            out: the leading shape of the rows, int32.
        """
        layout, total, device = self.layout, out.numel(), out.device
        row = torch.arange(layout.rows, dtype=torch.int64, device=device)
        source, position = row // layout.max_tokens, row % layout.max_tokens
        if layout.expanded:
            slots = self.table("choices").to(torch.int64)
        elif out.dim() == 2:  # RANK_MAJOR
            slots = row[:, None]
        else:
            slots = (self.table("first_row")[source] + position)[:, None]
        here = (position < self.table("rows_from")[source])[:, None]
        here = here & (slots >= 0) & (slots < total)
        made = torch.full((total + 1,), -1, dtype=torch.int32, device=device)
        tokens = self.table("tokens")[:, None].expand(slots.shape)
        made[torch.where(here, slots, total)] = tokens  # the last one takes what has no slot
        out.copy_(made[:total].view(out.shape))


def said_by(communicator: int, *, of: LlRoute | None) -> int:
    """What headers say of the communicator of a call that uses a routing, or None.

    Two communicators may count the same number of calls. There is no room in the headers for that
    of the routing's maker, so it is mixed into the other one where they differ; two routings are
    then told apart unless 31 bits collide.
    """
    if of is None or of.maker == communicator:
        return communicator
    return (communicator ^ of.maker * 0x9E3779B1) & 0x7FFFFFFF


@dataclass(eq=False)
class BufferTables:
    """What `DispatchBuffers` hold beside the outputs: memory of one routing, and arguments.

    Attributes:
        block: the tables, and behind them room for `[T_max, K]` int64 ids.
        ids_address: of the ids.
        dispatch: arguments of dispatches into the buffers.
        combine: arguments of their combines.
        routes: what dispatches return and their routings, by T, whether there are weights, whether
            ids are int64, and where the number of the transfer is kept.
        said: form of the rows that `dispatch` says.
    """

    block: Tensor
    ids_address: int
    dispatch: Arguments
    combine: Arguments
    routes: dict[tuple[int, bool, bool, int], tuple[DispatchOutput, LlRoute]]
    said: object = None
