"""What a dispatch of the nvlink engine leaves for combine, backward and cached dispatches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.nvlink.capture import is_capturing
from expertlink.engines.outputs import part_of
from expertlink.layouts import align
from expertlink.types import DispatchLayout

_WORD = 4  # bytes
ORIGINS = 2  # numbers of transfers that tables may be of: they alternate where memory is used again


class TableLayout:
    """Where the tables of a routing lie in one block of int32 words, by name.

    Making one tensor costs the host as much as launching a kernel, so the tables share a block and
    become tensors only where somebody looks at them. Tables of a size that depends on T come last.

    Attributes:
        at: bytes from the start of a block to a table. Calls add these to the block's address
            themselves: a function in between would take most of the time.
        public: sizes of the tables that the caller gets a copy of.
    """

    def __init__(self, config: MoECommunicatorConfig, *, num_ranks: int, num_local: int) -> None:
        self.topk = config.topk
        self.copies = min(num_ranks, config.topk)
        self.max_tokens = config.max_tokens_per_rank
        self.num_ranks, self.num_local = num_ranks, num_local
        self.rows = num_ranks * config.max_tokens_per_rank
        self.expanded = config.layout.expanded
        self._shapes = self._table_shapes(config)
        self._starts: dict[str, int] = {}
        end = 0
        for name, shape in self._shapes.items():
            self._starts[name] = end
            end += math.prod(shape)
        self._starts["slots"] = self._fixed = end
        self.at = {name: _WORD * start for name, start in self._starts.items()}
        self.public = [num_local, num_local + 1, num_ranks]

    dense = True
    """Rows are numbered without gaps; else each rank's begin at rank * T_max."""

    def _table_shapes(self, config: MoECommunicatorConfig) -> dict[str, tuple[int, ...]]:
        return {
            # The first three lie side by side: the caller gets a copy of them. What follows them
            # is a cached dispatch's own too.
            "counts": (self.num_local,),
            "offsets": (self.num_local + 1,),
            "rows_from": (self.num_ranks,),
            "origin": (ORIGINS,),
            "first_row": (self.num_ranks,),
            "first_sent": (self.num_ranks,),
            "rows_to": (self.num_ranks,),
            "first_slot": (self.num_ranks, self.num_local),
            "choices": (self.rows, config.topk),
            "weights": (self.rows, config.topk),
        }

    def words(self, num_tokens: int) -> int:
        """Words of a block."""
        return self._fixed + num_tokens * (self.copies + 1)

    def ids_at(self, num_tokens: int) -> int:
        """Bytes from the start of a block to the ids, where these lie behind the tables."""
        return _WORD * align(self.words(num_tokens), 4)

    def ids_end(self, num_tokens: int, *, wide: bool) -> int:
        """Words to the end of the ids there; `wide`: they are int64."""
        return align(self.words(num_tokens), 4) + num_tokens * self.topk * (2 if wide else 1)

    def own_tokens(self, block: int, num_tokens: int) -> int:
        """Address of the tokens whose rows stay on this rank."""
        return block + self.at["slots"] + _WORD * num_tokens * self.copies

    def view(self, block: Tensor, name: str, num_tokens: int = 0) -> Tensor:
        """A table as a tensor."""
        shape = (num_tokens, self.copies) if name == "slots" else self._shapes[name]
        start = self._starts[name]
        return block[start : start + math.prod(shape)].view(shape)


@dataclass(eq=False)
class Route:
    """Tables of one routing, on the device. T tokens, N rows received, D = min(R, K).

    Not frozen, because building a frozen one takes five times as long; never changed once made.

    Attributes:
        shape: leading dimensions of `tokens`.
        num_tokens: T.
        ids_TK: `[T, K]` the routing, this engine's own copy; None: `ids()` makes it.
        layout: of `block`.
        block: the tables. `rows_from` `[R]` rows from each rank; `first_row` `[R]` rows from the
            ranks before; `first_sent` `[R]` where this rank's rows start at each rank; `rows_to`
            `[R]` rows to each rank; `counts` `[E_loc]` choices of each local expert; `offsets`
            `[E_loc + 1]` FLAT; `choices` `[N, K]` slot (expanded layouts) or local expert of each
            choice, or -1; `weights` `[N, K]`; `slots` `[T, D]` rank * T_max + position there,
            ascending, then -1; own tokens `[T]`.
        weights_block: block that holds the weights, where they are not those of `block`.
        weighted: there are weights.
        counts: choices of each local expert, where the host knows them.
        origin: address of the number of the transfer that this is the routing of: on the device,
            since graphs are replayed. Calls that use the routing say it to each other.
        keeps: owns the memory of `origin`, where that is not `block`.
        number: the host's number of the dispatch, 0 if it was captured.
        maker: number of the communicator that made the dispatch, the same on all ranks.
        other_slots: `slots` for communicators of another T_max, by that and the stream on which
            they were made.
        ids_address: of the ids; without `ids_TK` they are in `block`.
        wide_ids: they are int64, else int32.
    """

    shape: tuple[int, ...]
    num_tokens: int
    ids_TK: Tensor | None
    layout: TableLayout
    block: Tensor
    weights_block: Tensor | None
    weighted: bool
    counts: list[int] | None
    origin: int
    keeps: Tensor | None = None
    number: int = 0
    maker: int = 0
    other_slots: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    ids_address: int = 0
    wide_ids: bool = False

    def ids(self) -> Tensor:
        """`[T, K]` the routing."""
        if self.ids_TK is None:
            start = (self.ids_address - self.block.data_ptr()) // _WORD
            shape = (self.num_tokens, self.layout.topk)
            dtype = torch.int64 if self.wide_ids else torch.int32
            self.ids_TK = part_of(self.block, start, shape, dtype)
        return self.ids_TK

    def slots_for(self, max_tokens: int) -> Tensor | None:
        """`slots` for a communicator of another T_max; None: its own ones suit.

        Made on the device, without a host wait, once for every stream: no call waits for the
        streams of others. Those of a capture have no value before its replay, so they are not kept.
        """
        own = self.layout.max_tokens
        if own == max_tokens:
            return None
        slots, capturing, stream = self.table("slots"), False, 0
        if slots.is_cuda:
            capturing = is_capturing()
            stream = torch.cuda.current_stream(slots.device).cuda_stream
        made = None if capturing else self.other_slots.get((max_tokens, stream))
        if made is None:
            ranks = slots.div(own, rounding_mode="floor")
            made = torch.where(slots < 0, -1, slots + ranks * (max_tokens - own))
            if not capturing:
                self.other_slots[max_tokens, stream] = made
        return made

    def weights_address(self) -> int | None:
        """Address of the weights, if there are any."""
        if not self.weighted:
            return None
        if self.weights_block is not None:
            return self.weights_block.data_ptr()
        return self.block.data_ptr() + self.layout.at["weights"]

    def table(self, name: str) -> Tensor:
        """A table as a tensor."""
        if name == "weights" and self.weights_block is not None:
            return self.weights_block
        table = self.layout.view(self.block, name, self.num_tokens)
        return table.view(torch.float32) if name == "weights" else table

    def wire_rows(self) -> tuple[list[int], list[int]]:
        """Rows sent to and received from each rank, own rank included. Waits for the device."""
        slots = self.table("slots").reshape(-1)
        ranks = slots[slots >= 0].div(self.layout.max_tokens, rounding_mode="floor")
        sent = torch.bincount(ranks.to(torch.int64), minlength=self.layout.num_ranks)
        return sent.tolist(), self.table("rows_from").tolist()

    def expert_ranges(self, layout: DispatchLayout, alignment: int) -> tuple[Tensor, Tensor]:
        """See `Tables`. Slots are in a table, whatever the alignment."""
        del alignment
        first_ER = self.table("first_slot").t()
        ends_E = first_ER[:, 0] + self.table("counts")
        counts_ER = torch.cat([first_ER[:, 1:], ends_E[:, None]], dim=1) - first_ER
        groups_E = torch.zeros_like(ends_E)
        if layout is DispatchLayout.EXPERT_MAJOR:
            groups_E = torch.arange(len(ends_E), dtype=torch.int32, device=ends_E.device)
            groups_E *= self.layout.rows
        return first_ER - groups_E[:, None], counts_ER

    def arrivals(self) -> Tensor:
        """See `Tables`. Waits for the device."""
        return self.table("choices")[self._arrived()].to(torch.int64)

    def source_tokens(self, shape: tuple[int, ...]) -> Tensor | None:
        """These tables do not say; see `Tables`."""
        del shape
        return None

    def _arrived(self) -> Tensor:
        """`[rows of the tables]` bool: rows that arrived."""
        row = torch.arange(self.layout.rows, dtype=torch.int64, device=self.block.device)
        if self.layout.dense:
            return row < self.table("rows_from").sum()
        position = row.view(self.layout.num_ranks, -1) - row[:: self.layout.max_tokens, None]
        return (position < self.table("rows_from")[:, None]).view(-1)

    def slot_weights(self) -> Tensor | None:
        """Expanded layouts: routing weight of every slot, 0 where none is filled."""
        if not self.weighted:
            return None
        total = math.prod(self.shape)
        slots = torch.where(self._arrived()[:, None], self.table("choices"), -1).reshape(-1)
        # The last one takes what has none.
        weights = torch.zeros(total + 1, dtype=torch.float32, device=self.block.device)
        target = torch.where(slots >= 0, slots, total).to(torch.int64)
        weights[target] = self.table("weights").reshape(-1)
        return weights[:total].view(self.shape)


def as_route(state: object) -> Route:
    """The state of a dispatch of this engine."""
    assert isinstance(state, Route)
    return state
