"""The variants of a measurement: who owns the rows, who knows the counts, who launches calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How dispatch and combine are called.

    Attributes:
        cached: dispatch passes the handle of an earlier one, whose counts, ids and weights are
            kept: rows alone travel. Else every dispatch counts and exchanges its routing.
        zero_copy: the received rows are a view of the engine's pool. Else the caller owns them.
        static: no host wait; outputs have their maximal shape.
        graph: calls are captured in CUDA graphs, and their replays are measured.
    """

    cached: bool = False
    zero_copy: bool = False
    static: bool = False
    graph: bool = False

    @property
    def needs_nvlink(self) -> bool:
        """Whether only the NVLink engine has it."""
        return self.zero_copy or self.static

    @property
    def config_fields(self) -> dict[str, Any]:
        """Fields of `MoECommunicatorConfig` that differ from their defaults."""
        chosen = {"zero_copy": self.zero_copy, "static_shapes": self.static}
        return {name: value for name, value in chosen.items() if value}


VARIANTS = {
    "uncached": Variant(),
    "cached": Variant(cached=True),
    "zero_copy": Variant(zero_copy=True),
    "zero_copy_cached": Variant(zero_copy=True, cached=True),
    "static": Variant(static=True),
    "zero_copy_static": Variant(zero_copy=True, static=True),
    "graph": Variant(static=True, graph=True),
}
"""By the name that records and the command line use."""
