"""Memory of mode `ht`: regions of the arena, and what a communicator fixes for its kernels."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.nvlink import tuning
from expertlink.engines.nvlink.rows import RowShape
from expertlink.engines.nvlink.shared import HEADER_WORDS
from expertlink.layouts import align
from expertlink.types import DispatchLayout

FLAG_WORDS = 3  # of each rank: ready, credit and abort
ARENA_ALIGNMENT = 1024
LEAST_SUM_BYTES = 8192  # shared memory of a warp that sums


@dataclass(frozen=True)
class HtPlan:
    """Sizes of an arena's regions, in bytes. Every rank has the same.

    Attributes:
        flags: ready, credit and abort words of every rank, then an arrival flag for every row.
        counts: a count row from every rank.
        count_words: words of a count row. Sharers with fewer experts use the first ones: so every
            row keeps its one writer, whichever communicator that is in.
        metadata: metadata of zero-copy rows.
        rows: staged rows, each with its metadata.
        pool: rows of one zero-copy dispatch; there are two pools, or none.
        max_tokens: T_max. Sharers have the same, so that every staged row keeps its one writer.
        stride: bytes from one staged row to the next; likewise.
    """

    flags: int
    counts: int
    count_words: int
    metadata: int
    rows: int
    pool: int
    max_tokens: int
    stride: int

    @staticmethod
    def of(config: MoECommunicatorConfig, num_ranks: int) -> HtPlan:
        """What a communicator needs."""
        shape = RowShape.of(config)
        slots = num_ranks * config.max_tokens_per_rank
        words = HEADER_WORDS + count_columns(config, num_ranks)
        sizes = {
            "flags": 4 * (FLAG_WORDS * num_ranks + slots),
            "counts": 4 * num_ranks * words,
            "metadata": slots * shape.metadata if config.zero_copy else 0,
            "rows": slots * shape.staged,
            "pool": slots * shape.row if config.zero_copy else 0,
        }
        rounded = {name: align(size, ARENA_ALIGNMENT) for name, size in sizes.items()}
        return HtPlan(
            **rounded,
            count_words=words,
            max_tokens=config.max_tokens_per_rank,
            stride=shape.staged,
        )

    def holds(self, other: object) -> bool:
        """Whether a communicator that needs `other` can share this arena."""
        if not isinstance(other, HtPlan):
            return False
        same = (self.max_tokens, self.stride) == (other.max_tokens, other.stride)
        return same and all(getattr(self, name) >= size for name, size in vars(other).items())

    @property
    def rail_words(self) -> int:
        """The mail says nothing of rails."""
        return 0

    def regions(self) -> dict[str, int]:
        """Bytes by region, in the order of their offsets."""
        return {
            "flags": self.flags,
            "counts": self.counts,
            "ids, weights and scales of zero-copy rows": self.metadata,
            "rows in transit": self.rows,
            "pools of zero-copy rows": 2 * self.pool,
        }

    @property
    def total(self) -> int:
        """Bytes of the whole arena."""
        return sum(self.regions().values())

    def offsets(self, num_peers: int) -> dict[str, int]:
        """Offsets of the regions as the kernels name them."""
        flags, counts, metadata, rows, _ = itertools.accumulate(
            (0, self.flags, self.counts, self.metadata, self.rows)
        )
        return {
            "kReadyAt": flags,
            "kCreditsAt": flags + 4 * num_peers,
            "kAbortsAt": self.aborts_at(num_peers),
            "kFlagsAt": flags + 4 * FLAG_WORDS * num_peers,
            "kCountsAt": counts,
            "kCountStride": self.count_words,
            "kMetadataAt": metadata,
            "kStagingAt": rows,
            "kPoolAt": self.pool_at(0),
            "kPoolBytes": self.pool,
        }

    def aborts_at(self, num_ranks: int) -> int:
        """Offset of the abort words."""
        return 4 * (FLAG_WORDS - 1) * num_ranks

    def prepare(self, memory: Tensor) -> None:
        """Makes an arena what it has to be before the first call."""
        memory.zero_()

    def pool_at(self, index: int) -> int:
        """Offset of pool 0 or 1."""
        return self.flags + self.counts + self.metadata + self.rows + index * self.pool


def count_columns(config: MoECommunicatorConfig, num_ranks: int, num_hosts: int = 1) -> int:
    """Counts of a count row: rows for each rank, choices of each expert, rows for each host."""
    return num_ranks + config.num_experts + (num_hosts if num_hosts > 1 else 0)


def shared_table_words(config: MoECommunicatorConfig, num_ranks: int, num_hosts: int = 1) -> int:
    """Words of shared memory for the count rows of all ranks; 0 where planning reads the arena."""
    words = num_ranks * (HEADER_WORDS + count_columns(config, num_ranks, num_hosts))
    return words if words <= tuning.HT_SHARED_TABLE else 0


def most_batch(config: MoECommunicatorConfig) -> int:
    """Most rows that a warp moves at a time: each needs a lane for every choice."""
    return min(tuning.HT_MOST_BATCH, 32 >> (config.topk - 1).bit_length())


def combine_warps(config: MoECommunicatorConfig) -> int:
    """Most warps of a combine's block that move rows or add them up."""
    return tuning.HT_SUM_WARPS if config.layout.expanded else tuning.HT_MAX_WARPS


def constants_of(
    config: MoECommunicatorConfig, plan: HtPlan, *, num_ranks: int, num_hosts: int = 1
) -> dict[str, int | bool]:
    """What a communicator fixes for its kernels; the same on all ranks."""
    shape = RowShape.of(config)
    table_words = shared_table_words(config, num_ranks, num_hosts)
    return {
        "kStagingStride": shape.staged,
        "kMetadataStride": shape.metadata,
        "kPlacesAt": shape.places_at,
        "kWeightsAt": shape.weights_at,
        "kSourceAt": shape.source_at,
        "kScalesAt": shape.scales_at,
        "kSourceTokens": config.source_tokens,
        "kColumns": count_columns(config, num_ranks, num_hosts),
        "kNumChunks": 1,
        "kChunkRows": config.max_tokens_per_rank,
        "kWriterSlots": config.max_tokens_per_rank,
        "kTableIsShared": table_words > 0,
        "kMaxWarps": tuning.HT_MAX_WARPS,
        "kCombineWarps": combine_warps(config),
        "kLeastSumBytes": LEAST_SUM_BYTES,
        "kMostBatch": most_batch(config),
        "kMailboxDepth": tuning.HT_MAILBOX_DEPTH,
        "kSumStages": tuning.HT_SUM_STAGES,
        "kMostSharedSlots": tuning.HT_SHARED_SLOTS,
        "kZeroCopy": config.zero_copy,
        # On GPUs, ids are checked only if the configuration says so.
        "kCheckInputs": bool(config.check_inputs),
        "kWantsMail": not config.static_shapes,
        "kClearsRest": config.static_shapes and config.layout is DispatchLayout.TOKEN_MAJOR,
        **plan.offsets(num_ranks // num_hosts),
    }
