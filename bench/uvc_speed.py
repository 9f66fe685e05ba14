"""How fast models are from which parts were removed, beside what their multiply-adds promise.

    python -m mixrank_bench.uvc_speed --models MODELS

MODELS is what :mod:`mixrank_bench.uvc` wrote. They are timed beside the dense model, interleaved, on one and on two
threads; and so is a DeiT-S of 224 pixels, of random weights, from whose blocks the same shares were removed, since the
models of MODELS are so small that what is no multiply-add counts for much. JSON lines go to
``bench/results/uvc_speed.jsonl``: images per second, and milliseconds of each kind of operation.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict
from pathlib import Path

import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import mixrank
from mixrank.counting import count_macs
from mixrank.demo import ASSETS
from mixrank.evaluate import compare_speed
from mixrank.models import preprocessing
from mixrank.uvc.shrink import KeptBlock, remaining_blocks, shrink_
from mixrank.uvc.structure import parts_of
from mixrank_bench.environment import RESULTS, append, busy
from mixrank_bench.uvc import BUDGETS, file_of, load, name_of

OUT = RESULTS / "uvc_speed.jsonl"
LARGER = "deit_small_patch16_224"
BATCH, ROUNDS, THREADS, PROFILED = 8, 25, (1, 2), 20

KINDS = {
    "linear layers": ("addmm", "mm"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu",),
    "GELU": ("gelu",),
    "normalisation": ("native_layer_norm",),
    "copies": ("copy_", "cat", "fill_", "constant_pad_nd"),
    "sums": ("add", "add_"),
}
"""Operations of torch, without their prefix, by what they are for; all others are "everything else"."""
ELSE = "everything else"


def like(model: nn.Module, small: nn.Module) -> nn.Module:
    """A copy of ``model`` from which the same shares are removed as from ``small``, whose heads are as wide."""
    parts, left = parts_of(model), {block.index: block.shape for block in remaining_blocks(small) or ()}
    whole = load(ASSETS, {})
    heads, neurons, count = len(parts_of(whole)[0].columns), parts_of(whole)[0].mlp.fc1.out_features, len(whole.blocks)
    kept: list[KeptBlock | None] = []
    for index, part in enumerate(parts):
        shape = left.get(index * count // len(parts))
        if shape is None:
            kept.append(None)
            continue
        columns = (*shape.columns, *(0,) * (heads - len(shape.columns)))
        of_heads = [columns[head * heads // len(part.columns)] for head in range(len(part.columns))]
        stay = max(1, shape.neurons * part.mlp.fc1.out_features // neurons)
        kept.append(KeptBlock(tuple(tuple(range(number)) for number in of_heads), tuple(range(stay))))
    return shrink_(copy.deepcopy(model), kept)


def milliseconds(model: nn.Module, images: torch.Tensor) -> dict[str, float]:
    """Of one batch, by kind of operation."""
    kind_of = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names}
    found = dict.fromkeys((*KINDS, ELSE), 0.0)
    with torch.inference_mode():
        model(images)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(PROFILED):
                model(images)
    for event in profiled.key_averages():
        found[kind_of.get(event.key, ELSE)] += event.self_cpu_time_total / 1000 / PROFILED
    return found


def measure(models: dict[str, nn.Module], name: str, out: Path, rounds: int) -> None:
    """Append the rows of models of one kind, the first of which is dense."""
    images = torch.randn(BATCH, *preprocessing(models["dense"])["input_size"])
    before = torch.get_num_threads()
    for threads in THREADS:
        torch.set_num_threads(threads)
        try:
            speeds = compare_speed(models, images, rounds=rounds)
            for budget, speed in speeds.items():
                row = {"model": name, "budget": budget, "macs": count_macs(models[budget])}
                append(out, row | asdict(speed) | {"milliseconds": milliseconds(models[budget], images)})
        finally:
            torch.set_num_threads(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="the folder that mixrank_bench.uvc wrote into")
    parser.add_argument("--seed", type=int, default=0, help="of the run whose models these are")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--busy", action="store_true", help="measure although the machine is busy")
    parser.add_argument("--out", type=Path, default=OUT, help="the file of results, added to")
    args = parser.parse_args()
    reason = None if args.busy else busy()
    if reason:
        parser.error(f"{reason}: timings would mean nothing; wait, or pass --busy to have them all the same")
    dense, larger = load(ASSETS, {}).eval(), timm.create_model(LARGER).eval()
    files = {f"{budget:g}": args.models / file_of(budget, args.seed) for budget in BUDGETS}
    small = {budget: mixrank.load(file).eval() for budget, file in files.items() if file.is_file()}
    measure({"dense": dense} | small, name_of(dense), args.out, args.rounds)
    alike = {budget: like(larger, one) for budget, one in small.items()}
    measure({"dense": larger} | alike, LARGER, args.out, args.rounds)


if __name__ == "__main__":
    main()
