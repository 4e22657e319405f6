"""From the times of all ranks to records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertlink.bench.cases import Case, Plan
from expertlink.bench.ceilings import KINDS, Floor, WireRows
from expertlink.bench.clock import Clock, TimesOfRanks
from expertlink.bench.environment import describe_environment
from expertlink.bench.records import PHASES, Record, Summary, slowest_rank, summarize


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a case's ranks found out together.

    Attributes:
        device: where rank 0 computed.
        engine: engine that served the case.
        aligned: how ranks were aligned before a call.
        num_inputs: inputs that took turns.
        times: by phase and kind: "time", "host", "raw", "put", "get", "idle", "idle host", "idle
            loop", "hot host", "memory". A pair has no "raw", "put" and "get", CPUs have no "idle",
            only prepared calls have "hot host", only prepared pairs on GPUs "idle loop".
        traffic: `[R, phases, 3]`, see `gather_traffic`.
        ceiling_note: why there are no "put" and "get"; None where there are.
        variant: what the record calls the variant.
        calls_per_graph: calls that one replay made, whose times are of one; None: no graph.
        floor: what the record is compared with, or None.
        on_wire: False for a part of a call in which no row leaves a rank.
    """

    device: torch.device
    engine: str
    aligned: str
    num_inputs: int
    times: TimesOfRanks
    traffic: Tensor
    ceiling_note: str | None
    variant: str
    calls_per_graph: int | None = None
    floor: Floor | None = None
    on_wire: bool = True


def gather_traffic(wires: list[WireRows], case: Case, clock: Clock) -> Tensor:
    """`[R, phases, 3]` bytes sent, received and of metadata, averaged over inputs. Collective."""
    topk = 0 if case.calls.cached else case.topk
    traffic = [
        [
            (wire.sent(phase), wire.received(phase), wire.metadata(phase, topk=topk))
            for wire in wires
        ]
        for phase in PHASES
    ]
    return clock.gather(torch.tensor(traffic, dtype=torch.float64).mean(dim=1))


def make_record(phase: str, case: Case, plan: Plan, measured: Measured) -> Record:
    """The record of one phase."""
    times = measured.times
    time_us = _summary(times[phase, "time"])
    raw_us = _compared(times, dict.fromkeys(_parts(phase), "raw"))
    sms = {"dispatch": case.num_sms_dispatch, "combine": case.num_sms_combine}
    budgets = [sms[part] for part in _parts(phase)]
    sent, received, metadata = (measured.on_wire * _traffic(measured, phase)).unbind(dim=1)
    on_gpu = measured.device.type == "cuda"

    def optional(kind: str) -> Summary | None:
        return _summary(times[phase, kind]) if (phase, kind) in times else None

    return Record(
        engine=measured.engine,
        mode=case.mode,
        phase=phase,
        variant=measured.variant,
        layout=case.layout,
        dtype=case.dtype,
        quantization=case.quantization,
        routing=case.routing_label,
        ranks=case.ranks,
        tokens=case.tokens,
        hidden=case.hidden,
        topk=case.topk,
        experts=case.experts,
        max_tokens_per_rank=case.max_tokens_per_rank,
        num_sms=max((budget for budget in budgets if budget is not None), default=None),
        num_sms_dispatch=case.num_sms_dispatch if phase == "pair" else None,
        num_sms_combine=case.num_sms_combine if phase == "pair" else None,
        time_us=time_us,
        time_us_mean_rank=summarize(times[phase, "time"].mean(dim=0).tolist()),
        host_us=optional("idle host") or _summary(times[phase, "host"]),
        wire_bytes=round(float(sent.mean())),
        wire_gbps=_gbps(sent.mean(), time_us),
        **_ceilings(phase, plan, measured, time_us, sent.mean()),
        **_floor(phase, measured, time_us),
        environment=describe_environment(measured.device),
        uneven=case.uneven,
        wire_bytes_max=round(float(sent.max())),
        wire_bytes_received_max=round(float(received.max())),
        wire_gbps_max=_gbps(sent.max(), time_us),
        aggregate_gbps=_gbps(sent.sum(), time_us),
        metadata_bytes=round(float(metadata.mean())),
        raw_us=raw_us,
        raw_gbps=_gbps(sent.mean(), raw_us),
        raw_ratio=round(_ratio(time_us, raw_us), 3),
        idle_us=optional("idle"),
        idle_loop_us=optional("idle loop"),
        host_hot_us=optional("hot host"),
        calls_per_graph=measured.calls_per_graph,
        aligned=measured.aligned,
        iterations=plan.iters,
        inputs=measured.num_inputs,
        threads=torch.get_num_threads(),
        memory_peak_bytes=int(times[phase, "memory"].max()) if on_gpu else None,
        seed=plan.seed,
        command=plan.command,
    )


def _ceilings(
    phase: str, plan: Plan, measured: Measured, time_us: Summary, sent: Tensor
) -> dict[str, Any]:
    """The fields of a record that say how close to the wire a phase is."""
    times, parts = measured.times, _parts(phase)
    if measured.ceiling_note is not None:
        return {"ceiling_note": measured.ceiling_note}
    # Dispatch has to put: its rows leave when their senders know of them. Combine may do either.
    chosen = {
        part: "put"
        if part == "dispatch"
        else min(KINDS, key=lambda kind: _summary(times[part, kind]).median)
        for part in parts
    }
    put_us, get_us = (_compared(times, dict.fromkeys(parts, kind)) for kind in KINDS)
    ceiling_us = _compared(times, chosen)
    return {
        "ceiling": "+".join(chosen.values()),
        "ceiling_us": ceiling_us,
        "ceiling_gbps": _gbps(sent, ceiling_us),
        "ceiling_ratio": _ratio(ceiling_us, time_us),
        "ceiling_num_sms": plan.ceiling_sms,
        "put_us": put_us,
        "put_ratio": _ratio(put_us, time_us),
        "get_us": get_us,
        "get_ratio": _ratio(get_us, time_us),
    }


def _floor(phase: str, measured: Measured, time_us: Summary) -> dict[str, Any]:
    """The fields of a record that say how close to the floor a phase is."""
    if measured.floor is None:
        return {}
    # Both ways at once: the rank that sends or receives most needs longest.
    busiest = [float(_traffic(measured, part)[:, :2].max()) for part in _parts(phase)]
    floor_us = round(sum(measured.floor.of(num_bytes) for num_bytes in busiest), 2)
    return {
        "floor_us": floor_us,
        "floor_ratio": round(floor_us / time_us.median, 4) if time_us.median > 0 else 0.0,
        "floor_gbps": round(measured.floor.gbps, 4),
        "flag_us": round(measured.floor.flag_us, 3),
    }


def _traffic(measured: Measured, phase: str) -> Tensor:
    """`[R, 3]` bytes that every rank sends and receives, and of metadata."""
    return measured.traffic[:, PHASES.index(phase)]


def _parts(phase: str) -> tuple[str, ...]:
    """The phases that are measured beside what they are compared with."""
    return ("dispatch", "combine") if phase == "pair" else (phase,)


def _compared(times: TimesOfRanks, kinds: dict[str, str]) -> Summary:
    """Times of one kind, or the sum over the phases that are given with their kinds."""
    columns = [slowest_rank(times[phase, kind]) for phase, kind in kinds.items()]
    return summarize([sum(column) for column in zip(*columns, strict=True)])


def _ratio(above: Summary, below: Summary) -> float:
    return round(above.median / below.median, 4) if below.median > 0 else 0.0


def _summary(times_RI: Tensor) -> Summary:
    return summarize(slowest_rank(times_RI))


def _gbps(num_bytes: Tensor, time: Summary) -> float:
    """GB/s, with 1 GB = 10**9 bytes."""
    return round(float(num_bytes) / time.median / 1e3, 4) if time.median > 0 else 0.0
