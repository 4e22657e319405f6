"""From times of every rank and iteration to the few numbers that a record keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Summary:
    """Distribution over iterations, in microseconds. p99 is an observed value (nearest rank)."""

    min: float
    median: float
    p99: float
    mean: float


def summarize(values: Sequence[float]) -> Summary:
    """Minimum, median, 99th percentile and mean of at least one value."""
    ordered = sorted(values)
    count = len(ordered)
    middle = count // 2
    median = ordered[middle] if count % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    p99 = ordered[math.ceil(0.99 * count) - 1]
    return Summary(ordered[0], median, p99, sum(ordered) / count)


def rounded(summary: Summary) -> Summary:
    """To hundredths of a microsecond, as records keep it."""
    return Summary(
        *(round(value, 2) for value in (summary.min, summary.median, summary.p99, summary.mean))
    )


def slowest_rank(times_RI: Tensor) -> list[float]:
    """Time of the slowest rank of each iteration: a collective step is over when all are."""
    return times_RI.amax(dim=0).tolist()


def mean_rank(times_RI: Tensor) -> list[float]:
    """Time of each iteration, averaged over the ranks."""
    return times_RI.mean(dim=0).tolist()


def gbps(num_bytes: float, time_us: float) -> float:
    """Bandwidth in GB/s, with 1 GB = 10**9 bytes."""
    return num_bytes / time_us / 1e3 if time_us > 0 else 0.0
