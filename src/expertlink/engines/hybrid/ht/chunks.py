"""What dispatches and combines across hosts tell the kernels of a chunk and of a routing, and the
rail of the messages of a chunk."""

from __future__ import annotations

from collections.abc import Sequence

from expertlink.engines.hybrid.ht.messages import Messages
from expertlink.engines.hybrid.ht.plan import MESSAGE_ALIGNMENT, RING, HybridPlan, message
from expertlink.engines.hybrid.ht.tables import HybridTables
from expertlink.jit.kernel import Arguments

Rows = Sequence[tuple[Sequence[int], Sequence[int]]]
"""By chunk: `[N]` rows for every host, and from every host."""


def full_message(a: Arguments, plan: HybridPlan, chunk: int) -> int:
    """Bytes of a message with room for all tokens of a chunk."""
    return (a.head_rows + plan.starts[chunk + 1] - plan.starts[chunk]) * a.rail_stride


def exchange(
    a: Arguments,
    messages: Messages,
    chunk: int,
    rows: Rows | None,
    *,
    host: int,
    back: bool = False,
) -> None:
    """The rail moves the messages of a chunk that the kernels have been told of.

    Args:
        a: says how long they are.
        messages: where they are.
        chunk: which one.
        rows: by chunk, rows for and from every host; None: messages have `a.message_bytes`.
        host: this one.
        back: of a combine, where what came goes back.
    """
    if a.message_bytes:
        same = [a.message_bytes // MESSAGE_ALIGNMENT] * messages.plan.num_hosts
        messages.exchange(chunk, message(same, same, host=host, head=0), MESSAGE_ALIGNMENT)
        return
    assert rows is not None
    send, receive = reversed(rows[chunk]) if back else rows[chunk]
    messages.exchange(chunk, message(send, receive, host=host, head=a.head_rows), a.rail_stride)


def tell_chunk(a: Arguments, messages: Messages, chunk: int) -> None:
    """Tells a kernel which tokens a chunk has, and where its messages are."""
    a.chunk = chunk
    starts = messages.plan.starts
    a.chunk_begin, a.chunk_end = starts[chunk], starts[chunk + 1]
    a.rail_send, a.rail_receive = messages.addresses[chunk % RING]


def tell_tables(a: Arguments, layout: HybridTables, base: int, num_tokens: int) -> None:
    """Tells a kernel where the tables of a routing are that all calls use."""
    at = layout.at
    a.slots_of_token = base + at["slots"]
    for name, table in _TABLES.items():
        setattr(a, name, base + at[table])
    a.host_slots = layout.host_slots(base, num_tokens)


_TABLES = {
    "rows_from": "rows_from",
    "rows_to": "rows_to",
    "first_row": "first_row",
    "choices_of_row": "choices",
    "rows_before": "rows_before",
    "relayed_before": "relayed_before",
    "relayed": "relayed",
    "sent": "sent",
    "relay_codes": "relay_codes",
}
