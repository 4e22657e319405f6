"""What the host and the kernels of the nvlink engine both know, each thing declared once.

Layouts of memory are structs, numbers with a meaning are enumerations. `declarations` gives all of
them to the device code, with assertions that the compiler lays memory out as the host does. Sizes
and offsets that depend on a communicator are constants: `ht/plan.py`, `ll/plan.py`.
"""

from __future__ import annotations

import enum
from functools import cache

import torch

from expertlink.engines.ranks.header import NUM_FIELDS, UNBOUNDED, HeaderWord, Operation
from expertlink.jit.compiler import constants, enum_declaration
from expertlink.jit.kernel import Field, Struct
from expertlink.quantization import BLOCK, E4M3_MAX, SMALLEST_AMAX
from expertlink.routing import Placement

LOCATION_STRIDE = 1 << 16
"""An expert's location is its rank times this, plus its index on that rank."""


class Phase(enum.IntEnum):
    """What a wait of the device waits for; from AGREEMENT on, a reason to end all waits."""

    BLOCKS = 1
    CREDIT = 2
    READY = 3
    ROW = 4
    AGREEMENT = 5
    ABORTED = 6
    HALVES = 7


class Verdict(enum.IntEnum):
    """What becomes of an uncached dispatch; the same on all ranks."""

    FINE = 0
    DISAGREE = 1
    OVERFLOW = 2


class ExtraWord(enum.IntEnum):
    """Words that follow those of `HeaderWord` in the headers of this engine."""

    FORM = NUM_FIELDS
    """`Form`."""
    POOL = NUM_FIELDS + 1
    """Zero copy: which pool has the view of this rank."""


HEADER_WORDS = NUM_FIELDS + len(ExtraWord)


class Form(enum.IntFlag):
    """What kind of call a rank makes; all ranks must agree."""

    WEIGHTS = 1
    """New weights travel."""
    MAIL = 2
    """The host waits for the counts."""


class ScaleKind(enum.IntEnum):
    """What a kernel quantizes rows to: the form of its scales."""

    NOT_QUANTIZED = 0
    FLOAT_SCALES = 1
    POWER_SCALES = 2
    PACKED_SCALES = 3


class CountColumn(enum.IntEnum):
    """Columns of an `ll` count row. Those before FIRST_COUNT are a header, read in pairs."""

    SIGNATURE = 0
    ROWS = 1
    SUBJECT = 2
    COMMUNICATOR = 3
    OVERFLOW = 4
    OVERFLOW_ROWS = 5
    ROOM = 6
    FIRST_COUNT = 8


STATE = Struct(
    "State",
    (
        Field("unsigned", "sent", "transfers whose sending half is over"),
        Field("unsigned", "received", "transfers whose receiving half is over"),
        Field("unsigned", "arrived", "blocks at the grid barrier"),
        Field("unsigned", "generation", "times the grid barrier has opened"),
        Field("unsigned", "left_send", "blocks that are done with the sending half"),
        Field("unsigned", "left_place", "blocks that are done with the receiving half"),
        Field("unsigned", "planned", "last transfer whose slots are known"),
        Field("unsigned", "failed", "not 0: a wait has expired, nobody waits any more"),
        Field("unsigned", "next_send", "next item of the sending half to take"),
        Field("unsigned", "next_place", "next item of the receiving half to take"),
        Field("unsigned", "deferred", "not 0: this launch places no rows"),
        Field("unsigned", "overflow", "ll: last transfer that found no room"),
        Field("unsigned", "overflow_rows", "ll: how many rows it had"),
        Field("unsigned", "overflow_room", "ll: for how many there was room"),
        Field("unsigned", "overflow_reported", "ll: last overflow, of any rank, told to the host"),
    ),
)
"""Device memory of one rank, zeroed at start."""


@cache
def control(num_ranks: int, num_experts: int, rail_words: int = 0) -> Struct:
    """Host memory of one rank that its kernels write. The mail is from `mail_number` on.

    Communicators with fewer experts can use the memory of one with more: only the last member
    depends on E. `rail_words`: across hosts, [C, 2, N].
    """
    rail = (
        Field("int", "mail_chunks", "chunks up to the last one that holds a row"),
        Field("int", "mail_rail", "[C, 2, N] rows to and from every host", max(1, rail_words)),
    )
    return Struct(
        "Control",
        (
            Field("unsigned", "reported", "transfer whose wait has expired; 0: none has"),
            Field("unsigned", "phase", "Phase of that wait"),
            Field("int", "peer", "rank that it waited for, or -1"),
            Field("unsigned", "expected", "number that it waited for"),
            Field("unsigned", "seen", "number that was there"),
            Field("unsigned", "index", "row that it waited for"),
            Field("unsigned", "waited_ms", "how long it waited"),
            Field("unsigned", "operation", "Operation that it belongs to"),
            Field("unsigned long long", "timeout_ns", "bound of waits; the host writes it"),
            Field("unsigned", "overflowed", "static shapes: transfer that found no room, or 0"),
            Field("int", "overflow_rank", "the rank without room"),
            Field("int", "overflow_rows", "rows that it received"),
            Field("int", "overflow_capacity", "rows that it has room for"),
            Field("unsigned", "unused", "keeps the mail where it is", 2),
            Field("unsigned", "mail_number", "transfer of the mail; written last"),
            Field("int", "mail_verdict", "Verdict"),
            Field("int", "mail_rank", "OVERFLOW: the rank without room"),
            Field("int", "mail_rows", "OVERFLOW: rows that it would receive"),
            Field("int", "mail_capacity", "OVERFLOW: rows that it has room for"),
            Field("int", "mail_arrivals", "rows that this rank receives, each token once"),
            Field("int", "mail_slots", "rows of an expanded layout, alignment gaps included"),
            Field("int", "headers", "[R, kHeaderWords] of all ranks", num_ranks * HEADER_WORDS),
            Field("int", "mail_rows_from", "[R] rows from each rank", num_ranks),
            *(rail if rail_words else ()),
            Field("int", "mail_counts", "[E_loc] choices of local experts", num_experts),
        ),
    )


@cache
def counters(num_ranks: int, num_sets: int) -> Struct:
    """Device memory of one rank in mode `ll`, zeroed at start.

    `sent` and `received` count launches in units: each launch adds exactly kUnits, a part by every
    block once it has read them. So all blocks of a launch read the same number of launches, however
    late they start, and none has to wait for the last.
    """
    return Struct(
        "Counters",
        (
            Field("unsigned long long", "sent", "launches of sending halves, in units"),
            Field("unsigned long long", "received", "launches of receiving halves, in units"),
            Field("unsigned long long", "decided", "transfer * 2 + is the rank lost", num_ranks),
            Field("unsigned long long", "alive_at", "when alive_word last changed", num_ranks),
            Field("unsigned", "alive_word", "last alive word of each rank", num_ranks),
            Field("unsigned", "masked", "not 0: neither sent to nor waited for", num_ranks),
            Field("unsigned", "drawn", "items of each set's sending half that are taken", num_sets),
        ),
    )


OUTPUTS = (
    Field("int*", "counts_out", "[E_loc] the caller's copy"),
    Field("int*", "offsets_out", "[E_loc + 1] the caller's copy"),
    Field("int*", "rows_from_out", "[R] the caller's copy"),
    Field("char*", "tokens", "output rows"),
    Field("char*", "scales_out", "output scales, or null"),
    Field("long long*", "topk_ids", "[N, K] local ids, deduplicated layouts"),
    Field("float*", "topk_weights", "[N, K], or null"),
)
"""The caller's tensors of a dispatch, in the arguments of both modes."""


def declarations(num_ranks: int, num_experts: int, rail_words: int = 0) -> str:
    """C++ text of what the kernels of both modes know; `rail_words` as in `control`."""
    return (
        enum_declaration(HeaderWord, ExtraWord, prefix="k")
        + enum_declaration(Form, prefix="kForm")
        + enum_declaration(Operation, prefix="kOperation")
        + enum_declaration(Phase, prefix="kPhase")
        + enum_declaration(Verdict, prefix="k")
        + enum_declaration(ScaleKind, prefix="k")
        + constants(
            {
                "kHeaderWords": HEADER_WORDS,
                "kUnbounded": UNBOUNDED,
                "kLocationStride": LOCATION_STRIDE,
                "kScaleBlock": BLOCK,
                "kLargestE4m3": E4M3_MAX,
                "kSmallestAmax": SMALLEST_AMAX,
            }
        )
        + STATE.declaration
        + control(num_ranks, num_experts, rail_words).declaration
    )


def expert_locations(placement: Placement) -> torch.Tensor:
    """`[E]` int32: rank and local index of every expert in one number."""
    locations = placement.rank_of_E[:-1] * LOCATION_STRIDE + placement.local_of_E[:-1]
    return locations.to(torch.int32)
