"""Records as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from expertlink.bench.cases import Case
from expertlink.bench.host_time import HostTimeRecord
from expertlink.bench.layer import LayerRecord
from expertlink.bench.overlap import TIMES, OverlapRecord
from expertlink.bench.records import WORDS, Record, Summary, names_of

_WIDEST = 400
_NUMBERS: dict[str, tuple[Callable[[Record], Summary | float | None], str]] = {
    "med": (lambda record: record.time_us, "med, p99: slowest rank of each iteration"),
    "p99": (lambda record: record.time_us.p99, ""),
    "idle": (lambda record: record.idle_us, "idle: started from an idle device"),
    "loop": (lambda record: record.idle_loop_us, "loop: the same in a loop, the host warm"),
    "host": (lambda record: record.host_us, "host: until the call returned"),
    "hot": (lambda record: record.host_hot_us, "hot: host, one call after the other"),
    "GB/s": (lambda record: record.wire_gbps, "GB/s: bytes that leave a rank"),
    "raw": (lambda record: record.raw_us, "raw: all_to_all_single of the same bytes"),
    "x raw": (lambda record: record.raw_ratio, ""),
    "put": (lambda record: record.put_ratio, "put, get: plain copies over med, 1 is the wire"),
    "get": (lambda record: record.get_ratio, ""),
    "rail": (lambda record: record.rail_us, "rail: the same rows between the hosts alone"),
    "/ rail": (lambda record: record.rail_ratio, "/ rail: rail over med"),
    "floor": (lambda record: record.floor_us, "floor: bytes at full bandwidth, two flags a call"),
}
"""What a column shows, and its line of the legend; columns without a value are left out."""

_EXPENDABLE = ("host", "get", "put", "loop", "raw", "GB/s")
"""Columns that a narrow terminal does not get; a file gets all."""


def number(value: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def text_of(value: Summary | float | None) -> str:
    """A value of a record, or the median of several; empty where there is none."""
    if value is None:
        return ""
    return number(value.median if isinstance(value, Summary) else value)


def print_records(records: Sequence[Record], console: Console) -> None:
    """Prints one row per record; what all records share stands in the title."""
    if not records:
        return
    columns = [
        name
        for name, (read, _) in _NUMBERS.items()
        if any(read(record) is not None for record in records)
    ]
    table = _table(records, columns)
    width = console.measure(table, options=console.options.update(width=_WIDEST)).maximum
    if not console.is_terminal:
        console.width = max(console.width, width)
    elif width > console.width:
        columns = [name for name in columns if name not in _EXPENDABLE]
        table = _table(records, columns)
    console.print(table)
    legend = [text for name, (_, text) in _NUMBERS.items() if name in columns and text]
    console.print(f"µs; {'; '.join(legend)}", style="dim")
    for note in dict.fromkeys(record.ceiling_note for record in records if record.ceiling_note):
        console.print(f"no ceilings: {escape(note)}", style="dim")


def _table(records: Sequence[Record], columns: Sequence[str]) -> Table:
    names = {word: [str(read(record)) for record in records] for word, read in WORDS.items()}
    varying = [name for name, values in names.items() if len(set(values)) > 1]
    title = names_of(records)[0]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in (*varying, "phase"):
        table.add_column(name, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    cases = [[names[name][index] for name in varying] for index in range(len(records))]
    for case, following, record in zip(cases, [*cases[1:], cases[-1]], records, strict=True):
        cells = [text_of(_NUMBERS[name][0](record)) for name in columns]
        table.add_row(*case, record.phase, *cells, end_section=case != following)
    return table


OVERLAP_HEADER = (
    *("case", "product m x n x k", "product alone", "dispatch alone", "both", "hidden"),
)


def overlap_row(record: OverlapRecord) -> list[str]:
    """Cells under `OVERLAP_HEADER`; a budget of SMs belongs to the case."""
    case = Case(**record.case)
    sms = "" if case.num_sms_dispatch is None else f" · SMs={case.num_sms_dispatch}"
    times = [text_of(getattr(record, f"{name}_us")) for name in TIMES]
    product = " x ".join(map(str, record.gemm))
    return [f"{record.engine} {case.label()}{sms}", product, *times, f"{record.hidden:.0%}"]


def print_overlaps(records: Sequence[OverlapRecord], console: Console) -> None:
    """Prints one row per record."""
    note = "µs, median of the slowest rank; hidden: part of the shorter one that costs no time"
    _print_rows(OVERLAP_HEADER, [overlap_row(record) for record in records], note, console)


HOST_TIME_HEADER = (
    *("case", "phase", "outputs", "hot", "wait", "host", "launch", "torch", "Python"),
)
HOST_TIME_NOTE = (
    "µs of the host, median of the rank that takes longest; hot: until the call returned, one call "
    "after the other; wait: of it, for the counts of all ranks; host: the rest, which is launches, "
    "operations of torch, and Python; outputs: made by each call, prepared (create_buffers, out=), "
    "or tracked by autograd"
)


def host_time_row(record: HostTimeRecord) -> list[str]:
    """Cells under `HOST_TIME_HEADER`."""
    wait = record.wait_us or None
    values = (record.host_hot_us, wait, record.host_us)
    values += (record.launch_us or None, record.torch_us, record.python_us)
    name = f"{record.engine} {Case(**record.case).label()}"
    return [name, record.phase, record.outputs, *map(text_of, values)]


def print_host_times(records: Sequence[HostTimeRecord], console: Console) -> None:
    """Prints one row per record."""
    rows = [host_time_row(record) for record in records]
    _print_rows(HOST_TIME_HEADER, rows, HOST_TIME_NOTE, console)


LAYER_HEADER = (
    *("case", "engine", "phase", "layer", "compute", "exposed", "floor", "x floor"),
    *("calls", "x longer", "SMs", "MiB"),
)
_LAYER_NOTE = (
    "µs, median of the slowest rank; compute: the same products without dispatch and combine; "
    "exposed: layer - compute; floor: bytes at full bandwidth, two flags a call; MiB: most memory "
    "beyond weights and inputs"
)
_TURNS_NOTE = (
    "; calls: dispatch and combine without products; x longer: layer over the longer of compute "
    "and calls; SMs: what products were limited to"
)


def layer_note(records: Sequence[LayerRecord]) -> str:
    """What the columns of `LAYER_HEADER` are that have a value."""
    turns = any(record.communication_us is not None for record in records)
    return _LAYER_NOTE + (_TURNS_NOTE if turns else "")


def layer_name(record: LayerRecord) -> str:
    """The case in a few words."""
    words = [record.model, *([f"{record.layers} layers"] if record.layers > 1 else [])]
    words += [record.variant, f"T={record.tokens}", f"R={record.ranks}", record.dtype]
    words += [record.routing + (" uneven" if record.uneven else "")]
    budgets = dict.fromkeys((record.num_sms_dispatch, record.num_sms_combine))
    sms = "+".join("auto" if budget is None else str(budget) for budget in budgets)
    return " · ".join([*words, *([] if sms == "auto" else [f"SMs={sms}"])])


def layer_row(record: LayerRecord) -> list[str]:
    """Cells under `LAYER_HEADER`."""
    values = (record.time_us, record.compute_us, record.exposed_us, record.floor_us)
    ratios = (record.exposed_ratio, record.overlap_ratio)
    exposed, overlap = ("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
    turns = [text_of(record.communication_us), overlap, text_of(record.compute_sms)]
    peak = record.memory_peak_bytes
    memory = "" if peak is None else f"{peak / (1 << 20):.0f}"
    phase = record.phase.removeprefix("layer_")
    numbers = [*map(text_of, values), exposed, *turns, memory]
    return [layer_name(record), record.engine, phase, *numbers]


def print_layers(records: Sequence[LayerRecord], console: Console) -> None:
    """Prints one row per record."""
    rows = [layer_row(record) for record in records]
    _print_rows(LAYER_HEADER, rows, layer_note(records), console)


def without_empty(
    header: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Columns that have a value."""
    places = [place for place in range(len(header)) if any(row[place] for row in rows)]
    return [header[place] for place in places], [[row[place] for place in places] for row in rows]


def _print_rows(
    header: Sequence[str], rows: Sequence[Sequence[str]], note: str, console: Console
) -> None:
    """A table of texts, if there are any; columns without a value are left out."""
    if not rows:
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    header, rows = without_empty(header, rows)
    for name in header:
        left = name in ("case", "engine", "phase", "outputs")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(note, style="dim")
