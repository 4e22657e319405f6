"""The clock: how a call is timed on one rank, and how the hosts of the ranks meet around it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_SPACER_BYTES = 256 << 20
_SPACER_FILLS = 12
_HEAD_START_S = 0.002  # until a common start: longer than hosts leave a barrier apart
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

TimesOfRanks = dict[tuple[str, str, str], Tensor]
"""`[R, rounds]` by variant, phase and kind (see `Times`)."""


class Sample(NamedTuple):
    """One timed call: until its work was done, until the host was free, and the device memory that
    it added at most (0 on CPUs)."""

    time_us: float
    host_us: float
    memory_bytes: int = 0


class Clock:
    """Times calls that all ranks make together. Every method is collective.

    CPU ranks: a barrier of the hosts, then the host's clock around the call.

    GPU ranks: events in stream order, behind an all-reduce that every rank has to reach. A long
    fill of memory goes ahead of the all-reduce. It gives the host time to queue the call, so that
    launch time is not measured, and it leaves nothing of the inputs in the L2 cache.

    `control` is a group of all ranks, with gloo, in which the hosts meet. Its time-out bounds the
    wait for a rank that failed. None: the default group.
    """

    def __init__(self, device: torch.device, control: dist.ProcessGroup | None = None) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self._control = control
        if self.on_gpu:
            self._spacer = torch.empty(_SPACER_BYTES, dtype=torch.uint8, device=device)
            self._aligned_at = torch.zeros(1, device=device)
            self._one_host = self.on_one_host()

    def barrier(self) -> None:
        """Returns on no rank before all have called it."""
        # Not dist.barrier(), which a group with NCCL runs on the GPU.
        dist.all_reduce(torch.zeros(1), group=self._control)

    def gather(self, mine: Tensor) -> Tensor:
        """`[R, ...]`: the tensor of every rank, on the host."""
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._control))]
        dist.all_gather(everyone, mine, group=self._control)
        return torch.stack(everyone)

    def ranks_with(self, problem: object | None) -> list[int]:
        """The ranks that pass something else than None."""
        return self.gather(torch.tensor(int(problem is not None))).nonzero()[:, 0].tolist()

    def sample(self, call: Callable[[], object]) -> Sample:
        """Times a call with the ranks aligned."""
        self.barrier()
        if not self.on_gpu:
            begin = time.perf_counter()
            result = call()  # what it returned lives until the clock has stopped
            elapsed_us = (time.perf_counter() - begin) * 1e6
            del result
            return Sample(elapsed_us, elapsed_us)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        memory = self._memory()
        for fill in range(_SPACER_FILLS):
            self._spacer.fill_(fill)
        dist.all_reduce(self._aligned_at)
        start.record()
        begin = time.perf_counter()
        result = call()
        host_us = (time.perf_counter() - begin) * 1e6
        end.record()
        end.synchronize()
        del result
        return Sample(start.elapsed_time(end) * 1e3, host_us, self._peak(memory))

    def sample_idle(self, call: Callable[[], object]) -> Sample:
        """Times a call that finds the GPU idle; launch times of all ranks are part of it.

        From the moment that the ranks have agreed on, not from when each left a barrier.
        """
        torch.cuda.synchronize(self.device)
        memory = self._memory()
        start = self._common_start()
        begin = time.monotonic()
        result = call()
        host_us = (time.monotonic() - begin) * 1e6
        torch.cuda.synchronize(self.device)
        time_us = (time.monotonic() - start) * 1e6
        del result
        return Sample(time_us, host_us, self._peak(memory))

    def on_one_host(self) -> bool:
        """Whether all ranks run on one system, and so read the same monotonic clock."""
        try:
            boot = _BOOT_ID.read_bytes()
        except OSError:
            boot = b""
        digest = int.from_bytes(hashlib.sha256(boot).digest()[:7], "big") if boot else 0
        everyone = self.gather(torch.tensor([digest]))
        return bool((everyone == everyone[0]).all()) and bool(everyone[0])

    def _common_start(self) -> float:
        """Returns at the same time on all ranks: that time, in seconds.

        Hosts leave a barrier up to a millisecond apart. Processes of one host read one clock, so
        they agree on a time a little ahead. Ranks of several hosts have to do with the barrier.
        """
        if not self._one_host:
            self.barrier()
            return time.monotonic()
        now = torch.tensor([time.monotonic()], dtype=torch.float64)
        start = float(self.gather(now).max()) + _HEAD_START_S
        while time.monotonic() < start:
            pass
        return start

    def _memory(self) -> int:
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def _peak(self, before: int) -> int:
        return torch.cuda.max_memory_allocated(self.device) - before


class Times:
    """What this rank measured by variant, phase and kind, in the order of the rounds.

    Kinds are "time", "host", "memory", "idle", "idle host", "idle loop" and "hot host"; and, under
    the variant "" because all variants are compared with them, "raw", "put", "get" and "rail".
    """

    def __init__(self) -> None:
        self._values: dict[tuple[str, str, str], list[float]] = {}

    def put(self, variant: str, phase: str, kind: str, value: float) -> None:
        """One more value. In the end all kinds have equally many."""
        self._values.setdefault((variant, phase, kind), []).append(value)

    def gather(self, clock: Clock) -> TimesOfRanks:
        """What all ranks put. Collective."""
        keys = sorted(self._values)
        mine = torch.tensor([self._values[key] for key in keys], dtype=torch.float64)
        return dict(zip(keys, clock.gather(mine).unbind(dim=1), strict=True))


def capture(call: Callable[[], Any], times: int = 1) -> torch.cuda.CUDAGraph:
    """A graph of a call, several times in a row. What it uses has to live as long as the graph."""
    graph = torch.cuda.CUDAGraph()
    # Not `torch.cuda.graph`, which gives all cached memory back every time.
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        # Other threads, such as those of NCCL, may use the device while this one captures.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(times):
                call()
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    return graph
