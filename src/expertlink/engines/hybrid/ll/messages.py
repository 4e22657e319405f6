"""What is where in the messages that low-latency calls send between hosts. Pure.

A call sends one message to each other host, all of one size: B tokens, whether or not the rank has
so many. B is the call's bound, which all ranks pass alike.

    dispatch   header | ids [B, K] int32 | weights [B, K] float32 | scales [B, S] | rows [B, W]
    combine    header | gradients of weights [B, K] float32 | rows [B, W]

Parts that a call does not have take no room, except weights of a dispatch. Each part begins at a
multiple of 128 bytes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.nvlink.ll.arguments import MessageWord
from expertlink.engines.nvlink.rows import RowShape
from expertlink.layouts import align

_ALIGNMENT = 128
_HEADER = align(4 * len(MessageWord), _ALIGNMENT)


@dataclass(frozen=True)
class DispatchMessage:
    """Offsets of the parts of a dispatch's message, in bytes.

    Attributes:
        ids_at: of the ids.
        weights_at: of the weights.
        scales_at: of the scales.
        rows_at: of the rows.
        nbytes: of the whole message.
    """

    ids_at: int
    weights_at: int
    scales_at: int
    rows_at: int
    nbytes: int

    @staticmethod
    def of(*, bound: int, topk: int, row_bytes: int, scale_bytes: int) -> DispatchMessage:
        """The message of B tokens.

        Args:
            bound: B.
            topk: K.
            row_bytes: of a row on the wire.
            scale_bytes: of its scales.
        """
        words = 4 * bound * topk
        return DispatchMessage(*_starts(words, words, bound * scale_bytes, bound * row_bytes))


@dataclass(frozen=True)
class CombineMessage:
    """Offsets of the parts of a combine's message, in bytes.

    Attributes:
        grads_at: of the gradients of weights.
        rows_at: of the rows.
        nbytes: of the whole message.
    """

    grads_at: int
    rows_at: int
    nbytes: int

    @staticmethod
    def of(*, bound: int, topk: int, row_bytes: int, grads: bool) -> CombineMessage:
        """The message of B tokens; arguments as in `DispatchMessage.of`.

        `grads`: gradients of weights travel.
        """
        return CombineMessage(*_starts(4 * bound * topk if grads else 0, bound * row_bytes))


def _starts(*sizes: int) -> tuple[int, ...]:
    """Where parts of these sizes begin behind a header, and where the last one ends."""
    return tuple(itertools.accumulate((align(size, _ALIGNMENT) for size in sizes), initial=_HEADER))


def most_bytes(config: MoECommunicatorConfig) -> int:
    """Bytes of the largest message that a communicator can send."""
    shape, bound, topk = RowShape.of(config), config.max_tokens_per_rank, config.topk
    there = DispatchMessage.of(
        bound=bound, topk=topk, row_bytes=shape.row, scale_bytes=shape.scales
    )
    back = CombineMessage.of(bound=bound, topk=topk, row_bytes=shape.row, grads=True)
    return max(there.nbytes, back.nbytes)
