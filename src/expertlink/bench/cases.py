"""What is measured: a `Case` is one situation, a `Variant` one way to make the calls.

`VARIANTS` is the one table of variants, `Plan` says how often and how long.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from expertlink.config import ENGINES, MAX_TOPK, MODES
from expertlink.errors import ConfigurationError
from expertlink.quantization import scale_columns
from expertlink.types import BlockFormat, DispatchLayout
from expertlink.workloads.routings import RoutingSpec

_LAYOUTS = tuple(layout.value for layout in DispatchLayout)
_QUANTIZATIONS = tuple(block_format.value for block_format in BlockFormat)
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_MAX_RANKS = 4096
_SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How dispatch and combine are called.

    Attributes:
        cached: dispatch passes the handle of an earlier one, whose counts, ids and weights are
            kept: rows alone travel. Else every dispatch counts and exchanges its routing.
        zero_copy: the received rows are a view of the engine's pool. Else the caller owns them.
        static: no host wait; outputs have their maximal shape.
        graph: calls are captured in CUDA graphs, and their replays are measured.
        prepared: calls write into outputs that were made once, as a decode loop does.
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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to measure.

    Attributes:
        iters: timed iterations of every phase.
        warmup: iterations before them.
        seed: of routings and inputs.
        inputs: different inputs that iterations take turns with, as far as memory allows.
        timeout_s: bound of every wait inside a case, in seconds.
        command: command line to note in the records.
        ceiling_sms: SMs that the bulk copies of the ceilings occupy.
        gemm: m, n, k of the matrix product that is measured beside a dispatch; None where no
            overlap is measured.
        calls_per_graph: calls in one graph of the variant `graph` in mode "ll".
    """

    iters: int = 50
    warmup: int = 5
    seed: int = 0
    inputs: int = 4
    timeout_s: float = 100.0
    command: str = ""
    ceiling_sms: int = 24
    gemm: tuple[int, int, int] | None = None
    calls_per_graph: int = 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measured situation. Lengths count elements, tokens, experts or ranks.

    Raises:
        ConfigurationError: a field cannot be measured; the message names it and what would.
    """

    ranks: int
    tokens: int
    """T of the rank that has most; the others have as many unless `uneven`."""
    hidden: int
    topk: int
    experts: int
    dtype: str = "bfloat16"
    layout: str = "flat"
    routing: str = "balanced"
    """See `workloads/routings.py`."""
    uneven: bool = False
    """Every rank has its own T, one of them none."""
    mode: str = "ht"
    engine: str = "auto"
    variant: str = "uncached"
    """A key of `VARIANTS`."""
    quantization: str | None = None
    """What rows are quantized to: in mode "ht" before dispatch, as models do, in "ll" by it."""
    max_tokens_per_rank: int | None = None
    """T_max of the communicator, which sizes padded layouts; None: `tokens`."""
    num_sms_dispatch: int | None = None
    num_sms_combine: int | None = None
    trace: str | None = None
    """File that the routing `trace` replays."""

    def __post_init__(self) -> None:
        self._whole("ranks", 1, _MAX_RANKS)
        self._whole("topk", 1, MAX_TOPK)
        for name in ("tokens", "hidden", "experts"):
            self._whole(name, 1)
        for name, least in (
            ("num_sms_dispatch", 1),
            ("num_sms_combine", 1),
            ("max_tokens_per_rank", self.tokens),
        ):
            if getattr(self, name) is not None:
                self._whole(name, least)
        if self.topk > self.experts:
            self._refuse("topk", f"at most experts={self.experts}")
        self._member("dtype", tuple(_DTYPES))
        self._member("layout", _LAYOUTS)
        self._member("mode", MODES)
        self._member("engine", ENGINES)
        self._member("variant", tuple(VARIANTS[self.mode]))
        if self.quantization is not None:
            self._member("quantization", _QUANTIZATIONS)
        spec = RoutingSpec.parse(self.routing)
        object.__setattr__(self, "routing", str(spec))  # one spelling per routing
        if spec.name == "trace" and self.trace is None:
            self._refuse("routing", "a recorded file beside it (--trace)")
        if self.calls.zero_copy and DispatchLayout(self.layout).expanded:
            self._refuse("variant", f"token_major or rank_major rows, not layout={self.layout!r}")
        if self.calls.needs_nvlink and self.engine == "collective":
            self._refuse("variant", "the nvlink engine, not engine='collective'")

    @property
    def calls(self) -> Variant:
        """What `variant` stands for."""
        return VARIANTS[self.mode][self.variant]

    @property
    def block_format(self) -> BlockFormat | None:
        """`quantization` as an enum member."""
        return None if self.quantization is None else BlockFormat(self.quantization)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Element type of unquantized rows."""
        return _DTYPES[self.dtype]

    def row_bytes(self, phase: str) -> int:
        """Payload and scales of a row on the wire in a dispatch or a combine."""
        if phase == "dispatch" and self.block_format is not None:
            return self.hidden + scale_columns(self.hidden, self.block_format) * _SCALE_BYTES
        return self.hidden * self.torch_dtype.itemsize

    def calls_per_graph(self, plan: Plan, engine: str) -> int | None:
        """Prepared calls that one graph holds; None where calls are launched one by one."""
        calls = self.calls
        if not calls.prepared or not (calls.graph or (calls.halves and engine == "nvlink")):
            return None
        return plan.calls_per_graph if calls.chained else 1

    @property
    def routing_label(self) -> str:
        """Routing as records name it: a trace by its file name, without the folder."""
        if self.routing == "trace" and self.trace is not None:
            return f"trace:{Path(self.trace).name}"
        return self.routing

    @property
    def situation(self) -> Case:
        """The same for all variants that can be measured on the same inputs."""
        return replace(self, variant="uncached")

    @property
    def communicator(self) -> Case:
        """The same for all cases that one communicator can serve."""
        tokens = self.max_tokens_per_rank or self.tokens
        shared = {"variant": "uncached", "routing": "balanced", "trace": None, "uneven": False}
        return replace(self, tokens=tokens, **shared)

    def label(self) -> str:
        """The case in a few words, for progress and errors."""
        parts = [
            f"{self.mode} {self.layout} {self.variant}",
            f"{self.routing_label}{' uneven' if self.uneven else ''}",
            f"T={self.tokens} H={self.hidden} K={self.topk} E={self.experts} R={self.ranks}",
            self.dtype if self.quantization is None else f"{self.dtype}->{self.quantization}",
        ]
        return " · ".join(parts)

    def _whole(self, name: str, least: int, most: int | None = None) -> None:
        value = getattr(self, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < least or (most is not None and value > most):
            until = "" if most is None else f" and at most {most}"
            self._refuse(name, f"a whole number of at least {least}{until}")

    def _member(self, name: str, accepted: Sequence[str]) -> None:
        if getattr(self, name) not in accepted:
            self._refuse(name, f"one of {', '.join(accepted)}")

    def _refuse(self, name: str, accepted: str) -> NoReturn:
        raise ConfigurationError(
            f"{name}={getattr(self, name)!r} cannot be measured; accepted: {accepted}"
        )


def batches(cases: Sequence[Case]) -> list[list[Case]]:
    """The cases in their order, those together that follow each other and share a communicator.

    Only cases with prepared outputs do: the others are measured with what a fresh one does.
    """
    grouped: list[list[Case]] = []
    for case in cases:
        last = grouped[-1][-1] if grouped and case.calls.prepared else None
        if last and last.calls.prepared and last.communicator == case.communicator:
            grouped[-1].append(case)
        else:
            grouped.append([case])
    return grouped


def grid(*, fixed: dict[str, Any], **lists: Sequence[Any]) -> list[Case]:
    """All combinations of the listed values of fields of `Case`, the last field varying fastest.

    Args:
        fixed: fields that all cases share.
        lists: values of each remaining field.

    Raises:
        ConfigurationError: a combination cannot be measured, or a list is empty.
    """
    for name, values in lists.items():
        if not values:
            raise ConfigurationError(f"{name}: at least one value is needed")
    combinations = itertools.product(*lists.values())
    cases = [Case(**fixed, **dict(zip(lists, values, strict=True))) for values in combinations]
    return list(dict.fromkeys(cases))
