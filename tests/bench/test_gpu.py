"""The suite of the GPU, rehearsed on the CPU: the same code, but for the graphs and the events."""

from __future__ import annotations

import dataclasses
import re
import sys

import pytest
import torch

from mixrank_bench import environment, gpu, gpu_bars, gpu_cases, gpu_models, gpu_timing, ops, peers, samples
from mixrank_bench.measures import SERVED, measures
from mixrank_bench.ops import Case
from mixrank_kernels import backend, choice
from mixrank_kernels import ops as operators

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A whole run of small cases in bfloat16, as it is on file."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "SMALL_DTYPES", (torch.bfloat16,))
        assert gpu.run(gpu.Options("cpu", out, rounds=1, commit="abc"))
    return environment.read(out)


def test_a_run_has_ceilings_every_case_in_every_way_and_the_model(rows):
    kinds = [row["kind"] for row in rows]
    assert (kinds[0], kinds[1], kinds[-1]) == ("ceiling", "model", "settings")
    cases = [row for row in rows if row["kind"] == "op"]
    assert [row["timed"] for row in cases] == ["cold", "warm"] * len(samples.tiny_cases(torch.bfloat16))
    assert {row["op"] for row in cases} == set(gpu.SCHEMAS)
    assert {row["environment"]["commit"] for row in rows} == {"abc"}
    assert len({row["run"] for row in rows}) == 1
    for row in cases:
        assert row["gate"] is None
        assert {SERVED, "composite"} <= set(row["milliseconds"]["ours"])
        assert {"gram", "rounded"} <= set(row["milliseconds"]) or "dense" in row["milliseconds"]
        low, high = row["milliseconds"]["ours"][SERVED]["quartiles"]
        assert 0 < low <= high


def test_a_row_is_measured_against_the_ceilings_of_its_run(rows):
    found = measures(rows)
    assert found
    assert all(one.roof[0] > 0 for one in found if one.row["dtype"] == "bfloat16")


def test_the_model_is_served_dense_and_by_each_implementation(rows):
    (row,) = (row for row in rows if row["kind"] == "model")
    assert (row["timed"], row["gate"], row["refused"].get("ours", {}).keys()) == ("eager", None, {}.keys())
    assert {SERVED, "composite"} <= set(row["milliseconds"]["ours"])
    assert row["parameters"]["compressed"] < row["parameters"]["dense"]
    assert row["milliseconds"]["dense"]["dense"]["median"] > 0


def test_one_row_of_tokens_is_also_timed_eagerly_and_compiled():
    case = Case("lowrank_linear", "vit-b proj", torch.bfloat16, 1, 48, 40, 8, 0.4)
    with torch.inference_mode():
        found = list(gpu.measure(case, CPU, 1))
    assert [row["timed"] for row in found] == ["cold", "warm", "eager"]
    for row in found:
        assert not row["refused"]
        assert set(row["milliseconds"]["factors"]) == {"torch eager", "torch.compile"}


def test_an_implementation_that_leaves_a_case_to_another_one_has_no_number(monkeypatch):
    case = samples.tiny_cases(torch.float32)[2]
    assert gpu.serving(case, case.arguments(), CPU) == ["composite"]
    real = backend.explain
    unfit = dataclasses.replace(real("lowrank_linear", *(torch.ones(2, 2),) * 3), chosen="reference")
    monkeypatch.setattr(backend, "explain", lambda op, *arguments: real(op, *arguments) and unfit)
    assert gpu.serving(case, case.arguments(), CPU) == []


def test_what_fails_is_left_out_with_its_reason(monkeypatch, tmp_path, capsys):
    def fail(*_, **__):
        raise ValueError("no such tile\nand more")

    case = Case("lowrank_linear", "tiny", torch.float32, 5, 48, 40, 8, 0.4)
    monkeypatch.setitem(peers.DEVICE_ENGINES, "torch eager", lambda x, program: fail)
    with torch.inference_mode():
        row = next(gpu.measure(case, CPU, 1))
    assert row["refused"]["factors"] == {"torch eager": "ValueError: no such tile"}
    assert list(row["milliseconds"]) == ["ours"]
    monkeypatch.setattr(gpu.Options, "cases", lambda self: [case])
    monkeypatch.setattr(operators, "lowrank_linear", fail)
    assert not gpu.run(gpu.Options("cpu", tmp_path / "gpu.jsonl", rounds=1, parts=("cases",)))
    *kept, _settings = environment.read(tmp_path / "gpu.jsonl")
    assert [(row["gate"], row["milliseconds"]) for row in kept] == [("ValueError: no such tile", {})] * 2
    assert "failed: lowrank_linear float32 tiny" in capsys.readouterr().err


def test_a_case_that_cannot_be_made_does_not_end_the_run(monkeypatch, tmp_path):
    good, bad = samples.tiny_cases(torch.float32)[:2]
    monkeypatch.setattr(gpu.Options, "cases", lambda self: [bad, good])
    real = gpu.measure
    monkeypatch.setattr(gpu, "measure", lambda case, *rest: 1 / 0 if case == bad else real(case, *rest))
    assert not gpu.run(gpu.Options("cpu", tmp_path / "gpu.jsonl", rounds=1, parts=("cases",)))
    first, *others = environment.read(tmp_path / "gpu.jsonl")
    assert first["gate"] == "ZeroDivisionError: division by zero"
    assert [row["gate"] for row in others if row["kind"] == "op"] == [None, None]


def test_no_case_is_begun_after_the_time_is_up(tmp_path, capsys):
    assert gpu.run(gpu.Options("cpu", tmp_path / "gpu.jsonl", seconds=-1.0, parts=("cases",)))
    assert [row["kind"] for row in environment.read(tmp_path / "gpu.jsonl")] == ["settings"]
    left_out = re.search(r"(\d+) of (\d+) are left out for lack of time", capsys.readouterr().out)
    assert int(left_out[1]) == int(left_out[2]) > 20


def test_cases_are_distinct_and_begin_with_those_of_the_bars():
    cases = list(gpu_cases.cases())
    assert len(cases) == len(set(cases))
    names = [(case.op, case.dtype, case.name) for case in cases]
    assert len(names) == len(set(names))
    bars = list(gpu_cases.bar_cases())
    assert cases[: len(bars)] == bars
    assert {(case.m, case.k) for case in bars if case.op == "gram_accumulate_"} == {
        (12608, k) for k in (384, 768, 1024, 3072)
    }
    linear = {(c.m, c.k, c.n, c.keep) for c in cases if c.op == "lowrank_linear" and c.dtype == torch.bfloat16}
    for width in (384, 768, 1024):
        for k, n in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)):
            assert {(m, k, n, keep) for m in (1, 16, 197, 1576, 12608) for keep in (0.4, 0.6)} <= linear
    batched = {(c.batch, c.k) for c in cases if c.op == "gram_accumulate_" and c.batch}
    assert {(12, k) for k in (384, 768, 1024, 3072)} <= batched


@pytest.mark.parametrize("operands", ["half", "fp32"])
def test_every_line_of_the_table_of_choices_has_a_case_of_each_operator(operands):
    sizes = {
        op: [
            choice.size(
                op, {"gram": torch.empty(c.k, c.k, device="meta"), "cross": torch.empty(c.k, c.n, device="meta")}
            )
            if "gram" in op
            else c.m
            for c in gpu_cases.cases()
            if c.op == op and choice.operand_class(c.dtype) == operands
        ]
        for op in gpu.SCHEMAS
    }
    for line in choice.table():
        if line.operands == operands:
            assert any(line.low <= size <= (line.high or size) for size in sizes[line.op]), line


def test_copies_do_not_fit_into_the_cache_together():
    for case in gpu_cases.cases():
        assert gpu.FEWEST_COPIES <= gpu.copies(case) <= gpu.MOST_COPIES
        assert gpu.copies(case) * case.bytes <= max(gpu_timing.FLUSH_BYTES, gpu.FEWEST_COPIES * case.bytes)


def test_copied_indices_are_read_once_and_not_at_each_call():
    case = samples.tiny_cases(torch.float32)[2]
    with torch.inference_mode():
        made = gpu.copied(case.arguments())
        assert {name for name, tensor in made.items() if tensor.is_inference()} == set()
    assert "crow" in made


class Device:
    """CUDA's events on a clock made by hand: only calls and flushes take time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls, device = 0.0, 0, self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: object) -> None:
                self.time = device.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, other: Event) -> float:
                return other.time - self.time

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)

    def call(self) -> None:
        self.now += 0.25
        self.calls += 1

    def sum(self) -> None:
        self.now += 100.0

    device = CPU


def test_between_events_are_as_many_calls_as_fill_the_time(monkeypatch):
    device = Device(monkeypatch)
    assert gpu_timing._between_events(CPU, device.call, 0.003) == 0.25
    assert device.calls == 1 + 13, "one to learn how long it takes, and 3 ms of them with a tenth more"
    device.calls = 0
    assert gpu_timing._between_events(CPU, device.call, 0.0) == 0.25
    assert device.calls == 1
    monkeypatch.setattr(gpu_timing, "_LAUNCHES", 4)
    assert gpu_timing._between_events(CPU, device.call, 10.0) == 0.25
    assert device.calls == 1 + 1 + 4


def test_flushes_take_no_part_in_the_time_of_a_call(monkeypatch):
    device = Device(monkeypatch)
    assert gpu_timing._after_flushes(device, device.call, 0.003) == 0.25
    assert device.calls == 12
    assert gpu_timing._after_flushes(device, device.call, 0.0) == 0.25
    assert device.calls == 13


def test_a_recording_makes_every_call_in_order_within_what_it_is_given():
    log = []

    def calls(name: str):
        return lambda: log.append((name, backend.explain("lowrank_linear", *arguments).chosen))

    arguments = torch.ones(2, 8), torch.ones(3, 8), torch.ones(5, 3)
    play = gpu_timing.recorded([calls("a"), calls("b")], CPU, lambda: backend.use("reference"))
    log.clear()
    play()
    assert log == [("a", "reference"), ("b", "reference")]


def test_bars_are_judged_for_each_implementation_against_the_fastest_peer():
    lines = gpu_bars.judge(samples.gpu_rows(1.0) + samples.gpu_rows(4.0, "triton"))
    ours = [line for line in lines if line.implementation == SERVED]
    assert [line.measured for line in ours] == pytest.approx([2.0, 2.0, 2.0, 1.0, 2.0])
    assert [line.met for line in ours] == [True, True, True, False, True]
    assert not any(line.met for line in lines if line.implementation == "triton")
    assert str(ours[3]).endswith("at least 1.5x, as served: 1.00x, not met")


def test_a_bar_without_all_of_its_cases_is_not_met():
    rows = [row for row in samples.gpu_rows(1.0) if row["kind"] == "model" or row["m"] != 197]
    line = gpu_bars.judge(rows)[1]
    assert (line.measured, line.met, line.cases) == (None, False, 16)
    assert str(line).endswith("not measured: 16 of 20 cases have a number")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, but it was 0"),
        (["--only", "matmul"], "invalid choice: 'matmul'"),
    ],
)
def test_options_that_cannot_be_are_refused(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is about machines without a GPU")
def test_a_machine_without_a_gpu_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "--device must be cpu where PyTorch finds no CUDA device, but it was cuda" in capsys.readouterr().err


def test_settings_are_read_where_the_driver_answers(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.gpu_settings() == {}
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '580.1, 1980 MHz, 3201 MHz, 1980 MHz, 100.0 W, 700.0 W'\n")
    tool.chmod(0o755)
    assert environment.gpu_settings()["power.limit"] == "700.0 W"
    assert environment.checked_out() == "unknown", "there is no git on this PATH"


def test_a_compiled_model_takes_the_same_way():
    setting = dataclasses.replace(gpu_models.SMALL, modes=("compiled",))
    with torch.inference_mode():
        (row,) = gpu_models.rows(setting, CPU, ("composite",), 1)
    assert row["gate"] is None, row["refused"]
    assert (row["timed"], row["refused"]) == ("compiled", {})
    assert set(row["milliseconds"]["ours"]) == {SERVED, "composite"}


@pytest.mark.gpu
def test_graphs_of_small_cases_are_timed_on_the_device():
    with torch.inference_mode():
        for case in samples.tiny_cases(torch.bfloat16):
            for row in gpu.measure(case, torch.device("cuda"), 2):
                assert row["gate"] is None
                assert not row["refused"].get("ours")
                assert {SERVED, *gpu.implementations("cuda", case.op)} <= set(row["milliseconds"]["ours"])


def test_arguments_have_the_master_of_the_case():
    case = Case("gram_accumulate_", "", torch.bfloat16, 10, 4, master=torch.float32)
    assert case.arguments()["gram"].dtype == torch.float32
    assert (case.bytes, case.name) == (2 * 10 * 4 + 2 * 4 * 16, "M=10 K=4 float32 master".rjust(len(case.name)))
    assert ops.Case("gram_accumulate_", "", torch.bfloat16, 10, 4).name.endswith("K=4")
