"""The times of one rank while they are taken, and those of all ranks afterwards."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from expertlink.bench.clocks import Sample, gather_on_hosts

TimesOfRanks = dict[tuple[str, str], Tensor]
"""`[R, rounds]` by phase and kind; times in microseconds, memory in bytes."""


class Times:
    """Times of this rank by phase and kind, in the order of the rounds."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], list[float]] = {}

    def put_sample(self, phase: str, sample: Sample, *, calls: int = 1) -> None:
        """What a sample of so many calls says of one."""
        self.put(phase, "time", sample.time_us / calls)
        self.put(phase, "host", sample.host_us / calls)
        self.put(phase, "memory", sample.memory_bytes)

    def put(self, phase: str, kind: str, value: float) -> None:
        """One more value. In the end all kinds have equally many."""
        self._values.setdefault((phase, kind), []).append(value)

    def gather(self, control: dist.ProcessGroup | None) -> TimesOfRanks:
        """What all ranks put. Collective."""
        keys = sorted(self._values)
        mine = torch.tensor([self._values[key] for key in keys], dtype=torch.float64)
        return dict(zip(keys, gather_on_hosts(mine, control).unbind(dim=1), strict=True))
