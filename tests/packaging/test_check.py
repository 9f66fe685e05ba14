"""What ``make package`` refuses. That it passes is what it is run for."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = Path(__file__).with_name("check.py")
PROJECT = tomllib.loads((SOURCE.parents[2] / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("packaging_check", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(check: ModuleType) -> set[str]:
    if not (check.ROOT / ".git").exists():
        pytest.skip("what ships is what git knows, and this is a copy without git")
    return check.tracked()


def sdist(check: ModuleType, files: set[str]) -> set[str]:
    """The names in a whole sdist."""
    sources = {file for file in files if file.startswith("csrc/")}
    return {f"mixrank_kernels-1/{name}" for name in {*check.BUILD_FILES, *sources, *check.shipped(files), "PKG-INFO"}}


def test_a_whole_sdist_and_a_whole_wheel_are_accepted(check, files):
    assert check.sdist_faults(sdist(check, files), files) == []
    made = {"mixrank_kernels/_C.cpython-311-x86_64-linux-gnu.so", "mixrank_kernels-1.dist-info/METADATA"}
    wheel = made | set(check.shipped(files).values())
    assert check.wheel_faults(wheel, files) == []


@pytest.mark.parametrize(
    "name",
    [
        "csrc/cpu/gram.h",
        "csrc/cuda/entry.cuh",
        "csrc/cuda/gram_op.cu",
        "mixrank_kernels/choices.json",
        "python/mixrank/templates/report.html",
        "python/mixrank/uvc/recipes/deit_small_imagenet.toml",
        "python/mixrank/demo/assets/fashion_mnist.npz",
        "python/mixrank/demo/assets/LICENSE.fashion-mnist",
        "bench/accuracy_peers/asvd.py",
        "setup.py",
        "LICENSE",
    ],
)
def test_what_an_sdist_lacks_is_named(check, files, name):
    assert check.sdist_faults(sdist(check, files) - {f"mixrank_kernels-1/{name}"}, files) == [f"the sdist lacks {name}"]


@pytest.mark.parametrize("name", ["bench/results/ops.jsonl", "mixrank_kernels/_C.so", "tests/conftest.py"])
def test_what_does_not_belong_in_an_sdist_is_named(check, files, name):
    faults = check.sdist_faults(sdist(check, files) | {f"mixrank_kernels-1/{name}"}, files)
    assert faults == [f"the sdist should not have {name}"]


def test_what_a_wheel_lacks_is_named(check, files):
    wheel = set(check.shipped(files).values()) - {"mixrank/uvc/recipe.py", "mixrank_kernels/triton/config.py"}
    assert check.wheel_faults(wheel | {"mixrank_bench/test_regressions.py"}, files) == [
        "the wheel lacks mixrank/uvc/recipe.py",
        "the wheel lacks mixrank_kernels/triton/config.py",
        "the wheel should not have mixrank_bench/test_regressions.py",
        "the wheel lacks the compiled module mixrank_kernels._C",
    ]


def test_metadata_that_say_something_else_are_named(check):
    lines = [f"{key}: {PROJECT[name]}" for key, name in (("Name", "name"), ("License-Expression", "license"))]
    lines += ["Version: 9.9", f"Requires-Python: {PROJECT['requires-python']}"]
    for key, values in (
        ("License-File", PROJECT["license-files"]),
        ("Classifier", PROJECT["classifiers"]),
        ("Provides-Extra", PROJECT["optional-dependencies"]),
    ):
        lines += [f"{key}: {value}" for value in values]
    contents = {"METADATA": "\n".join(lines), "licenses/LICENSE": ""}
    assert check.metadata_faults(contents, PROJECT) == [
        f"the metadata say Version: ['9.9'], and pyproject.toml says ['{PROJECT['version']}']",
        "the wheel lacks licenses/python/mixrank/demo/assets/LICENSE.fashion-mnist",
        "the wheel has no command mixrank = mixrank.cli:main",
    ]


def test_requirements_are_followed_without_their_extras(check):
    found = check.needed(["matplotlib>=1", "scipy; extra == 'bench'"])
    assert {"matplotlib", "numpy", "pillow"} <= set(found)
    assert "scipy" not in found
