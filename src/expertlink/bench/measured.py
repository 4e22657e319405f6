"""From the times of all ranks to records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expertlink.bench.cases import RECV, Case, Plan, recorded_as
from expertlink.bench.ceilings import KINDS, Floor
from expertlink.bench.clock import Clock, TimesOfRanks
from expertlink.bench.environment import describe_environment
from expertlink.bench.inputs import WireRows
from expertlink.bench.rails import KIND as RAIL
from expertlink.bench.records import PHASES, Record, Summary, slowest_rank, summarize

_NOTHING_LEAVES = "rows are there before a receiving half begins"
_SAME = ("mode", "layout", "dtype", "quantization", "ranks", "tokens", "hidden", "topk", "experts")
_SAME += ("max_tokens_per_rank", "uneven", "hosts", "rail", "rail_ctas")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a case's ranks found out together."""

    device: torch.device  # where rank 0 computed
    engine: str  # that served the case
    num_inputs: int  # that took turns
    # A pair has no "raw", "put" and "get", CPUs have no "idle", only prepared calls have "hot
    # host", only prepared pairs on GPUs "idle loop".
    times: TimesOfRanks
    traffic: Tensor  # `[R, phases, 3]`, see `gather_traffic`
    ceiling_note: str | None  # why there are no "put" and "get"
    floor: Floor | None = None  # of whole calls into prepared outputs
    rail_bytes: Mapping[str, float] = field(default_factory=dict)  # by phase; several hosts


def gather_traffic(wires: Sequence[WireRows], case: Case, clock: Clock) -> Tensor:
    """`[R, phases, 3]` float64: `WireRows.traffic`, averaged over inputs. Collective."""
    traffic = torch.tensor([wire.traffic(case) for wire in wires], dtype=torch.float64)
    return clock.gather(traffic.mean(dim=0))


def make_records(case: Case, plan: Plan, measured: Measured) -> list[Record]:
    """Records of all phases of a case, or of both halves of its calls."""
    return [
        _record(name, phase, case, plan, measured)
        for name in recorded_as(case.variant)
        for phase in PHASES
        if (name, phase, "time") in measured.times
    ]


def _record(name: str, phase: str, case: Case, plan: Plan, measured: Measured) -> Record:
    times, on_gpu = measured.times, measured.device.type == "cuda"
    time_us = _summary(times[name, phase, "time"])
    raw_us = _compared(times, dict.fromkeys(_parts(phase), "raw"))
    sms = {"dispatch": case.num_sms_dispatch, "combine": case.num_sms_combine}
    budgets = [budget for part in _parts(phase) if (budget := sms[part]) is not None]
    traffic = measured.traffic[:, PHASES.index(phase)] * (name != RECV)
    sent, received, metadata = traffic.unbind(dim=1)

    def optional(kind: str) -> Summary | None:
        found = times.get((name, phase, kind))
        return None if found is None else _summary(found)

    return Record(
        engine=measured.engine,
        phase=phase,
        variant=name,
        routing=case.routing_label,
        **{field: getattr(case, field) for field in _SAME},
        num_sms=max(budgets, default=None),
        num_sms_dispatch=case.num_sms_dispatch if phase == "pair" else None,
        num_sms_combine=case.num_sms_combine if phase == "pair" else None,
        time_us=time_us,
        time_us_mean_rank=summarize(times[name, phase, "time"].mean(dim=0).tolist()),
        host_us=optional("idle host") or _summary(times[name, phase, "host"]),
        wire_bytes=round(float(sent.mean())),
        wire_gbps=_gbps(sent.mean(), time_us),
        **_ceilings(name, phase, plan, measured, time_us, sent.mean()),
        **_floor(case, phase, measured, time_us),
        **_rail(name, phase, measured, time_us),
        environment=describe_environment(measured.device),
        wire_bytes_max=round(float(sent.max())),
        wire_bytes_received_max=round(float(received.max())),
        wire_gbps_max=_gbps(sent.max(), time_us),
        aggregate_gbps=_gbps(sent.sum(), time_us),
        metadata_bytes=round(float(metadata.mean())),
        raw_us=raw_us,
        raw_gbps=_gbps(sent.mean(), raw_us),
        raw_ratio=round(_ratio(time_us.median, raw_us), 3),
        idle_us=optional("idle"),
        idle_loop_us=optional("idle loop"),
        host_hot_us=optional("hot host"),
        calls_per_graph=case.calls_per_graph(plan, measured.engine),
        aligned="device" if on_gpu else "host",
        iterations=plan.iters,
        inputs=measured.num_inputs,
        threads=torch.get_num_threads(),
        memory_peak_bytes=int(times[name, phase, "memory"].max()) if on_gpu else None,
        seed=plan.seed,
        command=plan.command,
    )


def _ceilings(
    name: str, phase: str, plan: Plan, measured: Measured, time_us: Summary, sent: Tensor
) -> dict[str, Any]:
    """The fields of a record that say how close to the wire a phase is."""
    times, parts = measured.times, _parts(phase)
    note = measured.ceiling_note or (_NOTHING_LEAVES if name == RECV else None)
    if note is not None:
        return {"ceiling_note": note}
    # Dispatch has to put: its rows leave when their senders know of them. Combine may do either.
    chosen = dict.fromkeys(parts, "put")
    if "combine" in parts:
        chosen["combine"] = min(KINDS, key=lambda kind: _summary(times["", "combine", kind]).median)
    put_us, get_us = (_compared(times, dict.fromkeys(parts, kind)) for kind in KINDS)
    ceiling_us = _compared(times, chosen)
    return {
        "ceiling": "+".join(chosen.values()),
        "ceiling_us": ceiling_us,
        "ceiling_gbps": _gbps(sent, ceiling_us),
        "ceiling_ratio": _ratio(ceiling_us.median, time_us),
        "ceiling_num_sms": plan.ceiling_sms,
        "put_us": put_us,
        "put_ratio": _ratio(put_us.median, time_us),
        "get_us": get_us,
        "get_ratio": _ratio(get_us.median, time_us),
    }


def _floor(case: Case, phase: str, measured: Measured, time_us: Summary) -> dict[str, Any]:
    """The fields of a record that say how close to the floor a phase is."""
    floor = measured.floor
    if floor is None or case.calls.halves:
        return {}
    # Both ways at once: the rank that sends or receives most needs longest.
    busiest = [measured.traffic[:, PHASES.index(part), :2].max() for part in _parts(phase)]
    floor_us = round(sum(floor.of(float(num_bytes)) for num_bytes in busiest), 2)
    return {
        "floor_us": floor_us,
        "floor_ratio": _ratio(floor_us, time_us),
        "floor_gbps": round(floor.gbps, 4),
        "flag_us": round(floor.flag_us, 3),
    }


def _rail(name: str, phase: str, measured: Measured, time_us: Summary) -> dict[str, Any]:
    """The fields of a record that say how close to the rail alone a phase is."""
    parts = _parts(phase)
    if name == RECV or ("", parts[0], RAIL) not in measured.times:
        return {}
    rail_us = _compared(measured.times, dict.fromkeys(parts, RAIL))
    return {
        "rail_us": rail_us,
        "rail_ratio": _ratio(rail_us.median, time_us),
        "rail_bytes": round(sum(measured.rail_bytes[part] for part in parts)),
    }


def _parts(phase: str) -> tuple[str, ...]:
    """The phases that are measured beside what they are compared with."""
    return ("dispatch", "combine") if phase == "pair" else (phase,)


def _compared(times: TimesOfRanks, kinds: dict[str, str]) -> Summary:
    """Times of one kind, or the sum over the phases that are given with their kinds."""
    columns = [slowest_rank(times["", phase, kind]) for phase, kind in kinds.items()]
    return summarize([sum(column) for column in zip(*columns, strict=True)])


def _ratio(above: float, below: Summary) -> float:
    return round(above / below.median, 4) if below.median > 0 else 0.0


def _summary(times_RI: Tensor) -> Summary:
    return summarize(slowest_rank(times_RI))


def _gbps(num_bytes: Tensor, time: Summary) -> float:
    """GB/s, with 1 GB = 10**9 bytes."""
    return round(float(num_bytes) / time.median / 1e3, 4) if time.median > 0 else 0.0
