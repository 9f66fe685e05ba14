"""The table of exported models, and a runtime as a module."""

from __future__ import annotations

import json
import sys

import pytest
import timm
import torch

from mixrank_bench import export, tables_export


def test_each_runtime_is_compared_with_the_dense_model_there_and_with_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "OUT", tmp_path / "rows.jsonl")
    assert tables_export.runtimes() == tables_export.NO_RUN
    environment = {"cpu": "a", "threads": 1, "torch": "2", "timm": "1", "commit": "c", "date": "2026-01-01"}

    def row(model: str, runtime: str, rate: float) -> dict:
        named = {"kind": "export", "model": model, "runtime": runtime, "batch": 8}
        return named | {"images_per_second": rate, "environment": environment}

    rows = [row("dense", export.OURS, 10.0), row("keep 0.5", export.OURS, 20.0)]
    rows += [row("dense", "ONNX Runtime", 12.0), row("keep 0.5", "ONNX Runtime", 18.0)]
    export.OUT.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = tables_export.runtimes().splitlines()
    assert "| 8 | keep 0.5 | mixrank | 20.00 | 10.00 | 2.00x | 1.00x |" in lines
    assert "| 8 | keep 0.5 | ONNX Runtime | 18.00 | 12.00 | 1.50x | 0.90x |" in lines


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5).eval()


def test_each_runtime_computes_what_the_model_does(model, tmp_path):
    images = torch.randn(1, 3, 32, 32)
    found = export.runtimes("dense", model, tmp_path, threads=1)
    assert {runtime for _, runtime in found} >= {export.OURS, "torch.export", "ONNX Runtime"}
    with torch.inference_mode():
        for module in found.values():
            torch.testing.assert_close(module.eval()(images), model(images), rtol=1e-4, atol=1e-4)


def test_runtimes_are_timed_in_turns_and_recorded(model, tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(export, "models", lambda keep: {"dense": model})
    monkeypatch.setattr(export, "SHAPE", (3, 32, 32))
    monkeypatch.setattr(export, "ROUNDS", 1)
    monkeypatch.setattr(sys, "argv", ["export", "--threads", str(torch.get_num_threads()), "--out", str(out)])
    export.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 4 * len(export.BATCHES)
    assert all(row["images_per_second"] > 0 for row in rows)
