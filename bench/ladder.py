"""What each version of the kernels won: ``python -m mixrank_bench.ladder``.

Builds several commits of this repository and times each against the same opponent, torch eager: two ``F.linear`` for
low-rank layers, ``addmm_`` in fp32 for Gram matrices. Every build runs in a process of its own on one thread; all of
them take turns on a case, and the opponent is timed beside each in the same process, so that the ratios of the steps
can be compared although the machine's speed drifts. ``--save`` adds rows to a file; ``python -m mixrank_bench.report``
makes the tables of docs/kernels/ of ``bench/results/ladder.jsonl``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mixrank_bench.environment import RESULTS, ROOT, append_all, busy, environment, in_checkout
from mixrank_bench.ops import DTYPES, TOKENS, Case

OUT = RESULTS / "ladder.jsonl"
ROUNDS, TURN_SECONDS = 15, 0.02
PACKAGE = "mixrank_kernels"
LOWRANK, GRAM = "lowrank_linear", "gram_accumulate_"


@dataclass(frozen=True)
class Step:
    """A version of the kernels.

    Attributes:
        commit: what git knows it by.
        label: what is new in it.
        ops: the operators whose ladder it belongs to.
    """

    commit: str
    label: str
    ops: tuple[str, ...]


STEPS = (
    Step(
        "e03d1fb",
        "packs the weights at every call; sums go through memory every 64 terms; intermediate and second product in "
        "fp32",
        (LOWRANK,),
    ),
    Step(
        "f04030f",
        "factors packed once and kept, one packing for both products; bf16 pairs in the second product; a tile stays "
        "in L1 over the whole inner dimension; checks without strings, output allocated without a lookup by name",
        (LOWRANK,),
    ),
    Step(
        "716a35b",
        "sums stay in registers until they are rounded; a tile for every number of rows; half a vector for the tail",
        (LOWRANK,),
    ),
    Step("2d41eb2", "several sums for one element where rows are few", (LOWRANK,)),
    Step("ac3e6b0", "x is read where it is, or fetched into L2 before it is copied; lines of y go to L2", (LOWRANK,)),
    Step("e03d1fb", "x packed for each side apart", (GRAM,)),
    Step("c7516d4", "x packed once for both sides, panels stay in L2", (GRAM,)),
    Step("d4be640", "more tokens at once where the panels do not fit in L2", (GRAM,)),
)


def cases() -> list[Case]:
    """What every step of an operator's ladder is timed on."""
    found = []
    for dtype in DTYPES:
        found += [Case(LOWRANK, "vit-b fc1", dtype, m, 768, 3072, 248, 0.4) for m in (1, TOKENS, 8 * TOKENS)]
        found += [Case(LOWRANK, "vit-ti proj", dtype, m, 192, 192, 40, 0.4) for m in (1, TOKENS)]
        found += [Case(GRAM, f"width {width}", dtype, 8 * TOKENS, width) for width in (192, 768, 3072)]
    return found


def git(*arguments: str | Path) -> str:
    """Run git in this checkout and return what it prints.

    Raises:
        RuntimeError: git fails; with its own message.
    """
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """The files of a commit in a temporary folder, which is gone afterwards, and git's knowledge of it too."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        try:
            git("worktree", "add", "--detach", "--quiet", tree, commit)
            yield tree
        finally:
            if tree.exists():
                git("worktree", "remove", "--force", tree)


def build(commit: str, cache: Path) -> Path:
    """Build the extension of a commit, unless the cache has it.

    Args:
        commit: its abbreviated hash.
        cache: the folder of all builds.

    Returns:
        The folder that holds the package mixrank_kernels of that commit.

    Raises:
        RuntimeError: the build fails; with the end of what it printed.
    """
    folder = cache.resolve() / commit
    if folder.is_dir():
        return folder
    with worktree(commit) as tree:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        settings = os.environ | {"MIXRANK_CUDA": "0"}
        done = subprocess.run(command, cwd=tree, env=settings, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the build of {commit} failed: {(done.stdout + done.stderr)[-2000:]}")
        # Renamed at the end, so that an interrupted copy is never taken for a build.
        unfinished = folder.with_name(f"{commit}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(tree / PACKAGE, unfinished / PACKAGE)
        unfinished.rename(folder)
    return folder


class Child:
    """A process that imports mixrank_kernels from a folder and times it; used as a context manager.

    Raises:
        RuntimeError: it ends early, or imported another mixrank_kernels or one without its extension.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mixrank_bench.ladder_child"],
            env=os.environ | {"PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Child:
        try:
            found = self._receive()
            for file in found["files"]:
                if not Path(file).is_relative_to(self.folder):
                    raise RuntimeError(f"all of {PACKAGE} must come from {self.folder}, but {file} was imported")
            if not found["extension"]:
                raise RuntimeError(f"{PACKAGE} in {self.folder} must have its extension, but it has none")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_details: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process: it stops where its input ends."""
        self.process.communicate()

    def turn(self, case: Case, *, reverse: bool, turn_seconds: float) -> dict[str, float]:
        """Let it time one turn of each side; see :func:`mixrank_bench.ladder_child.answer`."""
        shape = {"op": case.op, "dtype": case.dtype_name, "m": case.m, "k": case.k, "n": case.n, "rank": case.rank}
        request = {"case": shape, "reverse": reverse, "turn_seconds": turn_seconds}
        with contextlib.suppress(BrokenPipeError):  # the missing answer tells it
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.folder} ended without an answer; its error stands above")
        return json.loads(line)


def gate(commit: str, case: Case, answer: dict[str, float]) -> None:
    """Raise AssertionError unless a step's root mean square error is at most twice the opponent's, or an ulp."""
    allowed = max(2 * answer["reference_error"], torch.finfo(case.dtype).eps)
    name, error = f"{commit}, {case.name}, {case.dtype_name}", answer["error"]
    assert error <= allowed, f"{name}: the error is {error:.1e}, allowed {allowed:.1e}"


def measure(
    case: Case, children: dict[str, Child], *, rounds: int = ROUNDS, turn_seconds: float = TURN_SECONDS
) -> dict[str, dict[str, float]]:
    """Let all commits take turns on a case; the order turns around every round.

    Returns:
        The median milliseconds of a call for each commit, of ours and of the reference.
    """
    answers: dict[str, list[dict[str, float]]] = {commit: [] for commit in children}
    for index in range(rounds):
        reverse = index % 2 == 1
        for commit in list(children)[:: -1 if reverse else 1]:
            answer = children[commit].turn(case, reverse=reverse, turn_seconds=turn_seconds)
            gate(commit, case, answer)
            answers[commit].append(answer)
    sides = ("milliseconds", "reference_milliseconds")
    return {
        commit: {side: statistics.median(answer[side] for answer in given) for side in sides}
        for commit, given in answers.items()
    }


def rows(steps: tuple[Step, ...], wanted: list[Case], cache: Path, **timing: Any) -> Iterator[dict[str, Any]]:
    """Build all commits and measure the cases; the rows of one case come together, in the order of the steps.

    Args:
        steps: the ladders of all operators.
        wanted: the cases; one whose operator has no step gives no row.
        cache: the folder of all builds.
        timing: ``rounds`` and ``turn_seconds`` of :func:`measure`.
    """
    commits = {step: git("rev-parse", "--short=12", f"{step.commit}^{{commit}}") for step in steps}
    folders = {commit: build(commit, cache) for commit in commits.values()}
    with contextlib.ExitStack() as stack:
        children = {commit: stack.enter_context(Child(folder)) for commit, folder in folders.items()}
        for case in wanted:
            ladder = [step for step in steps if case.op in step.ops]
            measured = measure(case, {commits[step]: children[commits[step]] for step in ladder}, **timing)
            for step in ladder:
                yield {
                    "kind": "ladder",
                    "op": case.op,
                    "step": step.label,
                    "commit": commits[step],
                    "case": case.name,
                    "dtype": case.dtype_name,
                } | measured[commits[step]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each commit")
    parser.add_argument("--quick", action="store_true", help="only the first step, and only the smallest layer")
    parser.add_argument("--cache", type=Path, help="keep the builds in this folder, and take those that it has")
    parser.add_argument("--save", type=Path, nargs="?", const=OUT, help=f"add the rows to a file ({OUT.name})")
    parser.add_argument("--busy", action="store_true", help="measure although the machine is busy")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, but it was {args.rounds}")
    if not in_checkout():
        parser.error("the commits are in a checkout of mixrank-kernels; this is an installed copy")
    reason = None if args.busy else busy()
    if reason:
        parser.error(f"{reason}: timings would mean nothing; wait, or pass --busy to have them all the same")
    torch.set_num_threads(1)
    steps, wanted = STEPS, cases()
    if args.quick:
        steps, wanted = STEPS[:1], [case for case in wanted if case.layer == "vit-ti proj"]

    header = environment()
    run = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}-{header['commit']}"
    console = Console()
    console.print(header, highlight=False)
    table = Table("case", "dtype", "commit", "ms", "torch eager, ms", "speed-up")
    with tempfile.TemporaryDirectory() as temporary:
        for row in rows(steps, wanted, args.cache or Path(temporary), rounds=args.rounds):
            if args.save:
                append_all(args.save, [{"run": run} | row], header)
            ours, eager = row["milliseconds"], row["reference_milliseconds"]
            figures = (f"{ours:.4f}", f"{eager:.4f}", f"{eager / ours:.2f}x")
            table.add_row(row["case"], row["dtype"], row["commit"], *figures)
    console.print(table)


if __name__ == "__main__":
    main()
