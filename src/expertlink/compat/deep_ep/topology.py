"""Domains of ranks: here, all ranks of a group are in one NVLink domain."""

from __future__ import annotations

from typing import Any


def get_physical_domain_size(group: Any) -> tuple[int, int]:
    """`(RDMA ranks, NVLink ranks)`: `(1, R)`."""
    return 1, group.size()


def get_logical_domain_size(group: Any, allow_hybrid_mode: bool = True) -> tuple[int, int]:
    """`(scale-out ranks, scale-up ranks)`: `(1, R)`."""
    return 1, group.size()
