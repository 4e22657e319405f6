"""The usual arguments of a call, recognised by a few comparisons.

Decode calls every few hundred microseconds, and checking arguments in detail takes ten. What is not
recognised here, faulty arguments among it, takes the detailed way (calls.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.types import DispatchHandle

_IDS = (torch.int64, torch.int32)


class UsualForm:
    """What tensors of one communicator look like in nearly all calls.

    Args:
        config: the communicator's.
        device: where its tensors live.
    """

    def __init__(self, config: MoECommunicatorConfig, device: torch.device) -> None:
        self._device = device
        self._dtype, self._weight_dtype = config.dtype, config.weight_dtype
        self._hidden, self._topk = config.hidden_size, config.topk
        self._max_tokens = config.max_tokens_per_rank
        self._expanded = config.layout.expanded

    def inputs(self, x: Tensor, topk_ids: Tensor | None, weights: Tensor | None) -> bool:
        """Unquantized rows with a routing."""
        # Anything may be passed: nothing is asked of an object that is no plain tensor.
        if x.__class__ is not Tensor or topk_ids is None or topk_ids.__class__ is not Tensor:
            return False
        device, shape = self._device, topk_ids.shape
        return (
            len(shape) == 2
            and shape[1] == self._topk
            and shape[0] <= self._max_tokens
            and topk_ids.dtype in _IDS
            and _is_plain(topk_ids, device)
            and x.shape == (shape[0], self._hidden)
            and x.dtype is self._dtype
            and _is_plain(x, device)
            and (
                weights is None
                or (
                    weights.__class__ is Tensor
                    and weights.shape == shape
                    and weights.dtype is self._weight_dtype
                    and _is_plain(weights, device)
                )
            )
        )

    def rows(
        self, rows: Tensor, handle: DispatchHandle, out: Tensor | None, weights: Tensor | None
    ) -> bool:
        """Expert outputs for a handle, with or without `out` and `weights` of a combine."""
        if rows.__class__ is not Tensor:
            return False
        device, dtype, shape = self._device, self._dtype, handle.rows_shape
        return (
            rows.shape == shape
            and rows.dtype is dtype
            and _is_plain(rows, device)
            and (
                out is None
                or (
                    out.__class__ is Tensor
                    and out.shape == (handle.num_tokens, self._hidden)
                    and out.dtype is dtype
                    and _is_plain(out, device)
                )
            )
            and (
                weights is None
                or (
                    self._expanded
                    and weights.__class__ is Tensor
                    and weights.shape == shape[:-1]
                    and weights.dtype is self._weight_dtype
                    and _is_plain(weights, device)
                )
            )
        )


def _is_plain(value: Tensor, device: torch.device) -> bool:
    return value.device == device and value.layout is torch.strided and value.is_contiguous()
