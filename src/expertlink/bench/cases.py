"""What is measured, one `Case` per communicator, routing and variant; and how: the `Plan`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from expertlink.bench.routings import RoutingSpec
from expertlink.bench.variants import VARIANTS, Variant
from expertlink.config import ENGINES, MAX_TOPK, MODES
from expertlink.errors import ConfigurationError
from expertlink.types import BlockFormat, DispatchLayout

LAYOUTS = tuple(layout.value for layout in DispatchLayout)
QUANTIZATIONS = tuple(block_format.value for block_format in BlockFormat)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_RANKS = 4096


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
    """See `routings.py`."""
    uneven: bool = False
    """Every rank has its own T, one of them none."""
    mode: str = "ht"
    engine: str = "auto"
    variant: str = "uncached"
    """See `variants.py`."""
    quantization: str | None = None
    """What rows are quantized to: in mode "ht" before dispatch, as models do, in "ll" by it."""
    max_tokens_per_rank: int | None = None
    """T_max of the communicator, which sizes padded layouts; None: `tokens`."""
    num_sms_dispatch: int | None = None
    num_sms_combine: int | None = None
    trace: str | None = None
    """File that the routing `trace` replays."""

    def __post_init__(self) -> None:
        self._whole("ranks", 1, MAX_RANKS)
        self._whole("tokens", 1)
        self._whole("hidden", 1)
        self._whole("topk", 1, MAX_TOPK)
        self._whole("experts", 1)
        for name in ("num_sms_dispatch", "num_sms_combine"):
            if getattr(self, name) is not None:
                self._whole(name, 1)
        if self.max_tokens_per_rank is not None:
            self._whole("max_tokens_per_rank", self.tokens)
        if self.topk > self.experts:
            self._refuse("topk", f"at most experts={self.experts}")
        self._member("dtype", tuple(DTYPES))
        self._member("layout", LAYOUTS)
        self._member("mode", MODES)
        self._member("engine", ENGINES)
        self._member("variant", tuple(VARIANTS[self.mode]))
        if self.quantization is not None:
            self._member("quantization", QUANTIZATIONS)
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
        return DTYPES[self.dtype]

    @property
    def wire_dtype(self) -> torch.dtype:
        """Element type of combine's rows on the wire, whatever dispatch sends."""
        return self.torch_dtype

    @property
    def routing_label(self) -> str:
        """Routing as records name it: a trace by its file name, without the folder."""
        if self.routing == "trace" and self.trace is not None:
            return f"trace:{Path(self.trace).name}"
        return self.routing

    def key(self) -> str:
        """All fields in one line: equal for equal cases, different for different ones."""
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))

    @property
    def situation(self) -> Case:
        """The same for all variants that can be measured on the same inputs."""
        return replace(self, variant="uncached")

    @property
    def communicator(self) -> Case:
        """The same for all cases that one communicator can serve."""
        return replace(
            self.situation,
            tokens=self.max_tokens_per_rank or self.tokens,
            routing="balanced",
            trace=None,
            uneven=False,
        )

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
        ceiling_num_sms: SMs that the bulk copies of the ceilings occupy.
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
    ceiling_num_sms: int = 24
    gemm: tuple[int, int, int] | None = None
    calls_per_graph: int = 20


def batches(cases: Sequence[Case]) -> list[list[Case]]:
    """The cases in their order, those together that follow each other and share a communicator.

    Only cases with prepared outputs do: the others are measured with what a fresh one does.
    """
    shared: list[list[Case]] = []
    for case in cases:
        last = shared[-1][-1] if shared else None
        together = (
            last is not None
            and last.calls.prepared
            and case.calls.prepared
            and last.communicator == case.communicator
        )
        if together:
            shared[-1].append(case)
        else:
            shared.append([case])
    return shared


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


def default_fields(device_type: str, mode: str) -> dict[str, Any]:
    """What is measured where nothing else is asked for.

    CUDA: the model shape that the field publishes figures for. CPU: one that a laptop measures in
    seconds.
    """
    on_gpu = device_type == "cuda"
    shape = {"hidden": [7168], "topk": [8], "experts": [256]}
    if not on_gpu:
        shape = {"hidden": [1024], "topk": [4], "experts": [16]}
    if mode == "ht":
        tokens = [4096] if on_gpu else [128, 1024]
        return {"tokens": tokens, **shape, "layout": ["flat"], "quantization": [None]}
    return {
        "tokens": [1, 8, 16, 32, 64, 128, 256, 512] if on_gpu else [1, 16, 128],
        **shape,
        "layout": ["expert_major", "rank_major"],
        "quantization": [None, BlockFormat.E4M3_FLOAT32.value],
    }


def default_variants(device_type: str, mode: str, engine: str) -> list[str]:
    """Variants that are measured where none are asked for: those that the engine has."""
    if mode == "ht":
        return ["uncached", "cached"]
    if device_type == "cpu":
        return ["eager", "halves"]
    # NCCL stands beside the others for comparison: one line is enough.
    return ["eager"] if engine == "collective" else ["graph", "graph_single", "eager", "halves"]


def parse_ints(text: str, *, name: str) -> list[int]:
    """Reads "128,1024".

    Raises:
        ConfigurationError: an item is no whole number.
    """
    try:
        return [int(item) for item in parse_names(text)]
    except ValueError:
        raise ConfigurationError(
            f"{name}={text!r} cannot be measured; accepted: whole numbers separated by commas"
        ) from None


def parse_names(text: str) -> list[str]:
    """Reads "flat,token_major"; blanks around the commas do not count."""
    return [item.strip() for item in text.split(",") if item.strip()]
