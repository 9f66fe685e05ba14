"""``mixrank bench``: times the operators on this machine against what could serve the same layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixrank.launch import usable_processors

EPILOG = "Example: mixrank bench --only gram_accumulate_ --threads 1"


def bench(
    full: Annotated[bool, typer.Option("--full", help="Every case and every peer; takes about an hour.")] = False,
    threads: Annotated[
        list[int] | None, typer.Option(help="Threads of one operation (repeatable).", show_default="1 and all")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Turns of each variant.", show_default="5, or 9 with --full")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this operator (repeatable).")] = None,
    save: Annotated[Path | None, typer.Option(help="Add the rows to this file, as JSON lines.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the result to this file, as JSON.")] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="Only name the cases.")] = False,
    busy: Annotated[bool, typer.Option("--busy", help="Measure although the machine is busy.")] = False,
) -> None:
    """Time the operators against what could serve the same layers, and against what this machine can do at most.

    Each case first passes its error budget. The last table compares the results with what the kernels are to reach.
    """
    from mixrank.cli_input import check_outputs
    from mixrank_bench.run import Options, run

    check_outputs({"--save": save, "--json": json})
    wanted = tuple(threads or sorted({1, usable_processors()}))
    green = run(Options(full, wanted, rounds, tuple(only or ()), save, json, list_cases, busy))
    raise typer.Exit(0 if green else 1)
