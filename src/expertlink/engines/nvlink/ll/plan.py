"""Memory of low-latency mode: regions of the arena, and what its kernels find in shared memory."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.nvlink.arena import FLAG_WORDS, RowShape, round_up
from expertlink.engines.ranks.header import Operation
from expertlink.quantization import num_blocks

SETS = 3  # staging sets that transfers take in turn
LAST_NUMBER = SETS << 30  # of a transfer; the next one is 1 again
STEP_BYTES = 512  # of a row that a warp moves at once
_ALIGNMENT = 1024
_NOTHING = 0xFF  # every byte of staging memory that nobody has written
_TAGGED = 8  # bytes of a word that carries its transfer
_HEAD_COLUMNS = 8  # of a count row, before the counts: `CountColumn` in latency/protocol.cuh
REFUSED = 0x7FFFFFFF  # no call has this signature
_MASK_WORDS = 24 * 1024  # words of masks for experts that a block holds
_TABLE_WORDS = 24 * 1024  # words of everything else


@dataclass(frozen=True)
class LatencyPlan:
    """Sizes of the regions of a low-latency arena, in bytes. Every rank has the same.

    Attributes:
        flags: ready, credit, abort and alive words of every rank.
        counts: tagged count rows from every rank, in every set.
        beside: tagged words beside every staged row, in every set.
        escapes: a word for every step of every staged row, in every set.
        rows: staged rows with their scales, in every set.
        slots: staged rows of a set.
        max_tokens: T_max.
        stride: bytes from one staged row to the next.
        max_steps: steps of the largest row.
        num_experts: E.
        topk: K.
        exact: of combines; those without owners of their slots cannot leave out a rank.
    """

    flags: int
    counts: int
    beside: int
    escapes: int
    rows: int
    slots: int
    max_tokens: int
    stride: int
    max_steps: int
    num_experts: int
    topk: int
    exact: bool

    @staticmethod
    def of(config: MoECommunicatorConfig, num_ranks: int) -> LatencyPlan:
        """What a communicator needs."""
        shape = RowShape.of(config)
        stride = round_up(shape.row + shape.beside - shape.scales_at, 128)
        slots = num_ranks * config.max_tokens_per_rank
        if config.combine_precision == "exact":
            slots = max(slots, config.topk * config.max_tokens_per_rank)
        max_steps = -(-shape.row // STEP_BYTES)
        columns = _HEAD_COLUMNS + config.num_experts
        sizes = {
            "flags": 4 * (FLAG_WORDS + 1) * num_ranks,
            "counts": SETS * _TAGGED * num_ranks * round_up(columns, 2),
            "beside": SETS * 2 * _TAGGED * slots * (config.topk + 1),
            "escapes": SETS * 4 * slots * (max_steps + 1),
            "rows": SETS * slots * stride,
        }
        rounded = {name: round_up(size, _ALIGNMENT) for name, size in sizes.items()}
        return LatencyPlan(
            **rounded,
            slots=slots,
            max_tokens=config.max_tokens_per_rank,
            stride=stride,
            max_steps=max_steps,
            num_experts=config.num_experts,
            topk=config.topk,
            exact=config.combine_precision == "exact",
        )

    def holds(self, other: object) -> bool:
        """Whether a communicator that needs `other` can share this arena."""
        return self == other

    def regions(self) -> dict[str, int]:
        """Bytes by region, in the order of their offsets."""
        return {
            "flags": self.flags,
            "counts": self.counts,
            "ids, places and weights": self.beside,
            "escape words": self.escapes,
            "rows in transit": self.rows,
        }

    @property
    def total(self) -> int:
        """Bytes of the whole arena."""
        return sum(self.regions().values())

    def offsets(self, num_ranks: int) -> dict[str, int]:
        """Offsets of the regions as the kernels name them."""
        flags, counts, beside, escapes, rows = itertools.accumulate(
            (0, self.flags, self.counts, self.beside, self.escapes)
        )
        return {
            "kReadyAt": flags,
            "kCreditsAt": flags + 4 * num_ranks,
            "kAbortsAt": self.aborts_at(num_ranks),
            "kAliveAt": flags + 4 * FLAG_WORDS * num_ranks,
            "kCountsAt": counts,
            "kBesideAt": beside,
            "kEscapesAt": escapes,
            "kRowsAt": rows,
        }

    def aborts_at(self, num_ranks: int) -> int:
        """Offset of the abort words."""
        return 4 * (FLAG_WORDS - 1) * num_ranks

    def prepare(self, memory: Tensor) -> None:
        """Makes an arena what it has to be before the first call."""
        rows_at = self.total - self.rows
        memory[:rows_at].zero_()
        memory[rows_at:].fill_(_NOTHING)


def constants_of(
    config: MoECommunicatorConfig, plan: LatencyPlan, *, num_ranks: int
) -> dict[str, int]:
    """What the plan fixes for the kernels; the same on all ranks."""
    return {
        "kSets": SETS,
        "kLastNumber": LAST_NUMBER,
        "kSlots": plan.slots,
        "kRowStride": plan.stride,
        "kScalesAt": RowShape.of(config).row,
        "kMaxSteps": plan.max_steps,
        "kNumBlocks": num_blocks(config.hidden_size),
        "kCountWords": round_up(_HEAD_COLUMNS + config.num_experts, 2),
        "kExpertChunk": experts_at_once(config),
        "kExact": int(config.combine_precision == "exact"),
        "kRefused": REFUSED,
        "kHostHeadColumns": _HEAD_COLUMNS,
        "kDispatchOperation": int(Operation.DISPATCH),
        **plan.offsets(num_ranks),
    }


def experts_at_once(config: MoECommunicatorConfig) -> int:
    """Experts whose masks fit into a block's shared memory together."""
    words = -(-config.max_tokens_per_rank // 32)
    return max(1, min(config.num_experts, _MASK_WORDS // words))


def shared_words(
    config: MoECommunicatorConfig, *, num_ranks: int, num_local: int, half: str
) -> int:
    """Words of dynamic shared memory of a dispatch: "send", "receive" or "both" halves."""
    words = -(-config.max_tokens_per_rank // 32)
    arrivals = (num_ranks + 2) * num_local + 2
    masks = config.num_experts + (num_ranks + experts_at_once(config)) * words
    return (arrivals if half != "send" else 0) + (masks if half != "receive" else 0)


def unavailable_reason(
    config: MoECommunicatorConfig, *, num_ranks: int, num_local: int
) -> str | None:
    """Why calls of few tokens cannot have kernels of their own, or None."""
    if config.zero_copy:
        return "zero_copy=True gives views, which they do not write"
    if not config.layout.padded and not config.static_shapes:
        return f"the host has to learn the shape of {config.layout.value} without static_shapes"
    total = shared_words(config, num_ranks=num_ranks, num_local=num_local, half="both")
    words = -(-config.max_tokens_per_rank // 32)
    if total - experts_at_once(config) * words > _TABLE_WORDS:
        return f"tables of {total * 4} bytes exceed the shared memory of a block"
    if config.max_tokens_per_rank >= 1 << 16 or config.num_experts >= 1 << 16:
        return "positions and experts are numbered with 16 bits"
    return None
