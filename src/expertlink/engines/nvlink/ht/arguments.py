"""What a launch tells the kernels ht::dispatch and ht::combine."""

from __future__ import annotations

import enum

from expertlink.engines.nvlink.shared import OUTPUTS
from expertlink.jit.compiler import enum_declaration
from expertlink.jit.kernel import Field, Struct


class Flag(enum.IntFlag):
    """What a launch does, and with what."""

    COUNT = 1
    """Count and plan: the routing is new."""
    SEND = 2
    PLACE = 4
    CACHED = 8
    """Slots and ids are those of an earlier dispatch."""
    WIDE_IDS = 16
    """`ids` are int64, else int32."""
    DISCARD = 32
    """Nothing is placed; the peers may go on."""
    NEW_WEIGHTS = 64
    """Weights travel. (A rank without tokens has no address for them.)"""
    GRADS = 128
    """Gradients of the slots' weights travel."""
    WITHIN_HOST = 256
    """Across hosts: the rows of this host's own tokens move, else those of other hosts."""
    CLEAR = 512
    """Across hosts: this transfer clears the slots that no row of the call fills."""
    UNCOUNTED = 1024
    """Statistics leave this dispatch out: it is a part of a combine."""


# What both kernels begin with: peers.cuh reads these.
_COMMON = (
    Field("char* const*", "bases", "[R] arena of every rank"),
    Field("State*", "state", "this rank's"),
    Field("Control*", "control", "this rank's, in host memory"),
    Field("int", "rank", "this rank"),
    Field("int", "operation", "header.Operation"),
    Field("int", "communicator", "tells communicators apart"),
    Field("const int*", "subject", "transfer of the dispatch that the call refers to, or null"),
    Field("int", "maker", "communicator of that dispatch, or 0"),
    Field("int", "pool", "zero copy: which of the two pools has this rank's view"),
    Field("int", "status", "header.Status"),
    Field("int", "capacity", "rows this rank has room for, or -1; T where that is too much"),
    Field("int", "row_bytes", "bytes of a row"),
    Field("int", "header_metadata_bytes", "bytes of a row's weights and scales, as announced"),
    Field("int", "metadata_bytes", "bytes of a row's metadata, a multiple of 16"),
    Field("int", "flags", "Flag"),
    Field("int", "num_tokens", "T"),
    Field("int", "num_senders", "blocks that send; the others place or add up"),
    Field("int", "slot_bytes", "shared memory of a row and its metadata"),
    Field("int", "warp_bytes", "shared memory of a warp"),
    Field("int", "batch", "rows that a warp moves at a time"),
    Field("int", "max_slots", "rows that the output has room for"),
    Field("const void*", "ids", "[T, K] global expert ids"),
    Field("const int*", "expert_location", "[E] rank * kLocationStride + local index"),
    Field("int*", "slots_of_token", "[T, D] rank * T_max + position, ascending, then -1"),
    Field("int*", "rows_from", "[R] rows received from each rank"),
    Field("int*", "rows_to", "[R] rows sent to each rank"),
    Field("int*", "first_row", "[R] rows received from the ranks before"),
    Field("int*", "choices_of_row", "[N, K] slot (expanded) or local expert of each choice, or -1"),
    Field("float*", "weights_of_row", "[N, K] weight of each choice, or null"),
    Field("long long*", "rows_sent", "[R] statistics, or null"),
    Field("long long*", "rows_received", "[R] statistics"),
    Field("long long*", "bytes_sent", "[R] statistics"),
    Field("long long*", "bytes_received", "[R] statistics"),
)

DISPATCH = Struct(
    "DispatchArguments",
    (
        *_COMMON,
        Field("const char*", "x", "[T] rows"),
        Field("const float*", "weights", "[T, K] new weights"),
        Field("const char*", "scales", "[T] scales, or null"),
        Field("int", "scale_bytes", "bytes of a row's scales"),
        Field("int", "groups", "masks of 32 tokens that fit into shared memory"),
        Field("const int*", "experts", "[E_loc] global ids of the local experts"),
        Field("int", "num_local", "E_loc"),
        Field("int*", "faulty", "not 0: ids are faulty"),
        Field("int*", "histogram", "[blocks, R + E] scratch"),
        Field("int*", "ordinals", "[T, K] scratch: place among the choices of an expert"),
        Field("int*", "own_tokens", "[T] tokens of the rows that stay on this rank"),
        Field("void*", "ids_copy", "[T, K] the ids, kept"),
        Field("int*", "first_sent", "[R] where this rank's rows start at each rank"),
        Field("int*", "first_slot", "[R, E_loc] where a source's rows of an expert start"),
        Field("int*", "tokens_per_expert", "[E_loc]"),
        Field("long long*", "tokens_stat", "[E_loc] statistics"),
        Field("int*", "expert_offsets", "[E_loc + 1] FLAT"),
        Field("int*", "origin", "where the number of this transfer is kept with the tables"),
        *OUTPUTS,
        Field("int*", "source_tokens", "a token for every output row, where they travel"),
    ),
)

COMBINE = Struct(
    "CombineArguments",
    (
        *_COMMON,
        Field("const void*", "rows", "expert outputs in the layout's shape"),
        Field("void*", "out", "[T] rows"),
        Field("const float*", "slot_grads", "gradients of the slots' weights"),
        Field("float*", "grads_out", "[T, K]"),
    ),
)


def declarations() -> str:
    """C++ text of all of this."""
    return enum_declaration(Flag, prefix="k") + DISPATCH.declaration + COMBINE.declaration
