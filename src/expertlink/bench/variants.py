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
        prepared: calls write into outputs that were made once (`latency.py` measures them).
        chained: a graph holds `Plan.calls_per_graph` calls, one after the other.
        halves: what sends and what receives are timed apart.
    """

    cached: bool = False
    zero_copy: bool = False
    static: bool = False
    graph: bool = False
    prepared: bool = False
    chained: bool = False
    halves: bool = False

    @property
    def needs_nvlink(self) -> bool:
        """Whether only the NVLink engine has it."""
        return self.zero_copy or self.static or self.graph

    @property
    def config_fields(self) -> dict[str, Any]:
        """Fields of `MoECommunicatorConfig` that differ from their defaults."""
        chosen = {"zero_copy": self.zero_copy, "static_shapes": self.static}
        return {name: value for name, value in chosen.items() if value}


SEND, RECV = "send", "recv"
"""What records call the two parts of the variant `halves`."""

_CALLED = {"uncached": Variant(), "cached": Variant(cached=True)}
VARIANTS = {
    "ht": {
        **_CALLED,
        "zero_copy": Variant(zero_copy=True),
        "zero_copy_cached": Variant(zero_copy=True, cached=True),
        "static": Variant(static=True),
        "zero_copy_static": Variant(zero_copy=True, static=True),
        "graph": Variant(static=True, graph=True),
    },
    "ll": {
        "graph": Variant(graph=True, prepared=True, chained=True),
        "graph_single": Variant(graph=True, prepared=True),
        "eager": Variant(prepared=True),
        "halves": Variant(prepared=True, halves=True),
        **_CALLED,
    },
}
"""By mode, and by the name that the command line uses."""


def recorded_as(variant: str) -> tuple[str, ...]:
    """What records call a variant: its own name, or those of its two halves."""
    return (SEND, RECV) if variant == "halves" else (variant,)


PREPARED = tuple(
    name for key, calls in VARIANTS["ll"].items() if calls.prepared for name in recorded_as(key)
)
"""Names that records of mode "ll" use for prepared calls."""
RECORDED = tuple(dict.fromkeys([*VARIANTS["ht"], *PREPARED]))
"""All names that records use."""
