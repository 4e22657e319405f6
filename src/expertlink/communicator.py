"""`MoECommunicator`: the calls together, and what operators and frameworks ask and change.

A call goes down once and comes back once: its method (dispatching.py, combining.py) has its
arguments checked (calls.py) and starts it, in line or on a stream (overlap.py), through autograd
where gradients are tracked (autograd.py), by the engine (engines/). A call that is refused here is
refused through the engine, which tells the peers. connection.py is the communicator's life.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expertlink.combining import Combining
from expertlink.config import MoECommunicatorConfig
from expertlink.dispatching import Dispatching
from expertlink.engines.ranks.header import Operation
from expertlink.engines.ranks.rebalance import rebalance, sum_copies
from expertlink.errors import ConfigurationError, InputError
from expertlink.handles import tables_of
from expertlink.overlap import check_settings, operation_of
from expertlink.placement import ExpertPlacement
from expertlink.types import CallStatistics, CommOverlapConfig, DispatchHandle


class MoECommunicator(Dispatching, Combining):
    """Dispatches tokens to the ranks of their experts and combines what the experts return.

    All methods but the constructor, `close` and those marked as local are collective: every rank of
    the group calls them in the same order. Not thread-safe. Usable as a context manager.

    Args:
        config: what is fixed for the communicator's lifetime.
        share_with: another communicator of the same group, of the nvlink engine: both use its
            memory and take turns, as the layers of a model do. Build the largest one first.

    Raises:
        ConfigurationError: device and group do not fit each other.
        EngineUnavailableError: the requested engine cannot run here, or none can.
    """

    def __init__(
        self, config: MoECommunicatorConfig, *, share_with: MoECommunicator | None = None
    ) -> None:
        super().__init__(config, share_with=share_with)

    # -- overlap ----------------------------------------------------------------------------------

    def create_overlap_config(
        self,
        op: str,
        *,
        stream: torch.cuda.Stream | None = None,
        wait_events: Sequence[torch.cuda.Event] = (),
        num_sms: int | None = None,
    ) -> CommOverlapConfig:
        """Where the asynchronous form of `op` ("dispatch" or "combine") runs. Local.

        Args:
            op: the operation.
            stream: CUDA stream to run on; None: the communicator's own, of high priority.
            wait_events: CUDA events to wait for, besides the caller's current stream.
            num_sms: SMs the operation may use; None: `num_sms_dispatch` / `num_sms_combine`.
        """
        operation = operation_of(op)
        check_settings(device=self.device, on_stream=bool(stream or wait_events), num_sms=num_sms)
        if num_sms is None:
            config = self.config
            on_dispatch = operation is Operation.DISPATCH
            num_sms = config.num_sms_dispatch if on_dispatch else config.num_sms_combine
        return CommOverlapConfig(op, stream or self._stream, tuple(wait_events), num_sms)

    def compute_sms(self, op: str, *, num_sms: int | None = None) -> int:
        """SMs of this GPU that one dispatch or combine leaves to kernels beside it. Local.

        Give it to kernels that can be told how many blocks to launch, as the size of a persistent
        grid. Initializes (collective) if needed.

        Args:
            op: "dispatch" or "combine".
            num_sms: SMs of the call, such as `CommOverlapConfig.num_sms`; None:
                `num_sms_dispatch` / `num_sms_combine`, else the engine's choice.

        Returns:
            All SMs less those of the call; 0 where that takes all. With the collective engine all
            SMs: NCCL decides how many its kernels take, and does not say. The SMs are those of the
            GPU, also in a green context. An uncached dispatch of mode "ht" whose output turns out
            too small, as the first one does, takes more for a moment (docs/tuning.md).

        Raises:
            InputError: no such operation, or `num_sms` is less than 1.
            ConfigurationError: tensors live on the CPU, which has no SMs.
            ClosedError: the communicator is closed or aborted.
        """
        operation = operation_of(op)
        check_settings(device=self.device, on_stream=False, num_sms=num_sms)
        return self._ready().compute_sms(operation, num_sms)

    # -- rows of a dispatch -----------------------------------------------------------------------

    def wire_rows(self, handle: DispatchHandle) -> tuple[list[int], list[int]]:
        """Rows that a dispatch sent to and received from each rank, own rank included."""
        engine = self._ready()
        handle = self._calls.check_handle(handle)
        handle.wait()
        return engine.wire_rows(handle.state)

    def expert_ranges(self, handle: DispatchHandle) -> tuple[Tensor, Tensor]:
        """Where the rows of each source rank lie among those of each local expert.

        FLAT and EXPERT_MAJOR, whose groups are ordered by source rank.

        Returns:
            `(starts, counts)`, int32 `[E_loc, R]` on the device, owned by the caller: rows of local
            expert `e` that came from rank `r` are slots `starts[e, r]` up to, not including,
            `starts[e, r] + counts[e, r]`: of `tokens` (FLAT), of `tokens[e]` (EXPERT_MAJOR).

        Raises:
            InputError: the layout is another one.
            HandleError, ClosedError: the handle or this communicator cannot be used.
        """
        self._ready()
        handle = self._calls.check_handle(handle)
        if not self.config.layout.expanded:
            raise InputError(
                f"expert_ranges needs a layout with a row per expert (flat, expert_major), not "
                f"{self.config.layout.value}"
            )
        return tables_of(handle).expert_ranges(self.config.layout, self.config.expert_alignment)

    def slot_weights(self, handle: DispatchHandle) -> Tensor | None:
        """Routing weight of every row, 0 for rows that nothing fills. Local.

        FLAT and EXPERT_MAJOR; the other layouts have the weights in their output.

        Returns:
            float32 in the leading shape of `tokens`; None where dispatch was given no weights.

        Raises:
            InputError: the layout is another one.
            HandleError, ClosedError: the handle or this communicator cannot be used.
        """
        engine = self._ready()
        handle = self._calls.check_handle(handle)
        handle.wait()
        if not self.config.layout.expanded:
            raise InputError(
                f"slot_weights needs a layout with a row per expert (flat, expert_major), not "
                f"{self.config.layout.value}"
            )
        return engine.slot_weights(handle.state)

    def arrivals(self, handle: DispatchHandle) -> Tensor:
        """Where the choices of every arrival are: one per (source rank, token), in that order.

        Local; waits for the device. For tests and tools: experts need none of it.

        Returns:
            `[N, K]` int64, owned by the caller: the row in the flattened `tokens` (FLAT,
            EXPERT_MAJOR), or the local expert (TOKEN_MAJOR, RANK_MAJOR); -1 for choices of other
            ranks.

        Raises:
            HandleError, ClosedError: the handle or this communicator cannot be used.
        """
        self._ready()
        return tables_of(self._calls.check_handle(handle)).arrivals()

    def source_tokens(self, handle: DispatchHandle) -> Tensor:
        """What `DispatchOutput.source_tokens` would be, made now instead of by every dispatch.

        Local. In mode "ll" of the nvlink engine, whose tables have it; elsewhere it comes with the
        rows, if the configuration says `source_tokens=True`.

        Returns:
            Leading shape of the rows, int32, owned by the caller: the token of its rank that every
            row is, -1 in padding.

        Raises:
            ConfigurationError: this engine, or mode, cannot tell afterwards.
            HandleError, ClosedError: the handle or this communicator cannot be used.
        """
        engine = self._ready()
        handle = self._calls.check_handle(handle)
        tokens = tables_of(handle).source_tokens(handle.rows_shape[:-1])
        if tokens is None:
            raise ConfigurationError(
                f"source tokens come with the rows in mode={self.config.mode!r} of the "
                f"{engine.name} engine: configure source_tokens=True"
            )
        return tokens

    # -- memory, statistics, placement ------------------------------------------------------------

    def memory_estimate(self) -> dict[str, int]:
        """Bytes by region that the largest possible call holds beyond inputs and outputs."""
        return self._ready().memory_estimate()

    def enable_statistics(self) -> CallStatistics:
        """Counts rows and bytes of this rank's calls from now on. Local; safe to repeat.

        Returns:
            The running totals, the same tensors every time; valid as long as referenced.
        """
        engine = self._ready()
        with torch.inference_mode(False):  # calls in any mode add to them
            return engine.enable_statistics()

    def rebalance(
        self,
        tensors: Sequence[Tensor],
        new: ExpertPlacement,
        *,
        old: ExpertPlacement | None = None,
    ) -> list[Tensor]:
        """Moves what belongs to experts to another placement, by one all-to-all. Collective.

        This communicator's own placement stays as it is: where `new` has as many slots on every
        rank it goes on to serve, else a new communicator does. On the nvlink engine too the process
        group moves the bytes, through the host where it cannot exchange tensors of the GPU. Beyond
        the results there is memory for what this rank sends and receives.

        Args:
            tensors: `[slots, ...]` any dtype, on the communicator's device: a row for each expert
                that this rank holds in `old`, such as weights and their optimizer states. Dtypes
                and row shapes are alike on all ranks.
            new: the placement to move to, the same on all ranks.
            old: the placement to move from; None: this communicator's, each id an expert.

        Returns:
            The same for the experts that this rank holds in `new`; tensors of their own, without
            gradients. On CUDA they are ready in the order of the current stream.

        Raises:
            InputError: an argument does not fit, or the ranks differ (on every rank).
            PeerError: another rank refused, or the ranks are not in the same call.
            PeerTimeoutError: a rank did not come. ClosedError: the communicator is closed.
        """
        if torch.compiler.is_dynamo_compiling():
            from expertlink.uncompiled import uncompiled

            return uncompiled(self.rebalance, tensors, new, old=old)
        self._ready()
        self.check_health()
        old = self.placement if old is None else old
        assert self._wire is not None
        return rebalance(self._wire, self.config, tensors, old=old, new=new)

    def sum_copies(
        self, tensors: Sequence[Tensor], *, placement: ExpertPlacement | None = None
    ) -> None:
        """Adds up what the copies of each expert have, in place, by one all-to-all. Collective.

        Afterwards all copies of an expert have the same bits: sums in float32, or in the tensor's
        type if that is wider, over the ranks ascending, rounded once. Experts without copies keep
        theirs. The process group moves the rows, as in `rebalance`.

        Args:
            tensors: `[slots, ...]` floating point, on the communicator's device, such as gradients:
                a row for each expert that this rank holds in `placement`.
            placement: where the copies are; None: this communicator's, in which there are none.

        Raises:
            InputError: an argument does not fit, or the ranks differ (on every rank).
            PeerError: another rank refused, or the ranks are not in the same call.
            PeerTimeoutError: a rank did not come. ClosedError: the communicator is closed.
        """
        if torch.compiler.is_dynamo_compiling():
            from expertlink.uncompiled import uncompiled

            uncompiled(self.sum_copies, tensors, placement=placement)
            return
        self.check_health()
        assert self._wire is not None
        sum_copies(self._wire, self.config, tensors, placement or self.placement)

    # -- ranks that are left out ------------------------------------------------------------------

    def query_mask(self) -> Tensor:
        """Ranks that calls leave out, `[R]` bool on the device, a copy. Local.

        True for ranks given to `mask_peer` and, with `mask_lost_peers=True`, for ranks that did not
        come to a call in time. All False on engines that cannot leave out a rank.
        """
        return self._ready().query_mask()

    def mask_peer(self, rank: int) -> None:
        """Leaves out a rank: later calls neither wait for it nor send to it. Local.

        From then on its experts add nothing to this rank's results: their rows count as zero.

        Raises:
            InputError: no such rank, or this one; or combine_precision="exact" without
                `mask_lost_peers`.
            ConfigurationError: the engine needs all ranks. Only mode="ll" of nvlink does not.
        """
        engine = self._ready()
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < self.num_ranks:
            raise InputError(f"rank={rank!r}: ranks are 0..{self.num_ranks - 1}")
        if rank == self.rank:
            raise InputError(f"rank={rank}: a rank cannot leave out itself")
        engine.mask_peer(rank)

    def clear_mask(self) -> None:
        """Lets all ranks take part again. Collective: every rank, those left out included."""
        self._ready().clear_mask()
