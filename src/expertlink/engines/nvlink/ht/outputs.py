"""What one rank's high-throughput dispatches return: how large, in which memory.

Making a tensor takes the host as long as launching a kernel, and a tuple for its size half of that
again: sizes are passed as arguments, types come from a tensor that has them.
"""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import DispatchCall
from expertlink.engines.nvlink import tuning
from expertlink.engines.nvlink.ht.arena import HtArena
from expertlink.engines.outputs import (
    BufferSource,
    LazyOutput,
    MemorySource,
    OutputSizes,
    first_rows,
    in_scale_order,
)
from expertlink.engines.ranks import capacity
from expertlink.jit.kernel import Arguments
from expertlink.types import DispatchBuffers, DispatchLayout, DispatchOutput, QuantScales


@dataclass(eq=False)
class BufferTables:
    """What `DispatchBuffers` hold beside the outputs.

    Attributes:
        block: tables of one routing at its largest, and the ids behind them.
        weights: those of the tables.
    """

    block: Tensor
    weights: Tensor


def tables_of(buffers: DispatchBuffers) -> BufferTables:
    """The tables that lie in buffers of this mode."""
    assert isinstance(buffers.tables, BufferTables)
    return buffers.tables


class Rows:
    """What a dispatch returns, before the host knows how many rows there are.

    Attributes:
        shape: leading dimensions.
        tokens: rows.
        scales: row-major scales of quantized rows, or None.
        source: makes the rest.
        own_tokens: `tokens` have memory that was made for this dispatch.
        own_scales: so have `scales`.
    """

    __slots__ = ("own_scales", "own_tokens", "scales", "shape", "source", "tokens")

    def __init__(
        self,
        shape: tuple[int, ...],
        tokens: Tensor,
        scales: Tensor | None,
        source: MemorySource | BufferSource,
        own_tokens: bool,
        own_scales: bool,
    ) -> None:
        self.shape, self.tokens, self.scales, self.source = shape, tokens, scales, source
        self.own_tokens, self.own_scales = own_tokens, own_scales

    def cut(self, rows: int) -> None:
        """Leaves the first rows of what was made larger."""
        self.shape = (rows,)
        self.source.cut(rows)
        self.tokens = first_rows(self.tokens, rows, own=self.own_tokens)
        if self.scales is not None:
            self.scales = first_rows(self.scales, rows, own=self.own_scales)


class OutputMaker:
    """Makes the outputs of one rank's dispatches, and tells the kernel where they are.

    Args:
        config: the communicator's.
        num_ranks: R.
        num_local: E_loc.
        arena: memory shared with the other ranks, for zero-copy outputs.

    Attributes:
        limit: rows of the largest output.
        expected: leading dimensions that the next output of a dispatch's own has before its rows
            are counted; None: nothing is known yet.
    """

    def __init__(
        self, config: MoECommunicatorConfig, *, num_ranks: int, num_local: int, arena: HtArena
    ) -> None:
        self._config, self._arena, self._layout = config, arena, config.layout
        self._expanded, self._padded = config.layout.expanded, config.layout.padded
        self._topk, self._zero_copy = config.topk, config.zero_copy
        self._row_major = config.scale_order == "row_major"
        largest = capacity.largest_shape(config, num_ranks=num_ranks, num_local=num_local)
        self.limit = math.prod(largest)
        # Only where the host learns the number of rows do outputs follow that of recent calls.
        self.expected: tuple[int, ...] | None = None
        if self._padded:
            self.expected = largest
        elif config.static_shapes or config.zero_copy:
            self.expected = (self.limit,)
        self._learns = self.expected is None
        self._recent: collections.deque[int] = collections.deque(maxlen=tuning.HT_CALLS_REMEMBERED)
        room = capacity.announced(config, None)
        if room < 0 and config.static_shapes and not self._padded:
            room = self.limit
        self._room = room  # where the caller has made no output
        is_flat = config.layout is DispatchLayout.FLAT
        self._sizes = OutputSizes(num_local, num_ranks, config.topk, is_flat)
        # Where every row of an output is some token's, the kernel writes all source tokens.
        self._has_sources, counted = config.source_tokens, not config.static_shapes
        self._gapless = counted and not self._padded and config.expert_alignment == 1
        self._words = torch.empty(0, dtype=torch.int32, device=arena.device)
        self._ids = torch.empty(0, dtype=torch.int64, device=arena.device)
        self._weights = torch.empty(0, dtype=torch.float32, device=arena.device)

    # -- sizes ------------------------------------------------------------------------------------

    def expected_shape(self, call: DispatchCall) -> tuple[int, ...] | None:
        """Leading dimensions of a `tokens` that rows can go to before they are counted, or None.

        Where the host will learn their number it is made as large as recent calls suggest. Should
        more rows arrive, the kernel leaves placing them to a second launch.
        """
        if not self._padded:
            if call.buffers is not None:
                return (self.limit,)
            if call.output_buffer is not None:
                return (call.output_buffer.shape[0],)
        return self.expected

    def remember(self, needed: int) -> None:
        """Learns how many rows a call needed."""
        recent = self._recent
        forgets = len(recent) == recent.maxlen
        gone = recent[0] if forgets else None
        recent.append(needed)
        if gone == needed or not self._learns:
            return
        most = max(recent)
        most += most // tuning.HT_OUTPUT_SLACK
        self.expected = (min(most, self.limit),) if most else None

    def announced(self, call: DispatchCall) -> int:
        """Rows that this rank has room for, or UNBOUNDED."""
        if call.buffers is not None and not self._padded:
            return self.limit
        if call.output_buffer is None:
            return self._room
        return capacity.announced(self._config, call.output_buffer)

    def source_words(self, shape: tuple[int, ...] | None) -> int:
        """Words of the source tokens of an output, where the kernel writes all of them."""
        if not self._has_sources or shape is None or not self._gapless:
            return 0
        return math.prod(shape)

    # -- memory -----------------------------------------------------------------------------------

    def new_words(self, words: int) -> Tensor:
        """Memory of int32 words."""
        return self._words.new_empty(words)

    def make(
        self,
        a: Arguments,
        call: DispatchCall,
        shape: tuple[int, ...],
        weighted: bool,
        pool_at: int,
        memory: Tensor,
        counts_at: int,
        rows_memory: Tensor,
        rows_at: int,
    ) -> Rows:
        """Allocates what a dispatch of a leading shape returns, and tells the kernel.

        Counts start at a word of `memory`, source tokens at one of `rows_memory`, unless all of
        that is in buffers.
        """
        x, buffers, scales, own_scales = call.x_TW, call.buffers, None, False
        if buffers is not None:
            own_tokens, tokens = False, buffers.output.tokens
            source = self._tell_buffers(a, buffers.output, weighted, shape)
            if buffers.output.scales is not None and self._row_major:
                scales = buffers.output.scales.tensor
        else:
            own_tokens = False
            if call.output_buffer is not None:
                tokens = call.output_buffer
            elif self._zero_copy:
                tokens = self._in_pool(x, shape, pool_at)
            else:
                tokens, own_tokens = x.new_empty(*shape, x.shape[1]), True
            ids = weights = sources = None
            if not self._expanded:
                # Of their own: callers free what they have used, and tables must outlive that.
                ids = self._ids.new_empty(*shape, self._topk)
                a.topk_ids, a.topk_weights = ids.data_ptr(), None
                if weighted:
                    weights = self._weights.new_empty(*shape, self._topk)
                    a.topk_weights = weights.data_ptr()
            sources_at = -1
            if self._has_sources:
                if self._gapless:
                    sources_at = rows_at
                    a.source_tokens = rows_memory.data_ptr() + 4 * rows_at
                else:
                    sources = self._words.new_full(shape, -1)
                    a.source_tokens = sources.data_ptr()
            source = MemorySource(
                self._sizes,
                memory,
                counts_at,
                ids,
                weights,
                sources,
                rows_memory,
                sources_at,
                shape,
            )
        if call.scales is not None:
            if scales is None:
                scales, own_scales = call.scales.new_empty(*shape, call.scales.shape[1]), True
            a.scales_out = scales.data_ptr()
        a.tokens, a.max_slots = tokens.data_ptr(), math.prod(shape)
        if call.zero_padding and self._padded:
            tokens.zero_()
            if scales is not None:
                scales.zero_()
        return Rows(shape, tokens, scales, source, own_tokens, own_scales)

    def _tell_buffers(
        self, a: Arguments, largest: DispatchOutput, weighted: bool, shape: tuple[int, ...]
    ) -> BufferSource:
        """Tells the kernel where buffers have what comes with the rows."""
        if largest.source_tokens is not None:
            if not self._gapless:
                largest.source_tokens.fill_(-1)
            a.source_tokens = largest.source_tokens.data_ptr()
        if largest.topk_ids is not None:
            a.topk_ids = largest.topk_ids.data_ptr()
            weights = largest.topk_weights if weighted else None
            a.topk_weights = None if weights is None else weights.data_ptr()
        return BufferSource(largest, weighted, shape)

    def _in_pool(self, x: Tensor, shape: tuple[int, ...], pool_at: int) -> Tensor:
        """Rows where the other ranks write them."""
        full = (*shape, x.shape[1])
        nbytes = math.prod(full) * x.element_size()
        return self._arena.local[pool_at : pool_at + nbytes].view(x.dtype).view(full)

    def output(self, call: DispatchCall, rows: Rows, counts: list[int] | None) -> DispatchOutput:
        """What the caller gets; `counts` of experts, where the host knows them."""
        scales = None
        if rows.scales is not None and call.scales is not None:
            tensor = rows.scales
            if not self._row_major:
                if call.buffers is None:
                    tensor = in_scale_order(self._config, tensor)
                else:
                    assert call.buffers.output.scales is not None
                    largest = call.buffers.output.scales.tensor
                    tensor = largest[: rows.shape[0]].copy_(tensor)
            scales = QuantScales(tensor, call.scale_format)
        per_expert = None if counts is None else list(counts)
        return LazyOutput.of(rows.source, self._layout, rows.tokens, scales, per_expert)
