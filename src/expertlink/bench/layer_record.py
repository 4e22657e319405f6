"""Records of whole MoE layers (`expertlink bench --layer`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from expertlink.bench.ceilings import Floor
from expertlink.bench.layer_cases import LAYER_VARIANTS
from expertlink.bench.records import (
    Checked,
    Environment,
    RecordError,
    Summary,
)

FORWARD, STEP = "layer_forward", "layer_step"
LAYER_PHASES: tuple[str, ...] = (FORWARD, STEP)
"""The forward pass without gradients, and forward and backward with those of everything."""


@dataclass(frozen=True, kw_only=True)
class LayerRecord(Checked):
    """One phase of one case. Times in microseconds, of the slowest rank of each iteration."""

    signed = ("exposed_us", "exposed_ratio")

    kind: str = "layer"
    engine: str
    phase: str  # one of `LAYER_PHASES`
    variant: str  # one of `LAYER_VARIANTS`
    model: str
    layers: int  # one after the other; all figures are those of all layers together
    dtype: str
    routing: str
    uneven: bool = False
    ranks: int
    tokens: int  # of the rank that has most
    hidden: int
    topk: int
    experts: int
    intermediate: int
    shared: int  # intermediate size of the shared expert; 0: none
    products: str  # "grouped": one for all experts of a rank; "loop": one after the other
    num_sms_dispatch: int | None = None
    num_sms_combine: int | None = None
    time_us: Summary  # the whole
    host_us: Summary  # until the host was free
    compute_us: Summary  # the same products on the same rows; dispatch and combine do nothing
    exposed_us: float  # medians: `time_us` - `compute_us`
    exposed_ratio: float | None = None  # `exposed_us` over `floor_us`
    # `micro_batches` only. The calls of both halves without anything in between, and `time_us` over
    # the longer one of `compute_us` and that: 1.0 is a layer that hides all of the other one.
    communication_us: Summary | None = None
    overlap_ratio: float | None = None
    # SMs that products were limited to, those of `compute_us` as well; None: no limit.
    compute_sms: int | None = None
    unlimited_us: Summary | None = None  # the whole, with products that may use all SMs
    # For every call, bytes of the rank that sends or receives most over `floor_gbps`, and two
    # flags. None: rows do not cross NVLink, see `floor_note`.
    floor_us: float | None = None
    floor_gbps: float | None = None
    flag_us: float | None = None
    floor_note: str | None = None
    wire_bytes: int  # of rows that leave the average rank
    # Medians of the average rank's phases, in the order in which they come first; from runs of
    # their own, in which all calls are launched one by one.
    phases_us: dict[str, float]
    # CUDA: most that a run added to weights and inputs; `graph`: that its graph keeps.
    memory_peak_bytes: int | None = None
    environment: Environment
    aligned: str  # as in `Record`
    iterations: int
    threads: int
    seed: int
    command: str

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, accepted in (("phase", LAYER_PHASES), ("variant", tuple(LAYER_VARIANTS))):
            if getattr(self, name) not in accepted:
                raise RecordError(f"{name} is {getattr(self, name)!r}, not one of {accepted}")
        for name, value in self.phases_us.items():
            if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise RecordError(f"phases_us is {value!r} for {name!r}, expected microseconds")

    def key(self) -> tuple[object, ...]:
        """What was measured, without when and how fast."""
        names = ("engine", "phase", "variant", "model", "layers", "dtype", "routing", "uneven")
        names += ("ranks", "tokens", "num_sms_dispatch", "num_sms_combine")
        return (*(getattr(self, name) for name in names), self.environment.hardware)


def overlap_fields(
    communication_us: Summary | None, time_us: Summary, compute_us: Summary
) -> dict[str, Any]:
    """The fields of a record that compare a layer with its longer part."""
    if communication_us is None:
        return {}
    longer_us = max(compute_us.median, communication_us.median)
    return {
        "communication_us": communication_us,
        "overlap_ratio": round(time_us.median / longer_us, 4),
    }


def floor_fields(
    floor: Floor | None, note: str | None, rounds: int, traffic: Tensor, exposed_us: float
) -> dict[str, Any]:
    """The fields of a record that compare exposed communication with the wire."""
    if floor is None:
        return {"floor_note": note}
    busiest = traffic.amax(dim=(0, 3)).flatten().tolist()  # of every call
    floor_us = round(rounds * sum(map(floor.of, busiest)), 2)
    return {
        "floor_us": floor_us,
        "exposed_ratio": round(exposed_us / floor_us, 4),
        "floor_gbps": round(floor.gbps, 4),
        "flag_us": round(floor.flag_us, 3),
    }
