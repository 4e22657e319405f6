"""Records as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from expertlink.bench.records import Record

_MB = 1e6
_NAMES: dict[str, Callable[[Record], object]] = {
    "engine": lambda record: record.engine,
    "mode": lambda record: record.mode,
    "ranks": lambda record: record.ranks,
    "H": lambda record: record.hidden,
    "K": lambda record: record.topk,
    "E": lambda record: record.experts,
    "dtype": lambda record: dtype_label(record),
    "routing": lambda record: routing_label(record),
    "SMs": lambda record: sms_label(record),
    "T": lambda record: record.tokens,
    "layout": lambda record: record.layout,
    "variant": lambda record: record.variant,
}
"""Columns that move into the title where all records agree."""
_EXPENDABLE = ("all", "MB", "rank", "host", "min", "GB/s", "raw", "get ratio")
_WIDEST = 400


def routing_label(record: Record) -> str:
    """Routing, with "uneven" where ranks have different numbers of tokens."""
    return f"{record.routing} uneven" if record.uneven else record.routing


def dtype_label(record: Record) -> str:
    """Element type of the rows, and what they are quantized to."""
    return record.dtype if record.quantization is None else f"{record.dtype}->{record.quantization}"


def sms_label(record: Record) -> str:
    """SMs of the phase; for a pair with two different budgets both of them."""
    budgets = [record.num_sms_dispatch, record.num_sms_combine]
    if budgets[0] == budgets[1]:  # not a pair, a pair of equals, or an old record
        budgets = [record.num_sms]
    return "+".join("auto" if budget is None else str(budget) for budget in budgets)


def print_records(records: Sequence[Record], console: Console) -> None:
    """Prints one row per record; what all records share stands in the title.

    A terminal that is too narrow does not get the columns that matter least; a file gets all.
    """
    unused = [
        column
        for column, read in _OPTIONAL.items()
        if all(read(record) is None for record in records)
    ]
    left_out: list[str] = []
    while True:
        table = _table(records, left_out + unused)
        width = console.measure(table, options=console.options.update(width=_WIDEST)).maximum
        if width <= console.width or not console.is_terminal or len(left_out) == len(_EXPENDABLE):
            break
        left_out.append(_EXPENDABLE[len(left_out)])
    if not console.is_terminal:
        console.width = max(console.width, width)
    console.print(table)
    legend = _LEGEND
    for column, text in _EXTRA_LEGENDS.items():
        legend += "" if column in unused else text
    console.print(legend, style="dim")
    for note in dict.fromkeys(record.ceiling_note for record in records if record.ceiling_note):
        console.print(f"no ceilings: {escape(note)}", style="dim")


def _table(records: Sequence[Record], left_out: Sequence[str]) -> Table:
    shared = {
        name: str(values.pop())
        for name, read in _NAMES.items()
        if len(values := {read(record) for record in records}) == 1
    }
    title = "  ".join(f"{name}={value}" for name, value in shared.items())
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    varying = [name for name in _NAMES if name not in shared]
    numbers = [name for name in _NUMBERS if name not in left_out]
    for name in (*varying, "phase"):
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for index, record in enumerate(records):
        names = [str(_NAMES[name](record)) for name in varying]
        after = records[index + 1] if index + 1 < len(records) else record
        table.add_row(
            *names,
            record.phase,
            *(_NUMBERS[name](record) for name in numbers),
            end_section=names != [str(_NAMES[name](after)) for name in varying],
        )
    return table


_LEGEND = (
    "µs; min, med, p99: slowest rank of each iteration; rank: median of the average rank; "
    "raw: all_to_all_single of the same bytes; GB/s: bytes that leave a rank, and all ranks"
)
_OPTIONAL: dict[str, Callable[[Record], object]] = {
    "idle": lambda record: record.idle_us,
    "loop": lambda record: record.idle_loop_us,
    "hot": lambda record: record.host_hot_us,
    "put ratio": lambda record: record.ceiling,
    "get ratio": lambda record: record.ceiling,
    "floor": lambda record: record.floor_us,
}
"""Columns that only some records have."""
_EXTRA_LEGENDS = {
    "idle": "; idle: started from an idle device",
    "loop": "; loop: the same one after the other, the host warm",
    "hot": "; hot: host, one call after the other",
    "floor": "; floor: bytes at the bandwidth of large copies, and two flags a call",
    "put ratio": "; put ratio, get ratio: time of plain bulk copies of the same bytes over med, "
    "1 is as fast as the wire",
}
_NUMBERS: dict[str, Callable[[Record], str]] = {
    "min": lambda record: _number(record.time_us.min),
    "med": lambda record: _number(record.time_us.median),
    "p99": lambda record: _number(record.time_us.p99),
    "rank": lambda record: _number(record.time_us_mean_rank.median),
    "idle": lambda record: "" if record.idle_us is None else _number(record.idle_us.median),
    "loop": lambda record: (
        "" if record.idle_loop_us is None else _number(record.idle_loop_us.median)
    ),
    "host": lambda record: _number(record.host_us.median),
    "hot": lambda record: "" if record.host_hot_us is None else _number(record.host_hot_us.median),
    "MB": lambda record: _number(record.wire_bytes / _MB),
    "GB/s": lambda record: _number(record.wire_gbps),
    "all": lambda record: _number(record.aggregate_gbps),
    "raw": lambda record: _number(record.raw_us.median),
    "x raw": lambda record: f"{record.raw_ratio:.2f}",
    "put ratio": lambda record: "" if record.put_ratio is None else f"{record.put_ratio:.2f}",
    "get ratio": lambda record: "" if record.get_ratio is None else f"{record.get_ratio:.2f}",
    "floor": lambda record: "" if record.floor_us is None else _number(record.floor_us),
}


def _number(value: float) -> str:
    """Three significant digits, or more where there are more before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
