"""Pages of docs/results, which `expertlink report` writes from benchmarks/results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from expertlink.bench.records import PHASES, latest, read_records, write_records
from expertlink.bench.report import PAGES, README_ROWS, Page, page_text, read_folder, readme_table
from expertlink.cli import app
from support.bench_records import make_record

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
AT = "../../benchmarks/results"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_committed_pages_are_what_the_records_say(page: Page) -> None:
    text = page_text(page, RESULTS, pictures_at=AT)
    path = ROOT / "docs" / "results" / f"{page.name}.md"
    committed = path.read_text() if path.exists() else None  # where there are no records
    assert text == committed, "run: expertlink report"


def test_pages_name_pictures_that_are_there() -> None:
    for page in (ROOT / "docs" / "results").glob("*.md"):
        for line in page.read_text().splitlines():
            if line.startswith("!["):
                picture = page.parent / line.rpartition("(")[2].rstrip(")")
                assert picture.is_file(), picture


def test_every_file_of_records_has_one_page() -> None:
    texts = [page_text(page, RESULTS, pictures_at=AT) or "" for page in PAGES]
    for path in RESULTS.glob("*.jsonl"):
        assert sum(f"## {path.stem}\n" in text for text in texts) == 1, path


def test_the_table_of_the_readme_has_six_rows_of_recorded_medians() -> None:
    table = readme_table(read_folder(RESULTS))
    lines = table.splitlines()
    assert len(lines) == 2 + len(README_ROWS) == 8
    records = latest(read_records(RESULTS / "nvlink-4xH200.jsonl"))
    [dispatch] = [
        one
        for one in records
        if (one.phase, one.engine, one.layout, one.variant, one.quantization)
        == ("dispatch", "nvlink", "token_major", "uncached", None)
        and (one.routing, one.num_sms) == ("balanced", None)
    ]
    assert f"| 4096 | {dispatch.time_us.median:.0f} (" in lines[2]


def test_the_command(tmp_path: Path) -> None:
    results, out = tmp_path / "records", tmp_path / "pages"
    results.mkdir()
    sweep = [("dispatch", 48), ("combine", 132), ("pair", 132)]
    budgets: dict[str, Any] = {"num_sms_dispatch": 48, "num_sms_combine": 132}
    records = [make_record(float(place), phase=phase) for place, phase in enumerate(PHASES, 7)]
    records += [
        make_record(50.0, phase=phase, num_sms=sms, **(budgets if phase == "pair" else {}))
        for phase, sms in sweep
    ]
    write_records(results / "collective-here.jsonl", records)
    (results / "collective-here.md").write_text("Notes:\n\n- a slow machine\n")
    arguments = ["report", str(results), "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert [path.name for path in out.iterdir()] == ["collective.md"]
    text = (out / "collective.md").read_text()
    assert "| auto | 128 | 7 | 8 | 9 |" in text
    assert "| 48+132 | 128 | 50 | 50 | 50 |" in text
    assert text.endswith("- a slow machine\n")
    assert "](../records/collective-here/cases.png)" in text
    assert (results / "collective-here" / "cases.png").is_file()
    done = CliRunner().invoke(app, ["report", str(tmp_path / "nothing"), "--out", str(out)])
    assert done.exit_code == 2
    assert "no files of records" in done.output
    done = CliRunner().invoke(app, ["report", str(results), "--table"])
    assert done.exit_code == 2
    assert "no record of" in done.output


def test_across_hosts_the_rail_is_what_times_are_compared_with(tmp_path: Path) -> None:
    """Where few blocks of NCCL make NVLink a network, its exchange of all ranks has all of it."""
    for rail, nccl in (("sockets", "1 of 1 calls"), ("nvlink", "")):
        record = make_record(
            hosts=2,
            rail=rail,
            rail_us=make_record(40.0).time_us,
            rail_ratio=0.4,
            ceiling_us=make_record(20.0).time_us,
            put_ratio=0.2,
            wire_bytes=2_000_000,
            environment=replace(make_record().environment, backend="nccl"),
        )
        write_records(tmp_path / "hybrid-1.jsonl", [record])
        page = next(page for page in PAGES if page.name == "hybrid")
        text = page_text(page, tmp_path, pictures_at=".")
        assert text is not None
        assert "100 (0.40)" in text
        assert "what the rail alone takes" in text
        assert nccl in text
        assert ("all_to_all_single" in text) == bool(nccl)
