"""What a launch tells the kernels ll::dispatch and ll::combine."""

from __future__ import annotations

import enum

from expertlink.domains import Domains
from expertlink.engines.nvlink.ll.plan import SETS
from expertlink.engines.nvlink.shared import OUTPUTS, CountColumn, Form, ScaleKind, counters
from expertlink.engines.ranks.header import Operation
from expertlink.jit.compiler import constants, enum_declaration
from expertlink.jit.kernel import Field, Struct


class Flag(enum.IntFlag):
    """What a launch does, and with what."""

    SEND = 1
    RECEIVE = 2
    WIDE_IDS = 4
    """`ids` are int64, else int32."""
    NEW_WEIGHTS = 8
    """Weights travel. (A rank without tokens has no address for them.)"""
    GRADS = 16
    """Gradients of the slots' weights travel."""
    ALONE = 32
    """The next launch takes no SM before this one leaves it."""
    TOKEN_WEIGHTS = 64
    """Each rank has the weights of its tokens. (Without tokens they have no address.)"""


class MessageWord(enum.IntEnum):
    """What a message of a rail begins with, in words of 4 bytes."""

    SIGNATURE = 0
    SUBJECT = 1
    COMMUNICATOR = 2
    OVERFLOW = 3
    OVERFLOW_ROWS = 4
    ROOM = 5
    NUMBER = 6
    """Combines: of the transfer."""


# A signature has in one word what must be the same on all ranks: the operation, then from these
# bits on the form, the bytes of a row in units of 16, and the bytes of a row's scales.
_FORM_BIT, _ROW_BIT, _SCALES_BIT = 3, 6, 19
_WEIGHTS = int(Form.WEIGHTS)  # the operators of flags take microseconds
_TOKEN_WEIGHTS = 1 << 1  # of combines, whose rows have no ScaleKind


def signature(
    operation: Operation,
    *,
    row_bytes: int,
    weights: bool = False,
    token_weights: bool = False,
    scale_kind: ScaleKind = ScaleKind.NOT_QUANTIZED,
    scale_bytes: int = 0,
) -> int:
    """The signature of a call.

    Args:
        operation: what kind of call.
        row_bytes: bytes of a row on the wire.
        weights: new weights travel, or gradients of weights.
        token_weights: `Flag.TOKEN_WEIGHTS`.
        scale_kind: what the kernel quantizes to.
        scale_bytes: bytes of a row's scales.
    """
    form = (_WEIGHTS if weights else 0) | scale_kind << 1 | (_TOKEN_WEIGHTS if token_weights else 0)
    word = operation | form << _FORM_BIT | row_bytes // 16 << _ROW_BIT | scale_bytes << _SCALES_BIT
    return word & 0x7FFFFFFF


# What both kernels begin with.
_COMMON = (
    Field("char* const*", "bases", "[R] arena of every rank"),
    Field("State*", "state", "this rank's"),
    Field("Counters*", "counters", "this rank's"),
    Field("Control*", "control", "this rank's, in host memory"),
    Field("int", "rank", "this rank"),
    Field("int", "operation", "header.Operation"),
    Field("unsigned", "communicator", "tells communicators apart"),
    Field("unsigned", "signature", "what must be the same on all ranks"),
    Field("const int*", "subject", "transfer of the dispatch that the call refers to, or null"),
    Field("int", "flags", "Flag"),
    Field("int", "num_tokens", "T"),
    Field("int", "send_warps", "warps of a block that send rows first, unless there are few rows"),
    Field("int", "row_bytes", "bytes of a row on the wire"),
    Field("int", "max_slots", "rows that the output has room for"),
    Field("const void*", "ids", "[T, K] global expert ids"),
    Field("void*", "ids_copy", "[T, K] the ids, kept"),
    Field("const int*", "expert_location", "[E] rank * kLocationStride + local index"),
    Field("int*", "slots_of_token", "[T, D] rank * T_max + position, ascending, then -1"),
    Field("int*", "rows_from", "[R] rows received from each rank"),
    Field("int*", "rows_to", "[R] rows sent to each rank"),
    Field("int*", "choices_of_row", "[R * T_max, K] slot or local expert of each choice, or -1"),
    Field("float*", "weights_of_row", "[R * T_max, K] weight of each choice, or null"),
    Field("int*", "tokens_of_row", "[R * T_max] token that a row belongs to"),
    Field("long long*", "rows_sent", "[R] statistics, or null"),
    Field("long long*", "rows_received", "[R] statistics"),
    Field("long long*", "bytes_sent", "[R] statistics"),
    Field("long long*", "bytes_received", "[R] statistics"),
    Field("long long*", "longest_wait_ns", "[R] statistics, or null"),
)

# What both end with. With one host they are not read.
_RAIL = (
    Field("int", "host", "several hosts: this one's number"),
    Field("int", "bound", "several hosts: tokens of each message"),
    Field("long long", "message_bytes", "several hosts: bytes from one message to the next"),
    Field("char*", "messages", "[N] several hosts: received, or to be sent; the own host's last"),
    Field("unsigned*", "under_way", "several hosts: calls whose messages are in this memory"),
    Field("unsigned*", "mark_counter", "several hosts, dispatch: rail steps done, or null"),
    Field("unsigned*", "mark_word", "several hosts, dispatch: the same for the host"),
)

DISPATCH = Struct(
    "DispatchArguments",
    (
        *_COMMON,
        Field("const char*", "x", "[T] rows"),
        Field("int", "input_bytes", "bytes of a row of x"),
        Field("int", "scale_kind", "ScaleKind: what the kernel quantizes to"),
        Field("int", "scale_bytes", "bytes of a row's scales"),
        Field("int", "scale_item", "bytes of a scale"),
        Field("int", "scale_stride", "slots from a column of scales to the next; 0: by rows"),
        Field("const char*", "scales", "[T] the caller's scales, or null"),
        Field("const float*", "weights", "[T, K] weights"),
        Field("float*", "weights_copy", "[T, K] the weights, kept"),
        Field("int", "num_local", "E_loc"),
        Field("int*", "first_row", "[R] rows received from the ranks before"),
        Field("int*", "first_slot", "[R, E_loc] where a source's rows of an expert start"),
        Field("int*", "tokens_per_expert", "[E_loc]"),
        Field("int*", "origin", "where the number of this transfer is kept with the tables"),
        *OUTPUTS,
        Field("long long*", "tokens_stat", "[E_loc] statistics, or null"),
        *_RAIL,
    ),
)

COMBINE = Struct(
    "CombineArguments",
    (
        *_COMMON,
        Field("const void*", "rows", "expert outputs in the layout's shape"),
        Field("void*", "out", "[T] rows"),
        Field("const float*", "slot_weights", "a weight for every slot, or null"),
        Field("const float*", "weights", "[T, K] with kTokenWeights"),
        Field("const float*", "slot_grads", "gradients of the slots' weights"),
        Field("float*", "grads_out", "[T, K]"),
        *_RAIL,
    ),
)


def declarations(num_ranks: int, domains: Domains | None = None) -> str:
    """C++ text of all of this.

    Args:
        num_ranks: R.
        domains: hosts of the ranks, all of one size; None: one host.
    """
    bits = {"kFormBit": _FORM_BIT, "kRowBit": _ROW_BIT, "kScalesBit": _SCALES_BIT}
    num_peers = num_ranks if domains is None else len(domains.ranks_of(0))
    return (
        enum_declaration(Flag, prefix="k")
        + enum_declaration(CountColumn, prefix="kColumn")
        + enum_declaration(MessageWord, prefix="kMessage")
        + constants(bits)
        + counters(num_peers, SETS).declaration
        + _places(domains)
        + DISPATCH.declaration
        + COMBINE.declaration
    )


def _places(domains: Domains | None) -> str:
    """C++ text of the place of every rank: `kPeerOf` and `kHostOf` of ranks, and `kRankAt`."""
    memory = "static __constant__ const"
    if domains is None:  # device code names the tables, and reads none
        memory, domains = "constexpr", Domains.one(1)
    tables = {
        "kPeerOf": [domains.local_of(rank) for rank in range(domains.num_ranks)],
        "kHostOf": domains.host_of,
        "kRankAt": [rank for host in range(domains.num_hosts) for rank in domains.ranks_of(host)],
    }
    return "".join(
        f"{memory} int {name}[] = {{{', '.join(map(str, values))}}};\n"
        for name, values in tables.items()
    )
