"""Make the tables and figures of the documents from the committed results: ``python -m mixrank_bench.report``.

A table stands between ``<!-- generated: ... -->`` and ``<!-- end -->``; ``--check`` fails where a document is not what
the results say.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mixrank_bench import (
    architectures,
    figures,
    gradient_spread,
    tables_ablation,
    tables_cuda,
    tables_export,
    tables_gpu_results,
    tables_gpu_roofline,
    tables_int8,
    tables_ladder,
    tables_models,
    tables_ops,
    tables_peers,
    tables_pivoted,
    tables_reliability,
    tables_scale,
    tables_triton,
    tables_uvc,
    tables_vit,
)
from mixrank_bench.environment import ROOT, in_checkout

BLOCK = re.compile(r"(<!-- generated: python -m mixrank_bench\.report(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)

DOCUMENTS: dict[str, dict[str | None, Callable[[], str]]] = {
    "README.md": {None: tables_vit.front},
    "docs/accuracy.md": {
        "front": tables_vit.front,
        "strategies": tables_vit.strategies,
        "costs": tables_vit.costs,
        "speeds": tables_vit.speeds,
        "aims": tables_vit.aims,
        "compensation": tables_vit.compensation,
        "peers": tables_peers.peers,
        "subsets": tables_peers.subsets,
        "oats-speed": tables_peers.sparse_speed,
        "ablation": tables_ablation.switches,
        "by-heart": tables_ablation.by_heart,
        "gradient-spread": gradient_spread.spread,
    },
    "docs/architectures.md": {"families": architectures.families},
    "docs/benchmarks.md": {
        "machine": tables_ops.machine,
        "steadiness": tables_ops.steadiness,
        "gpu": tables_gpu_results.gpu,
        "figures": partial(figures.links, "roofline", "speedups"),
        "summary": tables_ops.summary,
        "ceiling": tables_ops.ceiling,
        "bars": tables_ops.bar_lines,
        "losing": tables_ops.losing,
        "calibration": tables_models.calibration,
        "models": tables_models.models,
        "exported": tables_export.runtimes,
    },
    "docs/benchmarks_all.md": {"machine": tables_ops.machine, "all": tables_ops.complete, "absent": tables_ops.absent},
    "docs/kernels/lowrank_linear.md": {"ladder-lowrank": tables_ladder.lowrank, "by-rank": tables_ops.by_rank},
    "docs/kernels/cuda.md": {"cuda-build": tables_cuda.build},
    "docs/kernels/gram.md": {"ladder-gram": tables_ladder.gram, "by-width": tables_ops.by_width},
    "docs/kernels/gpu.md": {
        "gpu-fill": tables_gpu_roofline.fill,
        "gpu-fusing": tables_gpu_roofline.fusing,
        "gpu-roofline": tables_gpu_roofline.roofline,
    },
    "docs/kernels/int8.md": {"int8-speed": tables_int8.speed, "int8-accuracy": tables_int8.accuracy},
    "docs/kernels/pivoted.md": {"pivoted-speed": tables_pivoted.speed},
    "docs/reliability.md": {
        "interruptions": tables_reliability.interruptions,
        "hostile": tables_reliability.hostile,
    },
    "docs/scale.md": {
        "scale-measured": tables_scale.measured,
        "scale-large": tables_scale.large,
        "memory": tables_scale.memory,
    },
    "docs/uvc.md": {
        "uvc-methods": tables_uvc.methods,
        "uvc-mechanisms": tables_uvc.mechanisms,
        "uvc-split": tables_uvc.split,
        "uvc-speed": tables_uvc.speed,
        "uvc-times": tables_uvc.times,
        "uvc-figures": partial(figures.links, "uvc_front", "uvc_run"),
    },
    "docs/kernels/triton.md": {"triton-resources": tables_triton.triton_resources},
}


def render(path: Path, blocks: dict[str | None, Callable[[], str]]) -> str:
    """The document with each of its generated blocks made anew."""
    return BLOCK.sub(lambda match: match[1] + "\n" + blocks[match[2]]() + "\n" + match[3], path.read_text())


def stale(root: Path = ROOT) -> list[str]:
    """The documents and figures under ``root`` that are not what the results say."""
    found = [name for name, blocks in DOCUMENTS.items() if render(root / name, blocks) != (root / name).read_text()]
    return found + figures.stale(root)


def write(root: Path = ROOT) -> None:
    """Make the documents and figures under ``root`` anew."""
    for name, blocks in DOCUMENTS.items():
        text = render(root / name, blocks)
        if text != (root / name).read_text():
            (root / name).write_text(text)
    figures.write(root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a document is out of date")
    args = parser.parse_args()
    if not in_checkout():
        sys.exit("the documents and results are in a checkout of mixrank-kernels; this is an installed copy")
    if not args.check:
        write()
    elif found := stale():
        sys.exit(f"out of date, run python -m mixrank_bench.report: {', '.join(found)}")


if __name__ == "__main__":
    main()
