"""Options of `expertlink bench`: as they are typed, and the cases and the plan they stand for."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from expertlink.bench.cases import Case, Plan
from expertlink.bench.environment import usable_cores
from expertlink.errors import ConfigurationError
from expertlink.launch import RankContext

_DEFAULT_CPU_RANKS = 4
LEAST_MAX_TOKENS = 128
"""T_max of mode "ll" at least."""
_WHOLE = ("tokens", "hidden", "topk", "experts")
_LEAST = {"iters": 1, "warmup": 0, "inputs": 1, "seed": 0, "threads": 1, "ceiling_sms": 1}
_LEAST |= {"calls_per_graph": 1, "rail_ctas": 1}

# What is measured where nothing else is asked for. CUDA: the model shape that the field publishes
# figures for. CPU: one that a laptop measures in seconds.
SHAPE = {
    "cuda": {"hidden": "7168", "topk": "8", "experts": "256"},
    "cpu": {"hidden": "1024", "topk": "4", "experts": "16"},
}
TOKENS = {
    ("ht", "cuda"): "4096",
    ("ht", "cpu"): "128,1024",
    ("ll", "cuda"): "1,8,16,32,64,128,256,512",
    ("ll", "cpu"): "1,16,128",
}
_FORMATS = {
    "ht": {"layout": "flat", "quantization": "none", "variant": "uncached,cached"},
    "ll": {"layout": "expert_major,rank_major", "quantization": "none,e4m3_float32"},
}
_LL_VARIANTS = {"cuda": "graph,graph_single,eager,halves", "cpu": "eager,halves"}
# What --grid varies: rows of short and of long models, few tokens and many.
_GRID = {
    "cuda": {
        "hidden": "1024,2048,2880,4096,5120,7168,8192",
        "tokens": "256,1024,4096,16384",
        "topk": "1,2,4,8",
        "variant": "uncached",
    },
    "cpu": {"hidden": "256,1024", "tokens": "16,128", "topk": "1,4", "variant": "uncached"},
}
_LL_GRID_TOKENS = {"cuda": "32,64,128,256,512", "cpu": "1,16"}
_GEMM = {"cuda": "8192,4096,7168", "cpu": "256,512,512"}  # m, n, k
# Fields that need another communicator vary slowest.
_ORDER = {
    "ht": ("dtype", "quantization", "routing", "tokens", "hidden", "topk", "experts", "layout"),
    "ll": ("dtype", "quantization", "layout", "hidden", "topk", "experts", "routing", "tokens"),
}


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Options of `expertlink bench` as they were typed; lists are separated by commas.

    None leaves a choice to the machine and the mode or, for `topk` and `experts`, to the trace.
    """

    ranks: int | None = None
    tokens: str | None = None
    hidden: str | None = None
    topk: str | None = None
    experts: str | None = None
    dtype: str = "bfloat16"
    layout: str | None = None
    routing: str | None = None
    uneven: bool = False
    mode: str = "ht"
    variant: str | None = None
    quantization: str | None = None
    max_tokens_per_rank: int | None = None
    engine: str | None = None
    num_sms: str | None = None
    num_sms_dispatch: str | None = None
    num_sms_combine: str | None = None
    ceiling_sms: int = 24
    virtual_hosts: int | None = None
    rail: str | None = None
    rail_ctas: int | None = None
    calls_per_graph: int = 20
    grid: bool = False
    budget: float | None = None
    overlap: bool = False
    host_time: bool = False
    backward: bool = False
    drop_in: bool = False
    interface: str | None = None
    gemm: str | None = None
    layer: bool = False
    model: str | None = None
    layers: int = 1
    profile: Path | None = None
    device: str = "auto"
    threads: int | None = None
    iters: int = 50
    warmup: int = 5
    inputs: int = 4
    seed: int = 0
    timeout: float = 300.0
    trace: Path | None = None
    out: Path | None = None
    append: bool = False
    verbose: bool = False


def build_cases(options: BenchOptions, *, device: str, ranks: int) -> list[Case]:
    """All combinations of the listed options.

    Raises:
        ExpertlinkError: an option, or a combination of options, cannot be measured.
    """
    # A grid shows both engines beside NCCL's own exchange of the same bytes.
    usual_engines = "nvlink,collective" if options.grid and device == "cuda" else "auto"
    engines = parse_names(options.engine or usual_engines, name="engine")
    modes = parse_names(options.mode, name="mode")
    recorded = {} if options.trace is None else recorded_shape(options.trace)
    hosts = hosts_of(options, ranks)
    found: list[Case] = []
    for (dispatch, combine), engine, mode in product(parse_budgets(options), engines, modes):
        lists = _lists(options, device, engine, mode, recorded)
        most_tokens = options.max_tokens_per_rank
        if most_tokens is None and mode == "ll":
            # One for all T, so that they share a communicator as decode steps do.
            most_tokens = max([LEAST_MAX_TOKENS, *lists["tokens"]])
        for values in product(*lists.values()):
            case = Case(
                ranks=ranks,
                engine=engine,
                mode=mode,
                uneven=options.uneven,
                trace=None if options.trace is None else str(options.trace),
                num_sms_dispatch=dispatch,
                num_sms_combine=combine,
                max_tokens_per_rank=most_tokens,
                hosts=hosts,
                rail=rail_of(options) if hosts > 1 else None,
                rail_ctas=options.rail_ctas,
                **dict(zip(lists, values, strict=True)),
            )
            found.append(case)
    cases = list(dict.fromkeys(found))
    if options.interface is not None:
        raise ConfigurationError(f"interface={options.interface!r} needs --drop-in")
    for name in ("model", "profile"):
        if getattr(options, name) is not None:
            raise ConfigurationError(f"{name}={str(getattr(options, name))!r} needs --layer")
    if options.layers != 1:
        raise ConfigurationError(f"layers={options.layers} needs --layer")
    for case in cases:
        if options.overlap and (case.calls.graph or case.calls.prepared):
            raise ConfigurationError(
                f"variant={case.variant!r} cannot be measured with --overlap; accepted: variants "
                "that call dispatch_async themselves"
            )
        if options.host_time and (case.calls.graph or case.calls.halves):
            raise ConfigurationError(
                f"variant={case.variant!r} cannot be measured with --host-time; accepted: variants "
                "whose calls are launched one by one, as a whole"
            )
        check_device(case, device)
        check_trace(case, recorded)
    return cases


def refuse_options(options: BenchOptions, instead: Mapping[str, str], what: str) -> None:
    """Refuses options that were given and do not apply, with what is there instead.

    Raises:
        ConfigurationError: there is one.
    """
    usual = BenchOptions()
    for name, accepted in instead.items():
        value = getattr(options, name)
        if value != getattr(usual, name):
            raise ConfigurationError(
                f"{name}={value!r} cannot be measured with {what}; accepted: {accepted}"
            )


def hosts_of(options: BenchOptions, ranks: int) -> int:
    """Hosts that the ranks are on: pretended ones, or those of torchrun.

    Raises:
        ConfigurationError: ranks do not divide into so many hosts, or options of rails are given
            where there is one host.
    """
    hosts, local = options.virtual_hosts, os.environ.get("LOCAL_WORLD_SIZE", "")
    if hosts is None:
        # Ranks of torchrun follow each other on a host.
        hosts = ranks // int(local) if under_torchrun() and local.isdecimal() else 1
        hosts = hosts if hosts and local.isdecimal() and hosts * int(local) == ranks else 1
        if options.rail is not None:
            raise ConfigurationError(f"rail={options.rail!r} needs --virtual-hosts")
    elif hosts < 2 or ranks % hosts:
        raise ConfigurationError(
            f"virtual_hosts={hosts} cannot be measured on {ranks} ranks; accepted: at least 2, "
            "with equally many ranks each"
        )
    if hosts == 1 and options.rail_ctas is not None:
        raise ConfigurationError(f"rail_ctas={options.rail_ctas} needs several hosts")
    if hosts > 1 and options.layer:
        raise ConfigurationError("hosts cannot be told apart with --layer; accepted: one host")
    return hosts


def rail_of(options: BenchOptions) -> str:
    """What joins the hosts, if there are several."""
    return "network" if options.virtual_hosts is None else options.rail or "sockets"


def check_device(case: Case, device: str) -> None:
    """Refuses a variant that only GPUs have elsewhere."""
    if device == "cpu" and case.calls.needs_nvlink:
        raise ConfigurationError(
            f"variant={case.variant!r} cannot be measured on CPU ranks: it needs the nvlink "
            "engine, which moves rows between GPUs"
        )


def check_trace(case: Case, recorded: dict[str, str]) -> None:
    """Refuses a case of another shape than the trace that it replays."""
    shape = {"topk": str(case.topk), "experts": str(case.experts), "routing": case.routing}
    if case.routing == "trace" and shape != recorded:
        raise ConfigurationError(
            f"topk={case.topk}, experts={case.experts} cannot be replayed from the trace, "
            f"which has topk={recorded['topk']}, experts={recorded['experts']}"
        )


def _lists(
    options: BenchOptions, device: str, engine: str, mode: str, recorded: dict[str, str]
) -> dict[str, Sequence[Any]]:
    """Values of the fields that vary: as typed, as the trace has them, or the default ones."""
    mode = mode if mode in _ORDER else "ll"  # `Case` refuses another one
    names = (*_ORDER[mode], "variant")
    # NCCL stands beside the others for comparison: one line is enough.
    ll_variants = "eager" if engine == "collective" and device == "cuda" else _LL_VARIANTS[device]
    texts = {"tokens": TOKENS[mode, device], "routing": "balanced", "variant": ll_variants}
    texts |= {**SHAPE[device], **_FORMATS[mode], **(_GRID[device] if options.grid else {})}
    if options.grid and mode == "ll":
        texts |= {"tokens": _LL_GRID_TOKENS[device], "variant": ll_variants}
    if options.host_time and mode == "ll":
        texts["variant"] = "eager"
    texts |= recorded
    texts |= {name: text for name in names if (text := getattr(options, name)) is not None}
    lists: dict[str, Sequence[Any]] = {
        name: (parse_ints if name in _WHOLE else parse_names)(texts[name], name=name)
        for name in names
    }
    lists["quantization"] = [None if one == "none" else one for one in lists["quantization"]]
    return lists


def parse_budgets(options: BenchOptions) -> list[tuple[int | None, int | None]]:
    """SMs of dispatch and combine, in pairs; a single value stands beside each of the others."""
    both = options.num_sms
    if both is not None and (options.num_sms_dispatch or options.num_sms_combine):
        raise ConfigurationError(
            f"num_sms={both!r} is for dispatch and combine alike; accepted: either that, or "
            "num_sms_dispatch and num_sms_combine"
        )
    lists: list[Sequence[int | None]] = []
    for name in ("num_sms_dispatch", "num_sms_combine"):
        text = getattr(options, name) or both
        lists.append([None] if text is None else parse_ints(text, name=name))
    longest = max(map(len, lists))
    if any(len(values) not in (1, longest) for values in lists):
        raise ConfigurationError(
            f"num_sms_dispatch={options.num_sms_dispatch!r} and num_sms_combine="
            f"{options.num_sms_combine!r} go pairwise; accepted: equally many values, or one"
        )
    dispatch, combine = ([*values] * longest if len(values) == 1 else values for values in lists)
    return list(dict.fromkeys(zip(dispatch, combine, strict=True)))


def parse_ints(text: str, *, name: str) -> list[int]:
    """Reads "128,1024".

    Raises:
        ConfigurationError: an item is no whole number.
    """
    items = parse_names(text, name=name)
    try:
        return [int(item) for item in items]
    except ValueError:
        raise ConfigurationError(
            f"{name}={text!r} cannot be measured; accepted: whole numbers separated by commas"
        ) from None


def parse_names(text: str, *, name: str) -> list[str]:
    """Reads "flat,token_major"; blanks around the commas do not count.

    Raises:
        ConfigurationError: there is none.
    """
    names = [item.strip() for item in text.split(",") if item.strip()]
    if not names:
        raise ConfigurationError(
            f"{name}={text!r} cannot be measured; accepted: at least one value"
        )
    return names


def device_and_ranks(
    options: BenchOptions, context: RankContext | None
) -> tuple[Literal["cpu", "cuda"], int]:
    """Where to measure, and on how many ranks; `context` is this rank, if torchrun started it.

    Raises:
        ConfigurationError: that is not possible here.
    """
    wanted, ranks, gpus = options.device, options.ranks, torch.cuda.device_count()
    if wanted not in ("auto", "cpu", "cuda"):
        raise ConfigurationError(f"device={wanted!r} cannot be measured; accepted: auto, cpu, cuda")
    if wanted == "cuda" and gpus == 0:
        raise ConfigurationError("device='cuda' cannot be measured: no GPU was found")
    if context is not None:
        if ranks not in (None, context.num_ranks):
            raise ConfigurationError(
                f"ranks={ranks} cannot be measured: torchrun started {context.num_ranks}"
            )
        wanted = context.device.type if wanted == "auto" else wanted
        return ("cuda" if wanted == "cuda" else "cpu"), context.num_ranks
    if wanted == "auto":
        wanted = "cuda" if gpus >= (ranks or 1) and gpus > 0 else "cpu"
    if wanted == "cpu":
        return "cpu", min(_DEFAULT_CPU_RANKS, max(2, usable_cores())) if ranks is None else ranks
    ranks = gpus if ranks is None else ranks
    if ranks > gpus:
        raise ConfigurationError(f"ranks={ranks} cannot be measured on {gpus} GPUs")
    return "cuda", ranks


def make_plan(options: BenchOptions, device: str) -> Plan:
    """How to measure.

    Raises:
        ConfigurationError: an option makes no sense.
    """
    for name, least in _LEAST.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigurationError(
                f"{name}={value} cannot be measured; accepted: at least {least}"
            )
    if not (math.isfinite(options.timeout) and options.timeout > 0):
        raise ConfigurationError(
            f"timeout={options.timeout}: a positive number of seconds is needed"
        )
    budget = options.budget
    if budget is not None and not (math.isfinite(budget) and budget > 0):
        raise ConfigurationError(f"budget={budget}: a positive number of seconds is needed")
    return Plan(
        iters=options.iters,
        warmup=options.warmup,
        inputs=options.inputs if budget is None else 1,  # drawing them takes longer than the calls
        budget_s=budget,
        seed=options.seed,
        timeout_s=options.timeout / 2,
        command=_command_line(),
        ceiling_sms=options.ceiling_sms,
        calls_per_graph=options.calls_per_graph,
        profile=options.profile,
        gemm=_gemm(options.gemm or _GEMM[device]) if options.overlap else None,
    )


def _gemm(text: str) -> tuple[int, int, int]:
    sizes = parse_ints(text, name="gemm")
    if len(sizes) != 3 or min(sizes) < 1:
        raise ConfigurationError(
            f"gemm={text!r} cannot be measured; accepted: m,n,k, each at least 1"
        )
    return sizes[0], sizes[1], sizes[2]


def _command_line() -> str:
    as_module = Path(sys.argv[0]).name == "__main__.py"
    words = ["python", "-m"] if as_module else []
    if under_torchrun():
        ranks = os.environ.get("LOCAL_WORLD_SIZE", "?")
        words = ["torchrun", f"--nproc-per-node={ranks}", "-m" if as_module else "--no-python"]
    return shlex.join([*words, "expertlink", *sys.argv[1:]])


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "LOCAL_WORLD_SIZE" in os.environ


def recorded_shape(path: Path) -> dict[str, str]:
    """Choices and experts of a trace, and the routing that replays it, as they are typed."""
    from expertlink.workloads.trace import RoutingTrace

    trace = RoutingTrace.load(path)
    return {"topk": str(trace.topk), "experts": str(trace.num_experts), "routing": "trace"}
