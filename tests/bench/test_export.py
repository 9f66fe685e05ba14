"""The table of exported models, and a runtime as a module."""

from __future__ import annotations

import json

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


def test_a_runtime_is_called_as_a_module():
    module = export.Called(lambda images: images + 1)
    assert torch.equal(module(torch.zeros(2)), torch.ones(2))
