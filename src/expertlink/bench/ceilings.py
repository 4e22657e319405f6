"""The ceilings: how fast plain bulk copies move the rows of a case between the GPUs, and no more.

*put*: every rank copies rows from its memory through shared memory into that of the others. *get*:
every rank copies rows from the memory of the others into its shared memory. Both move, rank by
rank, exactly the rows that the measured calls put on the wire, so a skewed routing is compared with
its own busiest link. Kernels: kernels/ceiling.cu.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from expertlink.bench.clocks import gather_on_hosts
from expertlink.bench.raw import WireRows
from expertlink.errors import EngineUnavailableError
from expertlink.jit.compiler import CompiledKernel, compile_kernel
from expertlink.jit.kernel import Arguments, Field, Struct, load_kernel

if TYPE_CHECKING:
    from expertlink.engines.nvlink.arena import SymmetricBuffer

KINDS = ("put", "get")
PHASES = ("dispatch", "combine")

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
_SHARED_BYTES = 220 << 10
FLAG_BYTES = 1024
"""Room for flags behind the rows of a `WireMemory`."""
_COPY_UNIT = 16  # bytes that bulk copies move at least


def compile_ceiling(kind: str, arch: str) -> CompiledKernel:
    """The kernel of a ceiling, "put" or "get"; needs no GPU."""
    return compile_kernel("bench/ceiling", f"{kind}_rows", arch, prelude=ARGUMENTS.declaration)


@dataclass(frozen=True)
class Share:
    """One rank's part of an exchange; places are counted in rows from the start of a buffer.

    Attributes:
        near: `[R]` where the rows for each peer start in the own buffer; puts only.
        far: `[R]` where they start in the peer's buffer.
        rows: `[R]` rows to move.
    """

    near: list[int]
    far: list[int]
    rows: list[int]


def put_share(rows_SD: Tensor, rank: int) -> Share:
    """What `rank` puts: its rows lie ordered by destination, and arrive ordered by source.

    Args:
        rows_SD: `[R, R]` int64 rows from every source to every destination, own shares 0.
        rank: the source.
    """
    leave_SD, arrive_SD = _starts(rows_SD, dim=1), _starts(rows_SD, dim=0)
    return Share(leave_SD[rank].tolist(), arrive_SD[rank].tolist(), rows_SD[rank].tolist())


def get_share(rows_SD: Tensor, rank: int) -> Share:
    """What `rank` gets of the rows that lie with their sources, ordered by destination."""
    leave_SD = _starts(rows_SD, dim=1)
    return Share([0] * len(rows_SD), leave_SD[:, rank].tolist(), rows_SD[:, rank].tolist())


def most_rows(rows_SD: Tensor) -> int:
    """Rows that no rank's buffer holds more of, whether it sends or receives."""
    return int(torch.maximum(rows_SD.sum(dim=0), rows_SD.sum(dim=1)).max())


def _starts(rows_SD: Tensor, *, dim: int) -> Tensor:
    return rows_SD.cumsum(dim) - rows_SD


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
            kind: load_kernel(device, compile_ceiling(kind, f"sm_{major}{minor}"), _SHARED_BYTES)
            for kind in KINDS
        }

    def prepare(
        self, kind: str, share: Share, *, rank: int, near: int, far: Sequence[int]
    ) -> Callable[[], None]:
        """A call that moves a share on the current stream.

        Args:
            kind: "put" or "get".
            share: what to move.
            rank: this rank.
            near: address of the own buffer.
            far: `[R]` addresses of everyone's buffer as seen from here.
        """
        ranks = len(far)
        tables = [
            [near + start * self.row_bytes for start in share.near],
            [base + start * self.row_bytes for base, start in zip(far, share.far, strict=True)],
            share.rows,
        ]
        tables_3R = torch.tensor(tables, dtype=torch.int64, device=self._device)
        near_R, far_R, rows_R = tables_3R
        arguments = ARGUMENTS.new(
            near_rows=near_R.data_ptr(),
            far_rows=far_R.data_ptr(),
            rows=rows_R.data_ptr(),
            most_rows=max(share.rows),
            rank=rank,
            ranks=ranks,
            row_bytes=self.row_bytes,
        )
        return functools.partial(self._launch, kind, arguments, tables_3R)

    def _launch(self, kind: str, arguments: Arguments, tables_3R: Tensor) -> None:
        del tables_3R  # passed along so that it lives as long as the call
        self._kernels[kind].launch(
            arguments,
            grid=self._num_sms,
            block=32 * self._warps,
            shared_bytes=self._warps * self.row_bytes,
            stream=torch.cuda.current_stream(self._device).cuda_stream,
            follows=True,
        )


class WireMemory:
    """Memory that plain copies move rows between: symmetric, and local to put from. Collective.

    Args:
        nbytes: of the rows that one rank sends or receives at most.
        device: this rank's GPU.

    Attributes:
        nbytes: as given, at least one unit of bulk copies.
        addresses: of every rank's symmetric memory as seen from here.
        flags_at: offset behind the rows, of `FLAG_BYTES` that no copy touches.

    Raises:
        EngineUnavailableError: the GPUs cannot address each other's memory.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        from expertlink.engines.nvlink.arena import SymmetricBuffer

        self.nbytes = max(nbytes, _COPY_UNIT)  # a routing may leave every rank to itself
        self.flags_at = -(-self.nbytes // FLAG_BYTES) * FLAG_BYTES
        self._buffer: SymmetricBuffer | None = SymmetricBuffer(
            dist.group.WORLD, self.flags_at + FLAG_BYTES, device
        )
        self.addresses = self._buffer.addresses
        # Kept: the copies know its address only.
        self._source = torch.zeros(self.nbytes, dtype=torch.uint8, device=device)

    @property
    def source(self) -> int:
        """Address of the local memory."""
        return self._source.data_ptr()

    def close(self) -> None:
        """Releases the memory. Safe to repeat."""
        if self._buffer is not None:
            self._buffer.close()
        self._buffer = None
        self._source = torch.empty(0, dtype=torch.uint8)


class Ceilings:
    """The ceilings of one case, ready to be timed; or the reason why there are none.

    Args:
        wires: rows of each of the case's inputs.
        device: where the measured calls run.
        control: group of all ranks in which hosts exchange counts; None: the default group.
        num_sms: SMs that the copies occupy.
        memory: the caller's, where it is large enough; None: memory of their own.

    Attributes:
        note: why nothing can be measured, the same on every rank; None where it can.
        num_sms: as given.

    Building and closing are collective.
    """

    def __init__(
        self,
        wires: Sequence[WireRows],
        *,
        device: torch.device,
        control: dist.ProcessGroup | None,
        num_sms: int,
        memory: WireMemory | None = None,
    ) -> None:
        self.num_sms = num_sms
        self._calls: list[dict[tuple[str, str], Callable[[], None]]] = []
        self._memory = memory
        self._own: WireMemory | None = None
        self._control = control
        self.note = self._build(wires, device)

    def calls(self, index: int, phase: str) -> dict[str, Callable[[], None]]:
        """What moves the bytes of a phase of an input, by kind; empty where nothing can."""
        if self.note is not None:
            return {}
        return {kind: self._calls[index][phase, kind] for kind in KINDS}

    def __enter__(self) -> Ceilings:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the memory, if it is its own. Safe to repeat."""
        self._calls.clear()
        self._memory = None
        if self._own is not None:
            self._own.close()
            self._own = None

    def _build(self, wires: Sequence[WireRows], device: torch.device) -> str | None:
        rank = wires[0].rank
        rows_to = torch.tensor([wire.rows_to for wire in wires])
        rows_SID = gather_on_hosts(rows_to, self._control)
        if len(rows_SID) == 1:
            return "one rank sends nothing to others"
        copies: dict[str, BulkCopies] = {}
        row_bytes = {"dispatch": wires[0].dispatch_row_bytes, "combine": wires[0].combine_row_bytes}

        def compile_all() -> None:
            for phase in PHASES:
                copies[phase] = BulkCopies(device, row_bytes=row_bytes[phase], num_sms=self.num_sms)

        note = try_everywhere(compile_all, self._control)
        if note is not None:
            return note
        exchanges = [_exchanges(rows_SD) for rows_SD in rows_SID.unbind(dim=1)]
        num_bytes = max(
            most_rows(rows_SD) * copies[phase].row_bytes
            for exchange in exchanges
            for phase, rows_SD in exchange.items()
        )

        def allocate() -> None:
            self._memory = self._own = WireMemory(num_bytes, device)

        if self._memory is None or self._memory.nbytes < num_bytes:
            note = try_everywhere(allocate, self._control)
        if note is not None:
            self.close()
            return note
        memory = self._memory
        assert memory is not None
        for exchange in exchanges:
            calls: dict[tuple[str, str], Callable[[], None]] = {}
            for phase, rows_SD in exchange.items():
                for kind, share in zip(KINDS, (put_share, get_share), strict=True):
                    calls[phase, kind] = copies[phase].prepare(
                        kind,
                        share(rows_SD, rank),
                        rank=rank,
                        near=memory.source,
                        far=memory.addresses,
                    )
            self._calls.append(calls)
        return None


def try_everywhere(step: Callable[[], None], control: dist.ProcessGroup | None) -> str | None:
    """Does a step on every rank; why it failed, on whichever rank it did. Collective."""
    reason: str | None = None
    try:
        step()
    except EngineUnavailableError as error:
        reason = str(error)
    failed = gather_on_hosts(torch.tensor([float(reason is not None)]), control).flatten()
    if not bool(failed.any()):
        return None
    return reason or f"refused on ranks {failed.nonzero().flatten().tolist()}"


def _exchanges(rows_SD: Tensor) -> dict[str, Tensor]:
    """Rows between ranks of a dispatch and of the combine that reverses it."""
    between_SD = rows_SD.clone().fill_diagonal_(0)
    return {"dispatch": between_SD, "combine": between_SD.T.contiguous()}
