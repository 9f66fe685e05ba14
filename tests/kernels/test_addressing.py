"""Elements beyond the range of 32 bits: operands whose rows lie more than 2^31 elements apart.

The memory between the rows is reserved and never touched, so it takes no space.
"""

from __future__ import annotations

import mmap

import pytest
import torch

from mixrank_kernels import backend, ops, packing, testing

NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux, which the module mmap does not name
FAR = 2**31 + 7  # elements between two rows
IMPLEMENTATIONS = [name for name in backend.available("cpu", op="lowrank_linear") if name.startswith("cpu-")]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with backend.use(request.param):
        yield request.param


def far_apart(matrix: torch.Tensor) -> torch.Tensor:
    """The same values as ``matrix`` [rows, cols], its rows FAR elements apart."""
    rows, cols = matrix.shape
    reserved = mmap.mmap(
        -1,
        ((rows - 1) * FAR + cols) * matrix.element_size(),
        flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE,
    )
    view = torch.frombuffer(reserved, dtype=matrix.dtype).as_strided((rows, cols), (FAR, 1))
    return view.copy_(matrix)


def sample(op: str, dtype: torch.dtype) -> dict:
    return next(s for s in testing.sample_inputs(op) if s.name == "tiny").arguments(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("argument", ["x", "down", "up"])
def test_rows_of_a_linear_layer_may_lie_far_apart(implementation, argument, dtype):
    arguments = sample("lowrank_linear", dtype)
    expected = ops.lowrank_linear(**arguments)
    arguments[argument] = far_apart(arguments[argument])
    assert torch.equal(ops.lowrank_linear(**arguments), expected)
    packed = packing.packed(arguments["down"], arguments["up"])
    torch.testing.assert_close(ops.lowrank_linear(**arguments, packed=packed), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_of_a_gram_matrix_may_lie_far_apart(implementation, dtype):
    arguments = sample("gram_accumulate_", dtype)
    near, far = (
        next(testing.run(ops.gram_accumulate_, arguments | {"x": x}))
        for x in (arguments["x"], far_apart(arguments["x"]))
    )
    assert torch.equal(near, far)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_of_gram_matrices_may_lie_far_apart(implementation, dtype):
    x = far_apart(torch.randn(2, 15).to(dtype)).as_strided((2, 3, 5), (FAR, 5, 1))
    near, far = (torch.zeros(2, 5, 5, dtype=torch.float64) for _ in range(2))
    ops.gram_accumulate_(near, x.contiguous())
    ops.gram_accumulate_(far, x)
    assert torch.equal(near, far)
