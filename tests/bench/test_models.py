"""Whole models in processes of their own, on one block of a small model."""

from __future__ import annotations

import multiprocessing
import sys

import pytest
import torch
from torch import nn

from mixrank_bench import engines, memory, models
from mixrank_bench.environment import read
from mixrank_bench.timing import Timing

TINY = models.Options(
    models=("vit_tiny_patch16_224",),
    arguments={"img_size": 32, "depth": 1},
    keeps=(0.5,),
    dtypes=("float32",),
    modes=("eager", "prepacked"),
    batches=(2,),
    rounds=1,
)
ROW = {
    "kind": "model",
    "model": "vit_tiny_patch16_224",
    "keep": 0.5,
    "mode": "eager",
    "batch": 2,
    "threads": 1,
    "dtype": "float32",
    "parameters": 1000,
    "images_per_second": 12.5,
    "low": 10.0,
    "high": 20.0,
    "peak_megabytes": None,
}


def test_every_variant_serves_in_a_process_of_its_own():
    rows = list(models.rows(TINY))
    assert [(row["keep"], row["mode"]) for row in rows] == [(None, "eager"), (None, "prepacked"), (0.5, "eager")]
    for row in rows:
        assert row.keys() == ROW.keys()
        assert (row["batch"], row["threads"], row["dtype"]) == (2, 1, "float32")
        assert 0 < row["low"] <= row["images_per_second"] <= row["high"]
        assert row["peak_megabytes"] is None or row["peak_megabytes"] > 100
    assert rows[0]["parameters"] == rows[1]["parameters"] > rows[2]["parameters"]


def test_a_process_that_fails_is_named(tmp_path):
    with (
        pytest.raises(RuntimeError, match="the process of nothing ended without an answer"),
        models.Server(tmp_path / "missing.safetensors", "eager", 1, 1, name="the process of nothing") as server,
    ):
        server.first()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prepacked_layers_compute_the_same_and_drop_the_weight(dtype):
    if not engines.reorders(dtype):
        pytest.skip("oneDNN has no such product on this processor")
    model = nn.Sequential(nn.Linear(40, 24), nn.GELU(), nn.Sequential(nn.Linear(24, 8, bias=False))).to(dtype)
    x = torch.randn(3, 5, 40, dtype=dtype)
    with torch.inference_mode():
        expected = model(x)
        actual = models.prepacked(model)
        torch.testing.assert_close(actual(x), expected)
        torch.testing.assert_close(actual(x[:1]), expected[:1])
    assert [name for name, _ in actual.named_parameters()] == ["0.bias"]


def test_other_logits_are_refused():
    expected = torch.randn(2, 10)
    models.gate(models.Variant(None, "eager"), "float32", expected * (1 + 1e-7), expected)
    with pytest.raises(AssertionError, match=r"keep 0.4, compile, float32: the logits are .* from the reference"):
        models.gate(models.Variant(0.4, "compile"), "float32", expected * 1.01, expected)


def test_the_images_of_a_small_batch_are_the_first_of_a_large_one():
    model = models.mixrank.create_model(TINY.models[0], args=TINY.arguments)
    assert torch.equal(models.images_of(model, 3)[:2], models.images_of(model, 2))


def test_rates_are_images_per_second():
    assert models.rates(Timing(median=100.0, low=50.0, high=200.0, rounds=3, quartiles=(75.0, 150.0)), 8) == {
        "images_per_second": 80.0,
        "low": 40.0,
        "high": 160.0,
    }


def test_the_full_run_has_every_mode_and_the_compressed_models_pack_in_any():
    names = [str(variant) for variant in models.variants(models.Options(), "float32")]
    assert names == [
        "dense, eager", "dense, compile", "dense, prepacked",
        "keep 0.6, eager", "keep 0.6, compile", "keep 0.4, eager", "keep 0.4, compile",
    ]  # fmt: skip


def test_what_the_processor_does_not_have_is_left_out(monkeypatch):
    monkeypatch.setattr(engines, "reorders", lambda dtype: False)
    names = [str(variant) for variant in models.variants(TINY, "bfloat16")]
    assert names == ["dense, eager", "keep 0.5, eager"]


def test_rows_are_saved_with_their_environment(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(models, "rows", lambda options: asked.append(options) or [ROW])
    path, threads = tmp_path / "rows.jsonl", torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["models", "--quick", "--busy", "--rounds", "2", "--save", str(path)])
    try:
        models.main()
    finally:
        torch.set_num_threads(threads)
    assert asked == [models.Options(models=models.MODELS[:1], keeps=(0.4,), batches=(8,), rounds=2)]
    (row,) = read(path)
    assert ROW.items() <= row.items()
    assert row["run"].endswith(row["environment"]["commit"])
    assert "12.50" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--rounds", "--threads"])
def test_numbers_below_one_are_refused(monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["models", option, "0"])
    with pytest.raises(SystemExit):
        models.main()
    assert f"{option} must be at least 1, but it was 0" in capsys.readouterr().err


@pytest.mark.skipif(memory.peak_megabytes() is None, reason="needs /proc/self/status")
def test_the_peak_is_that_of_the_process_alone():
    ballast = torch.ones(2**26)  # 256 MB, which a process started now must not be charged with
    assert memory.peak_megabytes() > 256
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_peaks, args=(sender,))
    process.start()
    fresh, with_array, reset = receiver.recv()
    process.join()
    assert ballast.sum() == 2**26
    assert fresh <= memory.peak_megabytes() - 200
    assert with_array >= fresh + 60
    assert reset <= with_array - 60


def _report_peaks(sender) -> None:
    fresh = memory.peak_megabytes()
    array = bytearray(b"1" * 2**26)
    peaks = [fresh, memory.peak_megabytes()]
    del array
    memory.reset_peak()
    sender.send([*peaks, memory.peak_megabytes()])
