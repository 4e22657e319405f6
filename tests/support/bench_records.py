"""Records that nobody measured, and small cases, for tests of the benchmark."""

from __future__ import annotations

from typing import Any

from expertlink.bench.cases import Case
from expertlink.bench.layer_record import LayerRecord
from expertlink.bench.records import Environment, Record, Summary


def _spread(middle: float) -> Summary:
    return Summary(0.9 * middle, middle, 1.5 * middle, 1.1 * middle)


def _environment(date: str) -> Environment:
    values: dict[str, Any] = {"gpu": None, "driver": None, "torch": "2.11", "cuda": None}
    values |= {"commit": None, "date": date, "cpu": "some CPU", "cores": 4, "backend": "gloo"}
    return Environment(**values)


def make_record(
    time_us: float = 100.0, date: str = "2030-01-01T00:00:00", **changes: Any
) -> Record:
    values: dict[str, Any] = {"engine": "collective", "mode": "ht", "phase": "dispatch"}
    values |= {"variant": "uncached", "layout": "flat", "routing": "balanced"}
    values |= {"dtype": "bfloat16", "quantization": None, "num_sms": None, "seed": 0}
    values |= {"ranks": 4, "tokens": 128, "hidden": 1024, "topk": 4, "experts": 16}
    values |= {"time_us": _spread(time_us), "time_us_mean_rank": _spread(0.9 * time_us)}
    values |= {"host_us": _spread(time_us), "wire_bytes": 1000, "wire_gbps": 1.0 / time_us}
    values |= {"wire_bytes_max": 1100, "wire_bytes_received_max": 1100, "wire_gbps_max": 0.1}
    values |= {"aggregate_gbps": 0.4, "raw_us": _spread(50.0), "raw_gbps": 0.02, "raw_ratio": 2.0}
    values |= {"aligned": "host", "iterations": 10, "inputs": 4, "threads": 1}
    values |= {"command": "expertlink bench", "environment": _environment(date)}
    return Record(**{**values, **changes})


def make_layer_record(
    time_us: float = 100.0, date: str = "2030-01-01T00:00:00", **changes: Any
) -> LayerRecord:
    values: dict[str, Any] = {"engine": "nvlink", "phase": "layer_forward", "variant": "eager"}
    values |= {"model": "tiny", "layers": 1, "dtype": "bfloat16", "routing": "balanced"}
    values |= {"ranks": 2, "tokens": 16, "hidden": 64, "topk": 2, "experts": 8}
    values |= {"intermediate": 32, "shared": 32, "products": "grouped"}
    values |= {"time_us": _spread(time_us), "host_us": _spread(time_us)}
    values |= {"compute_us": _spread(60.0), "exposed_us": time_us - 60.0, "wire_bytes": 1000}
    values |= {"phases_us": {"gate": 5.0, "dispatch": 20.0, "combine_backward": 15.0}}
    values |= {"aligned": "device", "iterations": 10, "threads": 1, "seed": 0}
    values |= {"command": "expertlink bench --layer", "environment": _environment(date)}
    return LayerRecord(**{**values, **changes})


def latency_case(**changes: Any) -> Case:
    """A case of mode "ll" that two CPU ranks measure at once."""
    values: dict[str, Any] = {"ranks": 2, "tokens": 8, "hidden": 256, "topk": 2, "experts": 4}
    values |= {"mode": "ll", "variant": "eager", "layout": "expert_major"}
    return Case(**{**values, **changes})
