"""Ranks of the nvlink engine on streams of one GPU, each of which launches when it comes to it.

Beside `hosted.py`, where one kernel serves all ranks: here a rank may be late, in another call or
in a capture, as processes may. Budgets are small, so that the blocks of all ranks are resident.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from expertlink import MoECommunicator, MoECommunicatorConfig
from expertlink.engines.nvlink.build import assemble, make_memory, mode_of
from expertlink.engines.nvlink.launch import DeviceRunner
from expertlink.jit import compiler
from expertlink.routing import Placement, even_blocks
from support.hosted import DEVICE, HostedBuffer, HostedWire, Meeting, prepare, results_of

SMS = {"num_sms_dispatch": 3, "num_sms_combine": 3}


class World:
    """What the ranks of a test have in common: where they meet, and what they wait for."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.meeting = Meeting(num_ranks)
        self._barrier = threading.Barrier(num_ranks)

    def meet(self) -> None:
        """All ranks, with nothing under way on the GPU."""
        self._barrier.wait(60)
        torch.cuda.synchronize(DEVICE)
        self._barrier.wait(60)

    def break_up(self) -> None:
        self.meeting.break_up()
        self._barrier.abort()


class Rank(MoECommunicator):
    """One rank's communicator; its calls come on the stream of the rank's thread.

    Args:
        world: of all ranks.
        rank: this one.
        share_with: another communicator of this rank, whose memory serves this one too.
        fields: of the configuration.
    """

    def __init__(
        self, world: World, rank: int, *, share_with: Rank | None = None, **fields: Any
    ) -> None:
        usual: dict[str, Any] = {
            "num_experts": 8,
            "hidden_size": 64,
            "topk": 2,
            "max_tokens_per_rank": 32,
            "device": DEVICE,
            "check_inputs": False,
            "enable_overlap": False,
            "timeout_s": 10.0,
        }
        super().__init__(MoECommunicatorConfig(**{**usual, **SMS, **fields}))
        self.world, self._memory_of = world, share_with
        self.rank, self.num_ranks = rank, world.num_ranks
        self.initialize()

    def initialize(self) -> None:
        if self._engine is not None:
            return
        world, config = self.world, self.config
        wire = HostedWire(self.rank, world.meeting)
        placement = Placement.from_ranks(
            even_blocks(config.num_experts, world.num_ranks),
            num_ranks=world.num_ranks,
            device=DEVICE,
        )
        mode = mode_of(config, placement)
        plan = mode.plan(config, world.num_ranks)
        if self._memory_of is not None:
            memory = self._memory_of._engine.memory  # type: ignore[union-attr]
            memory.arena.check_fits(plan)
            plan = memory.arena.plan
        else:
            local = torch.empty(plan.total, dtype=torch.uint8, device=DEVICE)
            prepare(plan, local)
            buffers = world.meeting.swap(self.rank, local)
            addresses = [buffer.data_ptr() for buffer in buffers]
            memory = make_memory(
                config,
                mode,
                plan,
                rank=self.rank,
                buffer=HostedBuffer(local, addresses, buffers),
                device=DEVICE,
                timeout_s=self._timeout_s,
            )
        program = mode.program(config, plan, num_ranks=world.num_ranks)
        engine = assemble(
            config,
            mode,
            wire=wire,
            placement=placement,
            memory=memory,
            run=DeviceRunner(config, program, num_ranks=world.num_ranks, device=DEVICE),
            check_inputs=self._check,
        )
        self._use(engine, placement)
        world.meet()

    # -- what tests need of it --------------------------------------------------------------------

    @contextmanager
    def capture(self) -> Iterator[torch.cuda.CUDAGraph]:
        """A capture of this rank's stream that waits for no other rank's work."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            yield graph
        finally:
            graph.capture_end()

    def settle(self, limit_s: float = 20.0) -> None:
        """Waits for this rank's stream."""
        done = torch.cuda.Event()
        done.record()
        ends = time.monotonic() + limit_s
        while not done.query():
            assert time.monotonic() < ends, f"rank {self.rank} is still at work"
            time.sleep(0.0005)


def run_ranks(num_ranks: int, job: Callable[..., Any], *args: Any) -> list[Any]:
    """`job(world, rank, *args)` in a thread and on a stream for each rank; results by rank."""
    assert compiler.unavailable_reason() is None  # imports what threads must not import at once
    # A graph that is freed in a thread that captures would end the capture.
    gc.collect()
    world = World(num_ranks)
    streams = [torch.cuda.Stream(DEVICE) for _ in range(num_ranks)]

    def one(rank: int) -> Any:
        try:
            with (
                torch.cuda.device(DEVICE),
                torch.cuda.stream(streams[rank]),
                torch.no_grad(),
            ):
                # More memory from the driver may come only when all kernels have ended.
                kept = [torch.empty(1 << 19, dtype=torch.uint8, device=DEVICE) for _ in range(64)]
                kept += [torch.empty(1 << 24, dtype=torch.uint8, device=DEVICE) for _ in range(4)]
                del kept
                world.meet()
                return job(world, rank, *args)
        except BaseException:
            world.break_up()
            raise

    with ThreadPoolExecutor(num_ranks) as threads:
        futures = [threads.submit(one, rank) for rank in range(num_ranks)]
    results = results_of(futures)
    torch.cuda.synchronize(DEVICE)
    return results


def inputs_of(
    comm: MoECommunicator, seed: int, tokens: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, routing and weights of a rank, small whole numbers, so that sums are exact."""
    config = comm.config
    count = config.max_tokens_per_rank if tokens is None else tokens
    generator = torch.Generator().manual_seed(1000 * seed + comm.rank)
    x_TH = torch.randint(-8, 9, (count, config.hidden_size), generator=generator)
    scores = torch.rand(count, config.num_experts, generator=generator)
    ids_TK = scores.topk(config.topk).indices
    weights_TK = torch.randint(1, 3, (count, config.topk), generator=generator)
    # Converted on the host: the first kernel of a kind is loaded, which waits for all others.
    return x_TH.to(config.dtype).to(DEVICE), ids_TK.to(DEVICE), weights_TK.float().to(DEVICE)


def ranks_of(comm: MoECommunicator, ids_TK: Tensor) -> Tensor:
    """`[T, 1]` how many ranks each token goes to, on the host."""
    owners = even_blocks(comm.config.num_experts, comm.num_ranks)
    counts = [[len({owners[expert] for expert in token})] for token in ids_TK.tolist()]
    return torch.tensor(counts, dtype=torch.float32).view(-1, 1)


def round_trip(comm: MoECommunicator, seed: int, tokens: int | None = None, **options: Any) -> bool:
    """A dispatch and a combine of what it brought; whether the result is right."""
    x_TH, ids_TK, weights_TK = inputs_of(comm, seed, tokens)
    received, handle = comm.dispatch(x_TH, ids_TK, weights_TK, **options)
    y_TH = comm.combine(received.tokens, handle)
    return is_right(comm, seed, y_TH, tokens)


def is_right(comm: MoECommunicator, seed: int, y_TH: Tensor, tokens: int | None = None) -> bool:
    """Whether that came back of unchanged rows; waits for this rank's stream only."""
    x_TH, ids_TK, weights_TK = inputs_of(comm, seed, tokens)
    return is_sum(comm, y_TH, x_TH, ids_TK, weights_TK)


def is_sum(
    comm: MoECommunicator, y_TH: Tensor, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor
) -> bool:
    """Whether `y_TH` is what comes back if every expert returns its rows unchanged."""
    factor = weights_TK.cpu().sum(1, keepdim=True)
    if not comm.config.layout.expanded:
        factor = ranks_of(comm, ids_TK)
    return bool((y_TH.cpu().float() == x_TH.cpu().float() * factor).all())
