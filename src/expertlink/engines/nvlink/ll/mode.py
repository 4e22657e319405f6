"""Low-latency mode: a few rows with one launch per call, for decode.

No call waits for the device. Unless `check_inputs` is on, nor do hosts agree first: a call that
does not fit those of the other ranks is noticed by the kernels, and reported at the next call.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import CombineCall, Combined, DispatchCall, Dispatched, nothing_left
from expertlink.engines.nvlink import tuning
from expertlink.engines.nvlink.arena import Buffer, Plan
from expertlink.engines.nvlink.capture import is_capturing
from expertlink.engines.nvlink.launch import KernelName, KernelSource, Program, Run
from expertlink.engines.nvlink.ll import arguments, combine
from expertlink.engines.nvlink.ll.arena import LlArena
from expertlink.engines.nvlink.ll.combine import LlCombiner
from expertlink.engines.nvlink.ll.dispatch import LlDispatcher
from expertlink.engines.nvlink.ll.plan import LlPlan, constants_of
from expertlink.engines.nvlink.ll.tables import BufferTables, LlRoute
from expertlink.engines.nvlink.mode import (
    ALIGNMENT,
    Memory,
    check_address,
    common_arguments,
)
from expertlink.engines.nvlink.rows import RowShape
from expertlink.engines.nvlink.shared import expert_locations
from expertlink.engines.ranks.header import Operation
from expertlink.engines.ranks.wire import Wire
from expertlink.errors import HandleError, InputError
from expertlink.jit.kernel import Arguments
from expertlink.routing import Placement
from expertlink.types import CallStatistics, DispatchBuffers, RowKind


class LlMode:
    """See `mode.Mode`."""

    routing_form = "nvlink ll"
    numbers_by_max_tokens = True
    quantizes = True
    counts_captures = False
    agrees_on_device = False
    takes_weights = True

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
        arena = memory.arena
        assert isinstance(arena, LlArena)
        self._config, self._wire = config, wire
        self._arena, self._watchdog = arena, memory.watchdog
        self._rows = RowShape.of(config)
        self._num_ranks = placement.num_ranks
        self._num_local = len(placement.experts_of_rank[wire.rank])
        self._expert_location = expert_locations(placement)
        common = {
            **common_arguments(memory, wire=wire, expert_location=self._expert_location),
            "counters": arena.counters.data_ptr(),
        }
        self._dispatcher, self._combiner = self._callers(
            common, run, num_sms, max_warps or tuning.LL_DISPATCH_WARPS
        )
        self._statistics: CallStatistics | None = None
        # Tables of buffers: statistics have to reach their arguments.
        self._tables: weakref.WeakSet[BufferTables] = weakref.WeakSet()

    def _callers(
        self, common: dict[str, int], run: Run, num_sms: int, max_warps: int
    ) -> tuple[LlDispatcher, LlCombiner]:
        """What queues dispatches and combines."""
        dispatcher = LlDispatcher(
            self._config,
            common=common,
            num_ranks=self._num_ranks,
            num_local=self._num_local,
            arena=self._arena,
            run=run,
            num_sms=num_sms,
            max_warps=max_warps,
        )
        combiner = LlCombiner(
            self._config,
            common=common,
            arena=self._arena,
            run=run,
            num_ranks=self._num_ranks,
            num_sms=num_sms,
            max_warps=max_warps,
        )
        return dispatcher, combiner

    # -- what a communicator needs ----------------------------------------------------------------

    @staticmethod
    def plan(config: MoECommunicatorConfig, num_ranks: int) -> LlPlan:
        """Sizes of the arena."""
        return LlPlan.of(config, num_ranks)

    @staticmethod
    def program(config: MoECommunicatorConfig, plan: Plan, *, num_ranks: int) -> Program:
        """The kernels, for an arena of this plan."""
        assert isinstance(plan, LlPlan)
        source, function, warps = "ll/dispatch", "ll::dispatch", tuning.LL_DISPATCH_WARPS
        kernels = [KernelSource(KernelName.DISPATCH, source, function, "<false>", warps)]
        if config.quantization is not None:
            name = KernelName.DISPATCH_QUANTIZED
            kernels.append(KernelSource(name, source, function, "<true>", warps))
        source, function, warps = "ll/combine", "ll::combine", tuning.LL_COMBINE_WARPS
        kernels.append(KernelSource(KernelName.COMBINE, source, function, "<false>", warps))
        if config.layout.expanded and config.combine_precision == "wire":
            name = KernelName.COMBINE_WEIGHTS
            kernels.append(KernelSource(name, source, function, "<true>", warps))
        return Program(
            constants=constants_of(config, plan, num_ranks=num_ranks),
            declarations=arguments.declarations(num_ranks),
            kernels=tuple(kernels),
        )

    @staticmethod
    def make_arena(plan: Plan, *, rank: int, buffer: Buffer, device: torch.device) -> LlArena:
        """This rank's view of the memory of all ranks."""
        assert isinstance(plan, LlPlan)
        return LlArena(plan, rank=rank, buffer=buffer, device=device)

    # -- calls ------------------------------------------------------------------------------------

    def check(self, call: DispatchCall) -> None:
        """Raises InputError where the kernels cannot move such rows."""
        if call.quantize_to is None:
            self._rows.check(call.x_TW, call.scales)
        elif call.x_TW.shape[1] % ALIGNMENT:
            raise InputError(
                f"quantized rows have {call.x_TW.shape[1]} bytes; the nvlink engine moves "
                f"multiples of {ALIGNMENT}"
            )
        if call.output_buffer is not None:
            check_address(call.output_buffer)

    def find_fault(self, previous: object | None, *, capturing: bool) -> HandleError | None:
        """A routing of a time when other ranks took part: nobody was asked for its rows."""
        if previous is None:
            return None
        assert isinstance(previous, LlRoute)
        if previous.epoch == previous.restarts[0]:
            return None
        return HandleError(
            "the handle is of a dispatch before clear_mask(), which lets all ranks begin anew: "
            "dispatch again"
        )

    def dispatch(self, call: DispatchCall, number: int) -> Dispatched:
        """Queues a dispatch, or with `return_recv_hook` its sending half."""
        output, route, rest = self._dispatcher.dispatch(call, number)
        finish = nothing_left if rest is None else self._unless_closed(rest)
        # By position: names take time that decode notices.
        return Dispatched(output, route, finish, self._wire.call, route.ids)

    def combine(self, call: CombineCall) -> Combined:
        """Queues a combine, or with `return_recv_hook` its sending half."""
        out_TH = call.out_TH
        after = None
        if (out_TH.data_ptr() | call.rows.data_ptr()) % ALIGNMENT:
            call = dataclasses.replace(
                call, rows=call.rows.clone(), out_TH=torch.empty_like(out_TH)
            )
            after = functools.partial(out_TH.copy_, call.out_TH)
        grads_TK, rest = self._combiner.combine(call, after)
        finish = nothing_left if rest is None else self._unless_closed(rest)
        return Combined(out_TH, grads_TK, finish)

    def weight_grads(self, state: object, weight_grads: Tensor) -> Tensor:
        """Queues the return of per-slot gradients: `[T, K]` float32."""
        assert isinstance(state, LlRoute)
        return self._combiner.weight_grads(state, weight_grads)

    def refuse(self, number: int, error: Exception) -> None:
        """Takes part in a dispatch only to refuse it."""
        self._dispatcher.refuse()

    def _unless_closed(self, half: Callable[[], None]) -> Callable[[], None]:
        """A receiving half that is launched while this communicator lives."""

        def receive() -> None:
            self._wire.enter(self._wire.phase, self._wire.call)
            half()

        return receive

    # -- memory, statistics, masks ----------------------------------------------------------------

    def occupied_sms(self, operation: Operation, num_sms: int | None) -> int:
        """Most SMs that one launch takes: a block on each."""
        caller = self._dispatcher if operation is Operation.DISPATCH else self._combiner
        return caller.most_blocks(num_sms)

    def set_tokens_bound(self, tokens_bound: int | None) -> None:
        """Nothing: ranks of one host send as many rows as there are."""

    def make_buffers(self, rows: RowKind) -> DispatchBuffers:
        """Outputs of the largest shape and tables: dispatches into them allocate nothing."""
        output = self._dispatcher.largest_output(rows)
        tables = self._dispatcher.new_tables(output, combine=self._combiner.arguments.copy())
        slots = math.prod(output.tokens.shape[:-1])
        combine.name_tables(tables.combine, self._dispatcher.tables, tables.block, max_slots=slots)
        self._tables.add(tables)
        return DispatchBuffers(output=output, tables=tables, kind=rows)

    def enable_statistics(self) -> CallStatistics:
        """Counts calls from now on; returns the same tensors every time."""
        if self._statistics is None:
            counted = self._statistics = CallStatistics.zeros(
                num_local=self._num_local, num_ranks=self._num_ranks, device=self._arena.device
            )
            own = list(self._tables)
            dispatches = [self._dispatcher.arguments, *(tables.dispatch for tables in own)]
            combines = [self._combiner.arguments, *(tables.combine for tables in own)]
            for a in (*dispatches, *combines):
                _name_statistics(a, counted)
            for a in dispatches:
                a.tokens_stat = counted.tokens_per_expert.data_ptr()
        return self._statistics

    def query_mask(self) -> Tensor:
        """`[R]` bool on the device: ranks that calls no longer wait for."""
        self._arena.follow()
        return self._arena.masks != 0

    def mask_peer(self, rank: int) -> None:
        """Calls neither wait for that rank nor send to it from now on."""
        if not 0 <= rank < self._wire.num_ranks or rank == self._wire.rank:
            raise InputError(
                f"rank {rank} cannot be masked; accepted: another rank below {self._wire.num_ranks}"
            )
        if self._config.combine_precision == "exact" and not self._config.mask_lost_peers:
            raise InputError(
                f"rank {rank} cannot be masked with combine_precision='exact' and "
                "mask_lost_peers=False: memory of its rows would be that of others, should it come "
                "back"
            )
        self._arena.follow()
        self._arena.masks[rank] = 1

    def clear_mask(self) -> None:
        """All ranks take part again, as if no call had been made. Collective."""
        self._wire.enter("clear mask", self._wire.call + 1)
        if is_capturing():
            raise InputError("clear_mask() waits for all ranks: it cannot be captured")
        self._arena.halves.finish(0)
        torch.cuda.synchronize(self._arena.device)
        self._wire.gather_text("")  # nobody writes any more
        self._arena.restart()
        self._wire.gather_text("")  # everybody's memory is ready
        self._watchdog.revive()


def _name_statistics(a: Arguments, counted: CallStatistics) -> None:
    a.rows_sent = counted.rows_sent.data_ptr()
    a.rows_received = counted.rows_received.data_ptr()
    a.bytes_sent = counted.bytes_sent.data_ptr()
    a.bytes_received = counted.bytes_received.data_ptr()
    a.longest_wait_ns = counted.longest_wait_ns.data_ptr()
