"""The table that chooses an implementation for CUDA tensors; no CUDA device is needed to read it."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mixrank_kernels import _register, backend, choice, cuda
from mixrank_kernels._load import load_cuda_extension
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
        assert line.implementation in ("cuda", "triton", "composite")
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


def fake_cuda(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.fixture
def fake_device(monkeypatch):
    """CUDA tensors without memory, and the CUDA kernels as if they were built."""
    monkeypatch.setattr(cuda, "obstacle", lambda: None)
    with FakeTensorMode():
        yield


def test_cuda_kernels_refuse_what_they_have_no_kernel_for(fake_device):
    assert cuda.refusal("lowrank_linear", fake_cuda(3, 32), fake_cuda(4, 32), fake_cuda(8, 4)) is None
    for dtype, reason in ((torch.float64, "no terms for float64"), (torch.float16, "range")):
        operands = (fake_cuda(3, 32, dtype=dtype), fake_cuda(4, 32, dtype=dtype), fake_cuda(8, 4, dtype=dtype))
        assert reason in cuda.refusal("lowrank_linear", *operands)
    gram = fake_cuda(32, 32, dtype=torch.float32)
    assert cuda.refusal("gram_accumulate_", gram, fake_cuda(3, 32, dtype=torch.float16)) is None
    assert "float64" in cuda.refusal("gram_accumulate_", gram, fake_cuda(3, 32, dtype=torch.float64))


def test_without_the_cuda_extension_everything_else_serves(monkeypatch):
    monkeypatch.setattr(cuda, "obstacle", cuda.obstacle.__wrapped__)
    monkeypatch.setattr(cuda, "load_cuda_extension", lambda: None)
    assert "mixrank_kernels._cuda is not built" in cuda.refusal("lowrank_linear", *linear(torch.bfloat16))
    assert backend.available("cuda", "lowrank_linear") == ("composite", "triton", "reference")
    with pytest.raises(RuntimeError, match="implementation cuda cannot run here"), backend.use("cuda"):
        pass


def test_a_torch_without_cuda_does_not_load_the_extension(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert load_cuda_extension() is None


def test_a_form_holds_for_a_block(monkeypatch):
    calls = []

    def call(*arguments):
        calls.append(arguments[-2:])
        return torch.ones(3, 32)

    monkeypatch.setattr(torch.ops.mixrank_kernels, "_cuda_linear", call, raising=False)
    with cuda.form(1), cuda.form(2, cuda.Tile.LARGE):
        cuda.lowrank_linear(*linear(torch.float32))
    cuda.lowrank_linear(*linear(torch.float32))
    assert calls == [(2, 4), (0, 0)]
    with pytest.raises(ValueError, match="launches must be 0, 1 or 2, but it was 3"), cuda.form(3):
        pass


def test_old_devices_are_refused(fake_device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(cuda, "_capability", functools.cache(cuda._capability.__wrapped__))
    assert "compute capability 8.0" in cuda.refusal(
        "lowrank_linear", fake_cuda(3, 32), fake_cuda(4, 32), fake_cuda(8, 4)
    )


def test_what_cuda_refuses_is_served_by_the_libraries(fake_device, monkeypatch):
    line = choice.Line("lowrank_linear", "fp64", 0, None, "cuda", "run 1")
    monkeypatch.setattr(choice, "table", lambda: (line,))
    operands = [fake_cuda(*shape, dtype=torch.float64) for shape in ((3, 32), (4, 32), (8, 4))]
    found = _register.chosen("lowrank_linear", *operands)
    assert found.implementation == "composite"
    assert "not cuda: tensor cores have no terms for float64" in found.reason
    explanation = backend.explain("lowrank_linear", *operands)
    assert explanation.refused["cuda"] == "tensor cores have no terms for float64"


@pytest.mark.parametrize(("precision", "terms"), [("ieee", 3), ("tf32", 2), ("none", 3)])
def test_fp32_products_are_as_precise_as_pytorch_was_told(precision, terms):
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = precision
        assert cuda._terms() == terms
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_explanations_give_the_reason():
    arguments = linear(torch.float32)
    assert "first on cpu tensors" in backend.explain("lowrank_linear", *arguments).reason
    with backend.use("composite"):
        explanation = backend.explain("lowrank_linear", *arguments)
    assert (explanation.chosen, explanation.reason) == ("composite", "forced by backend.use")
    assert str(explanation).startswith("lowrank_linear: served by composite, forced by backend.use")
