"""Regenerating what the GPU kernels are committed with: by a timer made by hand, and from results made by hand."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from mixrank.errors import InputError
from mixrank_bench import gpu_cases, samples, tune, tune_choices, tune_entries
from mixrank_bench.measures import SERVED
from mixrank_bench.ops import Case
from mixrank_bench.tune_entries import Entry
from mixrank_kernels import choice
from mixrank_kernels.triton import config as configs
from mixrank_kernels.triton import is_interpreted

CPU = torch.device("cpu")
ROWS16 = Entry("LOWRANK", ("fp32", "fused-rows16"))
LINEAR = Case("lowrank_linear", "tiny", torch.float32, 5, 48, 40, 8, 0.4)
interpreted = pytest.mark.skipif(not is_interpreted(), reason="the kernels are called on CPU tensors here")
SOURCE = Path(configs.__file__)


def fastest_with(**wanted: int):
    """A timer for which a configuration is the faster the more of the wanted numbers it has."""

    def timer(calls: dict) -> dict:
        for call in calls.values():
            call()
        return {
            value: 1.0 / (1 + sum(getattr(value, field) == number for field, number in wanted.items()))
            for value in calls
        }

    return timer


@interpreted
def test_an_entry_climbs_step_by_step_to_the_fastest_and_is_left_as_it_was():
    before, log = ROWS16.value, []
    best, gained = tune.tuned(ROWS16, [LINEAR], CPU, fastest_with(BN=32, num_stages=3), log=log.append)
    assert best == dataclasses.replace(before, BN=32, num_stages=3)
    assert gained == pytest.approx(3.0)
    assert ROWS16.value is before
    assert log[-1].startswith("LOWRANK/fp32/fused-rows16: 3.000x with LowRankConfig(BM=16, BN=32")


@interpreted
@pytest.mark.parametrize(
    "options", [{"passes": 1}, {"time_left": iter([True, False]).__next__}], ids=["passes", "time"]
)
def test_it_climbs_no_further_than_it_is_told(options):
    best, gained = tune.tuned(ROWS16, [LINEAR], CPU, fastest_with(BN=32, num_stages=3), log=len, **options)
    assert gained == pytest.approx(2.0)
    assert (best.BN, best.num_stages) in ((32, 2), (64, 3))


@interpreted
def test_a_difference_within_the_noise_changes_nothing():
    log = []
    best, gained = tune.tuned(
        ROWS16, [LINEAR], CPU, lambda calls: {v: 1.0 if v == ROWS16.value else 0.99 for v in calls}, log=log.append
    )
    assert (best, gained) == (ROWS16.value, 1.0)
    assert log[-1] == "LOWRANK/fp32/fused-rows16: stays as it is, 1 cases"


@interpreted
def test_what_is_wrong_or_does_not_launch_is_out(monkeypatch):
    real = Entry.served_with

    @contextlib.contextmanager
    def fragile(self, value):
        if value.BN == 32:
            raise ValueError("out of shared memory\nby a lot")
        with real(self, value):
            if value.BN != 128:
                yield
                return
            plain, tune.ops.lowrank_linear = tune.ops.lowrank_linear, lambda **given: plain(**given) * 1.01
            try:
                yield
            finally:
                tune.ops.lowrank_linear = plain

    monkeypatch.setattr(Entry, "served_with", fragile)
    values = [dataclasses.replace(ROWS16.value, BN=columns) for columns in (64, 32, 128)]
    ratios, out = tune.compared(ROWS16, values, [LINEAR], CPU, fastest_with(BN=32))
    assert list(ratios) == values[:1]
    assert out[values[1]] == "float32 tiny M=5 K=48 N=40 R=8: ValueError: out of shared memory"
    assert "AssertionError: largest error" in out[values[2]]
    with pytest.raises(RuntimeError, match=r"the present value .*BN=32.* does not serve float32 tiny"):
        tune.compared(ROWS16, values[1:], [LINEAR], CPU, fastest_with(BN=32))


@interpreted
def test_other_processes_call_every_candidate_beforehand():
    assert tune._call_once(ROWS16, ROWS16.value, [LINEAR, LINEAR], "cpu") == 2
    assert tune._call_once(ROWS16, dataclasses.replace(ROWS16.value, BK=17), [LINEAR], "cpu") == 0
    wrong = dataclasses.replace(ROWS16.value, BK=17)
    assert tune.compile_beforehand(ROWS16, [ROWS16.value, wrong], [LINEAR], device="cpu", workers=1) == 1


def test_entries_are_those_of_the_module_and_every_class_of_a_shape_has_one():
    found = [str(entry) for entry in tune_entries.entries()]
    assert len(found) == len(set(found)) == len(configs.LOWRANK) + len(configs.GRAM) + len(tune_entries.CONSTANTS)
    for case in gpu_cases.cases():
        of_case = [entry for entry in tune_entries.entries() if entry.key and entry.serves(case)]
        assert len(of_case) in ((1,) if "gram" in case.op or case.m <= 16 else (1, 2)), case
        assert {entry.key[0] for entry in of_case} == {choice.operand_class(case.dtype)}


def test_the_entry_of_a_case_is_the_one_that_its_launch_reads():
    many = Case("lowrank_linear", "", torch.bfloat16, 12608, 768, 3072, 248, 0.4)
    assert [str(e) for e in tune_entries.entries() if e.serves(many)] == [
        "LOWRANK/half/down",
        "LOWRANK/half/up",
        "FUSED_RECOMPUTED_MACS",
    ]
    gram = Case("gram_accumulate_", "", torch.bfloat16, 12608, 768)
    assert [str(e) for e in tune_entries.entries() if e.serves(gram)] == [
        "GRAM/half/wide",
        "GRAM_PROGRAMS",
        "GRAM_ROWS_MIN",
    ]


def test_neighbours_differ_in_one_step_and_stay_within_the_limits():
    for entry in tune_entries.entries():
        for value in entry.neighbours(entry.value):
            if entry.key is None:
                assert value in (entry.value // 2, entry.value * 2)
                continue
            fields = [
                f.name for f in dataclasses.fields(value) if getattr(value, f.name) != getattr(entry.value, f.name)
            ]
            assert len(fields) == 1
            low, high = tune_entries.LIMITS[fields[0]]
            assert low <= getattr(value, fields[0]) <= high
    assert all(one.BS <= one.BK for one in Entry("GRAM").neighbours(configs.GramConfig(32, 64, 32, 4, 3)))


def test_cases_of_an_entry_are_spread_evenly():
    cases = list(gpu_cases.cases())
    assert tune.spread(cases[:12]) == cases[:12]
    assert tune.spread(cases[:24]) == cases[:24:2]
    assert len(tune.spread(cases)) <= tune.MOST_CASES
    assert tune.spread([]) == []


def test_winners_are_written_into_their_lines_and_nowhere_else():
    source = SOURCE.read_text()
    assert tune_entries.rewritten(source, {entry: entry.value for entry in tune_entries.entries()}) == source
    config = dataclasses.replace(ROWS16.value, BN=128)
    changed = tune_entries.rewritten(source, {ROWS16: config, Entry("GRAM_PROGRAMS"): 528})
    lines = [new for old, new in zip(source.splitlines(), changed.splitlines(), strict=True) if old != new]
    assert lines == [f'    ("fp32", "fused-rows16"): {config},', "GRAM_PROGRAMS = 528"]
    with pytest.raises(ValueError, match="GRAM/half/other must stand in one line of its own, but 0 lines"):
        tune_entries.rewritten(source, {Entry("GRAM", ("half", "other")): configs.GRAM["half", "wide"]})


@interpreted
def test_the_command_writes_only_when_told(monkeypatch, tmp_path, capsys):
    copy = tmp_path / "config.py"
    shutil.copy(SOURCE, copy)
    monkeypatch.setattr(configs, "__file__", str(copy))
    monkeypatch.setattr(tune, "device_timer", lambda device: fastest_with(BN=32))
    monkeypatch.setattr(samples, "tiny_cases", lambda dtype: [LINEAR])
    monkeypatch.setitem(configs.LOWRANK, ROWS16.key, ROWS16.value)  # is put back after the test
    command = ["triton", "--device", "cpu", "--workers", "0", "--passes", "1"]
    tune.main([*command, "--only", str(ROWS16)])
    assert copy.read_text() == SOURCE.read_text()
    assert "1 entries would change with --write" in capsys.readouterr().out
    configs.LOWRANK[ROWS16.key] = before = dataclasses.replace(ROWS16.value, BN=64)
    tune.main([*command, "--only", str(ROWS16), "--only", "GRAM/fp64/any", "--write"])
    winner = dataclasses.replace(before, BN=32)
    assert copy.read_text() == tune_entries.rewritten(SOURCE.read_text(), {ROWS16: winner})
    assert "GRAM/fp64/any: left out, no case of the suite is served with it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["triton", "--device", "cpu", "--only", "LOWRANK"],
            r"--only must be one of LOWRANK/half/fused-rows16, .*'LOWRANK'",
        ),
        (["triton", "--device", "cpu", "--passes", "0"], r"--passes must be at least 1, but it was 0"),
        (["choices", "nothing.jsonl"], r"the results must have rows of operators on cuda with a cold cache"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        tune.main(arguments)
    assert re.search(said, capsys.readouterr().err)


def results(commit: str = "abc", **fields) -> list[dict]:
    """A run of every case that choices rest on: Triton is twice as fast with few rows or a narrow Gram matrix."""
    found = []
    for case in (*gpu_cases.bar_cases(), *gpu_cases.choice_cases()):
        small = max(case.k, case.n) <= 256 if "gram" in case.op else case.m <= 16
        times = {"ours": {SERVED: 1.0, "composite": 1.0, "triton": 0.5 if small else 2.0}}
        row = samples.op_row(case, times, device="cuda", timed="cold", refused={}, threads=None, **fields)
        found.append(row | {"environment": {"commit": commit, "gpu": "a card"}})
    return found


def test_each_line_gets_what_was_fastest_and_keeps_its_range():
    text = tune_choices.PATH.read_text()
    changed, told = tune_choices.decided(text, results())
    before, after = json.loads(text), json.loads(changed)
    for old, new in zip(before, after, strict=True):
        assert [new[name] for name in ("op", "operands", "low", "high")] == [
            old[name] for name in ("op", "operands", "low", "high")
        ]
        if new["operands"] == "fp64":
            assert new == old
            continue
        assert new["implementation"] == ("triton" if new["low"] == 0 else "composite")
        assert new["measured"] == "a card, run r1"
    assert len(told) == sum(line["operands"] != "fp64" for line in after)
    assert "lowrank_linear half 0 to 16: triton (composite 1.00x, triton 2.00x)" in told
    assert tune_choices.decided(changed, results())[0] == changed


def test_the_form_of_the_table_stays_as_it_is():
    text = tune_choices.PATH.read_text()
    lines = [choice.Line(**line) for line in json.loads(tune_choices.decided(text, results())[0])]
    assert [(line.op, line.operands, line.low, line.high) for line in lines] == [
        (line.op, line.operands, line.low, line.high) for line in choice.table()
    ]
    assert len(tune_choices.decided(text, results())[0].splitlines()) == len(text.splitlines())


def test_an_implementation_that_failed_in_a_case_of_a_line_is_not_chosen():
    rows = results()
    broken = next(row for row in rows if row["op"] == "lowrank_linear" and row["m"] == 1 and row["dtype"] == "bfloat16")
    del broken["milliseconds"]["ours"]["triton"]
    line = json.loads(tune_choices.decided(tune_choices.PATH.read_text(), rows)[0])[0]
    assert (line["op"], line["operands"], line["low"], line["implementation"]) == (
        "lowrank_linear",
        "half",
        0,
        "composite",
    )


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "the results must have rows of operators on cuda with a cold cache, but there are none"),
        (results("abc+"), r"the results must be of a commit without changes, but they are of 'abc\+'"),
        (results("unknown"), "the results must be of a commit without changes, but they are of 'unknown'"),
        (results()[1:], "a number for each of .* cases, but 1 have none: lowrank_linear bfloat16 vit-b qkv M=12608"),
        (results(gate="largest error 2"), "a number for each of"),
    ],
    ids=["empty", "changed", "unknown", "incomplete", "red"],
)
def test_results_that_cannot_decide_are_refused(rows, said):
    with pytest.raises(InputError, match=said):
        tune_choices.decided(tune_choices.PATH.read_text(), rows)


def test_the_command_changes_the_table_only_when_told(monkeypatch, tmp_path, capsys):
    table, run = tmp_path / "choices.json", tmp_path / "gpu.jsonl"
    shutil.copy(tune_choices.PATH, table)
    monkeypatch.setattr(tune_choices, "PATH", table)
    run.write_text("".join(json.dumps(row) + "\n" for row in results()))
    before = table.read_text()
    tune.main(["choices", str(run)])
    assert table.read_text() == before
    assert "nothing is written without --write" in capsys.readouterr().out
    tune.main(["choices", str(run), "--write"])
    assert json.loads(table.read_text())[0]["implementation"] == "triton"
