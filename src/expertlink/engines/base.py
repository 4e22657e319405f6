"""The seam between the communicator and whatever moves the rows.

An engine receives calls whose host-visible form has been checked (shapes, dtypes, devices, handle)
and owns everything behind: counting, moving, placing, reducing, waiting, telling peers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, Protocol

from torch import Tensor

from expertlink.types import BlockFormat, DispatchOutput


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class CombineCall:
    """One combine.

    Attributes:
        rows: expert outputs in the layout's shape, contiguous.
        state: state of the dispatch.
        weighted: apply the routing weights where the layout leaves that to combine.
        out_TH: `[T, H]` tensor for the result.
        weight_grads: float32, gradient of every slot's weight (expanded layouts: the leading shape
            of the rows; others: that + `[K]`), to be returned as `[T, K]`; or None.
        num_sms: as in `DispatchCall`.
    """

    rows: Tensor
    state: object
    weighted: bool
    out_TH: Tensor
    weight_grads: Tensor | None = None
    num_sms: int | None = None


@dataclass(frozen=True)
class Dispatched:
    """A dispatch under way: tensors are allocated, `finish` makes them readable.

    Attributes:
        output: what the rank receives.
        state: the engine's memory of the routing; complete once finished.
        finish: waits for and places the rows; call until it succeeds, on the stream of the call.
        call: sequence number, as in error messages.
        topk_ids_TK: the engine's own copy of the call's ids, where it made one.
    """

    output: DispatchOutput
    state: object
    finish: Callable[[], None]
    call: int
    topk_ids_TK: Tensor | None = None


@dataclass(frozen=True)
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


class Engine(Protocol):
    """Moves rows. Calls are collective: every rank makes the same ones in the same order."""

    @property
    def name(self) -> str:
        """ "collective", "nvlink", ..."""
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

    def refuse(self, operation: str, error: Exception) -> NoReturn:
        """Raises `error`, after telling the ranks that are in the same call where that is possible.

        They raise `PeerError` with the same text instead of waiting for this rank.
        """
        ...

    def check_health(self) -> None:
        """Raises failures of earlier calls that nobody has been told about yet."""
        ...

    def wire_rows(self, state: object) -> tuple[list[int], list[int]]:
        """Rows sent to and received from each rank by a dispatch, own rank included."""
        ...

    def memory_estimate(self) -> dict[str, int]:
        """Bytes by region that the largest possible call holds beyond inputs and outputs."""
        ...

    def set_timeout(self, timeout_s: float) -> None:
        """Bounds later waits, in seconds."""
        ...

    def close(self) -> None:
        """Releases everything. Safe to call twice, also after a failure."""
        ...
