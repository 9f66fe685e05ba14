"""The ladder of kernel versions: without building anything."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import mixrank_kernels
from mixrank_bench import ladder, ladder_child, report, tables_ladder
from mixrank_bench.environment import ROOT, in_checkout, read
from mixrank_bench.ladder import GRAM, LOWRANK, Step
from mixrank_bench.ops import Case

pytestmark = pytest.mark.skipif(not in_checkout(), reason="the commits are in a checkout")

LAYER = Case(LOWRANK, "tiny", torch.float32, 3, 24, 16, 4, 0.4)
WIDTH = Case(GRAM, "tiny", torch.bfloat16, 5, 24)
STEPS = (Step("HEAD", "the start", (LOWRANK, GRAM)), Step("HEAD~1", "the end", (LOWRANK,)))
ANSWER = {"milliseconds": 2.0, "reference_milliseconds": 3.0, "error": 0.0, "reference_error": 0.0}


class FakeChild:
    """Answers at once, and writes down who was asked."""

    asked: list[tuple[str, bool]]

    def __init__(self, folder: Path) -> None:
        self.name = folder.name

    def __enter__(self) -> FakeChild:
        return self

    def __exit__(self, *_details: object) -> None:
        pass

    def turn(self, case: Case, *, reverse: bool, turn_seconds: float) -> dict[str, float]:
        self.asked.append((self.name, reverse))
        return ANSWER | {"milliseconds": float(len(self.asked))}


@pytest.fixture
def asked(monkeypatch):
    """Fake children in place of builds; what they were asked."""
    monkeypatch.setattr(FakeChild, "asked", [], raising=False)
    monkeypatch.setattr(ladder, "git", lambda *arguments: {"HEAD^": "aaa", "HEAD~1^": "bbb"}[arguments[2][:-8]])
    monkeypatch.setattr(ladder, "build", lambda commit, cache: cache / commit)
    monkeypatch.setattr(ladder, "Child", FakeChild)
    return FakeChild.asked


def test_commits_take_turns_and_the_order_turns_around(asked, tmp_path):
    found = list(ladder.rows(STEPS, [LAYER, WIDTH], tmp_path, rounds=3))
    assert asked[:6] == [("aaa", False), ("bbb", False), ("bbb", True), ("aaa", True), ("aaa", False), ("bbb", False)]
    assert asked[6:] == [("aaa", False), ("aaa", True), ("aaa", False)]
    assert [(row["op"], row["step"], row["commit"], row["milliseconds"]) for row in found] == [
        (LOWRANK, "the start", "aaa", 4.0),
        (LOWRANK, "the end", "bbb", 3.0),
        (GRAM, "the start", "aaa", 8.0),
    ]


def test_rows_are_saved_and_become_a_table_of_the_newest_run(asked, monkeypatch, tmp_path, capsys):
    path, threads = tmp_path / "ladder.jsonl", torch.get_num_threads()
    monkeypatch.setattr(ladder, "STEPS", STEPS)
    monkeypatch.setattr(ladder, "cases", lambda: [LAYER, WIDTH])
    monkeypatch.setattr(sys, "argv", ["ladder", "--busy", "--rounds", "1", "--save", str(path)])
    try:
        ladder.main()
    finally:
        torch.set_num_threads(threads)
    assert "3.00x" in capsys.readouterr().out
    keys = {"kind", "op", "step", "commit", "case", "dtype", "milliseconds", "reference_milliseconds", "run"}
    saved = read(path)
    assert all(row.keys() == keys | {"environment"} for row in saved)
    older = saved[0] | {"run": "older", "case": "of an older run"}
    path.write_text("".join(json.dumps(row) + "\n" for row in [older, *saved]))
    monkeypatch.setattr(tables_ladder, "LADDER", path)
    lines = tables_ladder.lowrank().splitlines()
    assert lines[0] == f"| dtype | what is new | commit | {LAYER.name} |"
    assert lines[2:4] == ["| float32 | the start | aaa | 3.00x |", "| float32 | the end | bbb | 1.50x |"]
    assert lines[5].startswith("Measured on ")
    assert "| bfloat16 | the start | aaa | 1.00x |" in tables_ladder.gram()


def test_without_a_run_the_documents_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr(tables_ladder, "LADDER", tmp_path / "none.jsonl")
    for name in ("docs/kernels/lowrank_linear.md", "docs/kernels/gram.md"):
        assert tables_ladder.NO_RUN in report.render(ROOT / name, report.DOCUMENTS[name])


def test_a_step_that_computes_something_else_is_no_step():
    ladder.gate("aaa", LAYER, ANSWER | {"error": 2e-6, "reference_error": 1e-6})
    with pytest.raises(AssertionError, match=r"aaa, tiny M=3 .*, float32: the error is 2.1e-06, allowed 2.0e-06"):
        ladder.gate("aaa", LAYER, ANSWER | {"error": 2.1e-6, "reference_error": 1e-6})


@pytest.mark.parametrize("case", [LAYER, WIDTH], ids=lambda case: case.op)
@pytest.mark.parametrize("packing", [True, False], ids=["packing", "no packing"])
def test_both_sides_of_a_case_are_right_with_and_without_a_module_that_packs(monkeypatch, case, packing):
    if not packing:
        monkeypatch.setattr(ladder_child, "PACKING", Path("missing"))
    ladder_child.contest.cache_clear()
    shape = {"op": case.op, "dtype": case.dtype_name, "m": case.m, "k": case.k, "n": case.n, "rank": case.rank}
    for reverse in (False, True):
        answer = ladder_child.answer({"case": shape, "reverse": reverse, "turn_seconds": 0.0})
        assert answer.keys() == ANSWER.keys()
        assert min(answer["milliseconds"], answer["reference_milliseconds"]) > 0
        assert 0 < answer["error"] < 1e-6
        assert 0 < answer["reference_error"] < 1e-6


@pytest.mark.skipif(not mixrank_kernels.HAS_EXTENSION, reason="needs a build")
def test_a_process_times_the_package_of_its_folder():
    with ladder.Child(ROOT) as child:
        answer = child.turn(LAYER, reverse=False, turn_seconds=0.0)
        ladder.gate("this one", LAYER, answer)
        assert answer["milliseconds"] > 0
        child.process.stdin.write("no json\n")
        with pytest.raises(RuntimeError, match="ended without an answer"):
            child.turn(LAYER, reverse=False, turn_seconds=0.0)
    assert child.process.poll() is not None


def test_a_package_from_elsewhere_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"must come from .*, but .* was imported"), ladder.Child(tmp_path):
        pytest.fail("the package is not in the folder")


@pytest.mark.skipif(not mixrank_kernels.HAS_EXTENSION, reason="needs a build")
def test_a_module_from_elsewhere_is_refused(tmp_path):
    package = Path(mixrank_kernels.__file__).parent
    shutil.copytree(package, tmp_path / "mixrank_kernels", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    with pytest.raises(RuntimeError, match=r"must (come|have)"), ladder.Child(tmp_path):
        pytest.fail("the folder has no extension")


def test_a_build_in_the_cache_is_taken_and_one_that_fails_leaves_no_worktree(monkeypatch, tmp_path):
    (tmp_path / "aaa").mkdir()
    assert ladder.build("aaa", tmp_path) == tmp_path / "aaa"
    called, run = [], ladder.subprocess.run

    def failing(command, **options):
        if command[0] != "git":
            return run([sys.executable, "-c", "raise SystemExit('no compiler')"], **options)
        called.append(command[1:3])
        if "add" in command:
            command[-2].mkdir()
        return run(["true"], **options)

    monkeypatch.setattr(ladder.subprocess, "run", failing)
    with pytest.raises(RuntimeError, match="the build of bbb failed: no compiler"):
        ladder.build("bbb", tmp_path)
    assert called == [["worktree", "add"], ["worktree", "remove"]]
    assert [path.name for path in tmp_path.iterdir()] == ["aaa"]


def test_a_failure_of_git_is_told():
    with pytest.raises(RuntimeError, match=r"git rev-parse failed: .*no-such-commit"):
        ladder.git("rev-parse", "no-such-commit^{commit}")


def test_numbers_below_one_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ladder", "--rounds", "0"])
    with pytest.raises(SystemExit):
        ladder.main()
    assert "--rounds must be at least 1, but it was 0" in capsys.readouterr().err
