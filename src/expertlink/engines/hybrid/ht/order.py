"""In which order a call's chunks move. Pure functions of numbers that all ranks agree on.

Kernels run on the caller's stream, exchanges on the rail's. A step of one waits for the steps of
the other that it needs, and those come before it in the order that is made here. So the order also
says when memory of a message may be written again: a chunk uses that of the RING-th before it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator

from expertlink.engines.hybrid.ht.plan import RING


class Step(enum.Enum):
    """What is done with a chunk."""

    FILL = enum.auto()
    """Its messages are written, and the rail takes them."""
    OWN = enum.auto()
    """Rows of own tokens move inside the host."""
    DRAIN = enum.auto()
    """Once the rail has brought its messages, they are read."""


def dispatch_steps(num_chunks: int) -> Iterator[tuple[Step, int]]:
    """All rows of own tokens move beside the first messages, the others as they come."""
    first = min(RING, num_chunks)
    yield from ((Step.FILL, chunk) for chunk in range(first))
    yield from ((Step.OWN, chunk) for chunk in range(num_chunks))
    for chunk in range(num_chunks):
        yield Step.DRAIN, chunk
        if chunk + RING < num_chunks:
            yield Step.FILL, chunk + RING


def combine_steps(num_chunks: int) -> Iterator[tuple[Step, int]]:
    """Sums of own tokens are made just before those of the other hosts are added to them.

    The last chunks, which are short, come first: the rail waits while the first sums are made.
    """
    chunks = list(reversed(range(num_chunks)))
    yield from ((Step.FILL, chunk) for chunk in chunks[:RING])
    for turn, chunk in enumerate(chunks):
        yield Step.OWN, chunk
        yield Step.DRAIN, chunk
        if turn + RING < num_chunks:
            yield Step.FILL, chunks[turn + RING]
