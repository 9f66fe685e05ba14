"""The documents and figures that are made from results."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch

from mixrank_bench import figures, report, tables_models, tables_ops, uvc, vit_b16_peers
from mixrank_bench.measures import ADDMM, SERVED, UNPACKED
from mixrank_bench.ops import Case
from mixrank_bench.samples import ceiling_row, op_row

LINEAR = Case("lowrank_linear", "vit-b proj", torch.float32, 197, 768, 768, 152, 0.4)
GRAM = Case("gram_accumulate_", "width 768", torch.bfloat16, 1576, 768)


@pytest.fixture
def environment() -> dict[str, Any]:
    """The header of a run."""
    versions = {"cpu": "a processor", "python": "3.11", "torch": "2.14", "timm": "1.0", "commit": "abc", "load": 0.1}
    return versions | {"threads": [1], "date": "2026-01-01", "peers": {"scipy": "1.17"}, "openblas": "SkylakeX"}


@pytest.fixture
def root(tmp_path, monkeypatch, environment):
    """A folder with the documents, and a run in which one case is lost and one has no number."""
    for name in report.DOCUMENTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(report.ROOT / name, tmp_path / name)
    monkeypatch.setattr(tables_ops, "OUT", tmp_path / "ops.jsonl")
    monkeypatch.setattr(tables_models, "CALIBRATION", tmp_path / "calibration.jsonl")
    monkeypatch.setattr(tables_models, "MODELS", tmp_path / "models.jsonl")
    monkeypatch.setattr(vit_b16_peers, "OUT", tmp_path / "peers.jsonl")
    monkeypatch.setattr(uvc, "OUT", tmp_path / "uvc.jsonl")
    record(tmp_path, environment, "r1")
    return tmp_path


def record(root, environment: dict, run: str) -> None:
    times = {"ours": {SERVED: 1.0, UNPACKED: 1.2}, "factors": {"torch eager": 2.0, "oneDNN prepacked": 0.8}}
    rows = [
        ceiling_row(),
        op_row(LINEAR, times | {"dense": {"torch eager": 3.0}}, absent={"factors": {"zentorch": "not installed"}}),
        op_row(GRAM, {"ours": {SERVED: 5.0}, "gram": {ADDMM: 20.0}}),
        op_row(GRAM, {}, dtype="float32", gate="largest error 1, allowed 0"),
    ]
    with tables_ops.OUT.open("a") as file:
        for row in rows:
            file.write(json.dumps(row | {"run": run, "environment": environment}) + "\n")


def test_what_is_written_is_not_stale_and_is_the_same_each_time(root):
    report.write(root)
    assert report.stale(root) == []
    files = [*root.glob("docs/*.md"), *root.glob("docs/images/*.svg")]
    before = {file: file.read_bytes() for file in files}
    documents = {root / name for name in report.DOCUMENTS if name.startswith("docs/") and name.count("/") == 1}
    assert before.keys() == documents | {root / "docs" / "images" / f"{name}.svg" for name in ("roofline", "speedups")}
    report.write(root)
    assert {file: file.read_bytes() for file in files} == before


def test_an_edited_table_and_a_newer_run_are_stale(root, environment):
    report.write(root)
    document = root / "docs" / "benchmarks.md"
    document.write_text(document.read_text().replace("0.80x", "1.80x"))
    assert report.stale(root) == ["docs/benchmarks.md"]
    report.write(root)
    record(root, environment, "r2")
    found = report.stale(root)
    assert {"docs/benchmarks.md", "docs/images/roofline.svg", "docs/images/speedups.svg"} <= set(found)


def test_the_front_is_drawn_again_when_a_method_has_another_result(root, environment):
    def row(method: str, keep: float, parameters: int, top1: float) -> str:
        found = {"method": method, "keep": keep, "parameters": parameters, "top1": top1, "seed": 0}
        return json.dumps(found) + "\n"

    rows = [row("dense", 1.0, 100, 90.0), row("EVA", 0.5, 50, 40.0), row("mixrank, defaults", 0.5, 50, 80.0)]
    vit_b16_peers.OUT.write_text("".join(rows))
    figures.write(root)
    assert figures.stale(root) == []
    assert "EVA" in (root / "docs" / "images" / "front.svg").read_text()
    vit_b16_peers.OUT.write_text("".join([*rows, row("EVA", 0.4, 40, 10.0)]))
    assert figures.stale(root) == ["docs/images/front.svg"]


def test_losing_cases_and_cases_without_a_number_are_shown(root):
    lines = tables_ops.losing().splitlines()[2:]
    assert len(lines) == 2
    assert "| oneDNN prepacked | 0.80x |" in lines[0]
    assert "no number" in lines[1]
    assert "largest error 1, allowed 0" in lines[1]


def test_summary_has_every_peer_the_best_of_them_and_ours_without_packing(root):
    text = tables_ops.summary()
    assert "| lowrank_linear | float32 | same factors | best of these | 0.80x | 0.80x | 1 |" in text
    assert "| lowrank_linear | float32 | same factors | torch eager | 2.00x | 2.00x | 1 |" in text
    assert "| lowrank_linear | float32 | ours | without packing | 1.20x | 1.20x | 1 |" in text
    assert "| gram_accumulate_ | bfloat16 | Gram | torch addmm_ in fp32 | 4.00x | 4.00x | 1 |" in text


def test_percent_of_the_roof_is_by_the_number_of_rows(root):
    percent = f"{100 * 1e3 * 1576 * 768 * 769 / 2e11 / 5:.0f} %"
    assert f"| gram_accumulate_ | bfloat16 | 1576 | {percent} | {percent} | arithmetic |" in tables_ops.ceiling()


def test_the_ceiling_is_shown_by_rank_and_by_width(root):
    least = 100 * 1e3 * LINEAR.flops / 1e11
    assert (
        f"| float32 | 1 | 129 to 256 | 1 | {least:.0f} % | {least / 0.8:.0f} % | {least:.0f} % |"
        in tables_ops.by_rank()
    )
    assert f"| width 768 M=1576 K=768 | bfloat16 | {100 * 1e3 * GRAM.flops / 2e11 / 5:.0f} % |" in tables_ops.by_width()


def test_steadiness_counts_rounds_that_were_slowed_down(root):
    # The rows made by hand have a fastest round of 0.9 and a slowest of 1.1 times the median.
    assert "| 1 | ours | 3 | 0 % | 0 % |" in tables_ops.steadiness()
    assert "| 1 | others | 4 | 0 % | 0 % |" in tables_ops.steadiness()
    rows = [json.loads(line) for line in tables_ops.OUT.read_text().splitlines()]
    rows[1]["milliseconds"]["ours"][SERVED]["high"] = 9.0
    tables_ops.OUT.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "| 1 | ours | 3 | 0 % | 33 % |" in tables_ops.steadiness()


def test_missing_peers_come_with_their_reason(root):
    assert "| zentorch | float32 | not installed | 1 |" in tables_ops.absent()


def test_without_a_run_the_documents_say_so(root):
    tables_ops.OUT.unlink()
    report.write(root)
    assert report.stale(root) == []
    assert tables_ops.NO_RUN in (root / "docs" / "benchmarks.md").read_text()
    assert not (root / "docs" / "images").exists()


def test_models_are_compared_with_the_fastest_dense_one(root, environment):
    def row(keep: float | None, mode: str, rate: float) -> dict:
        shape = {"kind": "model", "model": "vit", "batch": 8, "threads": 1, "dtype": "float32", "parameters": 1000}
        speed = {"images_per_second": rate, "low": rate, "high": rate, "peak_megabytes": 10.0}
        return shape | speed | {"keep": keep, "mode": mode, "environment": environment}

    rows = [row(None, "eager", 5.0), row(None, "compile", 10.0), row(0.4, "eager", 18.0)]
    tables_models.MODELS.write_text("".join(json.dumps(one) + "\n" for one in rows))
    cells = [line.rsplit("|", 2)[1].strip() for line in tables_models.models().splitlines()[2:5]]
    assert cells == ["0.50x", "1.00x", "1.80x"]


def test_calibration_shows_the_share(root, environment):
    spent = {"seconds_forward": 50.0, "seconds_gram": 10.0, "method": "ours"}
    row = {"kind": "calibration", "model": "vit", "dtype": "bfloat16", "threads": 1, "images": 256} | spent
    tables_models.CALIBRATION.write_text(json.dumps(row | {"environment": environment}) + "\n")
    assert "| vit | ours | bfloat16 | 1 | 256 | 50.0 | 10.0 | 20 % |" in tables_models.calibration()
    assert "| 20.00% | yes |" in tables_ops.bar_lines()
