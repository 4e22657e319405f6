"""Values of records as texts."""

from __future__ import annotations

from collections.abc import Sequence

from expertlink.bench.records import Summary


def number(value: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def text_of(value: Summary | float | None) -> str:
    """A value of a record, or the median of several; empty where there is none."""
    if value is None:
        return ""
    return number(value.median if isinstance(value, Summary) else value)


def without_empty(
    header: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Columns that have a value."""
    places = [place for place in range(len(header)) if any(row[place] for row in rows)]
    return [header[place] for place in places], [[row[place] for place in places] for row in rows]
