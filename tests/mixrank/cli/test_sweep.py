"""``mixrank sweep``: what it writes, what it refuses, and that an interrupted sweep goes on."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from mixrank.strategies import STRATEGIES

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 2, "depth": 2, "num_classes": 2}


def arguments(world, out: Path, *more: str, keep: tuple[str, ...] = ("0.6", "0.5")) -> list[str]:
    fixed = ["sweep", "--model", ARCHITECTURE, "--weights", str(world.weights), "--images", str(world.flat), "--quiet"]
    fixed += ["--model-args", json.dumps(MODEL_ARGS), "--json", str(out)]
    return [*fixed, *(word for share in keep for word in ("--keep", share)), *more]


def rows(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


def test_it_writes_a_row_for_each_strategy_and_budget_and_a_report(world, tmp_path: Path) -> None:
    out, page = tmp_path / "sweep.json", tmp_path / "sweep.html"
    result = world.invoke(*arguments(world, out, "--report", str(page), "--sensitivity-images", "4"))
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    assert len(data["rows"]) == 7 * 2
    assert data["images"]["evaluation"] == 2
    assert data["images"]["calibration"] == 10
    for row in data["rows"]:
        assert row["compressed"]["parameters"] <= row["keep"] * data["dense"]["parameters"]
        assert row["compressed"]["top1"] is None
        shown = (row["strategy"], f"{row['keep']:g}", f"{row['fidelity']['divergence']:.3g}")
        assert any(all(word in line.split() for word in shown) for line in result.stdout.splitlines())
    assert page.read_text().count("<svg") == 1 + 14
    drawn = tmp_path / "again.html"
    assert world.invoke("report", str(out), "--out", str(drawn)).exit_code == 0
    assert drawn.read_bytes() == page.read_bytes()


def test_labels_add_accuracy(world, tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    more = ["--strategy", "svd", "--eval-images", str(world.flat), "--labels", str(world.labels)]
    result = world.invoke(*arguments(world, out, *more))
    assert result.exit_code == 0, result.output
    assert "top-1" in result.stdout
    assert json.loads(out.read_text())["images"] == {
        "calibration": 12, "evaluation": 12, "calibration_skipped": [], "evaluation_skipped": []
    }  # fmt: skip
    assert all(0 <= row["compressed"]["top1"] <= 100 for row in rows(out))


def test_an_interrupted_sweep_goes_on_with_resume(world, tmp_path: Path, monkeypatch) -> None:
    whole, broken = tmp_path / "whole.json", tmp_path / "broken.json"
    chosen = ["--strategy", "svd", "--strategy", "aware"]
    assert world.invoke(*arguments(world, whole, *chosen)).exit_code == 0
    module = importlib.import_module("mixrank.sweep")
    apply, calls = module.apply_, []

    def interrupted(*given: object):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return apply(*given)

    with monkeypatch.context() as patch:
        patch.setattr(module, "apply_", interrupted)
        assert world.invoke(*arguments(world, broken, *chosen)).exit_code == 130
    first = rows(broken)
    assert len(first) == 2
    assert "go on with its sweep by --resume" in world.refused(*arguments(world, broken, *chosen))
    assert "another --seed" in world.refused(*arguments(world, broken, *chosen, "--resume", "--seed", "1"))
    assert world.invoke(*arguments(world, broken, *chosen, "--resume")).exit_code == 0
    assert rows(broken)[:2] == first
    for made, expected in zip(rows(broken), rows(whole), strict=True):
        assert all(made[key] == expected[key] for key in ("strategy", "keep", "plan", "fidelity", "compressed"))


def test_a_sweep_can_be_given_more_rows_later(world, tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    assert world.invoke(*arguments(world, out, "--strategy", "svd")).exit_code == 0
    first = rows(out)
    more = arguments(world, out, "--strategy", "aware", "--resume", keep=("0.5",))
    assert world.invoke(*more).exit_code == 0
    assert rows(out)[:2] == first
    assert [(row["strategy"], row["keep"]) for row in rows(out)[2:]] == [("aware", 0.5)]


def test_other_weights_and_other_files_are_no_sweep_to_go_on_with(world, tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    assert world.invoke(*arguments(world, out, "--strategy", "svd")).exit_code == 0
    data = json.loads(out.read_text())
    out.write_text(json.dumps(data | {"identity": data["identity"] | {"digest": "0"}}))
    assert "other weights" in world.refused(*arguments(world, out, "--resume"))
    half = world.root / "half.json"
    before = half.read_bytes()
    assert "does not hold a sweep" in world.refused(*arguments(world, half, "--resume"))
    assert half.read_bytes() == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--keep", "1.5"], "--keep must be above 0 and at most 1, got 1.5"),
        (["--strategy", "best"], "strategies must be among pivoted, svd"),
        (["--held-out", "1"], "held_out must be above 0 and below 1"),
        (["--held-out", "0.3", "--eval-images", "photos"], "--held-out belongs to a sweep without --eval-images"),
        (["--labels", "labels.csv"], "--labels belongs to --eval-images"),
        (["--limit", "4"], "needs more images, but there were 4"),
        (["--weights", "absent.pth"], "absent.pth"),
        (["--keep", "0.001"], "keep must be at least"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(world, tmp_path: Path, more: list[str], message: str) -> None:
    assert message in world.refused(*arguments(world, tmp_path / "sweep.json", *more))
    assert not list(tmp_path.iterdir())


def test_the_help_names_every_strategy(world) -> None:
    text = world.invoke("sweep", "--help").stdout
    assert all(name in text for name in STRATEGIES)
