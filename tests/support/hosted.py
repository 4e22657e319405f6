"""Several ranks of the nvlink engine in one process on one GPU: threads that launch together.

Every rank runs the engine's own host code in a thread of its own. A launch waits until all ranks
have come to it and starts one kernel with a row of blocks per rank, so all are resident at once.
All ranks share one stream, so calls cannot be captured here.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertlink import MoECommunicator, MoECommunicatorConfig
from expertlink.engines.nvlink import tuning
from expertlink.engines.nvlink.arena import Plan
from expertlink.engines.nvlink.build import assemble, make_memory, mode_of
from expertlink.engines.nvlink.engine import NvlinkEngine
from expertlink.engines.nvlink.ht.plan import HtPlan
from expertlink.engines.nvlink.launch import KernelName, Launch, Program, compile_program
from expertlink.engines.nvlink.ll.mode import LlMode
from expertlink.engines.nvlink.mode import Memory, Mode
from expertlink.engines.nvlink.tuning import SHARED_BYTES, STATIC_BYTES
from expertlink.engines.ranks.wire import Transfer, Wire
from expertlink.engines.weighted_backward import WeightedBackward
from expertlink.jit.kernel import Arguments, Field, Struct, architecture, load_kernel
from expertlink.routing import Placement, even_blocks
from support.cases import LL, MANY_RANKS, SMS
from support.jobs import config_of, without_gradients
from support.oracle import Case

_POINTER = Struct("Table", (Field("const void*", "table", "[R] arguments"),))
_PATIENCE_S = 60.0
DEVICE = torch.device("cuda", 0)


class Meeting:
    """Where the threads of all ranks exchange values: `swap` returns everybody's.

    Args:
        num_ranks: R.
        act: called with all values by the last thread to come, before any of them goes on.
        first_number: of communicators; those of two meetings must differ where they meet.
    """

    def __init__(
        self,
        num_ranks: int,
        act: Callable[[list[Any]], None] | None = None,
        *,
        first_number: int = 1,
    ) -> None:
        self.num_ranks = num_ranks
        self._values: list[Any] = [None] * num_ranks
        self._everyone: list[Any] = []
        self._act = act
        self.reasons: dict[int, str] = {}  # of ranks that have called abort
        self._numbers = [first_number - 1] * num_ranks
        self._barrier = threading.Barrier(num_ranks, self._close)

    def _close(self) -> None:
        # Replaced as a whole: nobody can come to the next exchange before all have read this one.
        self._everyone = list(self._values)
        if self._act is not None:
            self._act(self._everyone)

    def swap(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait(_PATIENCE_S)
        return self._everyone

    def next_number(self, rank: int) -> int:
        """Tells the communicators of a rank apart, alike on all ranks."""
        self._numbers[rank] += 1
        return self._numbers[rank]

    def break_up(self) -> None:
        """Lets everybody who waits fail: a rank has failed."""
        self._barrier.abort()


class HostedWire(Wire):
    """What ranks say in words, through the meeting."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__(None, device=DEVICE, timeout_s=30.0)
        self.rank, self.num_ranks, self._meeting = rank, meeting.num_ranks, meeting
        self.number = meeting.next_number(rank)

    def gather_text(self, text: str) -> list[str]:
        return self._meeting.swap(self.rank, text)

    def publish_abort(self, reason: str) -> None:
        self._meeting.reasons[self.rank] = reason

    def abort_reason(self, rank: int) -> str:
        deadline = time.monotonic() + 1.0  # the word in memory comes first
        while rank not in self._meeting.reasons and time.monotonic() < deadline:
            time.sleep(0.001)
        return self._meeting.reasons.get(rank, "")

    def gather(self, row: Tensor, rows: Tensor) -> Transfer:
        everyone = self._meeting.swap(self.rank, row)
        torch.stack(everyone, out=rows)
        return Transfer(lambda: None)

    def to_host(self, values: Tensor, after: Transfer | None = None) -> Tensor:
        return values.cpu()


@dataclass
class HostedBuffer:
    """A rank's buffer, and where all of them are."""

    local: Tensor
    addresses: list[int]
    buffers: list[Tensor]

    def word(self, rank: int, offset: int) -> Tensor:
        return self.buffers[rank][offset : offset + 4].view(torch.int32)


@dataclass(frozen=True)
class _Share:
    """One rank's part of a launch."""

    name: KernelName
    arguments: bytes
    launch: Launch
    stream: torch.cuda.Stream


class Fleet:
    """The ranks' common launches for one configuration; serves one `run_hosted` after another.

    Args:
        config: of every rank's communicator.
        num_ranks: R.
        max_warps: most warps of a block; None: all in mode "ll", else few: many blocks are to fit.
        host: another fleet, whose memory this one uses as well.
        skip: called with the number of a launch that all ranks make together (one per dispatch or
            combine); ranks it returns do not take part in it.
        first_number: of its communicators, where those of another fleet are used beside them.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        num_ranks: int,
        *,
        max_warps: int | None = None,
        host: Fleet | None = None,
        skip: Callable[[int], Sequence[int]] = lambda number: (),
        first_number: int = 1,
    ) -> None:
        self._first_number = first_number
        self.config, self.num_ranks, self.skip = config, num_ranks, skip
        owners = (
            even_blocks(config.num_experts, num_ranks)
            if config.expert_map is None
            else [int(rank) for rank in config.expert_map]
        )
        self.placement = Placement.from_ranks(owners, num_ranks=num_ranks, device=DEVICE)
        self.mode = self._mode()
        self.plan = self._plan()
        self._host = host
        if host is not None:
            assert host.plan.holds(self.plan)
            self.plan = host.plan
        torch.cuda.init()
        compiled = compile_program(
            config,
            self._program(),
            num_ranks=num_ranks,
            num_peers=self._num_peers(),
            arch=architecture(DEVICE),
            hosted=True,
        )
        self._kernels = {
            name: load_kernel(DEVICE, code, max_shared_bytes=SHARED_BYTES - STATIC_BYTES)
            for name, code in compiled.items()
        }
        self.backward_kernel = None
        if config.layout.expanded:
            self.backward_kernel = WeightedBackward(DEVICE, dtype=config.dtype)
        few = not issubclass(self.mode, LlMode)
        self.max_warps = max_warps or (4 if few else tuning.LL_DISPATCH_WARPS)
        self._buffers: list[Tensor] = []
        if host is not None:
            self._buffers = host._buffers
        for _ in range(num_ranks - len(self._buffers)):
            memory = torch.zeros(self.plan.total, dtype=torch.uint8, device=DEVICE)
            self._buffers.append(memory)
        self.addresses = [buffer.data_ptr() for buffer in self._buffers]
        self.reset()

    # -- what subclasses may have otherwise -------------------------------------------------------

    def _mode(self) -> type[Mode]:
        return mode_of(self.config, self.placement)

    def _plan(self) -> Plan:
        return self.mode.plan(self.config, self.num_ranks)

    def _program(self) -> Program:
        return self.mode.program(self.config, self.plan, num_ranks=self.num_ranks)

    def _num_peers(self) -> int | None:
        return None

    def make_memory(self, rank: int, timeout_s: float) -> Memory:
        """What a rank keeps of the memory of all."""
        return make_memory(
            self.config,
            self.mode,
            self.plan,
            rank=rank,
            buffer=self.memory(rank),
            device=DEVICE,
            timeout_s=timeout_s,
        )

    def assemble(self, config: MoECommunicatorConfig, **parts: Any) -> NvlinkEngine:
        """A rank's engine; `parts` as in `build.assemble`."""
        return assemble(config, self.mode, **parts)

    # -- calls ------------------------------------------------------------------------------------

    def reset(self) -> None:
        """For new communicators: flags as in fresh memory, and NaN and -1 everywhere else."""
        torch.cuda.synchronize(DEVICE)
        for buffer in self._buffers if self._host is None else ():
            prepare(self.plan, buffer)
        torch.cuda.synchronize(DEVICE)
        self._number = 0
        self.meeting = Meeting(self.num_ranks, first_number=self._first_number)
        self._launches = Meeting(self.num_ranks, self._start)

    def memory(self, rank: int) -> HostedBuffer:
        return HostedBuffer(self._buffers[rank], self.addresses, self._buffers)

    def run(self, rank: int, name: KernelName, arguments: Arguments, launch: Launch) -> None:
        """One rank's share of a launch; the last rank to come starts it for all."""
        if launch.local:
            # Rows that the common launch has sent are placed, or dropped: nobody is waited for, and
            # other ranks may have nothing to place.
            self._launch(name, [bytes(arguments)], launch)
            return
        stream = torch.cuda.current_stream(DEVICE)
        self._launches.swap(rank, _Share(name, bytes(arguments), launch, stream))

    def _start(self, everyone: list[_Share]) -> None:
        first = everyone[0]
        for other in everyone:
            assert other.name == first.name, f"{first.name} meets {other.name}"
            assert other.stream == first.stream, "hosted ranks launch on one common stream"
            same = (other.launch.grid, other.launch.block)
            assert same == (first.launch.grid, first.launch.block), f"{first} meets {other}"
        # Ranks with more experts plan in larger tables.
        shared = max(other.launch.shared_bytes for other in everyone)
        absent = set(self.skip(self._number))
        self._number += 1
        present = [share.arguments for rank, share in enumerate(everyone) if rank not in absent]
        launch = dataclasses.replace(first.launch, shared_bytes=shared)
        blocks_per_sm = min(
            SHARED_BYTES // max(shared + STATIC_BYTES, 1), 65536 // (launch.block * 128)
        )
        sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
        assert launch.grid * len(present) <= sms * blocks_per_sm, "blocks would wait for blocks"
        with torch.cuda.device(DEVICE), torch.cuda.stream(first.stream):
            self._launch(first.name, present, launch)

    def _launch(self, name: KernelName, arguments: list[bytes], launch: Launch) -> None:
        host = torch.frombuffer(bytearray(b"".join(arguments)), dtype=torch.uint8).pin_memory()
        table = host.to(DEVICE, non_blocking=True)
        self._kernels[name].launch(
            _POINTER.new(table=table.data_ptr()),
            grid=(launch.grid, len(arguments)),
            block=launch.block,
            shared_bytes=launch.shared_bytes,
            stream=torch.cuda.current_stream(DEVICE).cuda_stream,
            follows=False,
        )

    def break_up(self) -> None:
        """Ends all waiting between threads."""
        self.meeting.break_up()
        self._launches.break_up()


def prepare(plan: Plan, memory: Tensor) -> None:
    """Memory as it may be before the first call: NaN and -1 wherever the kernels must not care."""
    plan.prepare(memory)
    if isinstance(plan, HtPlan):
        memory[plan.flags :].fill_(0xFF)


class HostedCommunicator(MoECommunicator):
    """A communicator whose ranks are threads.

    Args:
        fleet: launches of all ranks.
        rank: this one.
        share_with: another communicator of the rank, whose memory the fleet uses; both take turns.
        fields: where its configuration differs from the fleet's; nothing that kernels fix.
    """

    def __init__(
        self,
        fleet: Fleet,
        rank: int,
        *,
        share_with: HostedCommunicator | None = None,
        **fields: Any,
    ) -> None:
        config = dataclasses.replace(fleet.config, **fields)
        chosen = config
        if config.engine == "hybrid":  # the choice would ask for a process group
            chosen = dataclasses.replace(config, engine="nvlink", domains=None)
        super().__init__(chosen)
        self.config = self._groupless = config
        self._fleet, self._memory_of = fleet, share_with
        self.rank, self.num_ranks = rank, fleet.num_ranks

    def initialize(self) -> None:
        if self._engine is not None:
            return
        fleet, config = self._fleet, self.config
        wire = HostedWire(self.rank, fleet.meeting)
        if self._memory_of is not None:
            memory = self._memory_of._engine.memory  # type: ignore[union-attr]
        else:
            memory = fleet.make_memory(self.rank, self._timeout_s)

        def run(name: KernelName, arguments: Arguments, launch: Launch) -> None:
            fleet.run(self.rank, name, arguments, launch)

        engine = fleet.assemble(
            config,
            wire=wire,
            placement=fleet.placement,
            memory=memory,
            run=run,
            check_inputs=self._check,
            backward_kernel=fleet.backward_kernel,
            max_warps=fleet.max_warps,
        )
        self._use(engine, fleet.placement)


def fleet_of(mode: str, case: Case, *, warps: int | None = None, **fields: Any) -> Fleet:
    """Hosted ranks for the configuration of a case.

    Args:
        mode: "ht" or "ll".
        case: of every rank.
        warps: most warps of a block; None: as many as fit.
        fields: of the configuration.
    """
    mode_fields = LL if mode == "ll" else {"engine": "nvlink"}
    config = config_of(case, DEVICE, **{**mode_fields, **SMS, **fields})
    if warps is None:
        warps = None if case.ranks <= MANY_RANKS else 4
    fleet = Fleet(config, case.ranks, max_warps=warps)
    assert (fleet.mode is LlMode) == (mode == "ll")
    return fleet


def run_cases(fleet: Fleet, job: Callable[..., None], cases: Sequence[Case], *args: Any) -> None:
    """`job(communicator, case, *args)` on every rank for each case, without gradients."""
    run_hosted(fleet, without_gradients, job, cases, *args)


def run_hosted(fleet: Fleet, job: Callable[..., Any], *args: Any) -> list[Any]:
    """`job(communicator, *args)` on every rank; results by rank, or the first failure."""
    fleet.reset()
    stream = torch.cuda.current_stream(DEVICE)

    def one(rank: int) -> Any:
        try:
            with (
                torch.cuda.device(DEVICE),
                torch.cuda.stream(stream),
                HostedCommunicator(fleet, rank) as comm,
            ):
                result = job(comm, *args)
                torch.cuda.synchronize(DEVICE)
                return result
        except BaseException:
            fleet.break_up()
            raise

    with ThreadPoolExecutor(fleet.num_ranks) as threads:
        futures = [threads.submit(one, rank) for rank in range(fleet.num_ranks)]
    return results_of(futures)


def results_of(futures: Sequence[Future[Any]]) -> list[Any]:
    """Results of the ranks' threads, or the first failure."""
    errors = [future.exception() for future in futures]
    # A rank that failed by itself says more than those that lost it.
    own = [error for error in errors if error is not None]
    for error in own:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    if own:
        raise own[0]
    return [future.result() for future in futures]
