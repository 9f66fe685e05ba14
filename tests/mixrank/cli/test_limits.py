"""A disk or a memory that is full: one sentence, and no file but those that were there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LIMITED = """
import resource, sys
kind, limit = getattr(resource, sys.argv[1]), int(sys.argv[2])
from mixrank import cli
import mixrank, mixrank.run_compress, mixrank.cli_quantize, timm, torch  # what is there before the limit
if kind == resource.RLIMIT_AS:
    limit += int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(kind, (limit, limit))
sys.argv = ["mixrank", *sys.argv[3:]]
cli.main()
"""


def limited(kind: str, limit: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED, kind, str(limit), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 60_000])
def test_a_full_disk_leaves_no_part_of_a_file(world, tmp_path: Path, limit: int) -> None:
    out = tmp_path / "out.safetensors"
    result = limited("RLIMIT_FSIZE", limit, "quantize", str(world.checkpoint), "--out", str(out))
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"error: {out} cannot be written: ")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_file_that_was_there_stays_whole(world, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"what was there")
    assert limited("RLIMIT_FSIZE", 4096, "quantize", str(world.checkpoint), "--out", str(out)).returncode == 2
    assert out.read_bytes() == b"what was there"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.slow
def test_memory_that_runs_out_is_a_sentence(world, tmp_path: Path) -> None:
    out, huge = tmp_path / "out.safetensors", ["--model", "vit_huge_patch14_224", "--model-args", "{}"]
    result = limited("RLIMIT_AS", 800 * 2**20, *world.compress(out), *huge)
    assert result.returncode == 1, result.stderr
    assert "error: out of memory: give a smaller --batch-size" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
