"""Memory of mode `ht` across hosts: chunks, the arena of a host's ranks, messages of the rail.

Pure functions of the configuration and the hosts, the same on all ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from expertlink.config import MoECommunicatorConfig
from expertlink.domains import Domains
from expertlink.engines.hybrid.schedule import chunk_sizes, rows_per_chunk
from expertlink.engines.nvlink.ht.plan import (
    ARENA_ALIGNMENT,
    FLAG_WORDS,
    HtPlan,
    constants_of,
    count_columns,
)
from expertlink.engines.nvlink.rows import RowShape
from expertlink.engines.nvlink.shared import HEADER_WORDS
from expertlink.layouts import align

RING = 3
"""Chunks whose messages are in memory at a time: one is packed, one is on the rail, one is passed
on. Not measured."""

_USUAL_ROW = 14336  # bytes; cuts do not follow the rows: those of any size can use a routing
MESSAGE_ALIGNMENT = 16
"""Bytes; of rows in a message, and of messages: bulk copies move multiples."""


def chunk_starts(max_tokens: int, *, most: int) -> list[int]:
    """First token of every chunk, then T_max. Every rank cuts its tokens at the same numbers.

    Args:
        max_tokens: T_max.
        most: m, most tokens of a chunk.
    """
    return list(itertools.accumulate(chunk_sizes(max_tokens, most=most), initial=0))


def bounds_of(tokens: Sequence[int], starts: Sequence[int]) -> list[int]:
    """How many of some ascending tokens lie before each start."""
    return [sum(token < start for token in tokens) for start in starts]


@dataclass(frozen=True)
class RailRow:
    """Bytes of a row in a message.

    Attributes:
        row: the row's own.
        metadata: what the receiving rank gets with it, a multiple of 16.
        positions: of its positions in the host that it goes to.
    """

    row: int
    metadata: int
    positions: int

    @property
    def stride(self) -> int:
        """Bytes from one row to the next."""
        return align(self.row + self.metadata + self.positions, MESSAGE_ALIGNMENT)


def head_rows(words: int, stride: int) -> int:
    """Rows of a message that `words` take, in front of all others."""
    return -(-4 * words // stride)


@dataclass(frozen=True)
class Message:
    """Rows that ranks of a rail exchange in one chunk, heads included; 0 for the own host.

    Attributes:
        send: `[N]`.
        receive: `[N]`.
    """

    send: tuple[int, ...]
    receive: tuple[int, ...]


def message(send: Sequence[int], receive: Sequence[int], *, host: int, head: int) -> Message:
    """Of a chunk with so many tokens for and from every host."""

    def with_heads(rows: Sequence[int]) -> tuple[int, ...]:
        lengths = [head + count for count in rows]
        lengths[host] = 0
        return tuple(lengths)

    return Message(with_heads(send), with_heads(receive))


@dataclass(frozen=True)
class HybridPlan(HtPlan):
    """Sizes of a host's arena, and of what a rank has for its rail, in bytes.

    Attributes:
        num_hosts: N.
        num_peers: G.
        starts: as `chunk_starts`.
        chunk_rows: m.
        messages: of all messages of one chunk, in one direction.
        own_sums: sums of this host for the tokens of a chunk.
        first_message: of a message of chunk 0 that leaves before counts are known, to one host.
    """

    num_hosts: int
    num_peers: int
    starts: tuple[int, ...]
    chunk_rows: int
    messages: int
    own_sums: int
    first_message: int

    @staticmethod
    def across(
        config: MoECommunicatorConfig, domains: Domains, *, chunk_rows: int | None = None
    ) -> HybridPlan:
        """What a communicator needs.

        Args:
            config: the communicator's.
            domains: hosts of one size.
            chunk_rows: m; None: as many as the rails want.
        """
        num_ranks, num_hosts = domains.num_ranks, domains.num_hosts
        num_peers = domains.ranks_per_host
        assert num_peers is not None
        shape = RowShape.of(config)
        if chunk_rows is None:
            chunk_rows = rows_per_chunk(
                num_hosts, row_bytes=_USUAL_ROW, max_tokens=config.max_tokens_per_rank
            )
        starts = tuple(chunk_starts(config.max_tokens_per_rank, most=chunk_rows))
        most = max(end - begin for begin, end in itertools.pairwise(starts))
        words = count_words(config, domains, len(starts) - 1)
        slots = num_ranks * most
        largest = largest_row(config, domains)
        head = _most_head(config, words, domains)
        sizes = {
            "flags": 4 * (FLAG_WORDS * num_peers + slots),
            "counts": 4 * num_ranks * words,
            "rows": slots * shape.staged,
            "messages": (num_hosts - 1) * align(head + most * largest, MESSAGE_ALIGNMENT),
            "own_sums": most * align(shape.row + 4 * config.topk, MESSAGE_ALIGNMENT),
        }
        rounded = {name: align(size, ARENA_ALIGNMENT) for name, size in sizes.items()}
        return HybridPlan(
            **rounded,
            metadata=0,
            pool=0,
            count_words=words,
            max_tokens=config.max_tokens_per_rank,
            stride=shape.staged,
            num_hosts=num_hosts,
            num_peers=num_peers,
            starts=starts,
            chunk_rows=most,
            first_message=align(4 * HEADER_WORDS + (starts[1] + 1) * largest, MESSAGE_ALIGNMENT),
        )

    @property
    def num_chunks(self) -> int:
        """C."""
        return len(self.starts) - 1

    @property
    def num_ranks(self) -> int:
        """R."""
        return self.num_hosts * self.num_peers

    def holds(self, other: object) -> bool:
        """Whether a communicator that needs `other` can share this memory."""
        if not isinstance(other, HybridPlan):
            return False
        mine, theirs = vars(self), vars(other)
        same = ("max_tokens", "stride", "num_hosts", "num_peers", "starts", "chunk_rows")
        sizes = ("flags", "counts", "count_words", "rows", "messages", "own_sums")
        return all(mine[name] == theirs[name] for name in same) and all(
            mine[name] >= theirs[name] for name in sizes
        )

    def regions(self) -> dict[str, int]:
        """Bytes by region of the arena, in the order of their offsets."""
        return {"flags": self.flags, "counts": self.counts, "rows in transit": self.rows}

    def message_regions(self) -> dict[str, int]:
        """Bytes by region of what the rail needs."""
        return {
            "messages of the rail": 2 * RING * self.messages,
            "sums of the own host": self.own_sums,
        }

    @property
    def rail_words(self) -> int:
        """Words of the host's mail for the rail: [C, 2, N]."""
        return 2 * self.num_chunks * self.num_hosts


def count_words(config: MoECommunicatorConfig, domains: Domains, num_chunks: int) -> int:
    """Words of a count row: header, columns, and rows for ranks and hosts before each chunk."""
    columns = count_columns(config, domains.num_ranks, domains.num_hosts)
    return HEADER_WORDS + columns + (num_chunks - 1) * (domains.num_ranks + domains.num_hosts)


def largest_row(config: MoECommunicatorConfig, domains: Domains) -> int:
    """Bytes of the largest row of a message."""
    shape = RowShape.of(config)
    return RailRow(shape.row, shape.metadata, positions_bytes(config, domains)).stride


def positions_bytes(config: MoECommunicatorConfig, domains: Domains) -> int:
    """Bytes of a row's positions in a host."""
    assert domains.ranks_per_host is not None
    return 4 * min(config.topk, domains.ranks_per_host)


def _most_head(config: MoECommunicatorConfig, words: int, domains: Domains) -> int:
    """Most bytes of a head: whole rows, of any size."""
    return 4 * words + largest_row(config, domains)


def hybrid_constants(config: MoECommunicatorConfig, plan: HybridPlan) -> dict[str, int | bool]:
    """What a communicator fixes for its kernels; the same on all ranks."""
    return {
        **constants_of(config, plan, num_ranks=plan.num_ranks, num_hosts=plan.num_hosts),
        "kNumChunks": plan.num_chunks,
        "kChunkRows": plan.chunk_rows,
        "kWriterSlots": plan.num_hosts * plan.chunk_rows,
    }
