"""Instances of kernels over plain rows: one for each row type, width of a load and switch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch

Key = TypeVar("Key")
_ROW_TYPES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float",
    torch.float64: "double",
}


def instances_of(
    kernel: str, dtype: torch.dtype, switches: Mapping[Key, str]
) -> dict[tuple[bool, Key], str]:
    """Instances of a kernel for rows of `dtype`, by (16 bytes at a time, its own switch).

    Args:
        kernel: its name.
        dtype: of the rows.
        switches: what stands for each position of the switch in the device code.
    """
    wide = 16 // dtype.itemsize
    return {
        (vector, key): f"{kernel}<{_ROW_TYPES[dtype]}, {wide if vector else 1}, {switch}>"
        for vector in (True, False)
        for key, switch in switches.items()
    }
