"""Host side of kernels/collective/ordered_sum.cu: reduction.py's sums on a GPU, in one pass."""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from expertlink.config import MAX_TOPK
from expertlink.engines.row_types import instances_of
from expertlink.jit.compiler import (
    CompiledKernel,
    compile_kernel,
    constants,
    enum_declaration,
)
from expertlink.jit.kernel import Field, Struct, architecture, load_kernel
from expertlink.reduction import accumulator_dtype

MAX_TERMS = MAX_TOPK
_THREADS = 256
_BLOCKS_PER_SM = 8


class Sum(enum.IntEnum):
    """What an instance of the kernel adds up."""

    PLAIN = 0
    WEIGHTED = 1
    BY_HOST = 2


_SUMS = {Sum.PLAIN: "kPlain", Sum.WEIGHTED: "kWeighted", Sum.BY_HOST: "kByHost"}
ARGUMENTS = Struct(
    "OrderedSumArguments",
    (
        Field("const void*", "rows", "[S, H]"),
        Field("const long long*", "slots", "[M, C] row of each term, or a negative number"),
        Field("const void*", "weights", "[M, C] in the accumulator's type, or null"),
        Field("const int*", "hosts", "[S] host of each row, or null"),
        Field("void*", "out", "[M, H]"),
        Field("long long", "num_results", "M"),
        Field("long long", "num_terms", "C"),
        Field("long long", "hidden", "H"),
    ),
)
PRELUDE = (
    enum_declaration(Sum, prefix="k")
    + constants({"kMaxTerms": MAX_TERMS, "kThreads": _THREADS})
    + ARGUMENTS.declaration
)


def instances(dtype: torch.dtype) -> dict[tuple[bool, Sum], str]:
    """Kernel instances for rows of `dtype`, by (16 bytes at a time, what is added up)."""
    return instances_of("ordered_sum", dtype, _SUMS)


def compile_instance(instance: str, arch: str) -> CompiledKernel:
    """Machine code of one instance. Needs no GPU."""
    return compile_kernel("collective/ordered_sum", instance, arch, prelude=PRELUDE)


class OrderedSum:
    """The kernels for one row type. Building one compiles and loads; calls only launch.

    Args:
        device: where they run.
        dtype: of the rows.
        by_host: calls may have rows of several hosts.
    """

    def __init__(self, device: torch.device, *, dtype: torch.dtype, by_host: bool = False) -> None:
        self._dtype = dtype
        arch = architecture(device)
        self._kernels = {
            key: load_kernel(device, compile_instance(instance, arch))
            for key, instance in instances(dtype).items()
            if by_host or key[1] is not Sum.BY_HOST
        }
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._most_blocks = _BLOCKS_PER_SM * num_sms

    def __call__(
        self,
        rows_SH: Tensor,
        slots_MC: Tensor,
        weights_MC: Tensor | None,
        hosts_S: Tensor | None,
        out: Tensor,
    ) -> None:
        """`reduction.ordered_sum` on the current stream; arguments as there, all contiguous."""
        assert rows_SH.dtype == out.dtype == self._dtype
        assert slots_MC.shape[1] <= MAX_TERMS
        results, hidden = out.shape
        slots_MC = slots_MC.contiguous()
        kind, weights, hosts = Sum.PLAIN, None, None
        if weights_MC is not None:
            kind = Sum.WEIGHTED
            weights_MC = weights_MC.to(accumulator_dtype(rows_SH.dtype)).contiguous()
            weights = weights_MC.data_ptr()
        elif hosts_S is not None:
            assert hosts_S.dtype is torch.int32
            kind, hosts = Sum.BY_HOST, hosts_S.data_ptr()
        addresses = rows_SH.data_ptr() | out.data_ptr() | (hidden * out.element_size())
        arguments = ARGUMENTS.new(
            rows=rows_SH.data_ptr(),
            slots=slots_MC.data_ptr(),
            weights=weights,
            hosts=hosts,
            out=out.data_ptr(),
            num_results=results,
            num_terms=slots_MC.shape[1],
            hidden=hidden,
        )
        with torch.cuda.device(out.device):  # the caller's current GPU may be another one
            self._kernels[addresses % 16 == 0, kind].launch(
                arguments,
                grid=min(results, self._most_blocks),
                block=_THREADS,
                shared_bytes=0,
                stream=torch.cuda.current_stream(out.device).cuda_stream,
            )
