"""The documents say what the results and the code say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import mixrank
import mixrank_kernels
from mixrank_bench import figures
from mixrank_bench.report import DOCUMENTS, ROOT, render


def modules() -> list[str]:
    """Every module of both packages that can be imported here without side effects."""
    found = [mixrank.__name__, mixrank_kernels.__name__]
    for package in (mixrank, mixrank_kernels):
        found += [info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    return sorted(name for name in found if not name.endswith(("__main__", "._C")))


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_some_docstrings_have_examples():
    tests = [test for name in modules() for test in doctest.DocTestFinder().find(importlib.import_module(name))]
    assert sum(bool(test.examples) for test in tests) >= 8


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tables_are_made_from_the_committed_results(name):
    path = ROOT / name
    assert "<!-- generated:" in path.read_text()
    assert render(path, DOCUMENTS[name]) == path.read_text(), "run python -m mixrank_bench.report"


def test_figures_are_drawn_from_the_newest_run():
    assert figures.stale(ROOT) == [], "run python -m mixrank_bench.report"


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))])
def test_links_lead_somewhere(path: Path):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250
