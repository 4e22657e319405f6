"""Cases of `expertlink bench --layer`: a whole MoE layer of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from expertlink.bench.cases import Case, Variant
from expertlink.bench.layer_model import MODELS, ROW_ALIGNMENT
from expertlink.bench.options import (
    TOKENS,
    BenchOptions,
    check_device,
    check_trace,
    parse_budgets,
    parse_ints,
    parse_names,
    recorded_shape,
    refuse_options,
)
from expertlink.config import MoECommunicatorConfig
from expertlink.errors import ConfigurationError
from expertlink.routing import even_blocks
from expertlink.workloads.routings import RoutingSpec, draw_routing, draw_token_counts

LAYER_VARIANTS = {
    "eager": Variant(),
    "graph": Variant(static=True, graph=True),
    "micro_batches": Variant(turns=True),
}
_DEFAULT_MODEL = {"cpu": "tiny", "cuda": "qwen3-30b-a3b"}
# Options that a layer does not have, and what is there instead.
_EXCLUDED = {
    "hidden": "--model, which sets the hidden size",
    "topk": "--model, which sets the choices per token",
    "experts": "--model, which sets the experts",
    "layout": "layout flat, which grouped products read",
    "quantization": "rows of --dtype",
    "max_tokens_per_rank": "--tokens",
    "gemm": "the products of the layer",
    "interface": "--drop-in",
    "grid": "either --layer or --grid",
    "mode": "ht",
}


@dataclass(frozen=True, kw_only=True)
class LayerCase(Case):
    """One or several MoE layers of a model, one after the other."""

    model: str  # a key of `MODELS`
    layers: int = 1
    seed: int = 0  # of routings, tokens and weights

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calls.turns and self.tokens < 2:
            raise ConfigurationError(
                f"tokens={self.tokens} cannot be measured with variant={self.variant!r}, which "
                "has two halves of them; accepted: at least 2"
            )

    def config(self, device: torch.device, *, timeout_s: float) -> MoECommunicatorConfig:
        """Of the communicator, for what goes through the layers together; where shapes are static,
        with room for the rows that arrive."""
        config = super().config(device, timeout_s=timeout_s)
        # A host that waits for counts lets the GPU run dry. Only `collective` has to.
        turns = self.calls.turns and device.type == "cuda" and self.engine != "collective"
        static = self.calls.static or turns
        return replace(
            config,
            max_tokens_per_rank=self.micro_batches(self.tokens)[0].stop,
            expert_alignment=ROW_ALIGNMENT,
            static_shapes=static,
            max_recv_tokens_per_rank=max(self.most_rows(), 1) if static else None,
        )

    @property
    def variants(self) -> Mapping[str, Variant]:
        """`LAYER_VARIANTS`."""
        return LAYER_VARIANTS

    @property
    def has_floor(self) -> bool:
        """Always, where rows cross NVLink."""
        return True

    def token_counts(self) -> list[int]:
        """Tokens of every rank."""
        return draw_token_counts(
            ranks=self.ranks, tokens=self.tokens, uneven=self.uneven, seed=self.seed
        )

    def choices(self, layer: int) -> list[Tensor]:
        """`[T, K]` expert ids of every rank; each layer has a routing of its own."""
        drawn = draw_routing(
            RoutingSpec.parse(self.routing),
            tokens_per_rank=self.token_counts(),
            experts=self.experts,
            topk=self.topk,
            seed=self.seed,
            trace=self.trace,
            index=layer,
        )
        return [routing.topk_ids_TK for routing in drawn]

    def micro_batches(self, tokens: int) -> list[slice]:
        """What of a rank's tokens goes through the layers together: all, or two halves."""
        if not self.calls.turns:
            return [slice(0, tokens)]
        half = (tokens + 1) // 2
        return [slice(0, half), slice(half, tokens)]

    def most_rows(self) -> int:
        """Rows that the busiest rank receives in any dispatch of the layers, alignment gaps
        included."""
        rank_of_E = torch.tensor(even_blocks(self.experts, self.ranks))
        most = 0
        parts = [self.micro_batches(tokens) for tokens in self.token_counts()]
        choices = map(self.choices, range(self.layers))
        for ids_RTK, own in product(choices, zip(*parts, strict=True)):
            chosen = zip(ids_RTK, own, strict=True)
            ids = torch.cat([ids_TK[part].flatten() for ids_TK, part in chosen])
            rows_E = torch.bincount(ids[ids >= 0], minlength=self.experts)
            padded_E = -(-rows_E // ROW_ALIGNMENT) * ROW_ALIGNMENT
            rows_R = torch.zeros(self.ranks, dtype=torch.int64)
            most = max(most, int(rows_R.index_add_(0, rank_of_E, padded_E).max()))
        return most

    def label(self) -> str:
        """The case in a few words."""
        layers = f"{self.layers} layers of " if self.layers > 1 else ""
        return f"{layers}{self.model} · {super().label()}"


def build_layer_cases(options: BenchOptions, *, device: str, ranks: int) -> list[LayerCase]:
    """All combinations of the listed options, for `--layer`.

    Raises:
        ExpertlinkError: an option, or a combination of options, cannot be measured.
    """
    refuse_options(options, _EXCLUDED, "--layer")
    if options.layers < 1:
        raise ConfigurationError(
            f"layers={options.layers} cannot be measured; accepted: at least 1"
        )
    models = parse_names(options.model or _DEFAULT_MODEL[device], name="model")
    for model in models:
        if model not in MODELS:
            raise ConfigurationError(
                f"model={model!r} cannot be measured; accepted: {', '.join(MODELS)}"
            )
    recorded = {} if options.trace is None else recorded_shape(options.trace)
    situations = product(
        models,
        parse_names(options.dtype, name="dtype"),
        parse_names(options.routing or recorded.get("routing", "balanced"), name="routing"),
        parse_ints(options.tokens or TOKENS["ht", device], name="tokens"),
    )
    ways = product(
        parse_budgets(options),
        parse_names(options.engine or "auto", name="engine"),
        parse_names(options.variant or "eager", name="variant"),
    )
    cases: list[LayerCase] = []
    for situation, way in product(situations, ways):
        model, dtype, routing, tokens = situation
        (dispatch, combine), engine, variant = way
        shape = MODELS[model]
        case = LayerCase(
            model=model,
            layers=options.layers,
            seed=options.seed,
            ranks=ranks,
            tokens=tokens,
            hidden=shape.hidden,
            topk=shape.topk,
            experts=shape.experts,
            dtype=dtype,
            routing=routing,
            uneven=options.uneven,
            engine=engine,
            variant=variant,
            num_sms_dispatch=dispatch,
            num_sms_combine=combine,
            trace=None if options.trace is None else str(options.trace),
        )
        check_device(case, device)
        check_trace(case, recorded)
        cases.append(case)
    return list(dict.fromkeys(cases))
