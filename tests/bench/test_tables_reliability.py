"""The tables of docs/reliability.md."""

from __future__ import annotations

import json

import pytest

from mixrank_bench import hostile, interruptions, tables_reliability

ENVIRONMENT = {"cpu": "A CPU", "threads": 1, "torch": "2", "timm": "1", "commit": "abc", "date": "2026-01-01"}


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Puts rows into the file of results of a module."""

    def put(module, *rows: dict) -> None:
        monkeypatch.setattr(module, "OUT", tmp_path / "rows.jsonl")
        module.OUT.write_text("".join(json.dumps(row | {"environment": ENVIRONMENT}) + "\n" for row in rows))

    return put


def test_without_a_run_the_tables_say_so(rows):
    rows(interruptions)
    rows(hostile)
    assert tables_reliability.interruptions() == tables_reliability.hostile() == tables_reliability.NO_RUN


def test_a_run_that_failed_has_not_the_same_bytes_and_the_last_row_counts(rows):
    row = {"command": "compress", "runs": 17, "kills": 40, "different": 0, "failures": []}
    rows(interruptions, row, row | {"kills": 41, "different": 1, "failures": ["run 3: left a file", "run 5: 1"]})
    table = tables_reliability.interruptions()
    assert "| `mixrank compress` | 17 | 41 | 14 | 1 | 2 |" in table
    assert "| `mixrank uvc` | not measured |" in table
    assert "A CPU" in table


def test_cases_are_added_up_over_the_targets(rows):
    row = {"target": "labels", "cases": 10_000, "refused": 9_000, "slowest_seconds": 0.5, "memory": 2**21}
    failed = row | {"target": "image", "cases": 25_000, "failures": [[7, "ValueError: x"]]}
    rows(hostile, row | {"failures": []}, failed)
    table = tables_reliability.hostile()
    assert "| labels | 10,000 | 9,000 | 0 | 0.50 | 2 |" in table
    assert "| image | 25,000 | 9,000 | 1 | 0.50 | 2 |" in table
    assert "| checkpoint | not measured |" in table
    assert "35,000 cases in all" in table
