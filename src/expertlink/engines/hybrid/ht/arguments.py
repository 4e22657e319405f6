"""What a launch tells the kernels of mode `ht` across hosts: as inside a host, and the rail's."""

from __future__ import annotations

from expertlink.engines.nvlink.ht import arguments
from expertlink.engines.nvlink.ht.arguments import Flag
from expertlink.jit.compiler import enum_declaration
from expertlink.jit.kernel import Field, Struct

# N hosts of G ranks, C chunks. A seat is host * G + index in the host.
_RAIL = (
    Field("int", "seat", "this rank's"),
    Field("const int*", "seats", "[R] seat of every rank"),
    Field("const int*", "ranks", "[R] rank at every seat"),
    Field("int", "chunk", "which one moves"),
    Field("int", "chunk_begin", "first token of the chunk"),
    Field("int", "chunk_end", "token behind its last one"),
    Field("int*", "rows_before", "[R, C + 1] by seat: rows that come before each chunk"),
    Field("int*", "relayed_before", "[N, C + 1, G] the same of this rail, for every peer"),
    Field("int*", "relayed", "[N, C + 1] tokens of this rail for this host before each chunk"),
    Field("int*", "sent", "[C + 1, N] own tokens for every host before each chunk"),
    Field("int*", "relay_codes", "[N, T_max, min(G, K)] peer * T_max + position, or -1"),
    Field("int*", "host_slots", "[T, min(N, K)] host * T_max + index there, ascending, then -1"),
    Field("char*", "rail_send", "messages to other hosts"),
    Field("const char*", "rail_receive", "messages from other hosts"),
    Field("int", "rail_stride", "bytes from one row of a message to the next"),
    Field("int", "head_rows", "rows before the first one of a message"),
    Field("long long", "message_bytes", "of each message; 0: as many as it has rows"),
)

DISPATCH = Struct(
    "DispatchArguments",
    (
        *arguments.DISPATCH.fields,
        *_RAIL,
        Field("const int*", "chunk_starts", "[C + 1] first token of every chunk, then T_max"),
        Field("int*", "count_row", "this rank's"),
        Field("const char*", "gathered", "count rows of the other ranks of this rail"),
        Field("long long", "gathered_stride", "bytes from one to the next"),
    ),
)

COMBINE = Struct(
    "CombineArguments",
    (
        *arguments.COMBINE.fields,
        *_RAIL,
        Field("char*", "own_sums", "sums of this host for the chunk's own tokens"),
        Field("int", "sum_stride", "bytes from one to the next"),
    ),
)


def declarations() -> str:
    """C++ text of all of this."""
    return enum_declaration(Flag, prefix="k") + DISPATCH.declaration + COMBINE.declaration
