"""The arguments of nearly all calls, recognized by a few comparisons.

Decode makes a call every few hundred microseconds; checking all arguments takes ten of them. What
is not recognized here, wrong arguments included, takes the checked path (calls.py), which says what
is wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.types import BlockFormat, DispatchHandle, RowKind

_ID_DTYPES = (torch.int64, torch.int32)
_STRIDED = torch.strided
_MOST_KINDS = 64  # of rows with scales; callers use one or two


class FastPath:
    """Tells whether the tensors of a call can go to the engine as they are.

    They can if they are contiguous plain tensors on the communicator's device, in the configured
    dtypes and in shapes that fit each other.

    Args:
        config: the communicator's.
        device: where its tensors live.
        plain: kind of the rows that arrive where callers pass unquantized ones; None: the engine
            cannot have these as they are.
    """

    def __init__(
        self, config: MoECommunicatorConfig, device: torch.device, plain: RowKind | None
    ) -> None:
        self._device = device
        self._dtype, self._weight_dtype = config.dtype, config.weight_dtype
        self._hidden, self._topk = config.hidden_size, config.topk
        self._max_tokens = config.max_tokens_per_rank
        self._expanded = config.layout.expanded
        self._plain = plain
        # Of rows with scales that the checked path has accepted: what it looks at, and the kind.
        self._scaled: dict[tuple[object, ...], RowKind] = {}

    def kind_of(
        self, x: Tensor, scales: Tensor | None, scale_format: BlockFormat | None
    ) -> RowKind | None:
        """The kind of plain rows, or of such with scales as have been accepted before."""
        # Callers may pass anything: what is no plain tensor is asked nothing.
        if x.__class__ is not Tensor:
            return None
        device, shape = self._device, x.shape
        if not (
            len(shape) == 2 and x.device == device and x.layout is _STRIDED and x.is_contiguous()
        ):
            return None
        if scales is None:
            fits = shape[1] == self._hidden and x.dtype is self._dtype
            return self._plain if fits else None
        if scales.__class__ is not Tensor:
            return None
        size = scales.shape
        if not (
            len(size) == 2
            and size[0] == shape[0]
            and scales.device == device
            and scales.layout is _STRIDED
            and scales.is_contiguous()
        ):
            return None
        return self._scaled.get((x.dtype, shape[1], scales.dtype, size[1], scale_format))

    def accept(self, kind: RowKind) -> RowKind:
        """Rows of this kind, with scales, have been accepted. Returns the one to compare with."""
        key = (kind.dtype, kind.width, kind.scale_dtype, kind.scale_columns, kind.scale_format)
        if len(self._scaled) >= _MOST_KINDS:
            self._scaled.clear()
        return self._scaled.setdefault(key, kind)

    def takes_routing(
        self, topk_ids: Tensor | None, weights: Tensor | None, num_tokens: int
    ) -> bool:
        """A new routing of so many tokens."""
        if topk_ids is None or topk_ids.__class__ is not Tensor:
            return False
        shape = topk_ids.shape
        return (
            shape == (num_tokens, self._topk)
            and num_tokens <= self._max_tokens
            and topk_ids.dtype in _ID_DTYPES
            and topk_ids.device == self._device
            and topk_ids.layout is _STRIDED
            and topk_ids.is_contiguous()
            and (
                weights is None
                or (
                    weights.__class__ is Tensor
                    and weights.shape == shape
                    and weights.dtype is self._weight_dtype
                    and weights.device == self._device
                    and weights.layout is _STRIDED
                    and weights.is_contiguous()
                )
            )
        )

    def takes_new_weights(self, weights: Tensor | None, num_tokens: int) -> bool:
        """Weights of a routing that is known, or none."""
        if num_tokens > self._max_tokens:  # the routing may be another communicator's
            return False
        return weights is None or self._are_weights(weights, (num_tokens, self._topk))

    def takes_combine(
        self,
        rows: Tensor,
        handle: DispatchHandle,
        out: Tensor | None,
        weights: Tensor | None,
        topk_weights: Tensor | None,
    ) -> bool:
        """Expert outputs that fit a handle, with or without `out` and one kind of weights."""
        if rows.__class__ is not Tensor:
            return False
        device, dtype, shape = self._device, self._dtype, handle.rows_shape
        if not (
            rows.shape == shape
            and rows.dtype is dtype
            and rows.device == device
            and rows.layout is _STRIDED
            and rows.is_contiguous()
        ):
            return False
        if out is not None and not (
            out.__class__ is Tensor
            and out.shape == (handle.num_tokens, self._hidden)
            and out.dtype is dtype
            and out.device == device
            and out.layout is _STRIDED
            and out.is_contiguous()
        ):
            return False
        if weights is None and topk_weights is None:
            return True
        if not self._expanded:
            return False
        if weights is not None:
            return topk_weights is None and self._are_weights(weights, shape[:-1])
        return self._are_weights(topk_weights, (handle.num_tokens, self._topk))

    def _are_weights(self, value: Tensor | None, shape: tuple[int, ...]) -> bool:
        return (
            value is not None
            and value.__class__ is Tensor
            and value.shape == shape
            and value.dtype is self._weight_dtype
            and value.device == self._device
            and value.layout is _STRIDED
            and value.is_contiguous()
        )
