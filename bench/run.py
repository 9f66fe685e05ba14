"""Time the operators against what a user would write instead: ``python -m mixrank_bench.run`` (``make bench``).

Every case first passes the error budget on its own inputs; a case that does not is an error, not a row. Results go to
``bench/results/ops.jsonl`` with ``--save``; ``python -m mixrank_bench.report`` makes docs/benchmarks.md from them.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mixrank_bench.environment import RESULTS, append, environment
from mixrank_bench.ops import Case, cases
from mixrank_bench.timing import Timing, interleaved
from mixrank_kernels import ops, reference, testing

OUT = RESULTS / "ops.jsonl"


def gate(case: Case) -> None:
    """Raise AssertionError unless the operator is within its error budget on the case's own inputs."""
    function = getattr(ops, case.op)
    exact = testing.run(getattr(reference, case.op), testing.exact(case.arguments))
    plain = testing.run(testing.plain(case.op), case.arguments)
    for ours, true, yardstick in zip(testing.run(function, case.arguments), exact, plain, strict=True):
        testing.assert_within_budget(ours, true, yardstick, case.dtype)


def row(case: Case, timings: dict[str, Timing], threads: int) -> dict:
    """One case as it is written to the results."""
    return {
        "kind": "op",
        "op": case.op,
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "threads": threads,
        "flops": case.flops,
        "milliseconds": {name: dataclasses.asdict(timing) for name, timing in timings.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of one operation")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each variant")
    parser.add_argument("--save", type=Path, nargs="?", const=OUT, help=f"add the rows to a file ({OUT.name})")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    console = Console()
    console.print(environment(), highlight=False)
    table = Table("operator", "case", "dtype", "ours, ms", "GF/s", "against each peer (above 1: ours is faster)")
    with torch.inference_mode():
        for case in cases():
            gate(case)
            timings = interleaved(case.variants, rounds=args.rounds)
            ours = timings["ours"].median
            peers = "  ".join(f"{name} {t.median / ours:.2f}x" for name, t in timings.items() if name != "ours")
            rate = case.flops / ours / 1e6
            table.add_row(case.op, case.name, str(case.dtype)[6:], f"{ours:.3f}", f"{rate:.0f}", peers)
            if args.save:
                append(args.save, row(case, timings, args.threads))
    console.print(table)


if __name__ == "__main__":
    main()
