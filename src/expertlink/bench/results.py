"""From the times of all ranks to records."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expertlink.bench.cases import Case, Plan
from expertlink.bench.environment import describe_environment
from expertlink.bench.inputs import Input
from expertlink.bench.records import PHASES, Record
from expertlink.bench.summary import Summary, gbps, mean_rank, slowest_rank, summarize


@dataclass(frozen=True)
class Measured:
    """What a case's ranks found out together.

    Attributes:
        device: where rank 0 computed.
        engine_name: engine that served the case.
        aligned: how ranks were aligned before a call.
        num_inputs: inputs that took turns.
        times: `[R, rounds]` by phase and kind: "time", "host", "raw", "idle", "idle host" in
            microseconds, "memory" in bytes; a pair has no "raw", CPUs have no "idle".
        traffic: `[R, phases, 3]`, see `mean_traffic`.
    """

    device: torch.device
    engine_name: str
    aligned: str
    num_inputs: int
    times: dict[tuple[str, str], Tensor]
    traffic: Tensor


def mean_traffic(inputs: list[Input], case: Case) -> list[list[float]]:
    """For every phase the bytes `[sent, received, metadata]`, averaged over the inputs."""
    topk = case.topk if case.variant == "uncached" else 0
    traffic = []
    for phase in PHASES:
        counts = [
            (wire.sent(phase), wire.received(phase), wire.metadata(phase, topk=topk))
            for wire in (item.wire for item in inputs)
        ]
        traffic.append([sum(column) / len(inputs) for column in zip(*counts, strict=True)])
    return traffic


def make_record(phase: str, case: Case, plan: Plan, measured: Measured) -> Record:
    """The record of one phase."""
    times = measured.times
    time_us = _summary(times[phase, "time"])
    if phase == "pair":
        there = slowest_rank(times["dispatch", "raw"])
        back = slowest_rank(times["combine", "raw"])
        raw_us = _rounded(summarize([a + b for a, b in zip(there, back, strict=True)]))
    else:
        raw_us = _summary(times[phase, "raw"])
    idle = times.get((phase, "idle"))
    budgets = {
        "dispatch": (case.num_sms_dispatch,),
        "combine": (case.num_sms_combine,),
        "pair": (case.num_sms_dispatch, case.num_sms_combine),
    }[phase]
    sent, received, metadata = measured.traffic[:, PHASES.index(phase)].unbind(dim=1)
    on_gpu = measured.device.type == "cuda"
    return Record(
        engine=measured.engine_name,
        mode=case.mode,
        phase=phase,
        variant=case.variant,
        layout=case.layout,
        dtype=case.dtype,
        quantization=case.quantization,
        routing=case.routing_label,
        ranks=case.ranks,
        tokens=case.tokens,
        hidden=case.hidden,
        topk=case.topk,
        experts=case.experts,
        num_sms=max((budget for budget in budgets if budget is not None), default=None),
        time_us=time_us,
        time_us_mean_rank=_rounded(summarize(mean_rank(times[phase, "time"]))),
        host_us=_summary(times.get((phase, "idle host"), times[phase, "host"])),
        wire_bytes=round(float(sent.mean())),
        wire_gbps=_gbps(sent.mean(), time_us),
        environment=describe_environment(
            device=measured.device, backend="nccl" if on_gpu else "gloo"
        ),
        uneven=case.uneven,
        wire_bytes_max=round(float(sent.max())),
        wire_bytes_received_max=round(float(received.max())),
        wire_gbps_max=_gbps(sent.max(), time_us),
        aggregate_gbps=_gbps(sent.sum(), time_us),
        metadata_bytes=round(float(metadata.mean())),
        raw_us=raw_us,
        raw_gbps=_gbps(sent.mean(), raw_us),
        raw_ratio=round(time_us.median / raw_us.median, 3) if raw_us.median > 0 else 0.0,
        idle_us=None if idle is None else _summary(idle),
        aligned=measured.aligned,
        iterations=plan.iters,
        inputs=measured.num_inputs,
        threads=torch.get_num_threads(),
        memory_peak_bytes=int(times[phase, "memory"].max()) if on_gpu else None,
        seed=plan.seed,
        command=plan.command,
    )


def _summary(times_RI: Tensor) -> Summary:
    return _rounded(summarize(slowest_rank(times_RI)))


def _rounded(summary: Summary) -> Summary:
    return Summary(
        *(round(value, 2) for value in (summary.min, summary.median, summary.p99, summary.mean))
    )


def _gbps(num_bytes: Tensor, time: Summary) -> float:
    return round(gbps(float(num_bytes), time.median), 4)
