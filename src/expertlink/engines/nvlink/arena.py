"""The memory that ranks write into each other: one allocation per rank.

torch's symmetric memory is an alpha API; this file is the only one that knows it.
"""

from __future__ import annotations

import collections
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from expertlink.engines.nvlink.capture import capture_of, raw_stream
from expertlink.engines.nvlink.shared import STATE
from expertlink.errors import ConfigurationError, EngineUnavailableError

_ABORT_S = 1.0  # how long an abort waits for its words to be written
# Arenas in use on each GPU of this process: one number in a list, which every arena holds.
_in_use: dict[torch.device, list[int]] = collections.defaultdict(lambda: [0])


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
        self.local = torch.empty(0, dtype=torch.uint8, device="cpu")


def _leave(in_use: list[int], members: set[int]) -> None:
    """An arena is gone, whose communicators nobody may have closed."""
    in_use[0] -= bool(members)


class Plan(Protocol):
    """Sizes and contents of an arena."""

    @property
    def total(self) -> int:
        """Bytes of the whole arena."""
        ...

    @property
    def rail_words(self) -> int:
        """As in `shared.control`: 0 on one host."""
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
        self.state = torch.zeros(STATE.size, dtype=torch.uint8, device=device)
        self._current = raw_stream(device)
        self._last: torch.cuda.Stream | None = None
        self._last_raw: int | None = None  # its handle
        self._captured: tuple[int, torch.cuda.Stream] | None = None
        self._members: set[int] = set()
        weakref.finalize(self, _leave, _in_use[device], self._members)
        self.in_use = _in_use[device]
        at = plan.aborts_at(self.num_ranks) + 4 * rank
        self._abort_words = [buffer.word(peer, at) for peer in range(self.num_ranks)]
        self._one = torch.ones(1, dtype=torch.int32, device="cpu", pin_memory=True)
        # Of another priority than usual: torch hands out the same streams again after a while, and
        # work on those may be waiting for the very ranks that an abort is to reach.
        self._abort_stream = torch.cuda.Stream(device, priority=-1)

    def follow(self, *, capturing: bool = False) -> None:
        """`enter` for torch's current stream, where the next call is made."""
        if capturing or self._current() != self._last_raw:
            self.enter(torch.cuda.current_stream(self.device), capturing=capturing)

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
            self._last_raw = stream.cuda_stream
            return
        if self._last is not None:
            stream.wait_stream(self._last)
        self._last, self._last_raw = stream, stream.cuda_stream

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

    def post_abort(self) -> None:
        """Ends the waits of all ranks' kernels, those of this rank too.

        Copies that need no kernel to end; where a queue of the GPU keeps them, not waited for long.
        """
        with torch.cuda.stream(self._abort_stream):
            for word in self._abort_words:
                word.copy_(self._one, non_blocking=True)
        # The process may be about to end.
        ends = time.monotonic() + _ABORT_S
        while not self._abort_stream.query() and time.monotonic() < ends:
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


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
