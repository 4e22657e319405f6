"""How one call is timed on one rank: by the host's clock on CPUs, by events on GPUs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

_SPACER_BYTES = 256 << 20
_SPACER_FILLS = 4
_HEAD_START_S = 0.002  # until a common start: longer than hosts leave a barrier apart
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


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
        """Times a call that finds the device idle; launch times of all ranks are part of it.

        From the moment that the ranks have agreed on, not from when each left a barrier.
        """
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
        self._one_host = on_one_host(control)

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
        start = self._common_start()
        begin = time.monotonic()
        result = call()
        host_us = (time.monotonic() - begin) * 1e6
        torch.cuda.synchronize(self._device)
        time_us = (time.monotonic() - start) * 1e6
        return Sample(time_us, host_us, self._peak(memory), result)

    def _common_start(self) -> float:
        """Returns at the same time on all ranks: that time, in seconds.

        Hosts leave a barrier up to a millisecond apart. Processes of one host read one clock, so
        they agree on a time a little ahead. Ranks of several hosts have to do with the barrier.
        """
        if not self._one_host:
            host_barrier(self._control)
            return time.monotonic()
        now = torch.tensor([time.monotonic()], dtype=torch.float64)
        start = float(gather_on_hosts(now, self._control).max()) + _HEAD_START_S
        while time.monotonic() < start:
            pass
        return start

    def _memory(self) -> int:
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def _peak(self, before: int) -> int:
        return torch.cuda.max_memory_allocated(self._device) - before


def make_clock(device: torch.device, control: dist.ProcessGroup | None = None) -> Clock:
    """The clock of a kind of device. Collective.

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


def on_one_host(control: dist.ProcessGroup | None) -> bool:
    """Whether all ranks run on one system, and so read the same monotonic clock. Collective."""
    try:
        boot = _BOOT_ID.read_bytes()
    except OSError:
        boot = b""
    digest = int.from_bytes(hashlib.sha256(boot).digest()[:7], "big") if boot else 0
    everyone = gather_on_hosts(torch.tensor([digest]), control)
    return bool((everyone == everyone[0]).all()) and bool(everyone[0])
