"""The communicators of a soak: their configurations, and the inputs that their calls draw from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from expertlink import BlockFormat, DispatchLayout
from support.cases import LL, Shape, exact, long_spans, usual
from support.jobs import config_of
from support.oracle import Case

LAYOUTS = tuple(DispatchLayout)
VIEWS = (DispatchLayout.TOKEN_MAJOR, DispatchLayout.RANK_MAJOR)
SMS = {"num_sms_dispatch": 4, "num_sms_combine": 4}


@dataclass(frozen=True)
class Setting:
    """One communicator of a soak: its configuration and the inputs that its calls draw from."""

    fields: dict[str, Any]
    cases: list[Case]
    steady: bool = False  # graphs may refer to its calls: T of a rank stays the same
    host: int | None = None  # the setting before this one whose communicator's memory it uses

    @property
    def mode(self) -> str:
        """ "ht" or "ll"."""
        return self.fields.get("mode", "ht")


def settings(ranks: int, seed: int) -> list[Setting]:
    """Mode "ht": caller-owned outputs, views, static shapes. Mode "ll": plain, in graphs
    with sums as exact as they can be, and with rows that are quantized on the way. One more of each
    mode that uses the memory of another one, in mode "ht" with fewer experts."""
    # Tokens of a rank stay the same where graphs refer to them.
    few = [tuple((i * 7 + r * 5) % 41 for r in range(ranks)) for i in range(5)]
    few.append((0,) * ranks)
    many = [tuple((300, 0, 65, 129)[(r + i) % 4] for r in range(ranks)) for i in range(3)]
    steady = tuple((40, 0, 23, 38)[r % 4] for r in range(ranks))
    plain, static = LAYOUTS[seed % 4], LAYOUTS[(seed + 1) % 4]
    views = VIEWS[seed % 2]
    swift, replayed, packed = (usual(ranks, LAYOUTS[(seed + i) % 4]) for i in (2, 3, 0))
    if replayed.layout.expanded:
        replayed = exact(replayed)
    formats = {
        "quantization": list(BlockFormat)[seed % 3],
        "scale_order": ("row_major", "column_major")[seed // 2 % 2],
    }

    fewer = dataclasses.replace(usual(ranks, LAYOUTS[(seed + 3) % 4]), experts=24)

    def drawn(shape: Shape, tokens: list[tuple[int, ...]]) -> list[Case]:
        return _drawn(shape, tokens, seed)

    return [
        Setting({}, drawn(long_spans(plain), many)),
        Setting({"zero_copy": True}, drawn(usual(ranks, views), few)),
        Setting({"static_shapes": True}, drawn(usual(ranks, static), [steady] * 6), steady=True),
        Setting(LL, drawn(swift, few)),
        Setting(LL, drawn(replayed, [steady] * 6), steady=True),
        Setting({**LL, **formats}, drawn(packed, few)),
        Setting({}, drawn(fewer, few), host=1),
        Setting(LL, drawn(usual(ranks, LAYOUTS[seed % 4]), few), host=3),
        # Training in one graph, forward and backward.
        Setting(
            {"static_shapes": True},
            drawn(usual(ranks, DispatchLayout.FLAT), [steady] * 4),
            steady=True,
        ),
    ]


def settings_across(hosts: tuple[int, ...], seed: int, *, engine: str) -> list[Setting]:
    """The same for ranks of several hosts, or of one, on GPUs ("hybrid") and on CPUs
    ("collective"): what both can do. `hosts`: that of every rank."""
    ranks = len(hosts)
    domains = hosts if len(set(hosts)) > 1 else None
    few = [tuple((i * 7 + r * 5) % 41 for r in range(ranks)) for i in range(3)]
    few.append((0,) * ranks)
    steady = tuple((40, 0, 23, 38)[r % 4] for r in range(ranks))
    plain, static, swift, packed = (usual(ranks, LAYOUTS[(seed + i) % 4]) for i in range(4))
    on_gpus = engine != "collective"
    fixed = {"static_shapes": on_gpus}
    low_latency = {**LL, **fixed}
    formats = {"quantization": list(BlockFormat)[seed % 3]}

    def drawn(shape: Shape, tokens: list[tuple[int, ...]]) -> list[Case]:
        return _drawn(shape, tokens, seed, domains=domains)

    chosen = [
        Setting({}, drawn(plain, few)),
        Setting(fixed, drawn(static, [steady] * 4), steady=on_gpus),
        Setting(low_latency, drawn(swift, [steady] * 4), steady=on_gpus),
        Setting({**low_latency, **formats}, drawn(packed, few)),
    ]
    return [dataclasses.replace(one, fields={**one.fields, "engine": engine}) for one in chosen]


def _drawn(
    shape: Shape,
    tokens: list[tuple[int, ...]],
    seed: int,
    *,
    domains: tuple[int, ...] | None = None,
) -> list[Case]:
    kinds: list[dict[str, Any]] = [{}, {"masked": 0.4}, {"skew": 3.0}, {"only_rank": 1}]
    return [
        shape.case(t, seed=seed + i, domains=domains, **kinds[i % 4]) for i, t in enumerate(tokens)
    ]


def config_for(setting: Setting, device: Any) -> Any:
    """Configuration of a setting's communicator."""
    return config_of(setting.cases[0], device, **{"engine": "nvlink", **SMS, **setting.fields})
