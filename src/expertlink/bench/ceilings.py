"""What the calls are compared with on GPUs: the same rows, moved and no more.

*put*: every rank copies rows from its memory through shared memory into that of the others. *get*:
every rank copies rows from the memory of the others into its shared memory. Both move, rank by
rank, exactly the rows that the measured calls put on the wire: a skewed routing is compared with
its own busiest link. *floor*: a bandwidth and the time of a flag.

Kernels: kernels/bench/ceiling.cu.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from expertlink.bench.cases import Case, Plan
from expertlink.bench.clock import Clock, capture
from expertlink.bench.flag_latency import FlagLatency
from expertlink.bench.records import slowest_rank
from expertlink.errors import EngineUnavailableError
from expertlink.jit.compiler import compile_kernel, constants
from expertlink.jit.kernel import Field, Struct, load_kernel

Moves = dict[tuple[str, str], Callable[[], object]]
"""What moves the rows of an input, by phase and kind: "raw", "put", "get" or "rail"."""
KINDS = ("put", "get")

ARGUMENTS = Struct(
    "CeilingArguments",
    [
        Field("const long long*", "near_rows", "[R] address of the first row for each peer; put"),
        Field("const long long*", "far_rows", "[R] address of its place in the peer's memory"),
        Field("const long long*", "rows", "[R] rows to move, 0 for the own rank"),
        Field("long long", "most_rows", "most of them"),
        Field("int", "rank", "this rank"),
        Field("int", "ranks", "R"),
        Field("unsigned", "row_bytes", "a multiple of 16"),
    ],
)
_MAX_WARPS = 16
PRELUDE = constants({"kMaxWarps": _MAX_WARPS}) + ARGUMENTS.declaration
_SHARED_BYTES = 220 << 10
_FLAG_BYTES = 1024
_COPY_UNIT = 16  # bytes that bulk copies move at least
LARGE_BYTES = 160 << 20
"""What a rank puts to learn the bandwidth: as much as 4096 tokens of 7168 elements on 4 ranks."""
_FLAGS_PER_CALL = 2
_PUTS_PER_GRAPH = 4
_SAMPLES = 8
_LONGEST_ANSWER_S = 10.0


def share_of(kind: str, rows_SD: Tensor, rank: int) -> Tensor:
    """`[3, R]` int64 of what `rank` puts, or gets: for each peer where its rows start in the own
    buffer (puts only), where in the peer's, and how many there are. Places count rows: they lie
    ordered by destination, and arrive ordered by source.

    `rows_SD`: `[R, R]` int64 rows from every source to every destination, own shares 0.
    """
    leave_SD, arrive_SD = (rows_SD.cumsum(dim) - rows_SD for dim in (1, 0))
    if kind == "put":
        return torch.stack((leave_SD[rank], arrive_SD[rank], rows_SD[rank]))
    return torch.stack((torch.zeros_like(rows_SD[rank]), leave_SD[:, rank], rows_SD[:, rank]))


class BulkCopies:
    """The two kernels on one device.

    Raises:
        EngineUnavailableError: they cannot run there, or rows of that size are too large.
    """

    def __init__(self, device: torch.device, *, row_bytes: int, num_sms: int) -> None:
        if device.type != "cuda":
            raise EngineUnavailableError(f"rows do not cross a wire between {device.type} ranks")
        major, minor = torch.cuda.get_device_capability(device)
        if major < 9:
            raise EngineUnavailableError(f"bulk copies need sm_90 or later, not sm_{major}{minor}")
        self.row_bytes = -(-row_bytes // _COPY_UNIT) * _COPY_UNIT
        self._warps = min(_MAX_WARPS, _SHARED_BYTES // self.row_bytes)
        if self._warps == 0:
            raise EngineUnavailableError(
                f"rows of {row_bytes} bytes are larger than {_SHARED_BYTES} bytes of shared memory"
            )
        self._device = device
        self._num_sms = num_sms
        self._kernels = {
            kind: load_kernel(
                device,
                compile_kernel(
                    "bench/ceiling", f"{kind}_rows", f"sm_{major}{minor}", prelude=PRELUDE
                ),
                _SHARED_BYTES,
            )
            for kind in KINDS
        }

    def prepare(
        self, kind: str, share_3R: Tensor, *, rank: int, near: int, far: Sequence[int]
    ) -> Callable[[], None]:
        """A call that puts or gets a share (see `share_of`) on the current stream.

        `near` is the address of the own buffer, `far` has everyone's as seen from here.
        """
        starts_3R = torch.tensor([[near] * len(far), far, [0] * len(far)])
        tables_3R = share_3R * torch.tensor([[self.row_bytes], [self.row_bytes], [1]]) + starts_3R
        tables_3R = tables_3R.to(self._device)
        near_R, far_R, rows_R = (table_R.data_ptr() for table_R in tables_3R)
        arguments = ARGUMENTS.new(
            near_rows=near_R,
            far_rows=far_R,
            rows=rows_R,
            most_rows=int(share_3R[2].max()),
            rank=rank,
            ranks=len(far),
            row_bytes=self.row_bytes,
        )

        def move(_alive: Tensor = tables_3R) -> None:
            self._kernels[kind].launch(
                arguments,
                grid=self._num_sms,
                block=32 * self._warps,
                shared_bytes=self._warps * self.row_bytes,
                stream=torch.cuda.current_stream(self._device).cuda_stream,
                follows=True,
            )

        return move


class WireMemory:
    """Memory that plain copies move rows between: symmetric, and local to put from. Collective.

    `nbytes` is what the rows take that one rank sends or receives at most.

    Raises:
        EngineUnavailableError: the GPUs cannot address each other's memory.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        from expertlink.engines.nvlink.arena import SymmetricBuffer

        self.nbytes = max(nbytes, _COPY_UNIT)  # a routing may leave every rank to itself
        flags_at = -(-self.nbytes // _FLAG_BYTES) * _FLAG_BYTES
        self._buffer = SymmetricBuffer(dist.group.WORLD, flags_at + _FLAG_BYTES, device)
        self._local = torch.zeros(self.nbytes, dtype=torch.uint8, device=device)
        # Addresses: the local memory, that of every rank, and its words that no copy touches.
        self.source = self._local.data_ptr()
        self.addresses = self._buffer.addresses
        self.flags = [address + flags_at for address in self.addresses]

    def close(self) -> None:
        """Releases the symmetric memory."""
        self._buffer.close()


class Ceilings:
    """Plain copies for the cases of one communicator, or `note`: why there are none, the same on
    every rank; and the `floor` of prepared calls. Building is collective."""

    def __init__(self, case: Case, plan: Plan, clock: Clock) -> None:
        self.floor: Floor | None = None
        self._clock = clock
        self._copies: dict[str, BulkCopies] = {}
        self._memory: WireMemory | None = None

        def compile_all() -> None:
            for phase in ("dispatch", "combine"):
                self._copies[phase] = BulkCopies(
                    clock.device, row_bytes=case.row_bytes(phase), num_sms=plan.ceiling_sms
                )

        def allocate() -> None:
            # A token sends at most one row to every other rank.
            tokens = (case.max_tokens_per_rank or 0) if case.calls.prepared else 0
            rows = (case.ranks - 1) * max(tokens, case.tokens)
            most_bytes = rows * max(copies.row_bytes for copies in self._copies.values())
            least_bytes = LARGE_BYTES if case.has_floor else 0
            self._memory = WireMemory(max(most_bytes, least_bytes), clock.device)

        self.note = "one rank sends nothing to others" if case.ranks == 1 else None
        for step in (compile_all, allocate):
            self.note = self.note or _try_everywhere(step, clock)
        if self.note is not None:
            self.close()
        elif case.has_floor:
            assert self._memory is not None
            self.floor = measure_floor(self._copies["combine"], self._memory, clock)

    def moves(self, rank: int, rows_ID: Sequence[Sequence[int]]) -> list[Moves]:
        """What moves the rows of every input; nothing where that cannot be measured. Collective.

        `rows_ID`: `[inputs, R]` rows that this rank dispatches to every rank.
        """
        memory = self._memory
        if memory is None:
            return [{} for _ in rows_ID]

        def moves_of(rows_SD: Tensor) -> Moves:
            between_SD = rows_SD.clone().fill_diagonal_(0)
            exchanges = {"dispatch": between_SD, "combine": between_SD.T.contiguous()}
            return {
                (phase, kind): self._copies[phase].prepare(
                    kind,
                    share_of(kind, rows, rank),
                    rank=rank,
                    near=memory.source,
                    far=memory.addresses,
                )
                for phase, rows in exchanges.items()
                for kind in KINDS
            }

        rows_SID = self._clock.gather(torch.tensor(rows_ID))
        return [moves_of(rows_SD) for rows_SD in rows_SID.unbind(dim=1)]

    def __enter__(self) -> Ceilings:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the memory. Safe to repeat."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None


@dataclass(frozen=True)
class Floor:
    """What no call can be faster than: its bytes at full bandwidth, and two flags.

    Few tokens do not fill the wire, so plain copies of exactly those rows say little about what
    would be possible: most of their time is latency.
    """

    gbps: float  # 10**9 bytes a second that leave a rank when every rank puts a lot to all others
    flag_us: float  # a flag, from one GPU to another

    def of(self, num_bytes: float) -> float:
        """Microseconds of a call whose busiest rank sends or receives so many bytes."""
        return num_bytes / self.gbps / 1e3 + _FLAGS_PER_CALL * self.flag_us


def measure_floor(copies: BulkCopies, memory: WireMemory, clock: Clock) -> Floor:
    """Puts on the SMs of the given copies, and on all: the faster ones count. Collective."""
    most = torch.cuda.get_device_properties(clock.device).multi_processor_count
    widest = BulkCopies(clock.device, row_bytes=copies.row_bytes, num_sms=most)
    gbps = max(_put_bandwidth(one, memory, clock) for one in (copies, widest))
    return Floor(gbps, _closest_flag(memory, clock))


def _put_bandwidth(copies: BulkCopies, memory: WireMemory, clock: Clock) -> float:
    """GB/s that leave the average rank while each puts `LARGE_BYTES` to the others."""
    rank, ranks = dist.get_rank(), len(memory.addresses)
    rows = max(1, LARGE_BYTES // copies.row_bytes // (ranks - 1))
    share = share_of("put", torch.full((ranks, ranks), rows).fill_diagonal_(0), rank)
    put = copies.prepare("put", share, rank=rank, near=memory.source, far=memory.addresses)
    # In one graph, so that launches are no part of it.
    graph = capture(put, _PUTS_PER_GRAPH)
    times = [clock.sample(graph.replay).time_us / _PUTS_PER_GRAPH for _ in range(_SAMPLES)]
    times_RI = clock.gather(torch.tensor(times, dtype=torch.float64))
    num_bytes = (ranks - 1) * rows * copies.row_bytes
    return num_bytes / median(slowest_rank(times_RI)) / 1e3


def _closest_flag(memory: WireMemory, clock: Clock) -> float:
    """Microseconds one way between the closest two of the pairs that ranks form."""
    rank = dist.get_rank()
    partner = rank ^ 1
    median_us = 0.0
    if partner < len(memory.flags):
        pair = FlagLatency(
            clock.device,
            mine=memory.flags[rank],
            theirs=memory.flags[partner],
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


def _try_everywhere(step: Callable[[], None], clock: Clock) -> str | None:
    """Does a step on every rank; why it failed, on whichever rank it did. Collective."""
    reason: str | None = None
    try:
        step()
    except EngineUnavailableError as error:
        reason = str(error)
    failed = clock.ranks_with(reason)
    return (reason or f"refused on ranks {failed}") if failed else None
