"""A run that is killed at random moments ends with the bytes of one that was not; the script has dozens."""

from __future__ import annotations

import pytest

from mixrank_bench import interruptions


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes():
    row = interruptions.run("compensate", 1, seed=1)
    assert row["kills"] > 0
    assert row["different"] == 0
    assert row["failures"] == []


def test_what_a_command_says_when_it_fails_is_told(tmp_path):
    with pytest.raises(RuntimeError, match=r"inspect ended with 2: error: .*nothing\.safetensors"):
        interruptions.finish(["inspect", str(tmp_path / "nothing.safetensors")])
