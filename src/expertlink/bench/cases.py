"""What is measured: a `Case` is one situation, a `Variant` one way to make the calls.

`VARIANTS` is the one table of variants, `Plan` says how often and how long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch

from expertlink.config import MoECommunicatorConfig
from expertlink.errors import ConfigurationError
from expertlink.quantization import scale_columns
from expertlink.types import BlockFormat
from expertlink.workloads.routings import RoutingSpec

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_MAX_RANKS = 4096
RAILS = ("sockets", "nvlink", "network")
"""What joins hosts: TCP or NVLink of one machine, or what NCCL finds between real hosts."""
_SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How dispatch and combine are called."""

    # Dispatch passes the handle of an earlier one, whose counts, ids and weights are kept: rows
    # alone travel. Else every dispatch counts and exchanges its routing.
    cached: bool = False
    zero_copy: bool = False  # received rows are a view of the engine's pool, not the caller's own
    static: bool = False  # no host wait; outputs have their maximal shape
    graph: bool = False  # calls are captured in CUDA graphs, and their replays are measured
    prepared: bool = False  # calls write into outputs that were made once, as a decode loop does
    chained: bool = False  # a graph holds `Plan.calls_per_graph` calls, one after the other
    halves: bool = False  # what sends and what receives are timed apart
    turns: bool = False  # a layer's tokens in two halves, see `layer_model.in_turn`

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
    """How to measure."""

    iters: int = 50  # timed iterations of every phase
    warmup: int = 5  # iterations before them
    seed: int = 0  # of routings and inputs
    inputs: int = 4  # different ones that iterations take turns with, as far as memory allows
    timeout_s: float = 100.0  # bound of every wait inside a case
    command: str = ""  # to note in the records
    ceiling_sms: int = 24  # that the bulk copies of the ceilings occupy
    gemm: tuple[int, int, int] | None = None  # m, n, k of the product beside a dispatch
    calls_per_graph: int = 20  # in the variant `graph` of mode "ll"
    profile: Path | None = None  # folder of torch's traces of a layer
    # Seconds for the cases of a batch, with all that comes before their iterations, of which there
    # are then as many as fit, at most `iters`. None: no matter how long they take.
    budget_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measured situation. Lengths count elements, tokens, experts or ranks.

    Raises:
        ConfigurationError: a field cannot be measured; the message names it and what would.
    """

    ranks: int
    tokens: int  # T of the rank that has most; the others have as many unless `uneven`
    hidden: int
    topk: int
    experts: int
    dtype: str = "bfloat16"
    layout: str = "flat"
    routing: str = "balanced"  # see `workloads/routings.py`
    uneven: bool = False  # every rank has its own T, one of them none
    mode: str = "ht"
    engine: str = "auto"
    variant: str = "uncached"  # a key of `VARIANTS`
    quantization: str | None = None  # of rows: in mode "ht" before dispatch, in "ll" by it
    max_tokens_per_rank: int | None = None  # T_max, which sizes padded layouts; None: `tokens`
    num_sms_dispatch: int | None = None
    num_sms_combine: int | None = None
    trace: str | None = None  # file that the routing `trace` replays
    hosts: int = 1  # N, of equally many ranks that follow each other
    rail: str | None = None  # what joins them: one of `RAILS`
    rail_ctas: int | None = None  # most thread blocks of NCCL's kernels on a rail

    def __post_init__(self) -> None:
        named = {"dtype": _DTYPES, "mode": VARIANTS, "variant": self.variants}
        for name, accepted in named.items():
            if getattr(self, name) not in accepted:
                self._refuse(name, f"one of {', '.join(accepted)}")
        if not 1 <= self.ranks <= _MAX_RANKS:
            self._refuse("ranks", f"from 1 to {_MAX_RANKS}")
        if self.hosts < 1 or self.ranks % self.hosts:
            self._refuse("hosts", f"a divisor of ranks={self.ranks}")
        if self.rail not in ((None,) if self.hosts == 1 else RAILS):
            self._refuse("rail", "None for one host" if self.hosts == 1 else ", ".join(RAILS))
        if self.calls.zero_copy and self.layout in ("flat", "expert_major"):
            self._refuse("variant", f"token_major or rank_major rows, not layout={self.layout!r}")
        if self.calls.needs_nvlink and self.engine == "collective":
            self._refuse("variant", "the nvlink engine, not engine='collective'")
        self.config(torch.device("cpu"), timeout_s=1.0)  # refuses the rest
        most = self.max_tokens_per_rank or self.tokens
        if not 1 <= self.tokens <= most:
            self._refuse("max_tokens_per_rank", f"at least {self.tokens}")
        spec = RoutingSpec.parse(self.routing)
        object.__setattr__(self, "routing", str(spec))  # one spelling per routing
        if spec.name == "trace" and self.trace is None:
            self._refuse("routing", "a recorded file beside it (--trace)")

    def config(self, device: torch.device, *, timeout_s: float) -> MoECommunicatorConfig:
        """Of the communicator that serves the case."""
        return MoECommunicatorConfig(
            device=device,
            num_experts=self.experts,
            hidden_size=self.hidden,
            topk=self.topk,
            max_tokens_per_rank=self.max_tokens_per_rank or self.tokens,
            dtype=self.torch_dtype,
            mode="ll" if self.mode == "ll" else "ht",
            engine=self.engine,  # pyright: ignore[reportArgumentType]
            output_layout=self.layout,  # pyright: ignore[reportArgumentType]
            quantization=self.quantization,  # pyright: ignore[reportArgumentType]
            num_sms_dispatch=self.num_sms_dispatch,
            num_sms_combine=self.num_sms_combine,
            timeout_s=timeout_s,
            startup_timeout_s=timeout_s,
            zero_copy=self.calls.zero_copy,
            static_shapes=self.calls.static,
            domains=None if self.hosts == 1 else self.host_of,
        )

    @property
    def host_of(self) -> tuple[int, ...]:
        """The host of every rank."""
        return tuple(rank * self.hosts // self.ranks for rank in range(self.ranks))

    @property
    def variants(self) -> Mapping[str, Variant]:
        """Those that the case can have, by name."""
        return VARIANTS.get(self.mode, {})

    @property
    def calls(self) -> Variant:
        """What `variant` stands for."""
        return self.variants[self.variant]

    @property
    def has_floor(self) -> bool:
        """Whether it is compared with the wire's bandwidth, not with copies of its rows."""
        return self.calls.prepared

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
        if not calls.prepared or not (calls.graph or (calls.halves and engine != "collective")):
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
        if self.hosts > 1:
            parts.append(f"{self.hosts} hosts")
        return " · ".join(parts)

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
