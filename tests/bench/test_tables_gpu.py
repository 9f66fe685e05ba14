"""The tables of GPU results and of what bounds a case: from rows made by hand, which nobody commits."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from mixrank_bench import gpu_cases, samples, tables_gpu_results, tables_gpu_roofline
from mixrank_bench.measures import SERVED
from mixrank_bench.ops import Case
from mixrank_bench.tables_gpu_roofline import H100, H200

LINEAR = next(gpu_cases.bar_cases())


def record(path, rows: list[dict[str, Any]], gpu: str = "NVIDIA H100 80GB HBM3", run: str = "r1") -> None:
    environment = {"gpu": gpu, "cuda": "13.0", "torch": "2.11", "triton": "3.6", "date": "2026-01-01"}
    environment |= {"driver_version": "580", "power.limit": "700 W"}
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row | {"run": run, "environment": environment}) + "\n")


@pytest.fixture
def out(tmp_path, monkeypatch):
    path = tmp_path / "gpu.jsonl"
    monkeypatch.setattr(tables_gpu_results, "OUT", path)
    return path


@pytest.fixture
def recorded(out):
    """A run with ceilings, one case lost, one without a number, and a row of tokens timed in every way."""
    alone = next(case for case in gpu_cases.bar_cases() if case.m == 1)
    ways = [
        samples.op_row(alone, {"ours": {SERVED: ms}, "factors": {"torch eager": 2 * ms}}, timed=way, refused={})
        for way, ms in (("warm", 0.004), ("eager", 0.02))
    ]
    lost = Case("lowrank_linear", "lost", torch.bfloat16, 16, 48, 40, 8, 0.4)
    rows = [
        samples.ceiling_row(8e13, 8e14, side=8192, eager_call=2e-5, call=4e-6, threads=None),
        *samples.gpu_rows(1.0),
        *ways,
        samples.op_row(lost, {"ours": {SERVED: 2.0}, "factors": {"torch eager": 1.5}}, timed="cold", refused={}),
        samples.op_row(
            lost, {}, dtype="float16", timed="cold", refused={"ours": {"triton": "too wide"}}, gate="too far"
        ),
        {"kind": "settings", "clocks.sm": "1980 MHz"},
    ]
    record(out, rows)
    return out


def test_without_a_run_the_documents_say_so(out):
    assert tables_gpu_results.gpu() == "Not measured yet.\n"
    lines = tables_gpu_roofline.roofline().splitlines()[2:]
    assert len(lines) == len(list(gpu_cases.cases()))
    assert all(line.endswith("| not measured |") for line in lines)


def test_a_run_is_told_with_its_card_and_its_ceilings(recorded):
    text = tables_gpu_results.gpu()
    assert text.startswith(
        "NVIDIA H100 80GB HBM3: run r1, 26 cases, driver 580, CUDA 13.0, torch 2.11, Triton 3.6, clock 1980 MHz at the "
        "end, power limit 700 W; 2026-01-01.\n"
    )
    assert "| bfloat16 product of 8192² | 800 TFLOP/s |" in text
    assert "| copy of 256 MiB | 10 GB/s |" in text
    assert "| captured call for one number | 4.0 µs |" in text
    assert "| call from Python for one number | 20.0 µs |" in text


def test_bars_ratios_losses_launches_and_models_are_shown(recorded):
    text = tables_gpu_results.gpu()
    assert "| lowrank_linear against two products, mean | as served | 1.2x | 2.00x | yes |" in text
    assert "| gram_accumulate_ against addmm_ rounded to bfloat16, worst | as served | 1.5x | 1.00x | **no** |" in text
    assert "| lowrank_linear | bfloat16 | as served | same factors | torch eager | 1.91x | 0.75x | 21 |" in text
    assert "| lowrank_linear | lost M=16 K=48 N=40 R=8 | bfloat16 | as served | 2000.0 | 0.75x | torch eager |" in text
    assert "| lowrank_linear | lost M=16 K=48 N=40 R=8 | float16 | triton | failed |  | too wide |" in text
    assert "| lowrank_linear | lost M=16 K=48 N=40 R=8 | float16 | as served | no number |  | too far |" in text
    assert "R=232 | as served | 20.0 | 4.0 |" in text
    assert "| vit_base_patch16_224 | 0.4 | 64 | bfloat16 | compiled | as served | 64000 | 2.00x |" in text


def test_a_model_without_a_number_says_why(out):
    (model,) = (row for row in samples.gpu_rows(1.0) if row["kind"] == "model")
    record(out, [model | {"gate": "the logits are far", "milliseconds": {}}])
    assert "| compiled | as served | no number | the logits are far |" in tables_gpu_results.gpu()


def test_each_card_has_its_newest_run(recorded):
    record(recorded, samples.gpu_rows(4.0), run="r2")
    record(recorded, samples.gpu_rows(0.5), gpu="NVIDIA H200", run="r3")
    text = tables_gpu_results.gpu()
    assert "run r1" not in text
    assert text.index("HBM3: run r2") < text.index("NVIDIA H200: run r3")
    name = next(line for line in tables_gpu_roofline.roofline().splitlines() if f"| {LINEAR.name} |" in line)
    reached = (0.1 * H100.floor(LINEAR) / 4.0, 0.1 * H200.floor(LINEAR) / 0.5)
    assert name.endswith(f"| {reached[0]:.0f} % (H100), {reached[1]:.0f} % (H200) |")


def test_a_case_without_a_number_has_no_share(out):
    row = samples.op_row(LINEAR, {}, timed="cold", refused={}, gate="too far")
    record(out, [row])
    assert f"| {LINEAR.name} |" in tables_gpu_roofline.roofline()
    assert "| no number |" in tables_gpu_roofline.roofline()


def test_the_floor_is_the_longer_of_operations_and_bytes():
    few, many = (Case("gram_accumulate_", "", torch.bfloat16, m, 768, master=torch.float32) for m in (197, 12608))
    assert (H100.bound(few), H100.bound(many)) == ("bytes", "arithmetic")
    assert H100.floor(few) == pytest.approx(1e6 * (2 * 197 * 768 + 8 * 768**2) / 3.35e12)
    assert H100.floor(many) == H200.floor(many) == pytest.approx(1e6 * 12608 * 768 * 769 / 989e12)
    assert H200.floor(few) < H100.floor(few)


@pytest.mark.parametrize(
    ("case", "tiles", "splits"),
    [
        (Case("lowrank_linear", "", torch.bfloat16, 129, 768, 3072, 248), (4, 48), (33, 3)),
        (Case("lowrank_residual_linear", "", torch.bfloat16, 1, 768, 768, 120, residual="branch"), (2, 6), (66, 22)),
        (Case("gram_accumulate_", "", torch.bfloat16, 1576, 384), (6,), (22,)),
        (Case("gram_accumulate_", "", torch.bfloat16, 1576, 384, batch=12), (72,), (2,)),
        (Case("cross_gram_accumulate_", "", torch.bfloat16, 1576, 768, 3072), (144,), (1,)),
    ],
)
def test_tiles_and_the_parts_that_fill_a_card(case, tiles, splits):
    assert tables_gpu_roofline.tiles(case) == tiles
    assert tables_gpu_roofline.splits(case) == splits


def test_what_fusing_saves_and_what_it_computes_again():
    case = next(case for case in gpu_cases.bar_cases() if case.m == 12608 and case.k == case.n)
    line = next(line for line in tables_gpu_roofline.fusing().splitlines() if f"| {case.name} |" in line)
    saved = 1e6 * 4 * case.m * case.rank / 3.35e12
    again = 1e6 * 5 * 2 * case.m * case.k * case.rank / 989e12
    assert line == f"| {case.name} | {H100.floor(case):.2f} | {saved:.2f} | {again:.2f} |"
