"""``mixrank bench``: what it times, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mixrank.cli import app
from mixrank.errors import InputError
from mixrank_bench import ceilings, environment, ops, peers, run
from mixrank_bench.ceilings import Ceilings
from mixrank_bench.run import Options
from mixrank_bench.samples import ceiling_row, tiny_cases


@pytest.fixture
def small(monkeypatch):
    """A suite of two small cases, and ceilings that need not be measured."""
    cases = [case for case in tiny_cases(torch.float32) if case.op in ("lowrank_linear", "cross_gram_accumulate_")]
    monkeypatch.setattr(ops, "quick_cases", lambda: iter(cases))
    measured = Ceilings.from_json(ceiling_row())
    monkeypatch.setattr(ceilings, "measure", lambda threads: measured)
    monkeypatch.setattr(run, "busy", lambda: None)


def test_rows_are_added_and_the_result_is_whole(small, tmp_path):
    out, whole, threads = tmp_path / "ops.jsonl", tmp_path / "result.json", torch.get_num_threads()
    options = Options(rounds=1, save=out, json=whole)
    assert run.run(options)
    assert run.run(options)
    rows = environment.read(out)
    assert [row["kind"] for row in rows] == ["ceiling", "op", "op"] * 2
    assert len({row["run"] for row in rows}) <= 2
    assert rows[1]["op"] == "lowrank_linear"
    assert rows[1]["milliseconds"]["ours"][peers.SERVED]["median"] > 0
    assert {"factors", "dense"} <= set(rows[1]["milliseconds"])
    assert rows[1]["absent"]["factors"]["torch.compile"].startswith("compiling takes seconds")
    result = json.loads(whole.read_text())
    assert result["rows"][1]["case"] == rows[1]["case"]
    assert [line["met"] in (True, False) for line in result["bars"]]
    assert result["environment"]["threads"] == [1]
    assert torch.get_num_threads() == threads


def test_a_red_gate_means_no_number_and_a_red_run(small, monkeypatch, tmp_path, capsys):
    def refuse(case, field):
        raise AssertionError("ours, as served: largest error 2, allowed 1")

    monkeypatch.setattr(peers, "gate", refuse)
    assert not run.run(Options(rounds=1, save=tmp_path / "ops.jsonl"))
    row = environment.read(tmp_path / "ops.jsonl")[1]
    assert row["milliseconds"] == {}
    assert row["gate"] == "ours, as served: largest error 2, allowed 1"
    assert "no number for lowrank_linear float32 tiny" in capsys.readouterr().err


def test_a_busy_machine_is_refused_unless_told_otherwise(small, monkeypatch):
    monkeypatch.setattr(run, "busy", lambda: "the load average of the last minute is 9.00 on 2 processors")
    with pytest.raises(InputError, match=r"load average .* pass --busy"):
        run.run(Options(rounds=1))
    assert run.run(Options(rounds=1, only=("cross_gram_accumulate_",), busy=True))


def test_the_command_names_its_cases_and_refuses_what_it_does_not_know():
    listed = CliRunner().invoke(app, ["bench", "--list", "--only", "gram_accumulate_"])
    assert listed.exit_code == 0
    assert "gram_accumulate_  float32  width 768 M=1576 K=768" in listed.output
    assert "lowrank" not in listed.output
    for arguments in (["--only", "matmul"], ["--rounds", "0"], ["--threads", "0"]):
        assert CliRunner().invoke(app, ["bench", "--list", *arguments]).exit_code == 2


class Stat:
    """The kernel's counters as they read one after another."""

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)

    def is_file(self) -> bool:
        return True

    def read_text(self) -> str:
        return self.lines.pop(0)


@pytest.mark.parametrize(
    ("after", "load", "reason"),
    [
        ("cpu 105 0 0 195 0 0 0 0 0 0", 0.1, None),
        ("cpu 150 0 0 150 0 0 0 0 0 0", 0.1, "50% of the processors are in use by others"),
        ("cpu 100 0 0 150 0 0 0 50 0 0", 0.1, "50% of the processors are in use by others"),
        ("cpu 105 0 0 195 0 0 0 0 0 0", 1.5, "the load average of the last minute is 1.50 on 2 processors"),
    ],
    ids=["idle", "work", "stolen", "load"],
)
def test_busy_counts_work_and_what_the_host_takes_away(after, load, reason):
    stat = Stat("cpu 100 0 0 100 0 0 0 0 0 0", after)
    assert environment.busy(0.0, stat=stat, load=load, cores=2) == reason


def test_an_installed_copy_is_no_checkout(monkeypatch, tmp_path):
    assert environment.in_checkout()
    monkeypatch.setattr(environment, "ROOT", Path(tmp_path))
    assert not environment.in_checkout()
    assert environment.checked_out() == "unknown"


def test_a_row_names_the_commit_of_the_code_that_ran(monkeypatch):
    before = environment.environment()["commit"]
    monkeypatch.setattr(environment, "_git", lambda *arguments: "another")
    assert environment.checked_out() == "another+", "the checkout has moved on"
    assert environment.environment()["commit"] == before


def test_ceilings_survive_json_and_choose_the_bandwidth_by_size():
    limits = Ceilings(2, {"float32": 1e11}, {1 << 19: 1e11, 1 << 28: 1e10}, 2e-6)
    assert Ceilings.from_json(json.loads(json.dumps(limits.to_json()))) == limits
    assert limits.memory_seconds(1 << 19) == pytest.approx((1 << 19) / 1e11)
    assert limits.memory_seconds(1 << 20) == pytest.approx((1 << 20) / 1e10)
    assert limits.memory_seconds(1 << 30) == pytest.approx((1 << 30) / 1e10)
    assert limits.arithmetic_seconds(1e11, "float32") == pytest.approx(1.0)
    assert limits.arithmetic_seconds(1e11, "bfloat16") is None


class Extension:
    """A C++ extension of a processor that does 100 operations per second in each thread."""

    def __init__(self, *isas: str) -> None:
        self.isas = isas

    def supported_isas(self) -> tuple[str, ...]:
        return self.isas

    def peak_flops(self, kind: str, milliseconds: float) -> float:
        return {"float32": 100.0, "bfloat16": 200.0, "int8": 400.0}[kind]


@pytest.mark.parametrize(
    ("extension", "flops"),
    [
        (Extension("avx512bf16", "avx2"), {"float32": 200.0, "bfloat16": 400.0, "int8": 800.0}),
        (Extension("avx2"), {"float32": 200.0, "int8": 800.0}),
        (None, {}),
    ],
    ids=["bf16", "no-bf16", "no-extension"],
)
def test_ceilings_add_up_the_threads_and_leave_out_what_is_not_there(extension, flops, monkeypatch):
    monkeypatch.setattr(ceilings, "load_extension", lambda: extension)
    monkeypatch.setattr(ceilings, "FOOTPRINTS", (1 << 12, 1 << 14))
    threads = torch.get_num_threads()
    found = ceilings.measure(2, milliseconds=0.1, repeats=1)
    assert found.flops == flops
    assert list(found.bandwidth) == [1 << 12, 1 << 14]
    assert all(rate > 0 for rate in found.bandwidth.values())
    assert 0 < found.call < 1e-3
    assert torch.get_num_threads() == threads
