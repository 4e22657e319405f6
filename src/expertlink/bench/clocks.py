"""How one call is timed on one rank: by the host's clock on CPUs, by events on GPUs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

_SPACER_BYTES = 256 << 20
_SPACER_FILLS = 4


@dataclass(frozen=True)
class Sample:
    """One timed call; times in microseconds.

    Attributes:
        time_us: inputs ready to outputs usable on this rank.
        host_us: until the call returned to its caller.
        memory_bytes: most device memory that the call added while it ran; 0 on CPUs.
        result: what the call returned.
    """

    time_us: float
    host_us: float
    memory_bytes: int
    result: Any


class Clock(Protocol):
    """Times calls that all ranks make together."""

    aligned: str
    """How ranks are aligned before an ordinary sample: "device" or "host"."""
    has_idle: bool
    """Whether samples from an idle device differ from ordinary ones."""

    def sample(self, call: Callable[[], Any]) -> Sample:
        """Times a call with the ranks aligned."""
        ...

    def sample_idle(self, call: Callable[[], Any]) -> Sample:
        """Times a call that finds the device idle; launch times of all ranks are part of it."""
        ...


class HostClock:
    """CPU ranks: a barrier, then the host's clock around the call."""

    aligned = "host"
    has_idle = False

    def __init__(self, control: dist.ProcessGroup | None) -> None:
        self._control = control

    def sample(self, call: Callable[[], Any]) -> Sample:
        host_barrier(self._control)
        start = time.perf_counter()
        result = call()
        elapsed = (time.perf_counter() - start) * 1e6
        return Sample(elapsed, elapsed, 0, result)

    def sample_idle(self, call: Callable[[], Any]) -> Sample:
        return self.sample(call)


class DeviceClock:
    """GPU ranks: events in stream order behind an all-reduce that every rank has to reach.

    A long fill of memory goes ahead of the all-reduce. It gives the host time to queue the call,
    so that launch time is not measured, and it leaves nothing of the inputs in the L2 cache.
    """

    aligned = "device"
    has_idle = True

    def __init__(self, device: torch.device, control: dist.ProcessGroup | None) -> None:
        self._device = device
        self._control = control
        self._spacer = torch.empty(_SPACER_BYTES, dtype=torch.uint8, device=device)
        self._meeting = torch.zeros(1, device=device)

    def sample(self, call: Callable[[], Any]) -> Sample:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        host_barrier(self._control)
        memory = self._memory()
        for fill in range(_SPACER_FILLS):
            self._spacer.fill_(fill)
        dist.all_reduce(self._meeting)
        start.record()
        begin = time.perf_counter()
        result = call()
        host_us = (time.perf_counter() - begin) * 1e6
        end.record()
        end.synchronize()
        return Sample(start.elapsed_time(end) * 1e3, host_us, self._peak(memory), result)

    def sample_idle(self, call: Callable[[], Any]) -> Sample:
        torch.cuda.synchronize(self._device)
        memory = self._memory()
        host_barrier(self._control)
        begin = time.perf_counter()
        result = call()
        host_us = (time.perf_counter() - begin) * 1e6
        torch.cuda.synchronize(self._device)
        time_us = (time.perf_counter() - begin) * 1e6
        return Sample(time_us, host_us, self._peak(memory), result)

    def _memory(self) -> int:
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def _peak(self, before: int) -> int:
        return torch.cuda.max_memory_allocated(self._device) - before


def make_clock(device: torch.device, control: dist.ProcessGroup | None = None) -> Clock:
    """The clock of a kind of device.

    Args:
        device: where the measured calls run.
        control: group of the same ranks, with gloo, in which hosts meet; None: the default group.
    """
    return DeviceClock(device, control) if device.type == "cuda" else HostClock(control)


def host_barrier(control: dist.ProcessGroup | None) -> None:
    """Returns on no rank before all have called it, nor later than the group's time-out."""
    # Not dist.barrier(), which a group with NCCL runs on the GPU.
    dist.all_reduce(torch.zeros(1), group=control)


def gather_on_hosts(mine: Tensor, control: dist.ProcessGroup | None) -> Tensor:
    """`[R, ...]`: the tensor of every rank. Collective, on the host."""
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(control))]
    dist.all_gather(everyone, mine, group=control)
    return torch.stack(everyone)
