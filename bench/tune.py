"""Regenerate what the GPU kernels are committed with: ``python -m mixrank_bench.tune triton`` and ``... choices``.

``triton``
    times block sizes of the Triton kernels on the device, entry by entry of ``mixrank_kernels/triton/config.py``: the
    present ones against all that differ from them in one step of one number, again from the winner while that is
    faster. A candidate that misses the error budget, or does not launch, is out.
``choices``
    takes from a file of :mod:`mixrank_bench.gpu` which implementation serves each line of
    ``mixrank_kernels/choices.json``.

Both print what they would change, and change it with ``--write`` only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mixrank.errors import InputError
from mixrank.files import write_text
from mixrank_bench import gpu, gpu_cases, samples, tune_choices
from mixrank_bench.environment import read
from mixrank_bench.gpu_timing import recorded, turns
from mixrank_bench.measures import geometric_mean
from mixrank_bench.ops import Case
from mixrank_bench.peers import in_words
from mixrank_bench.timing import interleaved
from mixrank_bench.tune_entries import Entry, Value, entries, rewritten
from mixrank_kernels import _register, backend, ops, reference, testing

ENOUGH = 1.02
"""A winner is at least so many times as fast as what it replaces: less is noise."""
ROUNDS, TURN_SECONDS = 5, 0.002
MOST_CASES = 12
"""Cases that an entry is tuned on: each compiles every candidate once more."""

Timer = Callable[[dict[Value, Callable[[], object]]], dict[Value, float]]
"""Milliseconds of each of some calls."""


def device_timer(device: torch.device) -> Timer:
    """All calls in turns, with a cold cache."""

    def timer(calls: dict[Value, Callable[[], object]]) -> dict[Value, float]:
        timings = interleaved(
            calls, rounds=ROUNDS, turn_seconds=TURN_SECONDS, settle_seconds=0.0, turn=turns(device, cold=True)
        )
        return {value: timing.median for value, timing in timings.items()}

    return timer


def compared(
    entry: Entry, values: list[Value], cases: list[Case], device: torch.device, timer: Timer
) -> tuple[dict[Value, float], dict[Value, str]]:
    """Time values of an entry on its cases, all in turns.

    Returns:
        How many times as fast as the first value each one is, as a geometric mean over the cases; and why each of the
        others is out.
    """
    ratios: dict[Value, list[float]] = {value: [] for value in values}
    out: dict[Value, str] = {}
    for case in cases:
        arguments = case.arguments(device)
        exact = list(testing.run(getattr(reference, case.op), testing.exact(arguments)))
        yardstick = list(testing.run(testing.plain(case.op), arguments))
        count = gpu.copies(case) if device.type == "cuda" else 1
        sets = [gpu.copied(arguments) for _ in range(count)]
        calls = [lambda given=given, op=case.op: getattr(ops, op)(**given) for given in sets]
        play = {}
        for value in (value for value in values if value not in out):
            try:
                with entry.served_with(value):
                    actual = list(testing.run(getattr(ops, case.op), arguments))
                for ours, true, plain in zip(actual, exact, yardstick, strict=True):
                    testing.assert_within_budget(ours, true, plain, case.dtype)
                play[value] = recorded(calls, device, lambda value=value: entry.served_with(value))
            except Exception as error:  # compilers and launches fail with exceptions of many kinds
                out[value] = f"{case.dtype_name} {case.name}: {in_words(error)}"
        if values[0] in out:
            raise RuntimeError(f"{entry}: the present value {values[0]} does not serve {out[values[0]]}")
        times = timer(play)
        for value, milliseconds in times.items():
            ratios[value].append(times[values[0]] / milliseconds)
    return {value: geometric_mean(found) for value, found in ratios.items() if value not in out}, out


def tuned(
    entry: Entry,
    cases: list[Case],
    device: torch.device,
    timer: Timer,
    *,
    passes: int = 3,
    time_left: Callable[[], bool] = lambda: True,
    prepare: Callable[[Entry, list[Value], list[Case]], object] = lambda *_: None,
    log: Callable[[str], None] = print,
) -> tuple[Value, float]:
    """Climb from the present value of an entry to the fastest among its neighbours, and on.

    Returns:
        The winner, and how many times as fast as the present value it is.
    """
    start = best = entry.value
    gained, seen = 1.0, {start}
    for _ in range(passes):
        values = [best, *(value for value in entry.neighbours(best) if value not in seen)]
        if len(values) == 1 or not time_left():
            break
        seen.update(values)
        prepare(entry, values, cases)
        ratios, out = compared(entry, values, cases, device, timer)
        for value, reason in out.items():
            log(f"  out: {value}: {reason}")
        for value, ratio in sorted(ratios.items(), key=lambda pair: -pair[1]):
            log(f"  {ratio:.3f}x {value}")
        winner = max(ratios, key=ratios.get)
        if ratios[winner] < ENOUGH:
            break
        best, gained = winner, gained * ratios[winner]
    log(f"{entry}: {f'{gained:.3f}x with {best}' if best != start else 'stays as it is'}, {len(cases)} cases")
    return best, gained


def compile_beforehand(entry: Entry, values: list[Value], cases: list[Case], *, device: str, workers: int) -> int:
    """Let other processes make every call once: what they compile is in Triton's cache on disk afterwards.

    Returns:
        How many calls were served.
    """
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        calls = [pool.submit(_call_once, entry, value, cases, device) for value in values]
        return sum(call.result() for call in calls)


def _call_once(entry: Entry, value: Value, cases: list[Case], device: str) -> int:
    """How many of the cases were served."""
    served = 0
    for case in cases:
        try:
            with entry.served_with(value):
                getattr(ops, case.op)(**case.arguments(device))
        except Exception:  # the process that times says why
            break
        served += 1
    return served


def spread(cases: list[Case]) -> list[Case]:
    """At most ``MOST_CASES`` of the cases, evenly from all of them."""
    return cases[:: -(-len(cases) // MOST_CASES) or 1]


def tune_triton(args: argparse.Namespace) -> None:
    device, ends = torch.device(args.device), time.monotonic() + args.seconds
    source = Path(sys.modules["mixrank_kernels.triton.config"].__file__)
    cases = list(gpu_cases.cases() if args.device == "cuda" else samples.tiny_cases(torch.float32))
    winners: dict[Entry, Value] = {}

    def prepare(entry: Entry, values: list[Value], cases: list[Case]) -> None:
        if args.workers:
            compile_beforehand(entry, values, cases, device=args.device, workers=args.workers)

    for entry in entries():
        of_entry = spread([case for case in cases if entry.serves(case)])
        if args.only and str(entry) not in args.only:
            continue
        if not of_entry or time.monotonic() > ends:
            print(f"{entry}: left out, {'no time is left' if of_entry else 'no case of the suite is served with it'}")
            continue
        with torch.inference_mode():
            best, _ = tuned(
                entry,
                of_entry,
                device,
                device_timer(device),
                passes=args.passes,
                time_left=lambda: time.monotonic() < ends,
                prepare=prepare,
                log=lambda line: print(line, flush=True),
            )
        if best != entry.value:
            winners[entry] = best
            if args.write:  # one at a time, that an interruption loses one at most
                write_text(source, rewritten(source.read_text(encoding="utf-8"), {entry: best}))
            entry.set(best)
    print(f"{len(winners)} entries {'changed' if args.write else 'would change with --write'}")


def tune_choices_file(args: argparse.Namespace) -> None:
    text = tune_choices.PATH.read_text(encoding="utf-8")
    changed, told = tune_choices.decided(text, read(args.results))
    for line in told:
        print(line)
    if args.write:
        write_text(tune_choices.PATH, changed)
    elif changed != text:
        print("nothing is written without --write")


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    triton = commands.add_parser("triton", help="block sizes of the Triton kernels")
    triton.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: small cases, interpreted")
    triton.add_argument("--only", action="append", metavar="ENTRY", help="only this entry (repeatable)")
    triton.add_argument("--passes", type=int, default=3, help="steps from the present values at most")
    triton.add_argument("--seconds", type=float, default=480.0, help="begin nothing later than this")
    triton.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile; 0 for none")
    triton.set_defaults(run=tune_triton)
    choices = commands.add_parser("choices", help="which implementation serves which sizes")
    choices.add_argument("results", type=Path, metavar="RESULTS", help="a file of python -m mixrank_bench.gpu --save")
    choices.set_defaults(run=tune_choices_file)
    for command in (triton, choices):
        command.add_argument("--write", action="store_true", help="change the committed file")
    args = parser.parse_args(arguments)
    try:
        _check(args)
        args.run(args)
    except InputError as error:
        parser.error(str(error))


def _check(args: argparse.Namespace) -> None:
    if args.run is not tune_triton:
        return
    names = [str(entry) for entry in entries()]
    for name in args.only or ():
        if name not in names:
            raise InputError(f"--only must be one of {', '.join(names)}, but it was {name!r}")
    if args.passes < 1:
        raise InputError(f"--passes must be at least 1, but it was {args.passes}")
    if "triton" not in backend.available(args.device):
        raise InputError(f"--device must be one that Triton serves, but it was {args.device}: {_obstacle(args.device)}")


def _obstacle(device: str) -> Any:
    return "triton is not installed" if not _register.HAS_TRITON else f"there is no {device} device for it"


if __name__ == "__main__":
    main()
