"""What the launchers ask for is what is compiled ahead of time: each combination of operands, blocks and options."""

from __future__ import annotations

import contextlib
import inspect
from importlib import import_module
from itertools import product

import pytest
import torch
from torch import Tensor

from mixrank_kernels import triton
from mixrank_kernels.triton.variants import variants

DTYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
}
FLOATS = tuple(dtype for dtype in DTYPES if dtype.is_floating_point)

# Few rows, rows for one launch, rows for two; layers with narrow and with wide Gram matrices.
ROWS = (1, 64, 12608)
LAYERS = ((192, 256), (768, 3072))


def signature(kernel: str, pointers: dict[str, str], constants: dict[str, object], warps: int, stages: int) -> tuple:
    return kernel, frozenset(pointers.items()), frozenset(constants.items()), warps, stages


@pytest.fixture
def launched(monkeypatch) -> set[tuple]:
    """The signatures of the launches, which are noted down and do not happen."""
    found = set()

    class Noted:
        def __init__(self, kernel, _x):
            self.kernel = kernel

        def __getitem__(self, grid):
            assert len(grid) == 1
            assert grid[0] > 0
            return self

        def __call__(self, *given, num_warps, num_stages=3, **constants):
            names = list(inspect.signature(self.kernel.fn).parameters)
            pointers = {
                name: DTYPES[value.dtype]
                for name, value in zip(names, given, strict=False)
                if name.endswith("_ptr") and value is not None
            }
            assert set(names) == {*names[: len(given)], *constants}
            found.add(signature(self.kernel.__name__, pointers, constants, num_warps, num_stages))

    # Not by attribute of the package, where functions have the names of their modules.
    modules = [import_module(f"mixrank_kernels.triton.{name}") for name in ("gram", "lowrank_linear", "factor_grad")]
    for module in modules:
        monkeypatch.setattr(module, "launchable", Noted, raising=module is not modules[-1])
        monkeypatch.setattr(module, "launch_guard", lambda _op, _x: contextlib.nullcontext())
    return found


def tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_linear(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    x, down, up = (tensor(*shape, dtype=dtype) for shape in ((m, k), (200, k), (n, 200)))
    for bias in (None, tensor(n, dtype=dtype)):
        triton.lowrank_linear(x, down, up, bias)
    branch = (tensor(40, k, dtype=dtype), tensor(n, 40, dtype=dtype))
    for size, (residual_down, residual_up) in product((None, 16, 32), ((None, None), branch)):
        blocks = (None, None, None)
        if size is not None:
            indices = (tensor(length, dtype=torch.int64) for length in (n // size + 1, 9))
            blocks = (*indices, tensor(9, size, size, dtype=dtype))
        if size is not None or residual_down is not None:
            triton.lowrank_residual_linear(x, down, up, tensor(n, dtype=dtype), residual_down, residual_up, *blocks)
    triton.factor_grad(x, down, tensor(m, n, dtype=dtype))


def launch_gram(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    x, z = tensor(m, k, dtype=dtype), tensor(m, n, dtype=dtype)
    weight = tensor(m, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for master in (torch.float32, torch.float64):
        for row_weight, column_sum in product((None, weight), (None, tensor(k, dtype=master))):
            triton.gram_accumulate_(tensor(k, k, dtype=master), x, row_weight, column_sum)
        triton.cross_gram_accumulate_(tensor(k, n, dtype=master), x, z)


def test_every_launch_is_compiled_ahead_of_time_and_nothing_else(launched):
    for m, (k, n), dtype in product(ROWS, LAYERS, FLOATS):
        launch_linear(m, k, n, dtype)
        launch_gram(m, k, n, dtype)
    compiled = {signature(v.kernel, v.pointers, v.constants, v.num_warps, v.num_stages) for v in variants()}
    assert launched - compiled == set()
    assert compiled - launched == set()
