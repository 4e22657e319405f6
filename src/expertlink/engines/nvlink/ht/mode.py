"""High-throughput mode: many rows, for training and prefill. Hosts may wait for counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import CombineCall, Combined, DispatchCall, Dispatched, nothing_left
from expertlink.engines.nvlink import tuning
from expertlink.engines.nvlink.arena import Buffer, Plan
from expertlink.engines.nvlink.ht import arguments
from expertlink.engines.nvlink.ht.arena import HtArena
from expertlink.engines.nvlink.ht.blocks import BlockShape
from expertlink.engines.nvlink.ht.combine import HtCombiner
from expertlink.engines.nvlink.ht.dispatch import HtDispatcher, Started
from expertlink.engines.nvlink.ht.outputs import BufferTables
from expertlink.engines.nvlink.ht.plan import HtPlan, combine_warps, constants_of
from expertlink.engines.nvlink.launch import KernelName, KernelSource, Program, Run
from expertlink.engines.nvlink.mode import (
    ALIGNMENT,
    Memory,
    check_address,
    common_arguments,
)
from expertlink.engines.nvlink.rows import RowShape
from expertlink.engines.nvlink.shared import Verdict, expert_locations
from expertlink.engines.nvlink.tables import Route, as_route
from expertlink.engines.nvlink.watchdog import Mail
from expertlink.engines.outputs import largest_output
from expertlink.engines.ranks.agreement import judge
from expertlink.engines.ranks.header import NUM_FIELDS, Operation
from expertlink.engines.ranks.wire import Wire
from expertlink.errors import (
    CapacityError,
    ConfigurationError,
    EngineUnavailableError,
    InputError,
)
from expertlink.jit.kernel import Arguments
from expertlink.routing import Placement, explain_ids
from expertlink.types import CallStatistics, DispatchBuffers, RowKind


class Dispatcher(Protocol):
    """What queues the dispatches of one rank: `HtDispatcher` says what the methods do."""

    @property
    def arguments(self) -> Arguments: ...

    @property
    def most_blocks(self) -> Callable[[int | None], int]: ...

    def dispatch(self, call: DispatchCall, *, number: int) -> Started: ...

    def dispatch_cached(self, call: DispatchCall, old: Route, *, number: int) -> Started: ...

    def refuse(self, error: Exception, *, number: int) -> Mail | None: ...

    def new_tables(self) -> BufferTables | None: ...


class Combiner(Protocol):
    """What queues the combines of one rank: `HtCombiner` says what the methods do."""

    @property
    def arguments(self) -> Arguments: ...

    @property
    def most_blocks(self) -> Callable[[int | None], int]: ...

    def combine(self, call: CombineCall) -> Tensor | None: ...

    def weight_grads(self, route: Route, grads: Tensor) -> Tensor: ...


class HtMode:
    """See `mode.Mode`."""

    routing_form = "nvlink ht"
    numbers_by_max_tokens = False
    quantizes = False
    counts_captures = True
    agrees_on_device = True
    takes_weights = False

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        wire: Wire,
        placement: Placement,
        memory: Memory,
        run: Run,
        num_sms: int,
        max_warps: int | None = None,
    ) -> None:
        if config.combine_precision == "exact":
            raise EngineUnavailableError("combine_precision='exact' needs low-latency kernels")
        self._config, self._wire, self._placement = config, wire, placement
        self._watchdog = memory.watchdog
        self._rows = RowShape.of(config)
        self._experts = placement.experts_of_rank[wire.rank]
        self._expert_location = expert_locations(placement)
        common = common_arguments(memory, wire=wire, expert_location=self._expert_location)
        self._dispatcher, self._combiner = self._callers(memory, common, run, num_sms, max_warps)
        self._statistics: CallStatistics | None = None

    def _callers(
        self,
        memory: Memory,
        common: dict[str, int],
        run: Run,
        num_sms: int,
        max_warps: int | None,
    ) -> tuple[Dispatcher, Combiner]:
        """What queues dispatches and combines."""
        config, arena, num_ranks = self._config, memory.arena, self._placement.num_ranks
        assert isinstance(arena, HtArena)
        blocks = BlockShape(
            config, num_ranks=num_ranks, num_local=len(self._experts), max_warps=max_warps
        )
        dispatcher = HtDispatcher(
            config,
            common=common,
            experts=self._experts,
            num_ranks=num_ranks,
            arena=arena,
            watchdog=memory.watchdog,
            run=run,
            blocks=blocks,
            num_sms=num_sms,
        )
        combiner = HtCombiner(config, common=common, run=run, blocks=blocks, num_sms=num_sms)
        return dispatcher, combiner

    # -- what a communicator needs ----------------------------------------------------------------

    @staticmethod
    def plan(config: MoECommunicatorConfig, num_ranks: int) -> HtPlan:
        """Sizes of the arena."""
        return HtPlan.of(config, num_ranks)

    @staticmethod
    def program(config: MoECommunicatorConfig, plan: Plan, *, num_ranks: int) -> Program:
        """The kernels, for an arena of this plan."""
        assert isinstance(plan, HtPlan)
        moving, summing = tuning.HT_MAX_WARPS + 1, combine_warps(config) + 1
        return Program(
            constants=constants_of(config, plan, num_ranks=num_ranks),
            declarations=arguments.declarations(),
            kernels=(
                KernelSource(KernelName.DISPATCH, "ht/dispatch", "ht::dispatch", max_warps=moving),
                KernelSource(KernelName.COMBINE, "ht/combine", "ht::combine", max_warps=summing),
            ),
        )

    @staticmethod
    def make_arena(plan: Plan, *, rank: int, buffer: Buffer, device: torch.device) -> HtArena:
        """This rank's view of the memory of all ranks."""
        assert isinstance(plan, HtPlan)
        return HtArena(plan, rank=rank, buffer=buffer, device=device)

    # -- calls ------------------------------------------------------------------------------------

    def check(self, call: DispatchCall) -> None:
        """Raises InputError where the kernels cannot move such rows."""
        self._rows.check(call.x_TW, call.scales)
        if call.output_buffer is not None:
            check_address(call.output_buffer)

    def find_fault(self, previous: object | None, *, capturing: bool) -> InputError | None:
        """A capture cannot wait for counts."""
        if not capturing or previous is not None or self._config.static_shapes:
            return None
        return InputError(
            "a dispatch without previous_handle waits for the row counts of all ranks, so it "
            "cannot be captured in a CUDA graph: configure static_shapes=True, or capture "
            "cached dispatches"
        )

    def dispatch(self, call: DispatchCall, number: int) -> Dispatched:
        """Queues a dispatch; a new routing waits for the counts unless shapes are static."""
        if call.previous is None:
            started = self._dispatcher.dispatch(call, number=number)
        else:
            old = as_route(call.previous)
            started = self._dispatcher.dispatch_cached(call, old, number=number)
        output, route = started.output, started.route
        if output is None or route is None:
            self._raise_verdict(call, started)
        # By position: names take time that the caller notices.
        return Dispatched(output, route, nothing_left, self._wire.call, route.ids)

    def combine(self, call: CombineCall) -> Combined:
        """Queues a combine."""
        if call.slot_weights is not None:
            route = with_slot_weights(as_route(call.state), call.slot_weights)
            call = dataclasses.replace(call, state=route)
        out_TH = call.out_TH
        if out_TH.data_ptr() % ALIGNMENT:
            call = dataclasses.replace(call, out_TH=torch.empty_like(out_TH))
        grads_TK = self._combiner.combine(call)
        if call.out_TH is not out_TH:
            out_TH.copy_(call.out_TH)
        return Combined(out_TH, grads_TK, nothing_left)

    def weight_grads(self, state: object, weight_grads: Tensor) -> Tensor:
        """Queues the return of per-slot gradients: `[T, K]` float32."""
        return self._combiner.weight_grads(as_route(state), weight_grads)

    def refuse(self, number: int, error: Exception) -> None:
        """Takes part in a dispatch only to refuse it; where the host learns of it, all ranks agree.

        Raises:
            PeerError: the ranks are not even in the same call.
            TooManyTokensError: a rank has more tokens than T_max.
        """
        mail = self._dispatcher.refuse(error, number=number)
        if mail is not None:
            self._judge(mail, refused=error)

    def _raise_verdict(self, call: DispatchCall, started: Started) -> NoReturn:
        """A dispatch that no rank carries out."""
        mail, number = started.mail, self._wire.call
        assert mail is not None
        if mail.verdict is Verdict.DISAGREE:
            ids_TK = call.topk_ids_TK
            assert ids_TK is not None
            self._judge(mail, explain=lambda: explain_ids(ids_TK, self._placement.num_experts))
        raise CapacityError(
            f"rank {mail.rank} would receive {mail.rows} rows in dispatch #{number} but has room "
            f"for {mail.capacity} (max_recv_tokens_per_rank or its output_buffer); nothing was "
            "placed",
            rank=mail.rank,
            rows=mail.rows,
            capacity=mail.capacity,
        )

    def _judge(
        self,
        mail: Mail,
        *,
        refused: Exception | None = None,
        explain: Callable[[], Exception] | None = None,
    ) -> NoReturn:
        """Raises why a dispatch does not happen, the same on all ranks."""
        error = self._watchdog.disagreement(mail.headers)
        if self._watchdog.is_fatal(mail.headers):
            self._watchdog.fail(str(error))
            raise error if refused is None else refused
        # The ranks that refused say why.
        judge(
            self._wire,
            Operation.DISPATCH,
            [words[:NUM_FIELDS] for words in mail.headers],
            max_tokens=self._config.max_tokens_per_rank,
            refused=refused,
            explain=explain,
            resynchronise=False,
        )
        raise error

    # -- memory, statistics, masks ----------------------------------------------------------------

    def occupied_sms(self, operation: Operation, num_sms: int | None) -> int:
        """Most SMs that one launch takes: a block on each."""
        caller = self._dispatcher if operation is Operation.DISPATCH else self._combiner
        return caller.most_blocks(num_sms)

    def set_tokens_bound(self, tokens_bound: int | None) -> None:
        """Nothing: ranks of one host send as many rows as there are."""

    def make_buffers(self, rows: RowKind) -> DispatchBuffers:
        """Outputs of the largest shape and tables: dispatches into them allocate nothing."""
        output = largest_output(
            self._config,
            rows,
            num_ranks=self._placement.num_ranks,
            num_local=len(self._experts),
            device=self._wire.device,
        )
        return DispatchBuffers(output=output, tables=self._dispatcher.new_tables(), kind=rows)

    def enable_statistics(self) -> CallStatistics:
        """Counts calls from now on; returns the same tensors every time.

        Longest waits stay 0: these kernels do not measure them.
        """
        if self._statistics is None:
            counted = self._statistics = CallStatistics.zeros(
                num_local=len(self._experts),
                num_ranks=self._placement.num_ranks,
                device=self._wire.device,
            )
            dispatch = self._dispatcher.arguments
            for a in (dispatch, self._combiner.arguments):
                a.rows_sent = counted.rows_sent.data_ptr()
                a.rows_received = counted.rows_received.data_ptr()
                a.bytes_sent = counted.bytes_sent.data_ptr()
                a.bytes_received = counted.bytes_received.data_ptr()
            dispatch.tokens_stat = counted.tokens_per_expert.data_ptr()
        return self._statistics

    def query_mask(self) -> Tensor:
        """`[R]` bool on the device: nobody is masked."""
        return torch.zeros(self._wire.num_ranks, dtype=torch.bool, device=self._wire.device)

    def mask_peer(self, rank: int) -> None:
        """Refuses."""
        raise ConfigurationError(
            f"rank {rank} cannot be masked: peers can be masked with mode='ll' on the nvlink engine"
        )

    def clear_mask(self) -> None:
        """There is nothing to clear."""


def with_slot_weights(route: Route, slot_weights: Tensor) -> Route:
    """The same routing with other weights: one for every slot of an expanded layout."""
    weights = slot_weights.reshape(-1)
    # Entries beyond the last row, and those that name no slot, are never multiplied.
    slots = route.table("choices").clamp(min=0, max=max(weights.numel() - 1, 0))
    picked = weights[slots] if weights.numel() else weights.new_zeros(slots.shape)
    return dataclasses.replace(route, weights_block=picked, weighted=True)
