"""Launcher of kernels/ordered_sum.cu: reduction.py's sums on a GPU, in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from expertlink.jit.compiler import Launcher
from expertlink.reduction import accumulator_dtype

MAX_TERMS = 32
_THREADS = 256
_BLOCKS_PER_SM = 8
_ROW_TYPES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float",
    torch.float64: "double",
}


def instances(dtype: torch.dtype) -> dict[tuple[bool, bool], str]:
    """Kernel instances for rows of `dtype`, by (16 bytes at a time, weighted)."""
    wide = 16 // dtype.itemsize
    return {
        (vector, weighted): (
            f"ordered_sum<{_ROW_TYPES[dtype]}, {wide if vector else 1}, {str(weighted).lower()}>"
        )
        for vector in (True, False)
        for weighted in (True, False)
    }


class OrderedSum:
    """The compiled kernels for one row type. Building one compiles; calls only launch."""

    def __init__(self, launcher: Launcher, *, dtype: torch.dtype) -> None:
        self._launcher = launcher
        self._dtype = dtype
        self._kernels = {
            key: launcher.load("collective/ordered_sum", instance)
            for key, instance in instances(dtype).items()
        }
        self._most_blocks = _BLOCKS_PER_SM * launcher.num_sms

    def __call__(
        self, rows_SH: Tensor, slots_MC: Tensor, weights_MC: Tensor | None, out: Tensor
    ) -> None:
        """`reduction.ordered_sum` on the current stream; arguments as there, all contiguous."""
        assert rows_SH.dtype == out.dtype == self._dtype
        assert slots_MC.shape[1] <= MAX_TERMS
        results, hidden = out.shape
        slots_MC = slots_MC.contiguous()
        if weights_MC is not None:
            weights_MC = weights_MC.to(accumulator_dtype(rows_SH.dtype)).contiguous()
        addresses = rows_SH.data_ptr() | out.data_ptr() | (hidden * out.element_size())
        self._launcher.launch(
            self._kernels[addresses % 16 == 0, weights_MC is not None],
            rows_SH.data_ptr(),
            slots_MC.data_ptr(),
            0 if weights_MC is None else weights_MC.data_ptr(),
            out.data_ptr(),
            results,
            slots_MC.shape[1],
            hidden,
            grid=min(results, self._most_blocks),
            block=_THREADS,
        )
