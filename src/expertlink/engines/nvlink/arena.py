"""The memory that ranks write into each other: one allocation per rank, every offset made here.

torch's symmetric memory is an alpha API; this file is the only one that knows it.
"""

from __future__ import annotations

import collections
import itertools
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.nvlink.capture import capture_of
from expertlink.engines.ranks.header import NUM_FIELDS
from expertlink.errors import ConfigurationError, EngineUnavailableError, InputError
from expertlink.types import DispatchLayout

HEAD_WORDS = NUM_FIELDS + 2  # of a count row, before the counts: `Head` in common/sync.cuh
FLAG_WORDS = 3  # of each rank: ready, credit and abort
_ALIGNMENT = 1024
STATE_WORDS = 16  # room for `State` in common/sync.cuh
_TELL_S = 1.0  # how long an abort waits for its words to be written
# Arenas in use on each GPU of this process: one number in a list, which every arena holds.
_in_use: dict[torch.device, list[int]] = collections.defaultdict(lambda: [0])
_SCALE_SHARE = 8  # scales may take an eighth of a row's elements in bytes: 4 bytes per 32


def round_up(value: int, multiple: int) -> int:
    """`value` rounded up to a multiple of `multiple`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class RowShape:
    """Bytes of a row and of what travels beside it.

    Attributes:
        row: largest row, a multiple of 16.
        scales_at: where scales start in what is beside a row: K ids, K places and K weights first.
        beside: room for all of that, a multiple of 16.
    """

    row: int
    scales_at: int
    beside: int

    def check(self, x_TW: Tensor, scales: Tensor | None) -> None:
        """Refuses rows that bulk copies cannot move or that there is no room for."""
        row_bytes = x_TW.shape[1] * x_TW.element_size()
        if row_bytes % 16 or row_bytes > self.row:
            raise InputError(
                f"input has rows of {row_bytes} bytes; the nvlink engine moves multiples of 16 "
                f"bytes up to {self.row} (hidden_size elements of the configured dtype); "
                "engine='collective' moves any"
            )
        room = self.beside - self.scales_at
        if scales is not None and scales.shape[1] * scales.element_size() > room:
            raise InputError(
                f"scales have {scales.shape[1] * scales.element_size()} bytes per row; the nvlink "
                f"engine has room for {room} at this hidden_size"
            )

    @property
    def staged(self) -> int:
        """Stride of staged rows, each with what is beside it."""
        return round_up(self.row + self.beside, 128)

    @staticmethod
    def of(config: MoECommunicatorConfig) -> RowShape:
        """The shape that a configuration needs."""
        scales_at = round_up(12 * config.topk, 16)
        scales = round_up(max(16, config.hidden_size // _SCALE_SHARE), 16)
        row = config.hidden_size * config.dtype.itemsize
        return RowShape(row=row, scales_at=scales_at, beside=scales_at + scales)


@dataclass(frozen=True)
class ArenaPlan:
    """Sizes of an arena's regions, in bytes. Every rank has the same.

    Attributes:
        flags: ready, credit and abort words of every rank, then an arrival flag for every row.
        counts: a count row from every rank.
        count_words: words of a count row. Sharers with fewer experts use the first ones: so every
            row keeps its one writer, whichever communicator that is in.
        beside: what travels beside zero-copy rows.
        rows: staged rows, each with what travels beside it.
        pool: rows of one zero-copy dispatch; there are two pools, or none.
        max_tokens: T_max. Sharers have the same, so that every staged row keeps its one writer.
        stride: bytes from one staged row to the next; likewise.
    """

    flags: int
    counts: int
    count_words: int
    beside: int
    rows: int
    pool: int
    max_tokens: int
    stride: int

    @staticmethod
    def of(config: MoECommunicatorConfig, num_ranks: int) -> ArenaPlan:
        """What a communicator needs."""
        shape = RowShape.of(config)
        slots = num_ranks * config.max_tokens_per_rank
        words = HEAD_WORDS + num_ranks + config.num_experts
        sizes = {
            "flags": 4 * (FLAG_WORDS * num_ranks + slots),
            "counts": 4 * num_ranks * words,
            "beside": slots * shape.beside if config.zero_copy else 0,
            "rows": slots * shape.staged,
            "pool": slots * shape.row if config.zero_copy else 0,
        }
        rounded = {name: round_up(size, _ALIGNMENT) for name, size in sizes.items()}
        return ArenaPlan(
            **rounded,
            count_words=words,
            max_tokens=config.max_tokens_per_rank,
            stride=shape.staged,
        )

    def holds(self, other: Any) -> bool:
        """Whether a communicator that needs `other` can share this arena."""
        if not isinstance(other, ArenaPlan):
            return False
        same = (self.max_tokens, self.stride) == (other.max_tokens, other.stride)
        return same and all(getattr(self, name) >= size for name, size in vars(other).items())

    def regions(self) -> dict[str, int]:
        """Bytes by region, in the order of their offsets."""
        return {
            "flags": self.flags,
            "counts": self.counts,
            "ids, weights and scales of zero-copy rows": self.beside,
            "rows in transit": self.rows,
            "pools of zero-copy rows": 2 * self.pool,
        }

    @property
    def total(self) -> int:
        """Bytes of the whole arena."""
        return sum(self.regions().values())

    def offsets(self, num_ranks: int) -> dict[str, int]:
        """Offsets of the regions as the kernels name them."""
        flags, counts, beside, rows, _ = itertools.accumulate(
            (0, self.flags, self.counts, self.beside, self.rows)
        )
        return {
            "kReadyAt": flags,
            "kCreditsAt": flags + 4 * num_ranks,
            "kAbortsAt": self.aborts_at(num_ranks),
            "kFlagsAt": flags + 4 * FLAG_WORDS * num_ranks,
            "kCountsAt": counts,
            "kCountStride": self.count_words,
            "kBesideAt": beside,
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
        return self.flags + self.counts + self.beside + self.rows + index * self.pool


class Buffer(Protocol):
    """Memory of one size on every rank: this rank's, and where every rank's is seen from here."""

    local: Tensor
    addresses: list[int]

    def word(self, rank: int, offset: int) -> Tensor:
        """`[1]` int32 in the memory of a rank, `offset` bytes from its start."""
        ...


class SymmetricBuffer:
    """Memory on every rank that all ranks of the group can address. Collective.

    Args:
        group: the ranks; None: this one alone.
        nbytes: bytes on each rank, the same everywhere.
        device: this rank's GPU.
        prepare: writes what the memory has to hold at first.

    Attributes:
        local: `[nbytes]` uint8, this rank's.
        addresses: of every rank's memory as this GPU sees it, the own one included.

    Raises:
        EngineUnavailableError: the GPUs of the group cannot address each other.
    """

    def __init__(
        self,
        group: Any | None,
        nbytes: int,
        device: torch.device,
        prepare: Callable[[Tensor], object] = Tensor.zero_,
    ) -> None:
        self._handle: Any = None
        if group is None or group.size() == 1:
            self.local = torch.empty(nbytes, dtype=torch.uint8, device=device)
            prepare(self.local)
            self.addresses = [self.local.data_ptr()]
            return
        try:
            import torch.distributed._symmetric_memory as symmetric

            self.local = symmetric.empty(nbytes, dtype=torch.uint8, device=device)
            self._handle = symmetric.rendezvous(self.local, group)
            prepare(self.local)
            torch.cuda.synchronize(device)
            # Addresses of the buffers themselves: the handle's own table ignores offsets.
            self.addresses = [
                self._handle.get_buffer(rank, (1,), torch.uint8, 0).data_ptr()
                for rank in range(group.size())
            ]
        except (ImportError, AttributeError, RuntimeError) as error:
            raise EngineUnavailableError(
                f"the GPUs of the group cannot address each other's memory: {_first_line(error)}"
            ) from error

    def word(self, rank: int, offset: int) -> Tensor:
        """`[1]` int32 in the memory of a rank, `offset` bytes from its start."""
        if self._handle is None:
            return self.local[offset : offset + 4].view(torch.int32)
        return self._handle.get_buffer(rank, (1,), torch.int32, offset // 4)

    def close(self) -> None:
        """Lets go of the memory; peers that still hold it keep it alive."""
        self._handle = None
        self.local = torch.empty(0, dtype=torch.uint8)


def _leave(in_use: list[int], members: set[int]) -> None:
    """An arena is gone, whose communicators nobody may have closed."""
    in_use[0] -= bool(members)


class Plan(Protocol):
    """Sizes and contents of an arena."""

    @property
    def total(self) -> int:
        """Bytes of the whole arena."""
        ...

    def regions(self) -> dict[str, int]:
        """Bytes by region, in the order of their offsets."""
        ...

    def holds(self, other: Any) -> bool:
        """Whether a communicator that needs `other` can share this arena."""
        ...

    def aborts_at(self, num_ranks: int) -> int:
        """Offset of the abort words."""
        ...

    def prepare(self, memory: Tensor) -> None:
        """Makes an arena what it has to be before the first call."""
        ...


class Arena:
    """One rank's view of the arenas of all ranks, with its own counters.

    Communicators that share an arena take turns: their calls form one sequence, which `enter` keeps
    in order across streams.

    Args:
        plan: sizes.
        rank: this rank.
        buffer: memory of all ranks, zeroed everywhere before anybody uses it.
        device: this rank's GPU.

    Attributes:
        in_use: `[number]` of arenas in use on this GPU, in a list that all of them hold.
    """

    def __init__(self, plan: Plan, *, rank: int, buffer: Buffer, device: torch.device) -> None:
        self.plan = plan
        self.buffer = buffer
        self.local = buffer.local
        addresses = buffer.addresses
        self.num_ranks = len(addresses)
        self.device = device
        self.bases = torch.tensor(list(addresses), dtype=torch.int64, device=device)
        self.state = torch.zeros(STATE_WORDS, dtype=torch.int32, device=device)
        self._pool = self._captured_pool = 0
        self._last: torch.cuda.Stream | None = None
        self._captured: tuple[int, torch.cuda.Stream] | None = None
        self._members: set[int] = set()
        weakref.finalize(self, _leave, _in_use[device], self._members)
        self.in_use = _in_use[device]
        at = plan.aborts_at(self.num_ranks) + 4 * rank
        self._abort_words = [buffer.word(peer, at) for peer in range(self.num_ranks)]
        self._one = torch.ones(1, dtype=torch.int32, device="cpu", pin_memory=True)
        # Of the other priority: streams of one are shared after a while, with ones that may wait.
        self._beside = torch.cuda.Stream(device, priority=-1)

    def next_pool(self, *, capturing: bool) -> tuple[int, int]:
        """Pool 0 or 1 for the next zero-copy dispatch of this rank, and its offset.

        The two take turns. Dispatches of captures do so apart: a capture launches nothing, and what
        this rank captures is no other rank's business.
        """
        assert isinstance(self.plan, ArenaPlan)
        if capturing:
            self._captured_pool ^= 1
            pool = self._captured_pool
        else:
            self._pool ^= 1
            pool = self._pool
        return pool, self.plan.pool_at(pool)

    def enter(self, stream: torch.cuda.Stream, *, capturing: bool) -> None:
        """Orders `stream` after the last call, where that was made on another stream.

        In a capture: after the last call of the same capture. Replays and eager calls are ordered
        by the caller.
        """
        if capturing:
            capture = capture_of(stream.cuda_stream)
            before = self._captured
            if before is not None and before[0] == capture and before[1] != stream:
                stream.wait_stream(before[1])
            self._captured = (capture, stream)
            return
        if stream == self._last:
            return
        if self._last is not None:
            stream.wait_stream(self._last)
        self._last = stream

    def join(self, communicator: int) -> None:
        """A communicator will use this arena; `leave` when it does no more."""
        if not self._members:
            self.in_use[0] += 1
        self._members.add(communicator)

    def leave(self, communicator: int) -> bool:
        """Whether the last one has left now."""
        if communicator not in self._members:
            return False
        self._members.remove(communicator)
        if not self._members:
            self.in_use[0] -= 1
        return not self._members

    def tell_abort(self) -> None:
        """Ends the waits of all ranks' kernels, those of this rank too.

        Copies that need no kernel to end; where a queue of the GPU keeps them, not waited for long.
        """
        with torch.cuda.stream(self._beside):
            for word in self._abort_words:
                word.copy_(self._one, non_blocking=True)
        # The process may be about to end.
        ends = time.monotonic() + _TELL_S
        while not self._beside.query() and time.monotonic() < ends:
            time.sleep(1e-4)

    def check_fits(self, needed: Plan) -> None:
        """Refuses a communicator that needs more than there is."""
        if self.plan.holds(needed):
            return
        if type(needed) is not type(self.plan):
            raise ConfigurationError(
                "share_with: low-latency and high-throughput calls have memory of their own each"
            )
        differing = [
            f"{name} {size}, needed {getattr(needed, name)}"
            for name, size in vars(self.plan).items()
            if getattr(needed, name) != size
        ]
        raise ConfigurationError(
            "share_with: the memory does not suit this communicator; equal max_tokens_per_rank, "
            "hidden_size, dtype and topk are needed, and the communicator with most experts comes "
            f"first ({'; '.join(differing)})"
        )


def row_limit(config: MoECommunicatorConfig, num_ranks: int, num_local: int) -> int:
    """Most rows that `tokens` can have on a rank."""
    arrivals = num_ranks * config.max_tokens_per_rank
    if config.layout is DispatchLayout.EXPERT_MAJOR:
        return num_local * arrivals
    if config.layout is DispatchLayout.FLAT:
        gaps = num_local * (config.expert_alignment - 1)
        most = arrivals * min(config.topk, num_local) + gaps
    else:
        most = arrivals
    limit = config.max_recv_tokens_per_rank
    return most if limit is None else min(most, limit)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
