from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from .files import VIT, compressed


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return compressed(*VIT)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.safetensors"
