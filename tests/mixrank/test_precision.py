"""What ``--dtype`` stands for on a processor with and without products of bfloat16."""

from __future__ import annotations

import pytest
import torch

import mixrank
from mixrank.cli_input import chosen_dtype
from mixrank.precision import Precision, multiplies_bfloat16
from mixrank_kernels import backend

CPU = torch.device("cpu")
WITH = ("avx512bf16", "avx512vnni", "avx512", "avx2", "portable")


@pytest.fixture(params=[WITH, WITH[1:], ()], ids=["with", "without", "no-kernels"])
def isas(request, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    monkeypatch.setattr(backend, "isas", lambda: request.param)
    return request.param


def test_the_fast_dtype_is_bfloat16_where_the_processor_multiplies_it(isas) -> None:
    assert multiplies_bfloat16() == (isas == WITH)
    assert mixrank.fast_dtype() == (torch.bfloat16 if isas == WITH else None)


def test_what_is_asked_for_is_taken_and_a_slow_choice_is_told(isas, capsys: pytest.CaptureFixture) -> None:
    assert chosen_dtype(Precision.float32, CPU) is None
    assert chosen_dtype(Precision.auto, CPU) == mixrank.fast_dtype(CPU)
    assert capsys.readouterr().err == ""
    assert chosen_dtype(Precision.bfloat16, CPU) == torch.bfloat16
    told = capsys.readouterr().err
    assert told == "" if isas == WITH else told.startswith("note: this CPU has no instructions for bfloat16")


def test_this_processor_agrees_with_what_the_system_says_of_it() -> None:
    with open("/proc/cpuinfo") as file:
        flags = next(line for line in file if line.startswith("flags")).split()
    assert multiplies_bfloat16() == ("avx512_bf16" in flags)


@pytest.mark.parametrize("command", ["compress", "compensate", "sweep", "uvc"])
def test_each_command_names_what_dtype_may_be(command: str) -> None:
    from typer.testing import CliRunner

    from mixrank.cli import app

    result = CliRunner().invoke(app, [command, "--dtype", "int8"])
    assert result.exit_code == 2
    assert "'int8' is not one of 'auto', 'float32', 'bfloat16'" in " ".join(result.stderr.replace("│", " ").split())
