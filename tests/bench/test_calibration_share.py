"""The share of the Gram matrices in a calibration run, on one block of a small model."""

from __future__ import annotations

import sys

import pytest
import torch

from mixrank_bench import calibration
from mixrank_bench.environment import read
from mixrank_kernels import ops

TINY = ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1})


def test_every_method_is_measured_in_both_dtypes(monkeypatch):
    monkeypatch.setattr(calibration, "TURN_IMAGES", 2)
    monkeypatch.setattr(calibration, "BATCH", 1)
    rows = list(calibration.rows(TINY[0], 3, arguments=TINY[1]))
    assert {(row["dtype"], row["method"]) for row in rows} == {
        (dtype, method) for dtype in ("float32", "bfloat16") for method in ("ours", "addmm")
    }
    for row in rows:
        assert row["images"] == 3
        assert 0 < row["seconds_gram"] < row["seconds_calibrate"]
        assert row["share"] == row["seconds_gram"] / row["seconds_forward"]


def test_addmm_computes_the_same_gram_matrices():
    addmm, ours, total = (
        calibration.Addmm(),
        torch.zeros(5, 5, dtype=torch.float64),
        torch.zeros(5, dtype=torch.float64),
    )
    gram, column_sum = torch.zeros_like(ours), torch.zeros_like(total)
    for x in torch.randint(-4, 5, (3, 2, 7, 5)).bfloat16():
        ops.gram_accumulate_(ours, x, None, total)
        addmm(gram, x, None, column_sum)
    assert torch.equal(addmm.grams[gram.data_ptr()].double(), ours)
    assert torch.equal(column_sum, total)


def test_the_gate_is_red_where_the_operator_is_wrong(monkeypatch):
    operator = ops.gram_accumulate_

    def wrong(gram, x, row_weight, column_sum):
        operator(gram, x * 1.01, row_weight, column_sum)

    monkeypatch.setattr(calibration, "gram_accumulate_", wrong)
    with pytest.raises(AssertionError, match="largest error"):
        list(calibration.rows(TINY[0], 1, arguments=TINY[1]))


def test_rows_are_saved_with_their_environment(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(calibration, "rows", lambda name, images: [dict(ROW, model=name, images=images)])
    path, threads = tmp_path / "rows.jsonl", torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["calibration", "--images", "5", "--busy", "--threads", "1", "--save", str(path)])
    try:
        calibration.main()
    finally:
        torch.set_num_threads(threads)
    (row,) = read(path)
    assert (row["images"], row["share"], row["environment"]["threads"]) == (5, 0.25, 1)
    assert row["run"].endswith(row["environment"]["commit"])
    assert "25.0%" in capsys.readouterr().out


ROW = {
    "kind": "calibration",
    "dtype": "bfloat16",
    "method": "ours",
    "seconds_forward": 4.0,
    "seconds_gram": 1.0,
    "seconds_calibrate": 5.5,
    "share": 0.25,
}


@pytest.mark.parametrize("option", ["--images", "--threads"])
def test_numbers_below_one_are_refused(monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["calibration", option, "0"])
    with pytest.raises(SystemExit):
        calibration.main()
    assert f"{option} must be at least 1, but it was 0" in capsys.readouterr().err
