"""Instances of kernels over plain rows: one for each row type, width of a load and switch."""

from __future__ import annotations

import torch

_ROW_TYPES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float",
    torch.float64: "double",
}


def instances_of(kernel: str, dtype: torch.dtype) -> dict[tuple[bool, bool], str]:
    """Instances of a kernel for rows of `dtype`, by (16 bytes at a time, its own switch)."""
    wide = 16 // dtype.itemsize
    return {
        (vector, switch): (
            f"{kernel}<{_ROW_TYPES[dtype]}, {wide if vector else 1}, {str(switch).lower()}>"
        )
        for vector in (True, False)
        for switch in (True, False)
    }
