"""Cases of `expertlink bench --drop-in`: the calls of `expertlink.compat.deep_ep`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from expertlink.bench.cases import Case, Variant
from expertlink.bench.options import (
    LEAST_MAX_TOKENS,
    SHAPE,
    BenchOptions,
    check_device,
    check_trace,
    hosts_of,
    parse_budgets,
    parse_ints,
    parse_names,
    rail_of,
    recorded_shape,
    refuse_options,
)
from expertlink.engines import select
from expertlink.errors import ConfigurationError

INTERFACES = ("normal", "low_latency", "elastic")
"""`Buffer.dispatch` and `combine`, `Buffer.low_latency_*`, and `ElasticBuffer`."""
DROP_IN_VARIANTS = {
    "eager": Variant(),
    "graph": Variant(graph=True, prepared=True, chained=True),
}
"""Calls launched one by one, and so many of them in one CUDA graph (`low_latency` only)."""
FORMATS = (None, "e4m3_float32")
_TOKENS = {
    ("normal", "cuda"): "4096",
    ("elastic", "cuda"): "4096",
    ("low_latency", "cuda"): "1,16,128",
    ("normal", "cpu"): "64",
    ("elastic", "cpu"): "64",
    ("low_latency", "cpu"): "1,16",
}
_EXCLUDED = {
    "mode": "--interface",
    "layout": "the layouts of deep_ep",
    "engine": "none, as the drop-in chooses",
    "max_tokens_per_rank": "--tokens, whose largest value is that of the buffers",
    "grid": "either --drop-in or --grid",
    "gemm": "--overlap",
    "model": "--layer",
    "profile": "--layer",
}


@dataclass(frozen=True, kw_only=True)
class DropInCase(Case):
    """Calls of one interface. `num_sms_dispatch` and `num_sms_combine` are equal; None leaves them
    to the drop-in."""

    interface: str  # one of `INTERFACES`

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantization not in FORMATS:
            raise ConfigurationError(
                f"quantization={self.quantization!r} cannot be measured with --drop-in; accepted: "
                "none, e4m3_float32"
            )
        block = 128 if self.quantization is None else 512
        if self.hidden % block:
            raise ConfigurationError(
                f"hidden={self.hidden} cannot be measured with --drop-in; accepted: multiples of "
                f"{block}"
            )
        if self.experts % self.ranks:
            raise ConfigurationError(
                f"experts={self.experts} cannot be measured with --drop-in; accepted: multiples of "
                f"the {self.ranks} ranks"
            )

    @property
    def variants(self) -> Mapping[str, Variant]:
        """Those of the interface."""
        if self.interface == "low_latency":
            return DROP_IN_VARIANTS
        return {"eager": DROP_IN_VARIANTS["eager"]}

    def label(self) -> str:
        """The case in a few words."""
        return f"{self.interface} · {super().label()}"


def build_drop_in_cases(options: BenchOptions, *, device: str, ranks: int) -> list[DropInCase]:
    """All combinations of the listed options, for `--drop-in`.

    Raises:
        ExpertlinkError: an option, or a combination of options, cannot be measured.
    """
    refuse_options(options, _EXCLUDED, "--drop-in")
    recorded = {} if options.trace is None else recorded_shape(options.trace)
    texts = {**SHAPE[device], "routing": "balanced", "quantization": "none,e4m3_float32"}
    texts |= recorded
    names = ("hidden", "topk", "experts", "routing", "quantization")
    texts |= {name: text for name in names if (text := getattr(options, name)) is not None}
    interfaces = parse_names(options.interface or ",".join(INTERFACES), name="interface")
    hosts = hosts_of(options, ranks)
    capturable = device == "cuda" and (hosts == 1 or select.AUTO_TAKES_HYBRID)
    usual = ",".join(DROP_IN_VARIANTS) if capturable else "eager"
    variants = parse_names(options.variant or usual, name="variant")
    _check_names(interfaces, INTERFACES, "interface")
    _check_names(variants, DROP_IN_VARIANTS, "variant")
    if "graph" in variants and hosts > 1 and not select.AUTO_TAKES_HYBRID:
        raise ConfigurationError(
            "variant='graph' cannot be measured across hosts, where low-latency calls of the "
            "drop-in make the host wait; accepted: eager"
        )
    routings = parse_names(texts["routing"], name="routing")
    sizes = [parse_ints(texts[name], name=name) for name in ("hidden", "topk", "experts")]
    formats = [
        None if one == "none" else one
        for one in parse_names(texts["quantization"], name="quantization")
    ]
    cases: list[DropInCase] = []
    for (dispatch, combine), interface in product(parse_budgets(options), interfaces):
        if dispatch != combine:
            raise ConfigurationError("--drop-in has one number of SMs; accepted: --num-sms")
        low_latency = interface == "low_latency"
        tokens = parse_ints(options.tokens or _TOKENS[interface, device], name="tokens")
        ways = product(routings, product(*sizes), tokens, formats, variants)
        for routing, (hidden, topk, experts), num_tokens, quantization, variant in ways:
            if variant == "graph" and not low_latency:
                continue
            case = DropInCase(
                interface=interface,
                ranks=ranks,
                tokens=num_tokens,
                hidden=hidden,
                topk=topk,
                experts=experts,
                dtype=options.dtype,
                layout="expert_major" if low_latency else "token_major",
                routing=routing,
                uneven=options.uneven,
                mode="ll" if low_latency else "ht",
                variant=variant,
                quantization=quantization,
                max_tokens_per_rank=max(LEAST_MAX_TOKENS, *tokens) if low_latency else None,
                num_sms_dispatch=None if low_latency else dispatch,
                num_sms_combine=None if low_latency else combine,
                trace=None if options.trace is None else str(options.trace),
                hosts=hosts,
                rail=rail_of(options) if hosts > 1 else None,
                rail_ctas=options.rail_ctas,
            )
            check_device(case, device)
            check_trace(case, recorded)
            cases.append(case)
    if not cases:
        raise ConfigurationError("variant='graph' needs --interface low_latency")
    return list(dict.fromkeys(cases))


def _check_names(names: Sequence[str], accepted: Iterable[str], what: str) -> None:
    known = list(accepted)
    for name in names:
        if name not in known:
            raise ConfigurationError(
                f"{what}={name!r} cannot be measured with --drop-in; accepted: {', '.join(known)}"
            )
