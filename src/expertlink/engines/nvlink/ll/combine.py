"""Low-latency combine of one rank: arguments and launches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import CombineCall
from expertlink.engines.nvlink import tuning
from expertlink.engines.nvlink.launch import KernelName, Launch, Run
from expertlink.engines.nvlink.ll.arena import LlArena
from expertlink.engines.nvlink.ll.arguments import COMBINE, Flag, signature
from expertlink.engines.nvlink.ll.launch import HalvesLauncher, LlLaunch
from expertlink.engines.nvlink.ll.plan import default_sms
from expertlink.engines.nvlink.ll.tables import LlRoute, said_by
from expertlink.engines.nvlink.tables import TableLayout
from expertlink.engines.ranks.header import Operation
from expertlink.jit.kernel import Arguments

# Plain numbers: the operators of enumerations take microseconds.
_WIDE_IDS, _GRADS, _ALONE = int(Flag.WIDE_IDS), int(Flag.GRADS), int(Flag.ALONE)
_TOKEN_WEIGHTS = int(Flag.TOKEN_WEIGHTS)
_COMBINE, _WEIGHT_GRADS = int(Operation.COMBINE), int(Operation.WEIGHT_GRADS)
_PLAIN, _WEIGHTS = KernelName.COMBINE, KernelName.COMBINE_WEIGHTS


@dataclass(frozen=True)
class CombinePlanner:
    """Plans launches.

    Attributes:
        config: the communicator's.
        num_ranks: R.
        num_sms: multiprocessors of the GPU.
        warps: warps of a block: one hears where the other ranks are, the others work.
        num_hosts: N.
    """

    config: MoECommunicatorConfig
    num_ranks: int
    num_sms: int
    warps: int
    num_hosts: int = 1

    def most_blocks(self, num_sms: int | None) -> int:
        """Blocks of a launch for a caller's number of SMs."""
        _, default = default_sms(self.config, self.num_ranks // self.num_hosts)
        return min(self.num_sms, num_sms or self.config.num_sms_combine or default)

    def __call__(
        self, name: KernelName, num_sms: int | None, sends: bool, receives: bool
    ) -> LlLaunch:
        """The launch of some halves, for a caller's number of SMs."""
        config, warps = self.config, self.warps
        blocks = self.most_blocks(num_sms)
        senders = warps
        if sends and receives:
            if config.layout.expanded:
                senders = int(tuning.LL_RETURNING_SHARE_EXPANDED * warps)
            else:
                each = max(tuning.LL_LEAST_RETURNING_WARPS, tuning.LL_RETURNING_WARPS // blocks)
                senders = min(int(tuning.LL_RETURNING_SHARE * warps), each)
        launch = Launch(grid=blocks, block=32 * warps, shared_bytes=0, follows=True)
        return LlLaunch(launch, max(1, senders))


class LlCombiner:
    """Queues the combines of one rank.

    Args:
        config: the communicator's.
        common: arguments that all calls share, by name.
        arena: memory shared with the other ranks.
        run: queues a kernel.
        num_ranks: R.
        num_sms: multiprocessors of the GPU.
        max_warps: most warps of a block.
        num_hosts: N.

    Attributes:
        arguments: those of combines of dispatches that made tensors of their own.
        most_blocks: of the planner.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        common: dict[str, int],
        arena: LlArena,
        run: Run,
        num_ranks: int,
        num_sms: int,
        max_warps: int,
        num_hosts: int = 1,
    ) -> None:
        self._topk, self._device, self._in_use = config.topk, arena.device, arena.in_use
        self._number = common["communicator"]
        self._exact = config.combine_precision == "exact"
        self._row_bytes = row_bytes = config.hidden_size * config.dtype.itemsize
        self._signature = signature(Operation.COMBINE, row_bytes=row_bytes)
        # Of rarer calls, by whether there are gradients of weights, and weights of tokens' ranks.
        self._signatures = {
            (grads, given): signature(
                Operation.COMBINE, row_bytes=row_bytes, weights=grads, token_weights=given
            )
            for grads in (False, True)
            for given in (False, True)
        }
        self._signature_only_grads = signature(Operation.WEIGHT_GRADS, row_bytes=0, weights=True)
        warps = max(2, min(max_warps, tuning.LL_COMBINE_WARPS))
        plan = CombinePlanner(config, num_ranks, num_sms, warps, num_hosts)
        self.most_blocks = plan.most_blocks
        self._launch = HalvesLauncher(arena=arena, run=run, plan=plan)
        self.arguments = COMBINE.new(**common)

    def combine(
        self, call: CombineCall, after: Callable[[], object] | None = None
    ) -> tuple[Tensor | None, Callable[[], None] | None]:
        """Queues a combine: the weight gradients, and the half that is left to launch.

        `after` queues what follows the receiving half.
        """
        route, grads, weights = call.state, call.weight_grads, call.slot_weights
        weights_TK = call.weights_TK
        assert isinstance(route, LlRoute)
        a = self._arguments_for(route)
        a.operation, a.row_bytes = _COMBINE, self._row_bytes
        a.rows, a.out = call.rows.data_ptr(), call.out_TH.data_ptr()
        a.slot_weights = None if weights is None else weights.data_ptr()
        a.weights_of_row = route.weights_address() if call.weighted else None
        a.signature, grads_TK = self._signature, None
        if grads is not None or weights_TK is not None:
            a.signature = self._signatures[grads is not None, weights_TK is not None]
        # Calls of several arenas must not hold SMs for their followers.
        flags, kernel = _ALONE if self._in_use[0] > 1 else 0, _PLAIN
        if grads is not None:
            flags |= _GRADS
            grads_TK = self._name_grads(a, route, grads)
        if weights_TK is not None:
            flags |= _TOKEN_WEIGHTS
            a.weights, a.weights_of_row = weights_TK.data_ptr(), None
            if not self._exact:
                kernel = _WEIGHTS
        if route.wide_ids:
            flags |= _WIDE_IDS
        left = self._launch(
            kernel,
            a,
            flags,
            call.num_sms,
            halves=call.return_recv_hook,
            needs=(call, route, grads, grads_TK) if call.return_recv_hook else (),
            after=after,
            tables=route.block,
        )
        return grads_TK, left

    def weight_grads(self, route: LlRoute, grads: Tensor) -> Tensor:
        """Queues the return of per-slot gradients: `[T, K]` float32."""
        a = self._arguments_for(route)
        a.operation, a.row_bytes = _WEIGHT_GRADS, 0
        a.slot_weights = a.weights_of_row = None
        a.signature = self._signature_only_grads
        grads_TK = self._name_grads(a, route, grads)
        flags = _GRADS | (_ALONE if self._in_use[0] > 1 else 0)
        if route.wide_ids:
            flags |= _WIDE_IDS
        self._launch(_PLAIN, a, flags, None, halves=False)
        return grads_TK

    def _arguments_for(self, route: LlRoute) -> Arguments:
        """Arguments of a combine with the tables of a routing."""
        a = route.combine
        if a is None:
            a = self.arguments
            name_tables(a, route.layout, route.block, max_slots=math.prod(route.shape))
            if route.maker != self._number or a.communicator != self._number:
                a.communicator = said_by(self._number, of=route)
        a.num_tokens, a.ids, a.subject = route.num_tokens, route.ids_address, route.origin
        return a

    def _name_grads(self, a: Arguments, route: LlRoute, grads: Tensor) -> Tensor:
        """Tensors of the gradients; what is freed here comes to its next user after the kernel."""
        grads = grads.to(torch.float32).contiguous()
        grads_TK = torch.empty(
            (route.num_tokens, self._topk), dtype=torch.float32, device=self._device
        )
        a.slot_grads, a.grads_out = grads.data_ptr(), grads_TK.data_ptr()
        return grads_TK


def name_tables(a: Arguments, layout: TableLayout, block: Tensor, *, max_slots: int) -> None:
    """Where the tables of a routing are that a combine reads, and for how many slots."""
    a.max_slots = max_slots
    base, at = block.data_ptr(), layout.at
    a.slots_of_token = base + at["slots"]
    a.rows_from, a.rows_to = base + at["rows_from"], base + at["rows_to"]
    a.choices_of_row, a.tokens_of_row = base + at["choices"], base + at["tokens"]
