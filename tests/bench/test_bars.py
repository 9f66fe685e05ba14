"""The bars, on rows made by hand."""

from __future__ import annotations

import pytest
import torch

from mixrank_bench.bars import Line, judge
from mixrank_bench.measures import ADDMM, SERVED, SSYRK, geometric_mean, measures, newest_runs
from mixrank_bench.ops import Case
from mixrank_bench.samples import ceiling_row, op_row


def linear(m: int, ours: float, **peers: float) -> dict:
    """A row of lowrank_linear with 2e8 operations for each row of x at 40 % kept."""
    case = Case("lowrank_linear", f"layer {m}", torch.float32, m, 768, 768, 152, 0.4)
    groups = {"factors": {"torch eager": peers["factors"]}, "dense": {"torch eager": peers["dense"]}}
    return op_row(case, {"ours": {SERVED: ours}} | groups)


def gram(dtype: torch.dtype, k: int, ours: float, name: str, peer: float) -> dict:
    case = Case("gram_accumulate_", f"width {k}", dtype, 1576, k)
    return op_row(case, {"ours": {SERVED: ours}, "gram": {name: peer, "another": 100 * peer}})


def line(rows: list[dict], text: str, calibration: tuple[dict, ...] = ()) -> Line:
    (found,) = [line for line in judge(measures(rows), calibration) if line.text.startswith(text)]
    return found


EVERY = "lowrank_linear against the best peer at the same factors, every case"
MEAN = "lowrank_linear against the best peer at the same factors, geometric mean"
DENSE = "lowrank_linear at 40 % kept"
PERCENT = "lowrank_linear, percent"


def test_every_case_counts_its_worst_and_the_mean_all_of_them():
    rows = [ceiling_row(), linear(197, 1.0, factors=1.0, dense=3.0), linear(1576, 9.0, factors=18.0, dense=27.0)]
    (worst, mean) = line(rows, EVERY), line(rows, MEAN)
    assert (worst.measured, worst.met) == (1.0, True)
    assert mean.measured == pytest.approx(2**0.5)
    assert mean.met
    assert worst.note == ""


def test_a_bar_that_is_not_met_names_its_worst_case():
    rows = [ceiling_row(1e15), linear(197, 1.0, factors=0.9, dense=3.0), linear(1576, 9.0, factors=18.0, dense=27.0)]
    worst = line(rows, EVERY)
    assert (worst.measured, worst.met, worst.missing, worst.cases) == (0.9, False, 1, 2)
    assert (
        worst.note
        == "worst: layer 197 M=197 K=768 N=768 R=152 0.90x; 1 of 2 cases below; see docs/kernels/lowrank_linear.md"
    )
    assert worst.allowed is None


def test_few_rows_have_a_bar_of_their_own():
    rows = [ceiling_row(), linear(32, 1.0, factors=1.2, dense=3.0), linear(1576, 9.0, factors=99.0, dense=27.0)]
    texts = {found.text: found for found in judge(measures(rows)) if "M <= 32" in found.text}
    (few,) = texts.values()
    assert (few.measured, few.met, few.cases) == (1.2, False, 1)


def test_a_bar_that_the_ceiling_rules_out_stays_and_says_what_is_possible():
    least = 2 * 197 * 152 * 1536 / 1e11 * 1e3
    rows = [ceiling_row(), linear(197, 1.25 * least, factors=2.0, dense=2 * least)]
    dense = line(rows, DENSE)
    assert dense.wanted == ">= 2.2x"
    assert dense.measured == pytest.approx(1.6)
    assert not dense.met
    assert dense.allowed == pytest.approx(2.0)
    assert dense.note.endswith("ceilings allow at most 2.00x; see docs/kernels/lowrank_linear.md")


def test_percent_of_the_ceiling_counts_only_many_rows():
    least = 2 * 197 * 152 * 1536 / 1e11 * 1e3
    rows = [ceiling_row(), linear(1, 1.0, factors=9, dense=9), linear(197, least / 0.9, factors=9, dense=9)]
    percent = line(rows, PERCENT)
    assert percent.measured == pytest.approx(90)
    assert (percent.met, percent.cases) == (True, 1)


def test_gram_bars_are_against_their_own_peers():
    rows = [
        ceiling_row(),
        gram(torch.float32, 768, 8.0, SSYRK, 10.0),
        gram(torch.bfloat16, 768, 5.0, ADDMM, 20.0),
    ]
    assert line(rows, "gram_accumulate_ in float32").measured == pytest.approx(1.25)
    half = line(rows, "gram_accumulate_ in bfloat16")
    assert half.measured == pytest.approx(4.0)
    assert half.allowed == pytest.approx(20.0 / (1576 * 768 * 769 / 2e11 * 1e3))
    both = [found for found in judge(measures(rows)) if found.text.startswith("Gram matrices, percent")]
    assert [found.dtype for found in both] == ["bfloat16", "float32"]


def test_gram_matrices_count_the_triangle():
    (one,) = measures([ceiling_row(), gram(torch.float32, 768, 10.0, SSYRK, 10.0)])
    assert one.rate() == pytest.approx(1576 * 768 * 769 / 0.01)
    assert one.rate("equivalent_flops") == pytest.approx(2 * 1576 * 768 * 768 / 0.01)


def test_no_number_is_a_bar_that_is_not_met():
    red = linear(197, 1.0, factors=9.0, dense=9.0) | {"milliseconds": {}, "gate": "largest error 1, allowed 0"}
    alone, beside = line([ceiling_row(), red], EVERY), line([red, linear(1576, 1.0, factors=9.0, dense=9.0)], EVERY)
    assert (alone.measured, alone.met) == (None, False)
    assert (beside.measured, beside.met, beside.missing) == (9.0, False, 1)
    assert "layer 197" in beside.note
    assert "error budget" in beside.note


def test_without_ceilings_ratios_stand_and_percents_do_not():
    rows = [linear(197, 1.0, factors=0.5, dense=9.0)]
    assert line(rows, EVERY).measured == 0.5
    assert line(rows, EVERY).allowed is None
    assert line(rows, PERCENT).measured is None


@pytest.mark.parametrize(("gram_seconds", "met"), [(20.0, True), (30.0, False)])
def test_calibration_has_a_largest_share(gram_seconds, met):
    def row(method: str, dtype: str, seconds: float) -> dict:
        spent = {"seconds_forward": 100.0, "seconds_gram": seconds}
        return {"kind": "calibration", "dtype": dtype, "threads": 1, "images": 256, "method": method} | spent

    measured = [("float32", 99.0), ("bfloat16", 99.0), ("bfloat16", gram_seconds)]
    rows = (*(row("ours", *one) for one in measured), row("addmm", "bfloat16", 600.0))
    found = line([], "Gram work in a calibration run", rows)
    assert (found.measured, found.met, found.wanted) == (gram_seconds, met, "<= 25%")


def test_the_roof_is_the_slower_of_arithmetic_and_memory_and_the_call():
    few, many = measures([ceiling_row(), linear(1, 1.0, factors=1, dense=1), linear(1576, 10.0, factors=1, dense=1)])
    assert few.roof[1] == "memory"
    assert few.roof[0] == pytest.approx(100 * few.row["bytes"] / 1e10 * 1e3)
    assert many.roof == (many.percent, "arithmetic")
    (called,) = measures([ceiling_row(call=2e-3), linear(1, 10.0, factors=1, dense=1)])
    assert called.roof == (pytest.approx(few.roof[0] / 10 + 20), "call")
    assert called.least_milliseconds == pytest.approx(0.1 * called.roof[0])


def test_a_limit_that_was_beaten_says_nothing():
    few = "lowrank_linear against the best peer at the same factors, every case with M <= 32"
    slow_call, wrong = ceiling_row(call=0.75e-3), ceiling_row(call=2e-3)
    one = linear(1, 1.0, factors=1.0, dense=9.0)
    (least,) = (measure.least_milliseconds for measure in measures([slow_call, one]))
    assert line([slow_call, one], few).allowed == pytest.approx(1.0 / least)
    assert line([wrong, one], few).allowed is None


def test_the_newest_runs_are_the_last_for_each_number_of_threads():
    rows = [{"run": "a", "n": 1}, {"n": 2}, {"run": "b", "n": 3}, {"run": "b", "n": 4}]
    assert [row["n"] for row in newest_runs(rows)] == [3, 4]
    assert newest_runs([{"n": 1}]) == []
    both = [("a", 1), ("a", 2), ("b", 2), ("b", 2)]
    rows = [{"run": run, "threads": threads, "n": n} for n, (run, threads) in enumerate(both)]
    assert [row["n"] for row in newest_runs(rows)] == [0, 2, 3]


def test_geometric_mean():
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
