"""Records as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from expertlink.bench.records import WORDS, Checked, Record, Summary, names_of
from expertlink.bench.tables import Listing
from expertlink.bench.texts import text_of, without_empty

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

_LEFT = ("case", "engine", "phase", "outputs", "variant", "call")
"""Columns of words."""


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


def print_listing(listing: Listing, records: Sequence[Checked], console: Console) -> None:
    """Prints one row per record, if there are any; columns without a value are left out."""
    if not records:
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    header, rows = without_empty(listing.header, [listing.row(record) for record in records])
    for name in header:
        table.add_column(name, justify="left" if name in _LEFT else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    if not console.is_terminal:
        width = console.measure(table, options=console.options.update(width=_WIDEST)).maximum
        console.width = max(console.width, width)
    console.print(table)
    console.print(listing.note(records), style="dim")
