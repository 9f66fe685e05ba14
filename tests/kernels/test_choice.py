"""The table that chooses an implementation for CUDA tensors; no CUDA device is needed to read it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixrank_kernels import _register, backend, choice
from mixrank_kernels._schema import SCHEMAS

OPERANDS = ("half", "fp32", "fp64")


def linear(dtype: torch.dtype, rows: int = 3) -> tuple[torch.Tensor, ...]:
    return torch.ones(rows, 32, dtype=dtype), torch.ones(4, 32, dtype=dtype), torch.ones(32, 4, dtype=dtype)


@given(st.sampled_from(tuple(SCHEMAS)), st.sampled_from(OPERANDS), st.integers(0, 10**9))
def test_every_size_has_one_line(op, operands, size):
    lines = [line for line in choice.table() if (line.op, line.operands) == (op, operands)]
    assert sum(line.low <= size and (line.high is None or size <= line.high) for line in lines) == 1


def test_lines_name_what_there_is():
    for line in choice.table():
        assert line.op in SCHEMAS
        assert line.implementation in ("triton", "composite")
        # What was not measured is served by the libraries.
        assert line.measured or line.implementation == "composite"


@pytest.mark.parametrize("op", ["lowrank_linear", "lowrank_residual_linear"])
def test_float16_keeps_the_range_of_its_intermediate(op):
    assert choice.choose(op, *linear(torch.float16)).implementation == "triton"
    assert "range" in choice.choose(op, *linear(torch.float16)).reason
    assert "range" not in choice.choose(op, *linear(torch.bfloat16)).reason


def test_block_sparse_residuals_have_no_library():
    crow, col, values = torch.tensor([0, 1, 1]), torch.tensor([1]), torch.ones(1, 16, 16)
    found = choice.choose("lowrank_residual_linear", *linear(torch.float32), None, None, None, crow, col, values)
    assert found.implementation == "triton"


def test_the_size_decides_among_measured_lines(monkeypatch):
    lines = [
        choice.Line("lowrank_linear", "fp32", 0, 16, "triton", "run 1"),
        choice.Line("lowrank_linear", "fp32", 17, None, "composite", None),
    ]
    monkeypatch.setattr(choice, "table", lambda: tuple(lines))
    few, many = (choice.choose("lowrank_linear", *linear(torch.float32, rows)) for rows in (16, 17))
    assert (few.implementation, few.reason) == ("triton", "the fastest in run 1")
    assert many.implementation == "composite"
    assert "not measured" in many.reason


def test_gram_matrices_are_chosen_by_their_larger_side():
    gram, x = torch.zeros(32, 32), torch.ones(7, 32)
    assert choice.size("gram_accumulate_", {"gram": gram, "x": x}) == 32
    assert choice.size("cross_gram_accumulate_", {"cross": torch.zeros(32, 40), "x": x}) == 40
    assert choice.choose("gram_accumulate_", gram, x.half()).implementation == "composite"


def test_without_triton_the_libraries_serve(monkeypatch):
    monkeypatch.setattr(_register, "HAS_TRITON", False)
    found = _register.chosen("lowrank_linear", *linear(torch.float16))
    assert found.implementation == "composite"
    assert "no Triton kernel" in found.reason


def test_explanations_give_the_reason():
    arguments = linear(torch.float32)
    assert "first on cpu tensors" in backend.explain("lowrank_linear", *arguments).reason
    with backend.use("composite"):
        explanation = backend.explain("lowrank_linear", *arguments)
    assert (explanation.chosen, explanation.reason) == ("composite", "forced by backend.use")
    assert str(explanation).startswith("lowrank_linear: served by composite, forced by backend.use")
