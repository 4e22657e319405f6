"""The seam between the communicator and whatever moves the rows.

An engine receives calls whose host-visible form has been checked (shapes, dtypes, devices, handle)
and owns everything behind: counting, moving, placing, reducing, waiting, telling peers.

The records of a call are never changed once made. They are not frozen, because building a frozen
one takes five times as long, which decode notices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, Protocol

from torch import Tensor

from expertlink.engines.ranks.header import Operation
from expertlink.reduction import BackwardKernel
from expertlink.types import (
    BlockFormat,
    CallStatistics,
    DispatchBuffers,
    DispatchLayout,
    DispatchOutput,
    RowKind,
)


@dataclass(eq=False)
class DispatchCall:
    """One dispatch.

    Attributes:
        x_TW: `[T, W]` contiguous rows, of the configured dtype or quantized.
        scales: `[T, S]` contiguous scales, or None.
        scale_format: block format of the scales, or None.
        topk_ids_TK: `[T, K]` int32 or int64; None with `previous`.
        weights_TK: `[T, K]` float32 or None; with `previous`, None keeps that call's weights.
        output_buffer: caller's tensor for `tokens`, or None.
        previous: state of an earlier dispatch whose routing is reused, or None.
        zero_padding: unfilled slots of padded layouts must read as zero.
        num_sms: SMs the call may occupy; None: the configuration's, or the engine's choice.
        quantize_to: the engine quantizes the rows to this format; only where `Engine.quantizes`.
        buffers: every tensor that the call returns is (a view of) one of these; excludes
            `output_buffer`. Made by this engine for rows like these.
        return_recv_hook: only what sends is launched now; `Dispatched.finish` launches what
            receives.
        counted: statistics count it; else it is a part of another call.
    """

    x_TW: Tensor
    scales: Tensor | None = None
    scale_format: BlockFormat | None = None
    topk_ids_TK: Tensor | None = None
    weights_TK: Tensor | None = None
    output_buffer: Tensor | None = None
    previous: object | None = None
    zero_padding: bool = False
    num_sms: int | None = None
    quantize_to: BlockFormat | None = None
    buffers: DispatchBuffers | None = None
    return_recv_hook: bool = False
    counted: bool = True


@dataclass(eq=False)
class CombineCall:
    """One combine.

    Attributes:
        rows: expert outputs in the layout's shape, contiguous.
        state: state of the dispatch.
        weighted: multiply rows by weights: by `slot_weights` or `weights_TK` where given, else by
            the routing weights. Only where the layout leaves that to combine.
        out_TH: `[T, H]` tensor for the result.
        weight_grads: float32, gradient of every slot's weight (expanded layouts: the leading shape
            of the rows; others: that + `[K]`), to be returned as `[T, K]`; or None.
        num_sms: as in `DispatchCall`.
        slot_weights: a weight for every slot, contiguous, in the leading shape of the rows; those
            of unfilled slots are never read. None: the routing weights.
        return_recv_hook: as in `DispatchCall`.
        weights_TK: `[T, K]` contiguous weights of this rank's tokens, in place of the routing
            weights; those of choices without an expert are never read. Excludes `slot_weights`.
    """

    rows: Tensor
    state: object
    weighted: bool
    out_TH: Tensor
    weight_grads: Tensor | None = None
    num_sms: int | None = None
    slot_weights: Tensor | None = None
    return_recv_hook: bool = False
    weights_TK: Tensor | None = None


@dataclass(eq=False)
class Dispatched:
    """A dispatch under way: tensors are allocated, `finish` makes them readable.

    Attributes:
        output: what the rank receives.
        state: the engine's memory of the routing; complete once finished.
        finish: waits for and places the rows; call until it succeeds, on the stream of the call
            (with `return_recv_hook`: on any that comes after it), with gradients off.
        call: sequence number, as in error messages.
        topk_ids_TK: the engine's own copy of the call's ids, where it made one; or what makes it a
            tensor.
    """

    output: DispatchOutput
    state: object
    finish: Callable[[], None]
    call: int
    topk_ids_TK: Tensor | Callable[[], Tensor] | None = None


@dataclass(eq=False)
class Combined:
    """A combine under way; fields as in `Dispatched`.

    Attributes:
        out_TH: `[T, H]` the call's result tensor.
        weight_grads_TK: `[T, K]` float32 if the call asked for them.
        finish: as in `Dispatched`.
    """

    out_TH: Tensor
    weight_grads_TK: Tensor | None
    finish: Callable[[], None]


class Tables(Protocol):
    """What a routing says of its rows. Every finished `Dispatched.state` is one.

    It needs neither engine nor communicator: tables are read for as long as the state lives.
    """

    def arrivals(self) -> Tensor:
        """`[N, K]` int64: slot (expanded layouts), else local expert, of each choice, or -1."""
        ...

    def expert_ranges(self, layout: DispatchLayout, alignment: int) -> tuple[Tensor, Tensor]:
        """Expanded layouts: first slot and number of rows of each source rank in each group.

        int32 `[E_loc, R]` each; FLAT: slots of `tokens`, EXPERT_MAJOR: slots of the group.
        """
        ...

    def source_tokens(self, shape: tuple[int, ...]) -> Tensor | None:
        """What `DispatchOutput.source_tokens` would be, where the tables say so.

        `shape`: the leading shape of the rows. None: only the dispatch can bring them.
        """
        ...


def nothing_left() -> None:
    """`finish` of a call whose work was queued before it returned."""


class Engine(Protocol):
    """Moves rows. Calls are collective: every rank makes the same ones in the same order."""

    @property
    def name(self) -> str:
        """ "collective", "nvlink", ..."""
        ...

    @property
    def routing_form(self) -> str:
        """How a dispatch's `state` keeps a routing: engines of one form can use each other's."""
        ...

    @property
    def numbers_by_max_tokens(self) -> bool:
        """Such a state depends on T_max in every layout, not only in the padded ones."""
        ...

    @property
    def quantizes(self) -> bool:
        """True: calls come with unquantized rows and `quantize_to` where the library quantizes."""
        ...

    @property
    def backward_kernel(self) -> BackwardKernel | None:
        """For `reduction.weighted_backward`; None: plain torch, or there is no such backward."""
        ...

    def dispatch(self, call: DispatchCall) -> Dispatched:
        """Starts a dispatch."""
        ...

    def combine(self, call: CombineCall) -> Combined:
        """Starts a combine."""
        ...

    def weight_grads(self, state: object, weight_grads: Tensor) -> Tensor:
        """Returns per-slot weight gradients to the tokens' ranks: `[T, K]` float32. Collective."""
        ...

    def slot_weights(self, state: object) -> Tensor | None:
        """Expanded layouts: routing weight of every slot; None for an unweighted dispatch."""
        ...

    def make_buffers(self, rows: RowKind) -> DispatchBuffers:
        """Outputs of the largest shape for such rows, and tables of one routing. Local."""
        ...

    def refuse(self, operation: Operation, error: Exception) -> NoReturn:
        """Raises `error`, after telling the ranks that are in the same call where that is possible.

        They raise `PeerError` with the same text instead of waiting for this rank.
        """
        ...

    def check_health(self) -> None:
        """Raises failures of earlier calls that nobody has been told about yet.

        ClosedError on a communicator that an earlier failure has made unusable.
        """
        ...

    def abort(self, reason: str) -> None:
        """Marks this communicator unusable here and tells the ranks that wait, or will.

        They raise AbortError instead of waiting. Local; never raises; safe to repeat.
        """
        ...

    def wire_rows(self, state: object) -> tuple[list[int], list[int]]:
        """Rows sent to and received from each rank by a dispatch, own rank included."""
        ...

    def enable_statistics(self) -> CallStatistics:
        """Counts calls from now on; returns the same tensors every time. Local."""
        ...

    def query_mask(self) -> Tensor:
        """`[R]` bool on the device: ranks that calls no longer wait for. Local."""
        ...

    def mask_peer(self, rank: int) -> None:
        """Calls neither wait for that rank nor send to it from now on. Local."""
        ...

    def clear_mask(self) -> None:
        """All ranks take part again. Collective."""
        ...

    def memory_estimate(self) -> dict[str, int]:
        """Bytes by region that the largest possible call holds beyond inputs and outputs."""
        ...

    def compute_sms(self, operation: Operation, num_sms: int | None) -> int:
        """SMs that a dispatch or combine of so many leaves to other kernels. Local."""
        ...

    def set_tokens_bound(self, tokens_bound: int | None) -> None:
        """Later dispatches have at most so many tokens on every rank; None: T_max.

        Engines whose messages do not depend on it need not do anything. Collective where the hosts
        agree before calls.
        """
        ...

    def set_timeout(self, timeout_s: float) -> None:
        """Bounds later waits, in seconds."""
        ...

    def close(self) -> None:
        """Releases everything. Safe to call twice, also after a failure."""
        ...
