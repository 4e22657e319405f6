"""Routings to measure and to test with: which experts every token of every rank chooses.

A routing is named by a short text, `name` or `name:parameter`:

| text        | choices                                                                            |
|-------------|------------------------------------------------------------------------------------|
| `balanced`  | every expert equally often over the whole group                                    |
| `zipf:S`    | popularity falls as 1 / rank ** S over a random order of the experts (default 1.0) |
| `one_hot`   | one expert is every token's first choice, the other choices are balanced           |
| `masked:F`  | balanced, then a fraction F of all choices is -1, half of it as whole tokens (0.25)|
| `trace`     | replayed from a recorded `RoutingTrace`                                            |

All of them draw from `seed` alone: every rank computes the routing of the whole group and takes
its own part, so nothing needs to be exchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from expertlink.errors import InputError

_PARAMETER = {"zipf": 1.0, "masked": 0.25}
NAMES = ("balanced", "zipf", "one_hot", "masked", "trace")


@dataclass(frozen=True)
class RoutingSpec:
    """A parsed routing name.

    Attributes:
        name: one of `NAMES`.
        parameter: skew of `zipf`, fraction of `masked`; None for the others.
    """

    name: str
    parameter: float | None = None

    @classmethod
    def parse(cls, text: str) -> RoutingSpec:
        """Reads `name` or `name:parameter`.

        Raises:
            InputError: unknown name, or a parameter that the routing cannot have.
        """
        name, colon, number = text.partition(":")
        if name not in NAMES:
            raise InputError(f"routing {text!r} is unknown; one of {', '.join(NAMES)}")
        if name not in _PARAMETER:
            if colon:
                raise InputError(f"routing {text!r}: {name} takes no parameter")
            return cls(name)
        if not colon:
            return cls(name, _PARAMETER[name])
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= 0 and (name != "masked" or value <= 1)):
            bounds = "from 0 to 1" if name == "masked" else "of at least 0"
            raise InputError(f"routing {text!r}: {name} takes a number {bounds} after the colon")
        return cls(name, value)

    def __str__(self) -> str:
        return self.name if self.parameter is None else f"{self.name}:{self.parameter:g}"


@dataclass(frozen=True)
class RankRouting:
    """Routing of one rank.

    Attributes:
        topk_ids_TK: int64, distinct experts within a token, -1 for no expert.
        topk_weights_TK: float32, positive, summing to 1 over a token's K choices. Choices of -1
            keep theirs: whoever reads those weights makes a mistake that a test can see.
    """

    topk_ids_TK: Tensor
    topk_weights_TK: Tensor


def draw_routing(
    spec: RoutingSpec,
    *,
    tokens_per_rank: list[int],
    experts: int,
    topk: int,
    seed: int,
    trace: str | Path | None = None,
    index: int = 0,
) -> list[RankRouting]:
    """Routing of every rank of a group.

    Args:
        spec: which routing.
        tokens_per_rank: T of every rank; 0 is possible.
        experts: E.
        topk: K, at most E.
        seed: the same seed gives the same routing on every machine.
        trace: file of the trace, for `trace` only.
        index: which of several routings of the same case; a trace is replayed from its
            `index`-th recorded (step, layer).

    Returns:
        One `RankRouting` per rank, on the CPU.

    Raises:
        InputError: the trace is missing, unreadable or recorded for another K or E; or K > E.
    """
    if not 1 <= topk <= experts:
        raise InputError(f"topk={topk}: from 1 to experts={experts} is possible")
    generator = torch.Generator("cpu").manual_seed(seed * 1_000_003 + index)
    total = sum(tokens_per_rank)
    if spec.name == "trace":
        ids_NK = _trace_ids(trace, tokens_per_rank, experts, topk, index)
    elif spec.name == "zipf":
        ids_NK = _zipf_ids(total, experts, topk, spec.parameter or 0.0, generator)
    elif spec.name == "one_hot":
        ids_NK = _one_hot_ids(total, experts, topk, generator)
    else:
        ids_NK = _balanced_ids(total, experts, topk, generator)
        if spec.name == "masked":
            ids_NK = _mask(ids_NK, spec.parameter or 0.0, generator)
    weights_NK = torch.softmax(
        torch.randn((total, topk), generator=generator, dtype=torch.float32, device="cpu"), dim=-1
    )
    return [
        RankRouting(ids_TK.contiguous(), weights_TK.contiguous())
        for ids_TK, weights_TK in zip(
            ids_NK.split(tokens_per_rank), weights_NK.split(tokens_per_rank), strict=True
        )
    ]


def draw_token_counts(*, ranks: int, tokens: int, uneven: bool, seed: int) -> list[int]:
    """Tokens of every rank.

    Args:
        ranks: R.
        tokens: the most any rank has.
        uneven: False gives `tokens` to every rank. True gives it to one rank, 0 to another and
            anything in between to the rest; a single rank keeps `tokens`.
        seed: decides which rank gets what.
    """
    if not uneven or ranks == 1:
        return [tokens] * ranks
    generator = torch.Generator("cpu").manual_seed(seed)
    middle = torch.randint(0, tokens + 1, (ranks - 2,), generator=generator, device="cpu").tolist()
    order = torch.randperm(ranks, generator=generator).tolist()
    counts = [tokens, 0, *middle]
    return [int(counts[place]) for place in order]


def _balanced_ids(total: int, experts: int, topk: int, generator: torch.Generator) -> Tensor:
    """`[total, K]`: how often two experts are chosen differs by one at most.

    The choices are permutations of the experts, one after the other, cut into tokens of K. Where
    a token spans two permutations, the second one is reordered so that no expert repeats.
    """
    if total == 0 or topk == 0:
        return torch.zeros(total, topk, dtype=torch.int64, device="cpu")
    rounds = math.ceil(total * topk / experts)
    drawn_PE = torch.rand((rounds, experts), generator=generator, dtype=torch.float32, device="cpu")
    order_PE = drawn_PE.argsort(dim=-1)
    if experts % topk:
        order_PE = torch.tensor(_without_repeats(order_PE.tolist(), topk), device="cpu")
    ids_NK = order_PE.flatten()[: total * topk].view(total, topk)
    return ids_NK[torch.randperm(total, generator=generator)]


def _without_repeats(order_PE: list[list[int]], topk: int) -> list[list[int]]:
    open_token: list[int] = []
    for place, order in enumerate(order_PE):
        taken = set(open_token)
        missing = topk - len(open_token) if open_token else 0
        head: list[int] = []
        tail: list[int] = []
        for expert in order:
            (head if len(head) < missing and expert not in taken else tail).append(expert)
        order_PE[place] = head + tail
        left = (len(order) - missing) % topk
        open_token = order_PE[place][len(order) - left :]
    return order_PE


def _zipf_ids(
    total: int, experts: int, topk: int, skew: float, generator: torch.Generator
) -> Tensor:
    """`[total, K]` drawn without replacement: Gumbel top-k over the log-popularities.

    Kool et al., "Stochastic Beams and Where to Find Them", 2019.
    """
    popularity_E = -skew * torch.arange(1, experts + 1, dtype=torch.float64, device="cpu").log()
    popularity_E = popularity_E[torch.randperm(experts, generator=generator, device="cpu")]
    uniform_NE = torch.rand(
        (total, experts), generator=generator, dtype=torch.float64, device="cpu"
    )
    gumbel_NE = -(-uniform_NE.clamp_(min=1e-300).log()).clamp_(min=1e-300).log()
    return (gumbel_NE + popularity_E).topk(topk, dim=-1).indices


def _one_hot_ids(total: int, experts: int, topk: int, generator: torch.Generator) -> Tensor:
    hot = int(torch.randint(0, experts, (1,), generator=generator, device="cpu"))
    rest = _balanced_ids(total, experts - 1, topk - 1, generator)
    rest = rest + (rest >= hot).to(torch.int64)  # the numbers around the hot expert
    return torch.cat((torch.full((total, 1), hot, dtype=torch.int64, device="cpu"), rest), dim=1)


def _mask(ids_NK: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Exactly `round(fraction * N * K)` choices become -1, about half of them in whole tokens."""
    total, topk = ids_NK.shape
    masked = round(fraction * (total * topk))
    whole = masked // 2 // topk if masked < total * topk else total
    order = torch.randperm(total, generator=generator)
    ids_NK = ids_NK.clone()
    ids_NK[order[:whole]] = -1
    open_ids = (ids_NK >= 0).flatten().nonzero().flatten()
    single = open_ids[torch.randperm(len(open_ids), generator=generator)][: masked - whole * topk]
    ids_NK.view(-1)[single] = -1
    return ids_NK


def _trace_ids(
    path: str | Path | None, tokens_per_rank: list[int], experts: int, topk: int, index: int
) -> Tensor:
    # numpy comes with the optional packages of the command line.
    from expertlink.workloads.trace import RoutingTrace

    if path is None:
        _refuse_trace("needs the file of a recorded trace (--trace)")
    trace = RoutingTrace.load(path)
    if (trace.topk, trace.num_experts) != (topk, experts):
        _refuse_trace(
            f"{Path(path).name} was recorded with topk={trace.topk}, experts={trace.num_experts}, "
            f"the case has topk={topk}, experts={experts}"
        )
    most = max(tokens_per_rank)
    dealt = trace.for_ranks(len(tokens_per_rank), max(1, most))
    step, layer = divmod(index % (dealt.num_steps * dealt.num_layers), dealt.num_layers)
    ids_RTK = torch.from_numpy(dealt.topk_ids[step, layer]).to(torch.int64)
    parts = [ids_TK[:count] for ids_TK, count in zip(ids_RTK, tokens_per_rank, strict=True)]
    return torch.cat(parts)


def _refuse_trace(message: str) -> NoReturn:
    raise InputError(f"routing trace: {message}")
