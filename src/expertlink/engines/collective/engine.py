"""The collective engine: torch.distributed all-to-alls, on any device, over any number of hosts.

A row crosses the wire once per (token, destination rank), together with its local expert ids,
weights and scales; combine sends one partial sum per (token, rank) back. This engine defines the
bits that every other engine reproduces.

This file is the engine as `engines/base.py` sees it. dispatch.py and combine.py do the calls.
"""

from __future__ import annotations

import logging
from typing import NoReturn

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.domains import Domains
from expertlink.engines.base import CombineCall, Combined, DispatchCall, Dispatched
from expertlink.engines.collective.combine import Returns
from expertlink.engines.collective.dispatch import Dispatcher
from expertlink.engines.collective.ordered_sum import OrderedSum
from expertlink.engines.collective.route import Route, finished
from expertlink.engines.collective.send_order import MAX_RANKS, KernelSender
from expertlink.engines.collective.sending import Sender, TorchSender
from expertlink.engines.collective.tally import Tally
from expertlink.engines.outputs import into_tokens, largest_output
from expertlink.engines.ranks import metadata
from expertlink.engines.ranks.agreement import agree
from expertlink.engines.ranks.header import NUM_FIELDS, Operation
from expertlink.engines.ranks.wire import Wire
from expertlink.engines.weighted_backward import WeightedBackward
from expertlink.errors import ConfigurationError
from expertlink.jit.compiler import unavailable_reason
from expertlink.reduction import BackwardKernel, SumKernel
from expertlink.routing import Placement
from expertlink.types import CallStatistics, DispatchBuffers, RowKind
from expertlink.workspace import Workspace

logger = logging.getLogger("expertlink")


class CollectiveEngine:
    """See the module's docstring; the contract is `engines.base.Engine`."""

    name = "collective"
    routing_form = "collective"
    numbers_by_max_tokens = False
    quantizes = False

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        wire: Wire,
        placement: Placement,
        check_inputs: bool,
    ) -> None:
        self._config, self._wire = config, wire
        domains = Domains.of(config.domains or (0,) * wire.num_ranks)
        self._num_local = len(placement.experts_of_rank[wire.rank])
        # gloo ends the process when sizes do not match, so there the ranks agree on every call.
        self._agrees = check_inputs or (wire.device.type == "cpu" and wire.num_ranks > 1)
        self._workspace = Workspace(wire.device)
        self._tally = Tally(
            rank=wire.rank,
            domains=domains,
            num_local=self._num_local,
            device=wire.device,
        )
        if config.num_sms_dispatch is not None or config.num_sms_combine is not None:
            logger.warning(
                "num_sms_dispatch and num_sms_combine have no effect with the collective engine: "
                "torch.distributed chooses its SMs"
            )
        sender, sum_kernel, self.backward_kernel = _kernels(
            config, wire=wire, placement=placement, by_host=domains.num_hosts > 1
        )
        self._dispatcher = Dispatcher(
            config,
            wire=wire,
            placement=placement,
            workspace=self._workspace,
            sender=sender or TorchSender(placement),
            tally=self._tally,
            check_inputs=check_inputs,
            agrees=self._agrees,
        )
        self._returns = Returns(
            config,
            wire=wire,
            domains=domains,
            workspace=self._workspace,
            kernel=sum_kernel,
            tally=self._tally,
            agrees=self._agrees,
        )

    # -- calls ------------------------------------------------------------------------------------

    def dispatch(self, call: DispatchCall) -> Dispatched:
        """Starts a dispatch: agrees on counts (waits for peers), then rows are on their way."""
        self._enter(Operation.DISPATCH if call.previous is None else Operation.CACHED_DISPATCH)
        with self._wire.abort_on_error():
            return self._dispatcher.dispatch(into_tokens(call))

    def combine(self, call: CombineCall) -> Combined:
        """Starts a combine: sums, or rows, are on their way to the tokens' ranks."""
        self._enter(Operation.COMBINE)
        with self._wire.abort_on_error():
            return self._returns.combine(call)

    def weight_grads(self, state: object, weight_grads: Tensor) -> Tensor:
        """Returns per-slot weight gradients to the tokens' ranks: `[T, K]` float32."""
        self._enter(Operation.WEIGHT_GRADS)
        route = finished(state)
        with self._wire.abort_on_error():
            return self._returns.weight_grads(route, weight_grads)

    def refuse(self, operation: Operation, error: Exception) -> NoReturn:
        """Raises `error` here and `PeerError` on the ranks that exchange headers in this call."""
        if self._agrees or operation is Operation.DISPATCH:
            self._enter(operation)
            with self._wire.abort_on_error():
                agree(
                    self._wire,
                    operation,
                    num_experts=self._config.num_experts,
                    max_tokens=self._config.max_tokens_per_rank,
                    device=self._wire.device,
                    refused=error,
                )
        raise error

    def _enter(self, operation: Operation) -> None:
        self._wire.enter(operation.title, self._wire.call + 1)

    # -- what a dispatch left behind --------------------------------------------------------------

    def wire_rows(self, state: object) -> tuple[list[int], list[int]]:
        """Rows sent to and received from each rank, own rank included."""
        assert isinstance(state, Route)
        return list(state.splits.send), list(state.splits.receive)

    def slot_weights(self, state: object) -> Tensor | None:
        """Expanded layouts: routing weight of every slot, 0 where none is filled."""
        return finished(state, self._config.weight_dtype).slot_weights()

    # -- SMs, memory and statistics ---------------------------------------------------------------

    def compute_sms(self, operation: Operation, num_sms: int | None) -> int:
        """All SMs of the GPU: NCCL decides how many its kernels take."""
        del operation, num_sms
        device = self._wire.device
        if device.type != "cuda":
            raise ConfigurationError(f"compute_sms counts SMs of a GPU; tensors live on {device}")
        return torch.cuda.get_device_properties(device).multi_processor_count

    def make_buffers(self, rows: RowKind) -> DispatchBuffers:
        """Outputs of the largest shape; every call makes its own tables."""
        output = largest_output(
            self._config,
            rows,
            num_ranks=self._wire.num_ranks,
            num_local=self._num_local,
            device=self._wire.device,
        )
        return DispatchBuffers(output=output, tables=None, kind=rows)

    def memory_estimate(self) -> dict[str, int]:
        """Bytes by region of the largest possible call, beyond inputs and outputs."""
        config, ranks = self._config, self._wire.num_ranks
        copies = min(ranks, config.topk)
        sent = config.max_tokens_per_rank * copies
        received = config.max_tokens_per_rank * ranks
        row = config.hidden_size * config.dtype.itemsize
        ids_and_weights = config.topk * (metadata.ID_BYTES + config.weight_dtype.itemsize)
        return {
            "rows sent": sent * row,
            "rows received": received * row,
            "ids and weights": (sent + received) * ids_and_weights,
            "headers": 2 * ranks * 4 * (NUM_FIELDS + ranks + config.num_experts),
        }

    def enable_statistics(self) -> CallStatistics:
        """Counts calls from now on; `longest_wait_ns` stays 0."""
        return self._tally.enable()

    # -- health -----------------------------------------------------------------------------------

    def check_health(self) -> None:
        """Raises ClosedError after a failure; calls have raised the failure itself."""
        self._wire.check()

    def set_tokens_bound(self, tokens_bound: int | None) -> None:
        """Nothing: ranks tell each other how many rows they send."""

    def set_timeout(self, timeout_s: float) -> None:
        """Bounds later waits, in seconds."""
        self._wire.timeout_s = timeout_s

    def abort(self, reason: str) -> None:
        """Later calls raise ClosedError here, and AbortError on ranks that wait for this one."""
        self._wire.abort(reason)

    def close(self) -> None:
        """Frees the workspace and drops the group, which belongs to the caller."""
        self._workspace.clear()
        self._wire.close()

    # -- masks: every call of this engine needs all ranks -----------------------------------------

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


def _kernels(
    config: MoECommunicatorConfig, *, wire: Wire, placement: Placement, by_host: bool
) -> tuple[Sender | None, SumKernel | None, BackwardKernel | None]:
    """GPUs: kernels in place of long chains of small operations, where they can be compiled."""
    if wire.device.type != "cuda":
        return None, None, None
    reason = unavailable_reason()
    if reason is not None:
        logger.warning("the collective engine falls back to slower torch operations: %s", reason)
        return None, None, None
    sender = KernelSender(wire.device, placement) if wire.num_ranks <= MAX_RANKS else None
    backward = WeightedBackward(wire.device, dtype=config.dtype) if config.layout.expanded else None
    return sender, OrderedSum(wire.device, dtype=config.dtype, by_host=by_host), backward
