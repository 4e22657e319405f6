"""In which portions rows cross a rail. Pure functions of numbers that all ranks of a rail know.

In: `rows_NN`, rows that each host of the rail sends to each other one. Out: chunks, and how many
rows of every host go with each of them. A *pair* is a host that sends and one that receives.

A chunk is one exchange on the rail. While it travels, the one before is forwarded inside the host,
and the last ones are short, so that little is left to forward when the rail is done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ROWS_IN_FLIGHT = 2048
"""Rows that a chunk brings from all other hosts together, about: some 30 MB of 7168 bf16."""
LEAST_BYTES = 1 << 20
"""Messages to one host are not made smaller than this: then networks still run at full speed."""
TAPER = (512, 256)
"""Rows of the last chunks, where messages of so few are not too small."""


@dataclass(frozen=True)
class Chunk:
    """Rows `start` up to, not including, `start + rows` of every pair that has as many.

    Attributes:
        start: first row.
        rows: most rows of a pair; what a static schedule sends for every pair.
    """

    start: int
    rows: int

    def rows_of(self, total: int) -> int:
        """Rows that a pair with `total` rows has in this chunk."""
        return min(max(total - self.start, 0), self.rows)


def rows_per_chunk(num_hosts: int, *, row_bytes: int, max_tokens: int) -> int:
    """m, most rows of a pair in a chunk. It sizes the staging memory, and never exceeds T_max.

    Args:
        num_hosts: N, at least 2.
        row_bytes: of a row on the rail.
        max_tokens: T_max: a rank sends a token to a host once.
    """
    rows = max(ROWS_IN_FLIGHT // (num_hosts - 1), least_rows(row_bytes))
    return min(rows, max_tokens)


def least_rows(row_bytes: int) -> int:
    """Rows of the smallest message that is not too small."""
    return math.ceil(LEAST_BYTES / row_bytes)


def schedule(rows_NN: Sequence[Sequence[int]], *, most: int, least: int = 1) -> tuple[Chunk, ...]:
    """The chunks of a call whose numbers of rows are known. The same on all ranks of the rail.

    Args:
        rows_NN: `[s][d]` rows that host s sends to host d; those to itself do not count.
        most: m, as `rows_per_chunk` says.
        least: `least_rows`; of what is smaller no chunk is made to end with.
    """
    pairs = (rows for s, row in enumerate(rows_NN) for d, rows in enumerate(row) if s != d)
    return _in_a_row(chunk_sizes(max(pairs, default=0), most=most, least=least))


def chunk_sizes(rows: int, *, most: int, least: int = 1) -> list[int]:
    """Rows of the chunks of the pair that has most: equal ones, at most `most`, then a taper."""
    tail = [size for size in TAPER if least <= size < most]
    while True:
        body = rows - sum(tail)
        count = -(-body // most)
        if not tail or body >= count * tail[0] > 0:  # else the end would not be shorter
            break
        del tail[0]
    sizes = [(body + index) // count for index in reversed(range(count))]
    return sizes + tail


def static_schedule(max_tokens: int, *, most: int) -> tuple[Chunk, ...]:
    """The chunks of calls with static shapes: room for T_max rows of every pair in C messages.

    Numbers of rows are frozen in a CUDA graph, so every message has its full size.
    """
    return _in_a_row([min(most, max_tokens - start) for start in range(0, max_tokens, most)])


def splits(
    rows_NN: Sequence[Sequence[int]], chunk: Chunk, host: int
) -> tuple[list[int], list[int]]:
    """`[N]` rows that a host sends to, and receives from, every host in a chunk; 0 for itself."""
    hosts = range(len(rows_NN))
    send = [0 if d == host else chunk.rows_of(rows_NN[host][d]) for d in hosts]
    receive = [0 if s == host else chunk.rows_of(rows_NN[s][host]) for s in hosts]
    return send, receive


def static_splits(num_hosts: int, chunk: Chunk, host: int) -> list[int]:
    """`[N]` rows that a host sends to, and receives from, every host in a static chunk."""
    return [0 if other == host else chunk.rows for other in range(num_hosts)]


def rows_on_rail(num_hosts: int, *, num_experts: int, topk: int) -> float:
    """Rows that a token sends to other hosts on average, where any K experts are as likely.

    A host gets a token once, whatever number of its experts are chosen. So that is the number of
    other hosts, times the probability that a host has one of K different experts out of E.
    """
    elsewhere = num_experts - num_experts // num_hosts
    missed = math.comb(elsewhere, topk) / math.comb(num_experts, topk)
    return (num_hosts - 1) * (1 - missed)


def static_rows_on_rail(num_hosts: int, *, max_tokens: int, tokens: int) -> float:
    """Rows that a token sends to other hosts where a call has room for T_max, whoever gets it."""
    return (num_hosts - 1) * max_tokens / tokens


def rail_bytes(rows_NN: Sequence[Sequence[int]], host: int, row_bytes: int) -> tuple[int, int]:
    """Bytes of rows that a host's rank sends and receives on the rail in a dispatch.

    In a combine it is the other way round, with the bytes of a sum.
    """
    sent = sum(rows for d, rows in enumerate(rows_NN[host]) if d != host)
    received = sum(row[host] for s, row in enumerate(rows_NN) if s != host)
    return sent * row_bytes, received * row_bytes


def ring_bytes(num_hosts: int, *, most: int, row_bytes: int, slots: int) -> int:
    """Bytes of the buffers that a rank sends from and receives into: of `slots` chunks each way."""
    return 2 * slots * (num_hosts - 1) * most * row_bytes


def _in_a_row(sizes: Sequence[int]) -> tuple[Chunk, ...]:
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return tuple(Chunk(start, rows) for start, rows in zip(starts, sizes, strict=True))
