"""Our operators under pytest-benchmark, to compare a change with what was before: ``pytest bench --benchmark-only``.

One thread; the quick cases, or all of them with ``--full``. Each case passes its error budget first.
"""

from __future__ import annotations

import pytest
import torch

from mixrank_bench import ops, peers


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = list(ops.cases() if metafunc.config.getoption("--full") else ops.quick_cases())
    metafunc.parametrize("case", cases, ids=lambda case: f"{case.op}-{case.dtype_name}-{case.name}".replace(" ", "-"))


@pytest.fixture
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
def test_operator(benchmark, case: ops.Case):
    with torch.inference_mode():
        variants = peers.ours(case, case.arguments())
        peers.gate(case, peers.Field({"ours": variants}, {}))
        benchmark.extra_info.update(flops=case.flops, bytes=case.bytes)
        benchmark(variants[peers.SERVED].call)
