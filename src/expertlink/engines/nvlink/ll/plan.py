"""Memory of mode `ll`: regions of the arena, and what its kernels find in shared memory."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.nvlink import tuning
from expertlink.engines.nvlink.rows import RowShape
from expertlink.engines.nvlink.shared import CountColumn
from expertlink.layouts import align
from expertlink.quantization import num_blocks

SETS = 3  # staging sets that transfers take in turn
LAST_NUMBER = SETS << 30  # of a transfer; the next one is 1 again
STEP_BYTES = 512  # of a row that a warp moves at once
_FLAG_WORDS = 4  # of each rank: ready, credit, abort and alive
_ALIGNMENT = 1024
_SENTINEL_BYTE = 0xFF  # every byte of staging memory that nobody has written
_TAGGED = 8  # bytes of a word that carries its transfer
REFUSED = 0x7FFFFFFF  # no call has this signature


@dataclass(frozen=True)
class LlPlan:
    """Sizes of the regions of an arena in mode `ll`, in bytes. Every rank has the same.

    Attributes:
        flags: ready, credit, abort and alive words of every rank.
        counts: tagged count rows from every rank, in every set.
        metadata: tagged words of every staged row's metadata, in every set.
        escapes: a word for every step of every staged row, in every set.
        rows: staged rows with their scales, in every set.
        slots: staged rows of a set.
        rank_slots: of these, those that one rank writes: of rank s from s * rank_slots on.
        max_tokens: T_max.
        stride: bytes from one staged row to the next.
        max_steps: steps of the largest row.
        num_experts: E.
        topk: K.
        exact: of combines. A row has the slot of its token and choice: among those of the rank that
            writes it if ranks can be left out, else among all.
    """

    flags: int
    counts: int
    metadata: int
    escapes: int
    rows: int
    slots: int
    rank_slots: int
    max_tokens: int
    stride: int
    max_steps: int
    num_experts: int
    topk: int
    exact: bool

    @staticmethod
    def of(config: MoECommunicatorConfig, num_ranks: int, num_hosts: int = 1) -> LlPlan:
        """What a communicator needs."""
        shape = RowShape.of(config)
        stride = align(shape.row + shape.scales, 128)
        exact, rank_slots = config.combine_precision == "exact", config.max_tokens_per_rank
        choices = config.topk * config.max_tokens_per_rank
        if exact and config.mask_lost_peers:
            rank_slots = choices
        slots = max(num_ranks * rank_slots, choices if exact else 0)
        max_steps = -(-shape.row // STEP_BYTES)
        columns = count_columns(config)
        sizes = {
            "flags": 4 * _FLAG_WORDS * (num_ranks // num_hosts),
            "counts": SETS * _TAGGED * num_ranks * columns,
            "metadata": SETS * 2 * _TAGGED * slots * (config.topk + 1),
            "escapes": SETS * 4 * slots * (max_steps + 1),
            "rows": SETS * slots * stride,
        }
        rounded = {name: align(size, _ALIGNMENT) for name, size in sizes.items()}
        return LlPlan(
            **rounded,
            slots=slots,
            rank_slots=rank_slots,
            max_tokens=config.max_tokens_per_rank,
            stride=stride,
            max_steps=max_steps,
            num_experts=config.num_experts,
            topk=config.topk,
            exact=exact,
        )

    def holds(self, other: object) -> bool:
        """Whether a communicator that needs `other` can share this arena."""
        return self == other

    @property
    def rail_words(self) -> int:
        """The mail says nothing of rails."""
        return 0

    def regions(self) -> dict[str, int]:
        """Bytes by region, in the order of their offsets."""
        return {
            "flags": self.flags,
            "counts": self.counts,
            "ids, places and weights": self.metadata,
            "escape words": self.escapes,
            "rows in transit": self.rows,
        }

    @property
    def total(self) -> int:
        """Bytes of the whole arena."""
        return sum(self.regions().values())

    def offsets(self, num_peers: int) -> dict[str, int]:
        """Offsets of the regions as the kernels name them; `num_peers`: ranks of a host."""
        flags, counts, metadata, escapes, rows = itertools.accumulate(
            (0, self.flags, self.counts, self.metadata, self.escapes)
        )
        return {
            "kReadyAt": flags,
            "kCreditsAt": flags + 4 * num_peers,
            "kAbortsAt": self.aborts_at(num_peers),
            "kAliveAt": flags + 4 * (_FLAG_WORDS - 1) * num_peers,
            "kCountsAt": counts,
            "kMetadataAt": metadata,
            "kEscapesAt": escapes,
            "kRowsAt": rows,
        }

    def aborts_at(self, num_ranks: int) -> int:
        """Offset of the abort words."""
        return 4 * (_FLAG_WORDS - 2) * num_ranks

    def prepare(self, memory: Tensor) -> None:
        """Makes an arena what it has to be before the first call."""
        rows_at = self.total - self.rows
        memory[:rows_at].zero_()
        memory[rows_at:].fill_(_SENTINEL_BYTE)


def count_columns(config: MoECommunicatorConfig) -> int:
    """Tagged words of a count row, an even number: they are stored in pairs."""
    return align(CountColumn.FIRST_COUNT + config.num_experts, 2)


def constants_of(
    config: MoECommunicatorConfig, plan: LlPlan, *, num_ranks: int, num_hosts: int = 1
) -> dict[str, int | bool]:
    """What a communicator fixes for its kernels; the same on all ranks."""
    steps = -(-RowShape.of(config).row // STEP_BYTES)
    place_depth, place_part = tuning.LL_PLACE_DEPTH, tuning.LL_PLACE_PART
    if steps <= tuning.LL_FEW_STEPS:
        place_depth = place_part = tuning.LL_PLACE_SHORT
    sum_depth = tuning.LL_SUM_DEPTH
    if config.layout.expanded:
        short = steps <= 2 * tuning.LL_FEW_STEPS and num_ranks <= 4 and num_hosts == 1
        short &= not config.mask_lost_peers and not plan.exact
        sum_depth = tuning.LL_SUM_DEPTH_EXPANDED_SHORT if short else tuning.LL_SUM_DEPTH_EXPANDED
    return {
        "kDispatchWarps": tuning.LL_DISPATCH_WARPS,
        "kCombineWarps": tuning.LL_COMBINE_WARPS,
        "kPublishingWarps": tuning.LL_PUBLISHING_WARPS,
        "kFewSenders": tuning.LL_SENDING_WARPS_FEW_ROWS,
        "kSendDepth": tuning.LL_SEND_DEPTH,
        "kSendDepthQuantized": tuning.LL_SEND_DEPTH_QUANTIZED,
        "kPlaceDepth": place_depth,
        "kPlaceMost": place_part,
        "kSumDepth": sum_depth,
        "kTogether": tuning.LL_TERMS_TOGETHER,
        "kDrawnFrom": tuning.LL_DRAWN_FROM,
        "kSets": SETS,
        "kLastNumber": LAST_NUMBER,
        "kSlots": plan.slots,
        "kRankSlots": plan.rank_slots,
        "kRowStride": plan.stride,
        "kScalesAt": RowShape.of(config).row,
        "kMaxSteps": plan.max_steps,
        "kNumBlocks": num_blocks(config.hidden_size),
        "kCountWords": count_columns(config),
        "kCopies": min(num_ranks // num_hosts, config.topk),
        "kExpertChunk": experts_at_once(config, num_hosts),
        "kExact": plan.exact,
        "kRefused": REFUSED,
        "kSentinelByte": _SENTINEL_BYTE,
        "kStepBytes": STEP_BYTES,
        "kMaskLost": config.mask_lost_peers,
        **plan.offsets(num_ranks // num_hosts),
    }


def default_sms(config: MoECommunicatorConfig, num_peers: int) -> tuple[int, int]:
    """SMs of a dispatch and of a combine where nobody asks for a number."""
    if config.layout.expanded and min(config.topk, num_peers) <= 2:
        return tuning.LL_DISPATCH_SMS_TWO_RANKS, tuning.LL_COMBINE_SMS_TWO_RANKS
    return tuning.LL_DISPATCH_SMS, tuning.LL_COMBINE_SMS


def experts_at_once(config: MoECommunicatorConfig, num_hosts: int = 1) -> int:
    """Experts whose masks fit into a block's shared memory together."""
    words = num_hosts * -(-config.max_tokens_per_rank // 32)
    return max(1, min(config.num_experts, tuning.LL_MASK_WORDS // words))


def shared_words(
    config: MoECommunicatorConfig,
    *,
    num_ranks: int,
    num_local: int,
    sends: bool,
    receives: bool,
    num_hosts: int = 1,
) -> int:
    """Words of dynamic shared memory of a dispatch's launch that sends, receives, or both."""
    words = num_hosts * -(-config.max_tokens_per_rank // 32)
    arrivals = (num_ranks + 2) * num_local + 2
    masks = num_ranks // num_hosts + experts_at_once(config, num_hosts)
    masks = config.num_experts + masks * words
    return (arrivals if receives else 0) + (masks if sends else 0)


def unavailable_reason(
    config: MoECommunicatorConfig, *, num_ranks: int, num_local: int, num_hosts: int = 1
) -> str | None:
    """Why calls of few tokens cannot have kernels of their own, or None."""
    if config.zero_copy:
        return "zero_copy=True gives views, which they do not write"
    if not config.layout.padded and not config.static_shapes:
        return f"the host has to learn the shape of {config.layout.value} without static_shapes"
    total = shared_words(
        config,
        num_ranks=num_ranks,
        num_local=num_local,
        sends=True,
        receives=True,
        num_hosts=num_hosts,
    )
    words = num_hosts * -(-config.max_tokens_per_rank // 32)
    if total - experts_at_once(config, num_hosts) * words > tuning.LL_TABLE_WORDS:
        return f"tables of {total * 4} bytes exceed the shared memory of a block"
    if config.max_tokens_per_rank >= 1 << 16 or config.num_experts >= 1 << 16:
        return "positions and experts are numbered with 16 bits"
    return None
