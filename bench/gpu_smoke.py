"""Call every operator once in each dtype by each implementation: ``python -m mixrank_bench.gpu_smoke``.

Small on purpose, so that it ends in time under a tool that makes every instruction a hundred times slower; what the
results are compared with is computed on the CPU. The last line counts the calls.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch

from mixrank_bench.peers import in_words
from mixrank_kernels import backend, ops, reference, testing
from mixrank_kernels._schema import SCHEMAS

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SAMPLES = {
    "lowrank_linear": ("above-tile", "slice-of-wider"),
    "lowrank_residual_linear": ("branch-above-tile", "both-32", "blocks-16"),
    "pivoted_linear": ("above-tile", "slice-of-wider"),
    "sparse_linear": ("above-tile", "slice-of-wider"),
    "gram_accumulate_": ("above-tile", "batched", "weighted"),
    "cross_gram_accumulate_": ("above-tile", "transposed"),
}
"""Samples that reach over the edges of tiles and have every argument."""


def calls(device: str) -> Iterator[tuple[str, str | None]]:
    """Call everything; yields what was called, and why it is wrong, or None."""
    for op in SCHEMAS:
        samples = {str(sample): sample for sample in testing.sample_inputs(op)}
        for name in SAMPLES[op]:
            for dtype in DTYPES:
                for implementation in (one for one in backend.available(device, op) if one != "reference"):
                    what = f"{op} {name} {str(dtype).removeprefix('torch.')} {implementation}"
                    try:
                        _compare(op, samples[name].arguments(dtype), device, implementation, dtype)
                    except Exception as error:  # a launch fails with exceptions of many kinds, a wrong result with one
                        yield what, in_words(error)
                    else:
                        yield what, None


def _compare(op: str, arguments: dict, device: str, implementation: str, dtype: torch.dtype) -> None:
    true = testing.run(getattr(reference, op), testing.exact(arguments))
    yardstick = testing.run(testing.plain(op), arguments)
    there = {name: None if tensor is None else tensor.to(device) for name, tensor in arguments.items()}
    with backend.use(implementation):
        actual = list(testing.run(getattr(ops, op), there))
    for ours, exact, other in zip(actual, true, yardstick, strict=True):
        testing.assert_within_budget(ours.cpu(), exact, other, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where the operators are called")
    args = parser.parse_args()
    found = list(calls(args.device))
    wrong = [f"{what}: {reason}" for what, reason in found if reason]
    for line in wrong:
        print(line)
    print(f"{len(found)} calls, {len(wrong)} of them wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
