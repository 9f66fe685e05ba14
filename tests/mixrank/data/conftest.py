from __future__ import annotations

import pytest

from .pictures import picture


@pytest.fixture
def folder(tmp_path):
    """Ten images without labels; 10.png comes after 9.png."""
    for number in range(1, 11):
        picture(tmp_path / "images" / f"{number}.png", level=20 * number)
    return tmp_path / "images"
