"""What no call can be faster than: its bytes at the bandwidth of large copies, and two flags.

Few tokens do not fill the wire, so plain copies of exactly those rows (`ceilings.py`) say little
about what would be possible: most of their time is latency. The floor is made of two figures
instead, both measured in the same run.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from expertlink.bench.cases import Case, Plan
from expertlink.bench.ceilings import BulkCopies, WireMemory, put_share, try_everywhere
from expertlink.bench.clock import Clock, capture
from expertlink.bench.flag_latency import FlagLatency
from expertlink.bench.records import slowest_rank
from expertlink.errors import EngineUnavailableError

LARGE_BYTES = 160 << 20
"""What a rank puts to learn the bandwidth: as much as 4096 tokens of 7168 elements on 4 ranks."""
FLAGS_PER_CALL = 2
_PUTS_PER_GRAPH = 4
_SAMPLES = 8
_LONGEST_ANSWER_S = 10.0


@dataclass(frozen=True)
class Floor:
    """The two figures.

    Attributes:
        gbps: bytes that leave a rank, in GB/s, when every rank puts a lot to all others.
        flag_us: a flag, from one GPU to another.
    """

    gbps: float
    flag_us: float

    def of(self, num_bytes: float) -> float:
        """Microseconds of a call whose busiest rank sends or receives so many bytes."""
        return num_bytes / self.gbps / 1e3 + FLAGS_PER_CALL * self.flag_us


class Yardstick:
    """Memory for the plain copies of all cases of a communicator, and the floor under them.

    Building is collective. Only prepared calls (`Variant.prepared`) have a floor.

    Attributes:
        memory: room for the rows of every case; None where no rows cross a wire.
        floor: None likewise.
    """

    def __init__(self, case: Case, plan: Plan, clock: Clock) -> None:
        self.memory: WireMemory | None = None
        self.floor: Floor | None = None
        if case.ranks == 1 or not case.calls.prepared:
            return
        copies: list[BulkCopies] = []

        def compile_all() -> None:
            row_bytes = case.hidden * case.torch_dtype.itemsize  # the widest kind
            copies.append(BulkCopies(clock.device, row_bytes=row_bytes, num_sms=plan.ceiling_sms))
            # On all SMs as well: the faster ones count.
            most = torch.cuda.get_device_properties(clock.device).multi_processor_count
            copies.append(BulkCopies(clock.device, row_bytes=row_bytes, num_sms=most))

        def allocate() -> None:
            # A token sends at most one row to every other rank.
            tokens = case.max_tokens_per_rank or case.tokens
            most_bytes = (case.ranks - 1) * tokens * copies[0].row_bytes
            self.memory = WireMemory(max(LARGE_BYTES, most_bytes), clock.device)

        for step in (compile_all, allocate):
            if try_everywhere(step, clock) is not None:  # the cases' own ceilings say why
                self.close()
                return
        assert self.memory is not None
        gbps = max(_put_bandwidth(copy, self.memory, clock) for copy in copies)
        self.floor = Floor(gbps, _flag_latency(self.memory, clock))

    def __enter__(self) -> Yardstick:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the memory. Safe to repeat."""
        if self.memory is not None:
            self.memory.close()
            self.memory = None


def _put_bandwidth(copies: BulkCopies, memory: WireMemory, clock: Clock) -> float:
    """GB/s that leave the average rank while each puts `LARGE_BYTES` to the others. Collective."""
    rank, ranks = dist.get_rank(), len(memory.addresses)
    rows = max(1, LARGE_BYTES // copies.row_bytes // (ranks - 1))
    share = put_share(torch.full((ranks, ranks), rows).fill_diagonal_(0), rank)
    put = copies.prepare("put", share, rank=rank, near=memory.source, far=memory.addresses)
    # In one graph, so that launches are no part of it.
    graph = capture(put, _PUTS_PER_GRAPH)
    times = [clock.sample(graph.replay).time_us / _PUTS_PER_GRAPH for _ in range(_SAMPLES)]
    times_RI = clock.gather(torch.tensor(times, dtype=torch.float64))
    num_bytes = (ranks - 1) * rows * copies.row_bytes
    return num_bytes / median(slowest_rank(times_RI)) / 1e3


def _flag_latency(memory: WireMemory, clock: Clock) -> float:
    """Microseconds one way between the closest two of the pairs that ranks form. Collective.

    Raises:
        EngineUnavailableError: on every rank, if a rank did not answer.
    """
    rank = dist.get_rank()
    partner = rank ^ 1
    median_us = 0.0
    if partner < len(memory.addresses):
        pair = FlagLatency(
            clock.device,
            mine=memory.addresses[rank] + memory.flags_at,
            theirs=memory.addresses[partner] + memory.flags_at,
            leads=rank < partner,
            limit_s=_LONGEST_ANSWER_S,
        )
        values = [pair.measure() for _ in range(_SAMPLES)]
        median_us = median(values) if min(values) > 0 else 0.0
    everyone = clock.gather(torch.tensor([median_us], dtype=torch.float64)).flatten()
    paired = everyone[: len(everyone) // 2 * 2]  # an odd rank is alone
    if not bool((paired > 0).all()):
        raise EngineUnavailableError("a flag between two GPUs did not arrive within 10 s")
    return float(paired.min())
