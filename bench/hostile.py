"""Hostile input, by the hundred thousand: every case ends in a value or in the error that is promised, soon.

    python -m mixrank_bench.hostile                # all targets, 100,000 cases in all
    python -m mixrank_bench.hostile --target image --cases 5000 --seed 7
    python -m mixrank_bench.hostile --target labels --atheris --cases 100000      # guided by coverage

A case is a function of target and number, so that one that failed can be had again. Cases run in a process of their
own, which may use four gigabytes more than it begins with; a crash, another error, or a case of more than five seconds
of work is told with its number. One JSON line for each target goes to ``bench/results/hostile.jsonl``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from mixrank_bench.environment import RESULTS, append
from mixrank_bench.hostile_targets import SHARES, TARGETS, Target

OUT = RESULTS / "hostile.jsonl"
CASES = 100_000
LIMIT_SECONDS = 5.0
"""Of work; the machine may be busy with other things."""
LIMIT_WAIT = 60.0
"""Until the end, also of a case that only waits."""
MORE_MEMORY = 4 * 2**30
_TOLD = 50  # cases between two notes of the child


@dataclass(frozen=True)
class Outcome:
    """What cases of a target did.

    Attributes:
        cases: how many ran.
        refused: how many ended in the promised error.
        slowest: seconds of work of the slowest.
        memory: bytes that the process used at most, more than at its beginning.
        failures: number and description of each case that did what is not promised.
    """

    cases: int
    refused: int
    slowest: float
    memory: int
    failures: list[tuple[int, str]]


def run(target: Target, first: int, cases: int, seed: int) -> Outcome:
    """Run cases in this process."""
    refused, slowest, failures = 0, 0.0, []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        attempt = target.prepare(Path(folder))
        for number in range(first, first + cases):
            started, used = time.perf_counter(), time.process_time()
            try:
                attempt(random.Random(hash((seed, number))))
            except target.promised:
                refused += 1
            except Exception as error:  # which is what is looked for
                failures.append((number, f"{type(error).__name__}: {error}"[:300]))
            seconds, waited = time.process_time() - used, time.perf_counter() - started
            slowest = max(slowest, seconds)
            if seconds > LIMIT_SECONDS or waited > LIMIT_WAIT:
                failures.append((number, f"{seconds:.1f} seconds of work, {waited:.1f} until the end"))
    memory = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return Outcome(cases, refused, slowest, memory, failures)


def _child(name: str, first: int, cases: int, seed: int, pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY, used + MORE_MEMORY))
    with open("/dev/null", "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        for start in range(first, first + cases, _TOLD):
            pipe.send(start)
            pipe.send(run(TARGETS[name], start, min(_TOLD, first + cases - start), seed))
    pipe.send(None)


def run_apart(name: str, cases: int, seed: int) -> Outcome:
    """Run cases in a process of their own; after a crash a new one goes on behind."""
    context, first, found = multiprocessing.get_context("spawn"), 0, []
    while first < cases:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(name, first, cases - first, seed, theirs))
        child.start()
        theirs.close()
        start, done = first, False
        try:
            while (told := ours.recv()) is not None:
                if isinstance(told, Outcome):
                    found.append(told)
                    first = start + told.cases
                else:
                    start = told
            done = True
        except EOFError:
            child.join()
            lost = min(_TOLD, cases - start)
            found.append(
                Outcome(lost, 0, 0.0, 0, [(start, f"a crash within {lost} cases: exit code {child.exitcode}")])
            )
            first = start + lost
        child.join()
        if done:
            break
    return Outcome(
        sum(one.cases for one in found),
        sum(one.refused for one in found),
        max(one.slowest for one in found),
        max(one.memory for one in found),
        [failure for one in found for failure in one.failures],
    )


def guided(target: Target, cases: int) -> None:
    """Let atheris choose the numbers that cases draw, by what code they reach; it ends the process."""
    import atheris

    class Chosen(random.Random):
        """Random numbers out of the bytes of atheris."""

        def __init__(self, data: bytes) -> None:
            super().__init__(0)
            self.source = atheris.FuzzedDataProvider(data)

        def random(self) -> float:
            return self.source.ConsumeProbability() * (1 - 2**-53)

        def getrandbits(self, count: int) -> int:
            return self.source.ConsumeUInt((count + 7) // 8) & ((1 << count) - 1)

    with tempfile.TemporaryDirectory() as folder:
        attempt = target.prepare(Path(folder))

        def once(data: bytes) -> None:
            with contextlib.suppress(target.promised):
                attempt(Chosen(data))

        atheris.instrument_all()
        atheris.Setup([sys.argv[0], f"-runs={cases}", f"-timeout={LIMIT_SECONDS:g}", "-max_len=4096"], once)
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one (repeatable)")
    parser.add_argument("--cases", type=int, help=f"of each target; by default {CASES} in all")
    parser.add_argument("--seed", type=int, default=0, help="other cases")
    parser.add_argument("--atheris", action="store_true", help="guided by coverage, of one target; writes no results")
    parser.add_argument("--out", type=Path, default=OUT, help="the file of results, added to")
    args = parser.parse_args()
    names = args.target or list(TARGETS)
    if args.atheris:
        if len(names) != 1:
            parser.error("--atheris needs one --target")
        guided(TARGETS[names[0]], args.cases or CASES)
        return
    failed = False
    for name in names:
        found = run_apart(name, args.cases or round(CASES * SHARES[name]), args.seed)
        row = {"kind": "hostile", "target": name, "seed": args.seed, "cases": found.cases, "refused": found.refused}
        row |= {"slowest_seconds": found.slowest, "memory": found.memory, "failures": found.failures}
        append(args.out, row)
        print(json.dumps({key: value for key, value in row.items() if key != "kind"}), file=sys.stderr, flush=True)
        failed = failed or bool(found.failures)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
