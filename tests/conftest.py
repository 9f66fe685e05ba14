"""Settings that hold for every test: Triton's interpreter, poisoned allocations, a fixed seed."""

from __future__ import annotations

import importlib.util
import os

# Triton reads this when a kernel is decorated, so it is set before anything imports Triton.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip_gpu = pytest.mark.skip(reason="needs a CUDA device")
    skip_peft = pytest.mark.skip(reason="needs the library peft: pip install -c constraints.txt -e '.[peft]'")
    skip_data = pytest.mark.skip(reason="needs the folder named by MIXRANK_DATA")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip_gpu)
        if item.get_closest_marker("peft") and importlib.util.find_spec("peft") is None:
            item.add_marker(skip_peft)
        if item.get_closest_marker("real_data") and "MIXRANK_DATA" not in os.environ:
            item.add_marker(skip_data)


@pytest.fixture(autouse=True)
def _poisoned_allocations():
    """Fill what PyTorch allocates with NaN, in C++ too, so that an entry that is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
