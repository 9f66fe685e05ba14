"""Every operator once, as it is called under the sanitizers of a GPU."""

from __future__ import annotations

import sys

import pytest

from mixrank_bench import gpu_smoke
from mixrank_kernels import backend, ops
from mixrank_kernels._schema import SCHEMAS


def test_everything_is_called_and_right_on_the_cpu():
    found = dict(gpu_smoke.calls("cpu"))
    wrong = {what: reason for what, reason in found.items() if reason and "Triton's interpreter" not in reason}
    assert not wrong
    for op in SCHEMAS:
        for implementation in set(backend.available("cpu", op)) - {"reference"}:
            for dtype in ("bfloat16", "float16", "float32", "float64"):
                assert any(what.split()[::2] == [op, dtype] and what.endswith(f" {implementation}") for what in found)


def test_a_wrong_result_is_named_and_is_a_failure(monkeypatch, capsys):
    real = ops.lowrank_linear
    monkeypatch.setattr(ops, "lowrank_linear", lambda **arguments: real(**arguments) * 1.1)
    monkeypatch.setattr(gpu_smoke, "SAMPLES", gpu_smoke.SAMPLES | {"lowrank_linear": ("above-tile",)})
    monkeypatch.setattr(gpu_smoke, "SCHEMAS", ("lowrank_linear",))
    monkeypatch.setattr(sys, "argv", ["gpu_smoke", "--device", "cpu"])
    with pytest.raises(SystemExit, match="1"):
        gpu_smoke.main()
    assert "lowrank_linear above-tile float32 cpu: AssertionError: largest error" in capsys.readouterr().out
