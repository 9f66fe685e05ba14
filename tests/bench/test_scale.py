"""The work of a compression by the shapes of a model, and what rates make of it."""

from __future__ import annotations

import json

import pytest
import torch

from mixrank.models import create_model
from mixrank_bench import large, scale, tables_scale
from mixrank_bench.scale import Rates, Work, tokens_of


def test_the_work_is_that_of_the_shapes():
    model = create_model("vit_tiny_patch16_224", args={"img_size": 32, "depth": 1, "num_classes": 7})
    assert tokens_of(model) == 5
    work = Work.of(model, 5)
    # qkv, proj, fc1 and fc2: the smaller side of each is 192.
    assert work.grams == 4 * 2 * 5 * 192 * 193
    assert work.sums == 4 * 2 * 8 * (2 * 192 * 192 + 192)
    assert work.eigenvectors == 4 * 6 * 25 * 192**3
    assert work.passes > 4 * 5 * 12 * 192 * 192


def test_processes_divide_the_images_and_add_the_network():
    rates, work = Rates(passes=10.0, grams=5.0, eigenvectors=2.0, network=4.0), Work(20, 10, 8, 6)
    assert rates.predict(work, 4, 1) == {"calibrate": 16.0, "decompose": 3.0}
    assert rates.predict(work, 4, 2) == {"calibrate": 8.0 + 2.0, "decompose": 1.5}


def test_rates_are_measured_and_the_tables_tell_both_runs(tmp_path, monkeypatch):
    model = create_model("vit_tiny_patch16_224", args={"img_size": 32, "depth": 1})
    found = scale.rates(model, torch.randn(2, 3, 32, 32))
    assert min(found.passes, found.grams, found.eigenvectors) > 1e6
    assert found.network == float("inf")
    monkeypatch.setattr(scale, "OUT", tmp_path / "rows.jsonl")
    assert tables_scale.measured() == tables_scale.NO_RUN
    environment = {"cpu": "a", "threads": 1, "torch": "2", "timm": "1", "commit": "c", "date": "2026-01-01"}

    def row(processes: int, seconds: float) -> dict:
        named = {"model": "m", "images": 64, "processes": processes, "seconds": 2 * seconds}
        told = {"steps": {"calibrate": seconds, "apply": 1.0}, "predicted": {"calibrate": 9.0}}
        return named | told | {"environment": environment}

    scale.OUT.write_text(json.dumps(row(1, 20.0)) + "\n" + json.dumps(row(2, 10.0)) + "\n")
    lines = tables_scale.measured().splitlines()
    assert "| 2 | calibrate | 10.0 | 9.0 | 2.00x |" in lines
    assert "| 2 | apply | 1.0 | - | 1.00x |" in lines
    assert "| 2 | all | 20.0 | - | 2.00x |" in lines
    assert tables_scale.large().count("\n| ") == len(tables_scale.GPUS) + 2
    assert tables_scale.large().splitlines()[2].startswith("An image: ")
    assert pytest.approx(1.8e9, rel=0.05) == sum(p.numel() for p in scale.hollow(tables_scale.LARGE).parameters())


def test_the_memory_of_large_models_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(large, "OUT", tmp_path / "rows.jsonl")
    assert tables_scale.memory() == tables_scale.NO_RUN
    environment = {"cpu": "a", "threads": 1, "torch": "2", "timm": "1", "commit": "c", "date": "2026-01-01"}
    row = {
        "kind": "large",
        "model": "m",
        "images": 256,
        "dtype": "float32",
        "parameters": 304_000_000,
        "seconds": 600.0,
    }
    row |= {"peak_bytes": 3 * 2**30, "times": {"calibrate": 60.0, "decompose": 120.0, "sensitivity": 30.0}}
    large.OUT.write_text(json.dumps(row | {"environment": environment}) + "\n")
    assert "| m | 304 | 256 | float32 | 3.00 | 1.0 | 2.0 | 0.5 | 10.0 |" in tables_scale.memory().splitlines()


def test_a_large_run_has_its_weights_and_images(tmp_path):
    assert large.make(tmp_path, "vit_tiny_patch16_224", 3) > 5e6
    assert len(list((tmp_path / "images").iterdir())) == 3
    assert (tmp_path / "weights.safetensors").stat().st_size > 2e7
