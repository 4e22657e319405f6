"""Pages about recorded figures: docs/results/*.md, and the table of figures in the README."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expertlink.bench.records import PHASES, Record, read_records
from expertlink.errors import InputError


@dataclass(frozen=True)
class TableRow:
    """A row of the README's table: what it is called, and which records it shows."""

    title: str
    tokens: int
    where: dict[str, Any] = field(default_factory=dict)


_HT = {"ranks": 4, "mode": "ht", "variant": "uncached", "quantization": None, "num_sms": None}
_LL = {"ranks": 4, "mode": "ll", "variant": "graph", "num_sms": None, "engine": "nvlink"}
_BALANCED = {"routing": "balanced", "hidden": 7168, "topk": 8, "experts": 256}
_EIGHT_BIT = "e4m3_float32"
README_ROWS = (
    TableRow(
        '`"ht"`, `TOKEN_MAJOR`, bfloat16', 4096, _HT | {"engine": "nvlink", "layout": "token_major"}
    ),
    TableRow('`"ht"`, `FLAT`, bfloat16', 4096, _HT | {"engine": "nvlink", "layout": "flat"}),
    TableRow(
        '`"ht"`, `TOKEN_MAJOR`, e4m3',
        4096,
        _HT | {"engine": "nvlink", "layout": "token_major", "quantization": _EIGHT_BIT},
    ),
    TableRow(
        '`"ht"`, `TOKEN_MAJOR`, bfloat16, engine `collective` (NCCL)',
        4096,
        _HT | {"engine": "collective", "layout": "token_major"},
    ),
    TableRow(
        '`"ll"`, `EXPERT_MAJOR`, e4m3, in a CUDA graph',
        128,
        _LL | {"layout": "expert_major", "quantization": _EIGHT_BIT},
    ),
    TableRow(
        '`"ll"`, `RANK_MAJOR`, bfloat16, in a CUDA graph',
        128,
        _LL | {"layout": "rank_major", "quantization": None},
    ),
)


def readme_table(records: Sequence[Record]) -> str:
    """The six rows of figures that the README shows, as a Markdown table.

    For the README and the test that compares it: the text between the README's lines
    `<!-- figures -->` and `<!-- /figures -->` equals this function's result for
    `read_folder("benchmarks/results")`. `expertlink report --table` prints it. It ends with a
    newline. A figure is the median time of the slowest rank in microseconds; in brackets stands
    what the wire allows over that time: 1.00 is as fast as plain bulk copies of the same bytes
    (`"ht"`), or as bytes at full bandwidth and two flags a call (`"ll"`).

    Raises:
        InputError: the records lack a row.
    """
    lines = ["| 4 x H200, µs | T | dispatch | combine | both |", "|---|---|---|---|---|"]
    for row in README_ROWS:
        cells = [_figure(records, row, phase) for phase in PHASES]
        lines.append(f"| {row.title} | {row.tokens} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _figure(records: Sequence[Record], row: TableRow, phase: str) -> str:
    wanted = {**_BALANCED, **row.where, "tokens": row.tokens, "phase": phase}
    found = [
        record
        for record in records
        if all(getattr(record, name) == value for name, value in wanted.items())
    ]
    if not found:
        raise InputError(f"no record of {row.title}, T={row.tokens}, {phase}")
    record = max(found, key=lambda one: one.environment.date)
    ratio = record.floor_ratio if record.mode == "ll" else record.ceiling_ratio
    return f"{number(record.time_us.median)}{'' if ratio is None else f' ({ratio:.2f})'}"


def number(value: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def read_folder(folder: str | Path) -> list[Record]:
    """The records of all files of a folder, without those of `bench --overlap`."""
    files = [path for path in Path(folder).glob("*.jsonl") if not path.name.startswith("overlap")]
    return [record for path in sorted(files) for record in read_records(path)]
