"""Handles of normal and low-latency calls: tuples of tensors, as callers of `deep_ep` expect.

Nobody but tests reads the tensors, so they are made when they are looked at, for as long as the
handle lives: also once its buffer has grown, or was destroyed. Copies of a handle that callers make
as plain tuples are recognized by one of the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from expertlink.compat.deep_ep.errors import CallError
from expertlink.compat.deep_ep.pool import Routing
from expertlink.engines.outputs import OutputSource, lasting_source
from expertlink.overlap import tensors_in
from expertlink.types import DispatchHandle, DispatchOutput

Known = TypeVar("Known")


class TensorTuple(tuple):
    """A tuple whose tensors are made when somebody looks at them.

    Attributes:
        KEY: position of the tensor by which plain copies are recognized.
        known: what the library knows of the call. It does not hold that tensor.
        kept: tensors that the others are made of.
    """

    KEY = 0

    known: Any
    kept: tuple[Tensor, ...]
    _made: dict[int, Any]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self._element(i) for i in range(*index.indices(len(self))))
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"{index}: this handle has {len(self)} elements")
        return self._element(position)

    def __iter__(self) -> Iterator[Any]:
        return (self._element(position) for position in range(len(self)))

    # The elements are tensors, which have no truth: a handle equals itself.
    __eq__ = object.__eq__
    __ne__ = object.__ne__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} elements)"

    def _element(self, position: int) -> Any:
        if position not in self._made:
            self._made[position] = self._make(position)
            if position == self.KEY:
                _plain_copies[self._made[position]] = self.known
        return self._made[position]

    def _make(self, position: int) -> Any:
        """The element at a position, when it is first looked at."""
        raise NotImplementedError


_plain_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def known_of(kind: type[Known], handle: object, *, key: int, length: int) -> Known:
    """What the library knows of a handle that the caller passed, or of which it passed a copy.

    Args:
        kind: of call.
        handle: what the caller passed.
        key: `TensorTuple.KEY` of such handles.
        length: their number of elements.

    Raises:
        CallError: it is no such handle.
    """
    known = None
    if isinstance(handle, TensorTuple):
        known = handle.known
    elif isinstance(handle, tuple) and len(handle) == length:
        tensor = handle[key]
        known = _plain_copies.get(tensor) if isinstance(tensor, Tensor) else None
    if isinstance(known, kind):
        return known
    raise CallError(
        f"a handle is expected that a dispatch of this kind has returned, not "
        f"{type(handle).__name__}: {str(handle)[:60]}"
    )


@dataclass(eq=False)
class Dispatched:
    """What a normal dispatch leaves for later calls. Not frozen, which takes four times as long.

    Attributes:
        handle: the library's own.
        routing: of the dispatch.
        capacity: `max_tokens_per_rank` of the communicator that made it.
        rows: rows that combine expects.
        padded_rows: rows of the tensors that the caller got: more than `rows` where it asked for
            a fixed number, and got it by padding.
    """

    handle: DispatchHandle
    routing: Routing
    capacity: int
    rows: int
    padded_rows: int
    _tensors: tuple[Tensor, ...] | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of `handle` that are on a GPU."""
        if self._tensors is None:
            self._tensors = tuple(tensors_in(self.handle))
        return self._tensors


class NormalHandle(TensorTuple):
    """The six tensors of a normal dispatch.

    0. `[R, R]` int32: column r (this rank) has the number of rows from ranks 0 to i in row i. The
       other columns, which only other ranks know, are -1.
    1. 2. `[R, 1]` int32, -1: DeepEP's channels, which do not exist here.
    3. `[N]` int32: source token of every row, -1 in padding.
    4. `[T, R]` bool: `is_token_in_rank` of the call.
    5. `[T, R]` int32, -1: DeepEP's own.
    """

    KEY = 3
    LENGTH = 6

    known: Dispatched
    _source: OutputSource
    _rank: int

    @staticmethod
    def of(
        dispatched: Dispatched, output: DispatchOutput, is_token_in_rank: Tensor, rank: int
    ) -> NormalHandle:
        """The handle of a dispatch.

        Args:
            dispatched: what the library knows of it.
            output: of the dispatch; only its counts and source tokens are kept.
            is_token_in_rank: `[T, R]` bool, the caller's.
            rank: this rank.
        """
        handle = NormalHandle(_SIX)
        handle.known, handle._rank = dispatched, rank
        handle._source = source = lasting_source(output)
        handle.kept = tuple(source.memories)
        handle._made = {4: is_token_in_rank}
        return handle

    def _make(self, position: int) -> Tensor:
        sources = self._source.make("source_tokens")
        assert sources is not None
        if position == self.KEY:
            return with_rows(sources, self.known.padded_rows, -1)
        num_tokens, num_ranks = self._made[4].shape
        shape = {0: (num_ranks, num_ranks), 5: (num_tokens, num_ranks)}.get(
            position, (num_ranks, 1)
        )
        made = torch.full(shape, -1, dtype=torch.int32, device=sources.device)
        if position == 0:
            per_rank = self._source.make("num_tokens_per_rank")
            assert per_rank is not None
            made[:, self._rank] = per_rank.cumsum(0)
        return made


_SIX = (None,) * NormalHandle.LENGTH


def with_rows(tensor: Tensor, num_rows: int, fill: int | None = None) -> Tensor:
    """The tensor with that many rows; those behind its own hold `fill`, or anything."""
    missing = num_rows - tensor.shape[0]
    if missing == 0:
        return tensor
    padded = tensor.new_empty((num_rows, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    if fill is not None:
        padded[tensor.shape[0] :] = fill
    return padded
