"""The comparison with published methods: what is still to be measured, and the table of it."""

from __future__ import annotations

import json

import pytest

from mixrank_bench import tables_peers, vit_b16_peers
from mixrank_bench.accuracy_peers.methods import METHODS

CONDITIONS = {"evaluation_dtype": "bfloat16", "calibration_images": 512, "seed": 0}
ENVIRONMENT = {
    "cpu": "a processor",
    "threads": 1,
    "torch": "2.14",
    "timm": "1.0",
    "commit": "abc",
    "date": "2026-01-01",
}


def row(method: str, keep: float, top1: float, **others) -> dict:
    found = {"method": method, "source": "somebody 2024", "how": "uniform", "keep": keep, "parameters": 1234567}
    score = {"top1": top1, "agreement": 90.04, "kl": 0.12345, "images": 500, "correct": "1"}
    return found | score | CONDITIONS | {"environment": ENVIRONMENT} | others


@pytest.fixture
def out(tmp_path, monkeypatch):
    path = tmp_path / "peers.jsonl"
    monkeypatch.setattr(vit_b16_peers, "OUT", path)
    return path


def write(path, *rows: dict) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


def test_what_was_measured_under_the_same_conditions_is_not_measured_again(out):
    write(out, row("EVA", 0.5, 50), row("EVA", 0.4, 40, seed=1), row("dense", 1.0, 90))
    found = vit_b16_peers.missing(out, ["EVA", "OATS"], [0.5, 0.4], CONDITIONS)
    assert found == [("EVA", 0.4), ("OATS", 0.5), ("OATS", 0.4)]


def test_methods_that_share_their_preparation_stand_together():
    prepared = [method.prepare for method in METHODS.values()]
    groups = [one for one, before in zip(prepared, [None, *prepared], strict=False) if one is not before]
    assert len(groups) == len(set(prepared))


def test_the_table_has_the_most_accurate_first_and_the_latest_of_each(out):
    write(
        out,
        row("dense", 1.0, 90.2, correct="111110"),
        row("EVA", 0.5, 10.0),
        row("EVA", 0.5, 60.0, correct="111101"),
        row("OATS", 0.5, 70.0, parameters_with_indices=1300000, correct="000010"),
        row("mixrank, defaults", 0.5, 80.0, correct="111101"),
        row("EVA", 0.4, 20.0, correct="000001"),
    )
    lines = tables_peers.peers().splitlines()
    assert lines[0] == "Dense: 1,234,567 parameters, top-1 90.2 %."
    assert lines.index("### keep 0.5") < lines.index("### keep 0.4")
    cells = [line for line in lines if line.startswith(("| EVA", "| OATS"))]
    assert cells == [
        "| OATS | uniform | 1,234,567 (1,300,000 with the places of the nonzeros) "
        "| 70.0 | 90.0 | 0.123 | 4 / 0 | 5 / 1 | 0.22 | somebody 2024 |",
        "| EVA | uniform | 1,234,567 | 60.0 | 90.0 | 0.123 | 1 / 1 | 0 / 0 | 1 | somebody 2024 |",
        "| EVA | uniform | 1,234,567 | 20.0 | 90.0 | 0.123 | 5 / 1 |  |  | somebody 2024 |",
    ]
    assert next(line for line in lines if line.startswith("| mixrank, defaults")).count("|  |") == 1
    absent = [name for name in METHODS if name not in ("EVA", "OATS", "mixrank, defaults")]
    assert f"Not measured yet: {'; '.join(absent)}." in lines
    assert "512 calibration images (seed 0), 500 test images, evaluated in bfloat16." in lines[-1]


def test_where_the_defaults_are_not_measured_an_earlier_row_of_ours_is_compared_with(out):
    others = {"OATS": "0101", "mixrank, tokens alike": "1100"}
    dense = row("dense", 1.0, 90.2, correct="1111")
    write(out, dense, *(row(name, 0.4, 50.0, correct=right) for name, right in others.items()))
    assert "| 1 / 1 | 1 | somebody 2024 |" in tables_peers.peers()
    others["mixrank, defaults"] = "1111"
    write(out, dense, *(row(name, 0.4, 50.0, correct=right) for name, right in others.items()))
    assert "| 2 / 0 | 0.5 | somebody 2024 |" in tables_peers.peers()


def test_the_exact_test_of_mcnemar():
    assert tables_peers.mcnemar(0, 0) == 1
    assert tables_peers.mcnemar(3, 3) == 1
    assert tables_peers.mcnemar(9, 1) == pytest.approx(2 * 11 / 1024)


def test_without_a_run_the_table_says_so(out):
    assert tables_peers.peers() == tables_peers.NO_RUN


def test_another_seed_has_its_own_table_and_leaves_the_first_one_alone(out):
    write(out, row("dense", 1.0, 90), row("EVA", 0.5, 50), row("OATS", 0.5, 60))
    alone = tables_peers.peers(), tables_peers.front()
    assert tables_peers.subsets() == tables_peers.NO_RUN
    write(out, row("dense", 1.0, 90), row("EVA", 0.5, 50), row("OATS", 0.5, 60), row("EVA", 0.5, 51, seed=1))
    assert (tables_peers.peers(), tables_peers.front()) == alone
    lines = tables_peers.subsets().splitlines()
    assert [line.split(" | ")[:4] for line in lines[2:]] == [
        ["| 0.5", "EVA", "0", "50.0"],
        ["| 0.5", "EVA", "1", "51.0"],
    ]
