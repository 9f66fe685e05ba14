"""Time the operators against what a user would take instead: ``mixrank bench`` or ``python -m mixrank_bench.run``.

Every case first passes the error budget on its own inputs; where it does not, there is no number. Variants take turns
within one process. Ceilings are measured first, in the same run. ``--save`` adds the rows to a file as JSON lines;
``python -m mixrank_bench.report`` makes docs/benchmarks.md from ``bench/results/ops.jsonl``.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mixrank.cli_output import write_json
from mixrank.errors import InputError
from mixrank_bench import affinity, bars, ceilings, engines, ops, peers
from mixrank_bench.ceilings import Ceilings
from mixrank_bench.environment import append_all, busy, environment, peer_versions
from mixrank_bench.measures import Measure
from mixrank_bench.memory import keep_freed_memory
from mixrank_bench.timing import SETTLE_SECONDS, SETTLE_THREADS_SECONDS, interleaved
from mixrank_kernels._schema import INT8_SCHEMAS, SCHEMAS

CASE_SECONDS = 20.0
"""Where the rounds of a case would take longer than this, there are fewer of them."""
TITLES = {
    "factors": "best at the same factors",
    "add": "best linear + add",
    "dense": "best dense",
    "gram": "best peer",
    "floating": "best without quantisation",
}


@dataclass(frozen=True)
class Options:
    """What ``mixrank bench`` was asked for.

    Attributes:
        full: every case and every peer, instead of a few.
        threads: numbers of threads to time one after another.
        rounds: turns of each variant; None is 5 for the quick suite and 9 for the full one.
        only: operators to time; all of them when empty.
        save: a file to add the rows to, as JSON lines.
        json: a file to write the whole result to.
        list: only name the cases.
        busy: time them although the machine is busy.
    """

    full: bool = False
    threads: tuple[int, ...] = (1,)
    rounds: int | None = None
    only: tuple[str, ...] = ()
    save: Path | None = None
    json: Path | None = None
    list: bool = False
    busy: bool = False

    def __post_init__(self) -> None:
        if self.rounds is not None and self.rounds < 1:
            raise InputError(f"--rounds must be at least 1, but it was {self.rounds}")
        for threads in self.threads:
            if threads < 1:
                raise InputError(f"--threads must be at least 1, but it was {threads}")
        for op in self.only:
            if op not in SCHEMAS | INT8_SCHEMAS:
                raise InputError(f"--only must be one of {', '.join(SCHEMAS | INT8_SCHEMAS)}, but it was {op!r}")

    def cases(self) -> Iterator[ops.Case]:
        """The cases to time."""
        for case in ops.cases() if self.full else ops.quick_cases():
            if not self.only or case.op in self.only:
                yield case


def measure(case: ops.Case, threads: int, options: Options) -> dict[str, Any]:
    """Time one case with every variant; torch's number of threads must be ``threads`` already.

    Returns:
        A row of results. ``milliseconds`` holds the timings by group and name, ``absent`` the reason of each peer that
        is missing, and ``gate`` is None, or says why there are no timings.
    """
    torch.compiler.reset()  # it compiles a function for a few shapes only, and gives up then
    field = peers.field(case, compiling=case.m == ops.TOKENS, unpacked=options.full)
    row = {"kind": "op", "threads": threads} | case.to_json() | {"absent": field.absent, "gate": None}
    try:
        peers.gate(case, field)
    except AssertionError as error:
        return row | {"milliseconds": {}, "gate": str(error)}
    calls = {(group, name): v.call for group, named in field.variants.items() for name, v in named.items()}
    with affinity.bound(threads):
        timings = interleaved(
            calls,
            rounds=options.rounds or (9 if options.full else 5),
            turn_seconds=0.01 if options.full else 0.005,
            settle_seconds=SETTLE_SECONDS if threads == 1 else SETTLE_THREADS_SECONDS,
            limit_seconds=CASE_SECONDS,
        )
    return row | {"milliseconds": peers.nested({key: dataclasses.asdict(timing) for key, timing in timings.items()})}


def run(options: Options) -> bool:
    """Time what was asked for, print it, and return whether every gate was green.

    Raises:
        InputError: the machine is busy, or an option cannot be.
    """
    console = Console()
    if options.list:
        for case in options.cases():
            console.print(f"{case.op}  {case.dtype_name}  {case.name}", highlight=False, soft_wrap=True)
        return True
    keep_freed_memory()
    reason = None if options.busy else busy()
    if reason:
        raise InputError(f"{reason}: timings would mean nothing; wait, or pass --busy to have them all the same")
    header = environment() | {"threads": list(options.threads), "peers": peer_versions()}
    header |= {"openblas": engines.openblas_core(), "omp_proc_bind": os.environ.get("OMP_PROC_BIND")}
    now = datetime.datetime.now(datetime.UTC)
    run_id = f"{now:%Y%m%dT%H%M%SZ}-{header['commit']}"
    console.print(", ".join(f"{name} {value}" for name, value in header.items()), highlight=False, soft_wrap=True)

    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append({"run": run_id, "full": options.full} | row)
        if options.save:
            append_all(options.save, rows[-1:], header)

    affinity.release()
    unbound = affinity.unbound_workers(max(options.threads))
    if unbound:
        print(f"warning: {unbound}", file=sys.stderr)
    before = torch.get_num_threads()
    try:
        found = _measure_all(options, console, keep)
    finally:
        torch.set_num_threads(before)
    _print_results(console, found)
    lines = bars.judge(found)
    console.print(bar_table(lines), highlight=False)
    if options.json:
        result = {"run": run_id, "environment": header, "rows": rows}
        write_json(options.json, result | {"bars": [dataclasses.asdict(line) for line in lines]})
    red = [one for one in found if one.red]
    for one in red:
        print(f"no number for {one.row['op']} {one.row['dtype']} {one.row['case']}: {one.red}", file=sys.stderr)
    return not red


def _measure_all(options: Options, console: Console, keep: Callable[[dict[str, Any]], None]) -> list[Measure]:
    """Ceilings first, then every case, for each number of threads."""
    limits: dict[int, Ceilings] = {}
    for threads in options.threads:
        limits[threads] = ceilings.measure(threads)
        keep(limits[threads].to_json())
        console.print(ceiling_line(limits[threads]), highlight=False, soft_wrap=True)
    found = []
    cases = list(options.cases())
    with Progress(console=console, transient=True) as progress, torch.inference_mode():
        task = progress.add_task("", total=len(cases) * len(options.threads))
        for threads in options.threads:
            torch.set_num_threads(threads)
            for case in cases:
                progress.update(task, advance=1, description=f"{threads}T {case.op} {case.dtype_name} {case.name}")
                row = measure(case, threads, options)
                keep(row)
                found.append(Measure(row, limits[threads]))
    return found


def ceiling_line(limits: Ceilings) -> str:
    """The ceilings in one sentence."""
    rates = [f"{dtype} {rate / 1e9:.0f} GF/s" for dtype, rate in limits.flops.items()] or ["arithmetic not measured"]
    moves = [f"{rate / 1e9:.0f} GB/s within {size / 2**20:g} MiB" for size, rate in limits.bandwidth.items()]
    return f"ceilings, {limits.threads} threads: {', '.join(rates)}; memory {', '.join(moves)}"


def _print_results(console: Console, found: list[Measure]) -> None:
    table = Table(
        "operator", "case", "dtype", "T", "ms", "spread", "GF/s", "% of roof", "against (above 1: ours is faster)"
    )
    for one in found:
        row = one.row
        cells = (row["op"], row["case"], row["dtype"], str(row["threads"]))
        if one.red:
            table.add_row(*cells, "-", "-", "-", "-", "no number: the error budget is exceeded")
            continue
        roof = f"{one.roof[0]:.0f}, {one.roof[1]}" if one.roof else "-"
        times = (f"{one.milliseconds:.3f}", f"{one.spread:.0%}", f"{one.rate() / 1e9:.0f}")
        table.add_row(*cells, *times, roof, "; ".join(against(one)))
    console.print(table, highlight=False)


def against(one: Measure) -> list[str]:
    """The best peer of each group and the ratio to it, in words."""
    found = []
    for group, title in TITLES.items():
        best = one.best(group)
        if best:
            found.append(f"{title} {best[1] / one.milliseconds:.2f}x ({best[0]})")
    return found


def bar_table(lines: list[bars.Line]) -> Table:
    """What is required, what was measured, and whether that is enough."""
    table = Table("bar", "dtype", "T", "wanted", "measured", "met", "why not")
    for line in lines:
        measured = "no number" if line.measured is None else f"{line.measured:.2f}{line.unit}"
        met = "yes" if line.met else "no"
        table.add_row(line.text, line.dtype, str(line.threads), line.wanted, measured, met, line.note)
    return table


if __name__ == "__main__":
    from mixrank.cli import app

    app(["bench", *sys.argv[1:]], prog_name="mixrank")
