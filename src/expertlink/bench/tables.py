"""How records of each kind but `Record` are shown: a row of texts for each, on the terminal and on
pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from expertlink.bench.backward import BackwardRecord
from expertlink.bench.cases import Case
from expertlink.bench.drop_in import DropInRecord
from expertlink.bench.host_time import HostTimeRecord
from expertlink.bench.layer_record import LayerRecord
from expertlink.bench.overlap import LIMITED_TIMES, TIMES, OverlapRecord
from expertlink.bench.records import Checked
from expertlink.bench.texts import text_of

_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Records of one kind as a table."""

    record: type[Checked]
    prefix: str  # of the files of records that get a page
    title: str  # of the page
    header: tuple[str, ...]
    row: Callable[[Any], list[str]]  # cells under the header
    note: Callable[[Sequence[Any]], str]  # what the columns are


def _sizes_of(record: DropInRecord | BackwardRecord) -> str:
    shape = f"T={record.tokens} H={record.hidden} K={record.topk} E={record.experts}"
    return f"{shape} R={record.ranks}"


def _routing_of(record: DropInRecord | BackwardRecord | LayerRecord) -> str:
    return record.routing + (" uneven" if record.uneven else "")


def _budgets_of(record: BackwardRecord | LayerRecord) -> str:
    """SMs of both calls, once where they are equal."""
    budgets = dict.fromkeys((record.num_sms_dispatch, record.num_sms_combine))
    return "+".join("auto" if budget is None else str(budget) for budget in budgets)


def _overlap_row(record: OverlapRecord) -> list[str]:
    """A budget of SMs belongs to the case."""
    case = Case(**record.case)
    sms = "" if case.num_sms_dispatch is None else f" · SMs={case.num_sms_dispatch}"
    times = [text_of(getattr(record, f"{name}_us")) for name in TIMES]
    product = " x ".join(map(str, record.gemm))
    limited = [text_of(getattr(record, f"{name}_us")) for name in LIMITED_TIMES]
    share = record.limited_hidden
    cells = [*times, f"{record.hidden:.0%}", text_of(record.compute_sms), *limited]
    name = f"{record.engine} {case.label()}{sms}"
    return [name, product, *cells, "" if share is None else f"{share:.0%}"]


def _overlap_note(records: Sequence[OverlapRecord]) -> str:
    note = "µs, median of the slowest rank; hidden: part of the shorter one that costs no time"
    limited = any(record.compute_sms is not None for record in records)
    return note + ("; limited: a product that leaves the dispatch its SMs" if limited else "")


_HOST_TIME_NOTE = (
    "µs of the host, median of the rank that takes longest; hot: until the call returned, one call "
    "after the other; wait: of it, for the counts of all ranks; host: the rest, which is launches, "
    "operations of torch, and Python; outputs: made by each call, prepared (create_buffers, out=), "
    "or tracked by autograd"
)


def _host_time_row(record: HostTimeRecord) -> list[str]:
    wait = record.wait_us or None
    values = (record.host_hot_us, wait, record.host_us)
    values += (record.launch_us or None, record.torch_us, record.python_us)
    name = f"{record.engine} {Case(**record.case).label()}"
    return [name, record.phase, record.outputs, *map(text_of, values)]


_LAYER_NOTE = (
    "µs, median of the slowest rank; compute: the same products without dispatch and combine; "
    "exposed: layer - compute; floor: bytes at full bandwidth, two flags a call; MiB: most memory "
    "beyond weights and inputs"
)
_TURNS_NOTE = (
    "; calls: dispatch and combine without products; x longer: layer over the longer of compute "
    "and calls; SMs: what products were limited to; unlimited: the layer without that limit"
)


def _layer_note(records: Sequence[LayerRecord]) -> str:
    turns = any(record.communication_us is not None for record in records)
    return _LAYER_NOTE + (_TURNS_NOTE if turns else "")


def layer_name(record: LayerRecord) -> str:
    """The case in a few words."""
    words = [record.model, *([f"{record.layers} layers"] if record.layers > 1 else [])]
    words += [record.variant, f"T={record.tokens}", f"R={record.ranks}", record.dtype]
    words.append(_routing_of(record))
    sms = _budgets_of(record)
    return " · ".join([*words, *([] if sms == "auto" else [f"SMs={sms}"])])


def _layer_row(record: LayerRecord) -> list[str]:
    values = (record.time_us, record.compute_us, record.exposed_us, record.floor_us)
    ratios = (record.exposed_ratio, record.overlap_ratio)
    exposed, overlap = ("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
    turns = [text_of(record.communication_us), overlap, text_of(record.compute_sms)]
    turns.append(text_of(record.unlimited_us))
    peak = record.memory_peak_bytes
    memory = "" if peak is None else f"{peak / _MIB:.0f}"
    phase = record.phase.removeprefix("layer_")
    numbers = [*map(text_of, values), exposed, *turns, memory]
    return [layer_name(record), record.engine, phase, *numbers]


_DROP_IN_NOTE = (
    "µs, median of the slowest rank; idle: from an idle device, launches included; loop: a call in "
    "a tight loop; host: until a call in that loop returned, without waits for counts, and the "
    "same of the library's own call; added: the difference"
)


def _drop_in_row(record: DropInRecord) -> list[str]:
    words = [record.interface, _sizes_of(record)]
    words += [f"{record.hosts} hosts, {record.rail}"] if record.hosts > 1 else []
    words += [record.quantization or "bfloat16", _routing_of(record)]
    values = (record.time_us, record.idle_us, record.loop_us, record.host_us)
    values += (record.library_host_us, record.added_us)
    sms = text_of(record.num_sms)
    return [
        " · ".join(words),
        record.engine,
        record.variant,
        record.call,
        sms,
        *map(text_of, values),
    ]


_BACKWARD_NOTE = (
    "µs, median of the slowest rank; MiB of the rank that needs most; rows: those that a dispatch "
    "received; kept: what the forward pair leaves; peak: the most that the backward pair adds; "
    "/ rows: peak over rows"
)


def _backward_row(record: BackwardRecord) -> list[str]:
    words = [f"{record.layout} {record.variant}", _sizes_of(record), record.dtype]
    words.append(_routing_of(record))
    words += [f"{record.hosts} hosts"] if record.hosts > 1 else []
    sizes = (record.expanded_bytes, record.kept_bytes, record.memory_peak_bytes)
    memory = ["" if size is None else text_of(size / _MIB) for size in sizes]
    share = "" if record.memory_ratio is None else f"{record.memory_ratio:.2f}"
    times = [text_of(record.forward_us), text_of(record.time_us), f"{record.backward_ratio:.2f}"]
    return [" · ".join(words), record.engine, _budgets_of(record), *times, *memory, share]


OVERLAP = Listing(
    record=OverlapRecord,
    prefix="overlap-",
    title="A dispatch beside a matrix product",
    header=(
        *("case", "product m x n x k", "product alone", "dispatch alone", "both", "hidden"),
        *("SMs left", "limited product", "both, limited", "hidden, limited"),
    ),
    row=_overlap_row,
    note=_overlap_note,
)
LAYER = Listing(
    record=LayerRecord,
    prefix="layer-",
    title="Whole MoE layers",
    header=(
        *("case", "engine", "phase", "layer", "compute", "exposed", "floor", "x floor"),
        *("calls", "x longer", "SMs", "unlimited", "MiB"),
    ),
    row=_layer_row,
    note=_layer_note,
)
HOST_TIME = Listing(
    record=HostTimeRecord,
    prefix="host-time-",
    title="Host time of calls",
    header=("case", "phase", "outputs", "hot", "wait", "host", "launch", "torch", "Python"),
    row=_host_time_row,
    note=lambda _: _HOST_TIME_NOTE,
)
DROP_IN = Listing(
    record=DropInRecord,
    prefix="drop-in-",
    title="The drop-in for `deep_ep`",
    header=(
        *("case", "engine", "variant", "call", "SMs", "time", "idle", "loop", "host"),
        *("library's host", "added"),
    ),
    row=_drop_in_row,
    note=lambda _: _DROP_IN_NOTE,
)
BACKWARD = Listing(
    record=BackwardRecord,
    prefix="backward-",
    title="Forward and backward pairs",
    header=(
        *("case", "engine", "SMs", "forward", "backward", "x forward", "rows", "kept", "peak"),
        "/ rows",
    ),
    row=_backward_row,
    note=lambda _: _BACKWARD_NOTE,
)
LISTINGS = (OVERLAP, LAYER, HOST_TIME, DROP_IN, BACKWARD)
"""All of them."""
