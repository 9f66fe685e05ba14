"""Parametrises the tests of the operators over what this machine can run.

``@pytest.mark.operators(*names, real_sizes=False, without=())`` gives a test that takes ``implementation``, ``op`` or
``sample`` every value that goes together: the named operators (all of them without names), each on the implementations
that really have it (but for those in ``without``), each with its sample inputs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from mixrank_kernels import backend, packing, testing
from mixrank_kernels._schema import SCHEMAS


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "operators(*names, real_sizes, without): see tests/kernels/conftest.py")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("operators")
    if marker is None:
        return
    names = [name for name in ("implementation", "op", "sample") if name in metafunc.fixturenames]
    metafunc.parametrize(
        names,
        [
            pytest.param(*(values[name] for name in names), id="-".join(str(values[name]) for name in names))
            for values in combinations(*marker.args, wanted=names, **marker.kwargs)
        ],
        indirect=["implementation"] if "implementation" in names else [],
    )


def combinations(*ops: str, wanted: list[str], real_sizes: bool = False, without: tuple[str, ...] = ()) -> list[dict]:
    return [
        {"implementation": implementation, "op": op, "sample": sample}
        for op in ops or SCHEMAS
        for implementation in (served_by(op, without) if "implementation" in wanted else [None])
        for sample in (testing.sample_inputs(op, real_sizes=real_sizes) if "sample" in wanted else [None])
    ]


def served_by(op: str, without: tuple[str, ...]) -> list[str]:
    # "cpu" is the best of the instruction sets, each of which is there under its own name.
    return [name for name in backend.available("cpu", op) if name != "cpu" and name not in without]


@pytest.fixture
def implementation(request):
    # This cache knows what was compiled for one implementation by the operator, and would give it to another.
    with torch._functorch.config.patch(enable_autograd_cache=False), backend.use(request.param):
        yield request.param


@pytest.fixture(params=backend.isas())
def isa(request):
    """Each instruction set of the extension in turn, in use."""
    with backend.use(f"cpu-{request.param}"):
        yield request.param


@pytest.fixture
def nothing_packed():
    """No packed weights of other tests, and none left for them."""
    packing.clear()
    yield
    packing.clear()


@pytest.fixture(scope="session")
def without_interpreter() -> Callable[..., subprocess.CompletedProcess]:
    """Run a fresh Python in which Triton compiles."""

    def run(*command: str) -> subprocess.CompletedProcess:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def computes():
    """Skip the dtypes of an implementation that only this machine's stand-in for its device cannot compute in."""

    def check(implementation: str, dtype) -> None:
        if implementation == "triton" and str(dtype) == "torch.bfloat16":
            pytest.skip("Triton's interpreter does not multiply bfloat16 blocks correctly; the GPU tests cover it")

    return check


@pytest.fixture(scope="session")
def kernels():
    """The CUDA kernels on the emulator, which is built when the first test asks for it."""
    from .cuda_emulated import Kernels

    return Kernels()
