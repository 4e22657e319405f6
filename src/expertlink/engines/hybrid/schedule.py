"""In which portions rows cross a rail, and how many of them. Pure functions, the same on all ranks.

A call cuts the tokens of every rank at the same numbers. The rows of one part that go to other
hosts are a *chunk*, one exchange on the rail. While it travels, the one before is passed on inside
the host. The last chunks are short, so that little is left to pass on when the rail is done. So is
the first one: the rail begins with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

ROWS_IN_FLIGHT = 2048
"""Rows that a chunk brings from all other hosts together, at most: some 30 MB of 7168 bf16."""
LEAST_BYTES = 1 << 20
"""Messages to one host have room for so much: then networks still run at full speed."""
FIRST = 4
"""The first chunk has that part of the most tokens: its messages may leave before anybody knows how
many rows they have, with room for all."""
TAPER = (512, 256)
"""Tokens of the last chunks, which a combine moves first."""


def rows_per_chunk(num_hosts: int, *, row_bytes: int, max_tokens: int) -> int:
    """m, most tokens of a rank in a chunk, and so most rows from one host to another.

    It sizes the staging memory, and never exceeds T_max.

    Args:
        num_hosts: N, at least 2.
        row_bytes: of a row on the rail.
        max_tokens: T_max.
    """
    rows = max(ROWS_IN_FLIGHT // (num_hosts - 1), math.ceil(LEAST_BYTES / row_bytes))
    return min(rows, max_tokens)


def chunk_sizes(tokens: int, *, most: int) -> list[int]:
    """Tokens of each chunk of a call: a short one; equal numbers, at most `most`; then a taper."""
    head = [min(most, tokens) // FIRST]
    tail = [size for size in TAPER if size < most]
    while True:
        body = tokens - sum(head) - sum(tail)
        count = -(-body // most)
        if body >= count * max([*head, *tail]) > 0 or not any([*head, *tail]):
            break  # else the ends would not be shorter
        if tail:
            del tail[0]
        else:
            head = [0]
    return [
        *filter(None, head),
        *((body + index) // count for index in reversed(range(count))),
        *tail,
    ]


def splits(rows_NN: Sequence[Sequence[int]], host: int) -> tuple[list[int], list[int]]:
    """`[N]` rows that a host sends to, and receives from, every host in a chunk; 0 for itself.

    `rows_NN`: `[s][d]` rows of the chunk that host s has for host d.
    """
    hosts = range(len(rows_NN))
    send = [0 if other == host else rows_NN[host][other] for other in hosts]
    receive = [0 if other == host else rows_NN[other][host] for other in hosts]
    return send, receive


def rows_on_rail(num_hosts: int, *, num_experts: int, topk: int) -> float:
    """Rows that a token sends to other hosts on average, where any K experts are as likely.

    A host gets a token once, whatever number of its experts are chosen. So that is the number of
    other hosts, times the probability that a host has one of K different experts out of E. With
    static shapes it is the number of other hosts.
    """
    elsewhere = num_experts - num_experts // num_hosts
    missed = math.comb(elsewhere, topk) / math.comb(num_experts, topk)
    return (num_hosts - 1) * (1 - missed)


def rail_bytes(rows_NN: Sequence[Sequence[int]], host: int, *, row_bytes: int) -> tuple[int, int]:
    """Bytes of rows that a rank sends and receives on its rail in a dispatch.

    A combine sends them the other way round, with the bytes of a sum.
    """
    send, receive = splits(rows_NN, host)
    return sum(send) * row_bytes, sum(receive) * row_bytes
