"""``bench/gpu.sh`` where there is no GPU: a rehearsal of everything but the build and the sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

from mixrank_bench.environment import ROOT, in_checkout, read

pytestmark = [
    pytest.mark.skipif(not in_checkout(), reason="the script is in a checkout"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it takes minutes, and runs these tests"),
]


def run(out: Path, *stages: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable} | variables
    command = [str(ROOT / "bench" / "gpu.sh"), str(out), *stages]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_rehearsal_times_small_cases_and_says_that_it_is_none(tmp_path):
    done = run(tmp_path, "timing", "tune", MIXRANK_COMMIT="abc+", MIXRANK_GPU_SECONDS="120")
    assert done.returncode == 1
    assert done.stdout == (tmp_path / "summary.txt").read_text()
    assert "no CUDA device was found: this is a rehearsal" in done.stdout
    assert "tune: left out, there is no CUDA device" in done.stdout
    assert "timing: passed in" in done.stdout, (tmp_path / "timing.log").read_text()
    assert "at least 1.8x, as served: not measured" in done.stdout
    rows = read(tmp_path / "gpu.jsonl")
    assert {row["kind"] for row in rows} == {"ceiling", "model", "op", "settings"}
    assert {row["environment"]["commit"] for row in rows} == {"abc+"}


def test_a_stage_that_fails_stops_no_other(tmp_path):
    fake = tmp_path / "python"
    fake.write_text(
        f'#!/bin/sh\ncase "$*" in *gpu_smoke*) exit 3;; *pytest*) exit 0;; esac\nexec {sys.executable} "$@"\n'
    )
    fake.chmod(0o755)
    done = run(tmp_path / "out", "tests", PYTHON=str(fake))
    assert done.returncode == 1
    assert "every operator once: failed with status 3" in done.stdout
    assert "tests on the device: passed" in done.stdout


def test_a_python_without_torch_is_refused(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    done = run(tmp_path / "out", "timing", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stdout.endswith(f"{sys.executable} cannot import torch: name one that can in PYTHON\n")


def test_an_unknown_stage_is_refused(tmp_path):
    done = run(tmp_path, "profile")
    assert (done.returncode, done.stderr) == (
        2,
        "STAGE must be one of build, tests, sanitize, timing, tune, but it was 'profile'\n",
    )


def hide(folder: Path, package: str) -> str:
    """A PYTHONPATH with which an installed package is not found, but one from elsewhere is."""
    (folder / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "def spec(name, *rest):\n"
        "    found = find(name, *rest)\n"
        f"    hidden = name == {package!r} and found and 'site-packages' in found.origin\n"
        "    return None if hidden else found\n"
        "u.find_spec = spec\n"
    )
    return str(folder)


def test_a_stage_without_time_and_what_is_missing_are_said(tmp_path):
    done = run(tmp_path / "out", "timing", MIXRANK_GPU_SECONDS="1", PYTHONPATH=hide(tmp_path, "hypothesis"))
    assert done.returncode == 1
    assert "timing: left out for lack of time" in done.stdout
    assert "missing: hypothesis; put their wheels into a folder and name it in MIXRANK_WHEELS" in done.stdout


# Asked of the metadata: setuptools leaves distutils alone in a process that has so much as looked for pip itself.
@pytest.mark.skipif(not any(metadata.distributions(name="pip")), reason="pip unpacks the wheels")
def test_what_is_missing_comes_from_a_folder_of_wheels(tmp_path):
    with zipfile.ZipFile(tmp_path / "hypothesis-0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("hypothesis/__init__.py", "")
        folder = "hypothesis-0.dist-info"
        wheel.writestr(f"{folder}/METADATA", "Metadata-Version: 2.1\nName: hypothesis\nVersion: 0\n")
        wheel.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{folder}/RECORD", "")
    variables = {"PYTHONPATH": hide(tmp_path, "hypothesis"), "MIXRANK_WHEELS": str(tmp_path)}
    done = run(tmp_path / "out", "timing", MIXRANK_GPU_SECONDS="1", **variables)
    assert "missing:" not in done.stdout
    assert "no wheel of it" not in done.stdout
