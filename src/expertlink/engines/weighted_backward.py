"""Host side of kernels/backward/weighted_backward.cu: backward of a weighted combine on a GPU.

It needs nothing of what moved the rows, so every engine uses it; reduction.py is the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expertlink.engines.row_types import instances_of
from expertlink.jit.compiler import CompiledKernel, compile_kernel, constants
from expertlink.jit.kernel import Field, Struct, architecture, load_kernel
from expertlink.reduction import PARTS, accumulator_dtype

_WARPS = 8
ARGUMENTS = Struct(
    "WeightedBackwardArguments",
    (
        Field("void*", "grads", "[S, H] gradients of the weighted rows; become those of the rows"),
        Field("const void*", "weights", "[S] in the accumulator's type"),
        Field("const void*", "rows", "[S, H], or null: only scale"),
        Field("void*", "sums", "[S] in the accumulator's type, or null"),
        Field("long long", "num_slots", "S"),
        Field("long long", "hidden", "H"),
    ),
)
PRELUDE = constants({"kParts": PARTS, "kThreads": 32 * _WARPS}) + ARGUMENTS.declaration


def instances(dtype: torch.dtype) -> dict[tuple[bool, bool], str]:
    """Kernel instances for rows of `dtype`, by (16 bytes at a time, with sums)."""
    return instances_of("weighted_backward", dtype, {True: "true", False: "false"})


def compile_instance(instance: str, arch: str) -> CompiledKernel:
    """Machine code of one instance. Needs no GPU."""
    return compile_kernel("backward/weighted_backward", instance, arch, prelude=PRELUDE)


class WeightedBackward:
    """The kernels for one row type. Building one compiles and loads; calls only launch."""

    def __init__(self, device: torch.device, *, dtype: torch.dtype) -> None:
        self._dtype = dtype
        arch = architecture(device)
        self._kernels = {
            key: load_kernel(device, compile_instance(instance, arch))
            for key, instance in instances(dtype).items()
        }

    def __call__(
        self, grads_SH: Tensor, weights_S: Tensor, rows_SH: Tensor | None, sums_S: Tensor | None
    ) -> None:
        """`reduction.weighted_backward` on the current stream; writes the sums to `sums_S`."""
        slots, hidden = grads_SH.shape
        assert grads_SH.dtype == self._dtype
        assert grads_SH.is_contiguous()
        assert weights_S.dtype == accumulator_dtype(self._dtype)
        assert (rows_SH is None) == (sums_S is None)
        addresses = grads_SH.data_ptr() | (hidden * grads_SH.element_size())
        if rows_SH is not None:
            assert rows_SH.dtype == self._dtype
            assert rows_SH.is_contiguous()
            addresses |= rows_SH.data_ptr()
        arguments = ARGUMENTS.new(
            grads=grads_SH.data_ptr(),
            weights=weights_S.data_ptr(),
            rows=None if rows_SH is None else rows_SH.data_ptr(),
            sums=None if sums_S is None else sums_S.data_ptr(),
            num_slots=slots,
            hidden=hidden,
        )
        with torch.cuda.device(grads_SH.device):  # the caller's current GPU may be another one
            self._kernels[addresses % 16 == 0, rows_SH is not None].launch(
                arguments,
                grid=-(-slots // _WARPS),
                block=32 * _WARPS,
                shared_bytes=0,
                stream=torch.cuda.current_stream(grads_SH.device).cuda_stream,
            )
