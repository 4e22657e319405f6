"""What a dispatch returns: the one place where its tensors and its `DispatchOutput` are made.

Making a tensor takes the host as long as a kernel's launch. Where that matters, all but the rows,
ids and weights are parts of one piece of memory, made when somebody reads them (`LazyOutput`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import DispatchCall
from expertlink.engines.ranks import capacity
from expertlink.types import (
    BlockFormat,
    DispatchBuffers,
    DispatchLayout,
    DispatchOutput,
    QuantScales,
    RowKind,
)


class PublicCounts(NamedTuple):
    """The caller's own counts, int32 on the device.

    Attributes:
        memory: what they lie in.
        per_expert: `[E_loc]` rows of each local expert.
        offsets: `[E_loc + 1]` where their groups start, in FLAT.
        per_rank: `[R]` rows from each rank.
    """

    memory: Tensor
    per_expert: Tensor
    offsets: Tensor
    per_rank: Tensor

    @staticmethod
    def within(memory: Tensor, sizes: Sequence[int]) -> PublicCounts:
        """Counts, offsets and rows in this order; `sizes` adds up to the memory."""
        per_expert, offsets, per_rank, *_ = memory.split_with_sizes(sizes)
        return PublicCounts(memory, per_expert, offsets, per_rank)


@dataclass(eq=False)
class OutputTensors:
    """Tensors of one leading shape, from which an output is made.

    Attributes:
        shape: leading dimensions.
        tokens: rows.
        scales: scales of quantized rows.
        scale_format: their block format, or None.
        ids: `[..., K]` int64, deduplicated layouts.
        weights: `[..., K]`, deduplicated layouts of weighted dispatches.
        source_tokens: `[...]` int32, -1 everywhere at first; where configured.
    """

    shape: tuple[int, ...]
    tokens: Tensor
    scales: Tensor | None
    scale_format: BlockFormat | None
    ids: Tensor | None
    weights: Tensor | None
    source_tokens: Tensor | None

    @staticmethod
    def around(
        config: MoECommunicatorConfig,
        tokens: Tensor,
        *,
        shape: tuple[int, ...],
        weighted: bool,
        scale_dtype: torch.dtype | None = None,
        scale_columns: int = 0,
        scale_format: BlockFormat | None = None,
        row_major: bool = False,
    ) -> OutputTensors:
        """Tensors beside the rows, uninitialised but for source tokens.

        Args:
            config: the communicator's.
            tokens: the rows.
            shape: leading dimensions of `tokens`.
            weighted: weights come with the rows.
            scale_dtype: of scales, if there are any.
            scale_columns: scales of a row.
            scale_format: their block format, or None.
            row_major: scales in that memory order, whatever the configuration says.
        """
        scales = ids = weights = sources = None
        device = tokens.device
        if scale_dtype is not None:
            kind = RowKind(tokens.dtype, tokens.shape[-1], scale_dtype, scale_columns)
            order = "row_major" if row_major else config.scale_order
            scales = new_scales(tokens, shape, kind, order=order)
        if not config.layout.expanded:
            choices = (*shape, config.topk)
            ids = torch.empty(choices, dtype=torch.int64, device=device)
            if weighted:
                weights = torch.empty(choices, dtype=config.weight_dtype, device=device)
        if config.source_tokens:
            sources = torch.full(shape, -1, dtype=torch.int32, device=device)
        return OutputTensors(shape, tokens, scales, scale_format, ids, weights, sources)

    def cut(self, rows: int) -> None:
        """Leaves the first rows of what was made larger."""
        self.shape = (rows,)
        if self.tokens.shape[0] != rows:
            self.tokens = self.tokens[:rows]
        if self.scales is not None and self.scales.shape[0] != rows:
            self.scales = self.scales[:rows]
        if self.ids is not None and self.ids.shape[0] != rows:
            self.ids = self.ids[:rows]
        if self.weights is not None and self.weights.shape[0] != rows:
            self.weights = self.weights[:rows]
        if self.source_tokens is not None and self.source_tokens.shape[0] != rows:
            self.source_tokens = self.source_tokens[:rows]

    def zero_rows(self) -> None:
        """Clears rows and scales, for slots that nothing fills."""
        self.tokens.zero_()
        if self.scales is not None:
            self.scales.zero_()

    def output(
        self,
        layout: DispatchLayout,
        counts: PublicCounts,
        per_expert: list[int] | None = None,
    ) -> DispatchOutput:
        """The output; `per_expert` are the counts of experts, where the host knows them."""
        scales = self.scales
        return DispatchOutput(
            tokens=self.tokens,
            num_tokens_per_expert=counts.per_expert,
            layout=layout,
            scales=None if scales is None else QuantScales(scales, self.scale_format),
            num_tokens_per_expert_list=None if per_expert is None else list(per_expert),
            expert_offsets=counts.offsets if layout is DispatchLayout.FLAT else None,
            topk_ids=self.ids,
            topk_weights=self.weights,
            num_tokens_per_rank=counts.per_rank,
            source_tokens=self.source_tokens,
        )


def largest_output(
    config: MoECommunicatorConfig,
    rows: RowKind,
    *,
    num_ranks: int,
    num_local: int,
    device: torch.device,
    tokens: Tensor | None = None,
) -> DispatchOutput:
    """Tensors of the largest shape that any dispatch of such rows can return, or for `tokens`."""
    if tokens is None:
        shape = capacity.largest_shape(config, num_ranks=num_ranks, num_local=num_local)
        tokens = torch.empty((*shape, rows.width), dtype=rows.dtype, device=device)
    else:
        shape = tuple(tokens.shape[:-1])
    tensors = OutputTensors.around(
        config,
        tokens,
        shape=shape,
        weighted=rows.weighted,
        scale_dtype=rows.scale_dtype,
        scale_columns=rows.scale_columns,
        scale_format=rows.scale_format,
    )
    sizes = [num_local, num_local + 1, num_ranks]
    memory = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    return tensors.output(config.layout, PublicCounts.within(memory, sizes))


def new_scales(like: Tensor, shape: tuple[int, ...], kind: RowKind, *, order: str) -> Tensor:
    """Uninitialised scales of rows, in that memory order.

    Args:
        like: where they live.
        shape: leading dimensions of the rows.
        kind: of the rows.
        order: as `scale_order` of the configuration.
    """
    size = (*shape, kind.scale_columns)
    if order == "row_major":
        return like.new_empty(size, dtype=kind.scale_dtype)
    return like.new_empty_strided(size, _column_major(size), dtype=kind.scale_dtype)


@lru_cache(maxsize=64)
def _column_major(size: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor whose last two dimensions are swapped."""
    *outer, rows, columns = (max(length, 1) for length in size)
    strides = [1, rows]
    step = rows * columns
    for length in reversed(outer):
        strides.insert(0, step)
        step *= length
    return tuple(strides)


def without_weights(output: DispatchOutput) -> DispatchOutput:
    """The same tensors for a dispatch without weights."""
    return DispatchOutput(**{**vars(output), "topk_weights": None})


def in_scale_order(config: MoECommunicatorConfig, scales: Tensor) -> Tensor:
    """Row-major scales in the order of the configuration."""
    if config.scale_order == "row_major":
        return scales
    return scales.transpose(-1, -2).contiguous().transpose(-1, -2)


class OutputSource(Protocol):
    """What makes the tensors of a `LazyOutput`."""

    @property
    def memories(self) -> Iterator[Tensor]:
        """What they lie in."""
        ...

    def make(self, name: str) -> Tensor | None:
        """The tensor of a field of `DispatchOutput`, or None where there is none."""
        ...

    def without_rows(self) -> OutputSource:
        """The same without ids and weights, for whoever keeps the rest longer than the rows."""
        ...


class _Part:
    """A field of a `LazyOutput`: made when it is first read, an ordinary attribute from then on."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, output: Any, owner: type | None = None) -> Any:
        if output is None:
            return self
        tensor = output.source.make(self._name)
        _attributes(output)[self._name] = tensor
        return tensor


_attributes: Callable[[DispatchOutput], dict[str, Any]] = vars(DispatchOutput)["__dict__"].__get__
"""The attributes that an output has, also where `vars` shows more."""


class LazyOutput(DispatchOutput):
    """A `DispatchOutput` of which all but rows and scales is made when it is first read.

    Nobody can tell otherwise: `vars` and the functions of `dataclasses` see tensors, and copies are
    ordinary outputs.

    Attributes:
        source: makes them; None in what `dataclasses.replace` has made, which has all of them.
    """

    source: OutputSource | None = None

    @staticmethod
    def of(
        source: OutputSource,
        layout: DispatchLayout,
        tokens: Tensor,
        scales: QuantScales | None,
        per_expert: list[int] | None,
    ) -> LazyOutput:
        """An output with these tensors and those that `source` makes."""
        output = object.__new__(LazyOutput)
        # Building a frozen record in the usual way makes all fields, and takes longer.
        held = _attributes(output)
        held["source"], held["layout"], held["tokens"] = source, layout, tokens
        held["scales"], held["num_tokens_per_expert_list"] = scales, per_expert
        return output

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        """What `vars` shows: every field."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __reduce__(self) -> tuple[Any, ...]:
        return DispatchOutput, tuple(vars(self).values())


for _name in (
    "num_tokens_per_expert",
    "expert_offsets",
    "topk_ids",
    "topk_weights",
    "num_tokens_per_rank",
    "source_tokens",
):
    setattr(LazyOutput, _name, _Part(_name))


def words_of(memory: Tensor, start: int, count: int) -> Tensor:
    """`[count]` int32 of such memory, from a word on; no view in autograd's sense.

    It belongs to inference mode if the memory does.
    """
    if memory.is_inference() and not torch.is_inference_mode_enabled():
        with torch.inference_mode():
            return memory[start : start + count].data
    return memory[start : start + count].data


def part_of(memory: Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The same, of any shape and type."""
    words = words_of(memory, start, math.prod(shape) * dtype.itemsize // 4)
    with torch.inference_mode(words.is_inference()):
        return words.view(dtype).view(shape).data


def first_rows(tensor: Tensor, rows: int, *, own: bool) -> Tensor:
    """The first rows of a contiguous 2-d tensor.

    `own`: nobody else has it, so it is cut itself. It keeps its memory and is no view, and that
    takes half the time.
    """
    if tensor.shape[0] == rows:
        return tensor
    return tensor.resize_(rows, tensor.shape[1]) if own else tensor[:rows]


class OutputSizes(NamedTuple):
    """What is the same in all outputs of a communicator: E_loc, R, K, and whether in FLAT."""

    num_local: int
    num_ranks: int
    topk: int
    is_flat: bool


class MemorySource:
    """Counts and source tokens of a dispatch in int32 memory; ids and weights of its rows.

    Tensors are no views in autograd's sense, so they can be changed in place as others can.

    Args:
        sizes: of the communicator.
        memory: where the counts are: `[E_loc]`, `[E_loc + 1]` and `[R]`, one after the other.
        counts_at: word at which they start.
        ids: `[*shape, K]` int64, or None.
        weights: `[*shape, K]`, or None.
        sources: `[*shape]` int32 source tokens, where they are a tensor of their own.
        rows_memory: where they are if not.
        sources_at: word at which they start there, `[N]`; -1: they do not.
        shape: leading dimensions of the output.
    """

    __slots__ = (
        "_counts_at",
        "_ids",
        "_memory",
        "_rows_memory",
        "_shape",
        "_sizes",
        "_sources",
        "_sources_at",
        "_weights",
    )

    def __init__(
        self,
        sizes: OutputSizes,
        memory: Tensor,
        counts_at: int,
        ids: Tensor | None,
        weights: Tensor | None,
        sources: Tensor | None,
        rows_memory: Tensor,
        sources_at: int,
        shape: tuple[int, ...],
    ) -> None:
        self._sizes, self._memory, self._counts_at = sizes, memory, counts_at
        self._ids, self._weights, self._sources = ids, weights, sources
        self._rows_memory, self._sources_at, self._shape = rows_memory, sources_at, shape

    @property
    def memories(self) -> Iterator[Tensor]:
        """As `OutputSource.memories`."""
        yield self._memory
        if self._rows_memory is not self._memory:
            yield self._rows_memory
        for tensor in (self._ids, self._weights, self._sources):
            if tensor is not None:
                yield tensor

    def cut(self, rows: int) -> None:
        """Leaves the first rows of what was made larger."""
        if self._shape[0] == rows:
            return
        self._shape = (rows,)
        if self._ids is not None:
            self._ids.resize_(rows, self._sizes.topk)  # keeps its memory, and is no view
        if self._weights is not None:
            self._weights.resize_(rows, self._sizes.topk)
        if self._sources is not None:
            self._sources.resize_(rows)

    def without_rows(self) -> MemorySource:
        """As `OutputSource.without_rows`."""
        return MemorySource(
            self._sizes,
            self._memory,
            self._counts_at,
            None,
            None,
            self._sources,
            self._rows_memory,
            self._sources_at,
            self._shape,
        )

    def make(self, name: str) -> Tensor | None:
        """As `OutputSource.make`."""
        num_local, num_ranks, _, is_flat = self._sizes
        if name == "num_tokens_per_expert":
            return words_of(self._memory, self._counts_at, num_local)
        if name == "topk_ids":
            return self._ids
        if name == "topk_weights":
            return self._weights
        offsets_at = self._counts_at + num_local
        if name == "expert_offsets":
            return words_of(self._memory, offsets_at, num_local + 1) if is_flat else None
        if name == "num_tokens_per_rank":
            return words_of(self._memory, offsets_at + num_local + 1, num_ranks)
        assert name == "source_tokens"
        if self._sources_at < 0:
            return self._sources
        return words_of(self._rows_memory, self._sources_at, self._shape[0])


class BufferSource:
    """Counts, ids and weights in `DispatchBuffers`.

    Args:
        largest: the tensors of the buffers.
        weighted: the dispatch has weights.
        shape: leading dimensions of the output.
    """

    __slots__ = ("_largest", "_rows", "_weighted")

    def __init__(self, largest: DispatchOutput, weighted: bool, shape: tuple[int, ...]) -> None:
        self._largest, self._weighted, self._rows = largest, weighted, shape[0]

    @property
    def memories(self) -> Iterator[Tensor]:
        """As `OutputSource.memories`."""
        yield from _tensors_but_tokens(self._largest)

    def cut(self, rows: int) -> None:
        """Leaves the first rows of what is larger."""
        self._rows = rows

    def without_rows(self) -> BufferSource:
        """As `OutputSource.without_rows`: the buffers are there anyway."""
        return self

    def make(self, name: str) -> Tensor | None:
        """As `OutputSource.make`."""
        tensor: Tensor | None = getattr(self._largest, name)
        if tensor is None or name not in ("topk_ids", "topk_weights", "source_tokens"):
            return tensor
        if name == "topk_weights" and not self._weighted:
            return None
        return tensor[: self._rows]


class TensorSource:
    """Counts and source tokens that are tensors.

    Args:
        output: has them.
    """

    __slots__ = ("_tensors",)

    def __init__(self, output: DispatchOutput) -> None:
        names = ("num_tokens_per_expert", "expert_offsets", "num_tokens_per_rank", "source_tokens")
        self._tensors: dict[str, Tensor | None] = {name: getattr(output, name) for name in names}

    @property
    def memories(self) -> Iterator[Tensor]:
        """As `OutputSource.memories`."""
        yield from (tensor for tensor in self._tensors.values() if tensor is not None)

    def make(self, name: str) -> Tensor | None:
        """As `OutputSource.make`."""
        return self._tensors.get(name)

    def without_rows(self) -> TensorSource:
        """As `OutputSource.without_rows`."""
        return self


def lasting_source(output: DispatchOutput) -> OutputSource:
    """What makes the counts and source tokens of an output, without keeping its rows."""
    source = output.source if isinstance(output, LazyOutput) else None
    return TensorSource(output) if source is None else source.without_rows()


def with_tensors(
    output: DispatchOutput, *, tokens: Tensor, topk_weights: Tensor | None
) -> DispatchOutput:
    """The same output with other rows and weights."""
    source = output.source if isinstance(output, LazyOutput) else None
    if source is None:
        return dataclasses.replace(output, tokens=tokens, topk_weights=topk_weights)
    replaced = LazyOutput.of(
        source,
        output.layout,
        tokens,
        output.scales,
        output.num_tokens_per_expert_list,
    )
    _attributes(replaced)["topk_weights"] = topk_weights
    return replaced


def into_tokens(call: DispatchCall) -> DispatchCall:
    """The same call with the `tokens` of its buffers, if it has any, as output buffer."""
    if call.buffers is None:
        return call
    return dataclasses.replace(call, output_buffer=call.buffers.output.tokens)


def into_buffers(
    buffers: DispatchBuffers, output: DispatchOutput
) -> tuple[DispatchOutput, Callable[[], None]]:
    """Views of the buffers for an output whose tokens lie there, and what copies the rest."""
    largest = buffers.output

    def view(buffer: Tensor | None, tensor: Tensor | None) -> Tensor | None:
        return None if buffer is None or tensor is None else buffer[: len(tensor)]

    scales = None
    if output.scales is not None and largest.scales is not None:
        tensor = largest.scales.tensor[: len(output.scales.tensor)]
        scales = QuantScales(tensor, output.scales.format)
    views = dataclasses.replace(
        output,
        num_tokens_per_expert=largest.num_tokens_per_expert,
        scales=scales,
        expert_offsets=largest.expert_offsets,
        topk_ids=view(largest.topk_ids, output.topk_ids),
        topk_weights=view(largest.topk_weights, output.topk_weights),
        num_tokens_per_rank=largest.num_tokens_per_rank,
        source_tokens=view(largest.source_tokens, output.source_tokens),
    )

    def fill() -> None:
        pairs = zip(_tensors_but_tokens(views), _tensors_but_tokens(output), strict=True)
        for target, source in pairs:
            target.copy_(source)

    return views, fill


def _tensors_but_tokens(output: DispatchOutput) -> Iterator[Tensor]:
    """Everything but the rows."""
    scales = None if output.scales is None else output.scales.tensor
    for tensor in (
        output.num_tokens_per_expert,
        scales,
        output.expert_offsets,
        output.topk_ids,
        output.topk_weights,
        output.num_tokens_per_rank,
        output.source_tokens,
    ):
        if tensor is not None:
            yield tensor
