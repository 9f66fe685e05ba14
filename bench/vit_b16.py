"""Compress a real ViT-B/16 by every strategy and measure accuracy, speed, time and memory.

    MIXRANK_DATA=FOLDER python -m mixrank_bench.vit_b16

FOLDER holds ``vit_base_patch16_224.int8.safetensors`` with ``dequantize.py``, ``calibration/`` (unlabelled images),
``test/`` and ``test.csv`` (columns file, label). One JSON line for each measurement goes to
``bench/results/vit_b16.jsonl``; what is there already is not measured again, so an interrupted run goes on.
``python -m mixrank_bench.report`` makes the tables of docs/accuracy.md from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import mixrank
from mixrank.allocate import allocate, plan_of
from mixrank.apply import apply_
from mixrank.calibrate import calibrate
from mixrank.counting import count_macs
from mixrank.data import open_images
from mixrank.decompose import decompose
from mixrank.evaluate import compare_speed, evaluate, summarise
from mixrank.measured_pull import first_pull
from mixrank.models import create_model, preprocessing, split_qkv_, twin
from mixrank.planning import SENSITIVITY_IMAGES, plan_and_pull, plan_ranks
from mixrank.precision import fast_dtype
from mixrank.sample import Sample
from mixrank.shrinkage import MEASURED
from mixrank.stats import CalibrationStats, LayerStats
from mixrank.weighting import Weighting
from mixrank_bench.environment import RESULTS, append, read
from mixrank_bench.fidelity import compare_logits, reference
from mixrank_bench.memory import peak_megabytes
from mixrank_bench.vit_b16_strategies import KEEPS, Strategy, low_rank_plans, low_ranks, speed_name, strategies

ARCHITECTURE = "vit_base_patch16_224"
OUT = RESULTS / "vit_b16.jsonl"
COST_IMAGES = 256
SPEED_BATCH = 8
SUMS = ("gram", "total", "gradient")
ALIKE = Weighting("none")


def checkpoint_of(models: Path, keep: float) -> Path:
    """Where in the folder ``models`` the model that the defaults compressed to a budget is kept."""
    return models / f"keep_{keep}.safetensors"


class Data:
    """The folder with the real model and images."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder = folder
        self.weights = scratch / "vit_b16.safetensors"

    def dequantize(self) -> None:
        subprocess.run([sys.executable, str(self.folder / "dequantize.py"), str(self.weights)], check=True)

    def model(self) -> torch.nn.Module:
        return create_model(ARCHITECTURE, weights=self.weights)

    def calibration(self, model: torch.nn.Module, limit: int | None = None):
        return open_images(self.folder / "calibration", preprocessing(model), limit=limit).batches(32)

    def test(self, model: torch.nn.Module):
        source = open_images(self.folder / "test", preprocessing(model), labels=self.folder / "test.csv")
        return source.batches(50)


def cached_statistics(
    data: Data, model: torch.nn.Module, cache: Path | None, tokens: Weighting = ALIKE
) -> CalibrationStats:
    """The statistics of all calibration images, with gradients.

    With ``cache``, from that file, or written to it; those of tokens that do not count alike in a file beside it.
    """
    if cache is not None and tokens != ALIKE:
        cache = cache.with_name(f"{cache.stem}_{tokens.kind}_{tokens.value}{cache.suffix}")
    if cache is not None and cache.is_file():
        with safe_open(cache, "pt") as file:
            header = json.loads(file.metadata()["statistics"])
            main, apart = (_part(file, part, header[part]) for part in ("main", "held_out"))
        main.held_out = apart
        return main
    print("calibrating on all images", file=sys.stderr)
    options = {"held_out": None, "gradients": True, "weighting": tokens, "progress": True}
    stats = calibrate(model, data.calibration(model), **options)
    if cache is not None:
        tensors, header = {}, {}
        for part, found in (("main", stats), ("held_out", stats.held_out)):
            layers = {name: (layer.side, layer.rows) for name, layer in found.items()}
            header[part] = {"layers": layers, "images": found.images, "seconds": found.seconds}
            for sums in SUMS:
                tensors |= {f"{part}.{name}.{sums}": getattr(layer, sums).clone() for name, layer in found.items()}
        save_file(tensors, cache, {"statistics": json.dumps(header)})
    return stats


def _part(file: Any, part: str, header: dict[str, Any]) -> CalibrationStats:
    layers = {
        name: LayerStats(
            side,
            rows=rows,
            images=header["images"],
            **{sums: file.get_tensor(f"{part}.{name}.{sums}") for sums in SUMS},
        )
        for name, (side, rows) in header["layers"].items()
    }
    return CalibrationStats(layers, header["images"], header["seconds"])


def measure_strategies(data: Data, out: Path, wanted: list[Strategy], cache: Path | None, models: Path | None) -> None:
    """A row for each strategy that has none yet; with ``models``, what the defaults make is kept in that folder."""
    done = {Strategy(**row["strategy"]) for row in read(out) if row["kind"] == "strategy"}
    wanted = [strategy for strategy in wanted if strategy not in done]
    if not wanted:
        return
    dense = data.model()
    test = list(data.test(dense))
    dense_score = evaluate(dense, test, progress=True)
    if not any(row["kind"] == "dense" for row in read(out)):
        append(out, {"kind": "dense"} | summarise(dense, dense_score).to_json())
    target = reference(dense, test, logits=dense_score.logits)
    sample = Sample(data.calibration(dense), SENSITIVITY_IMAGES, seed=0, held_out=None)
    list(sample)
    fused_stats, fused_tokens = None, None
    for (tokens, split, factors, centre, pull), group in itertools.groupby(
        sorted(wanted, key=_decomposition), key=_decomposition
    ):
        if fused_stats is None or fused_tokens != tokens:
            fused_stats = None  # not two at a time
            fused_stats, fused_tokens = cached_statistics(data, dense, cache, Weighting(*tokens)), tokens
        base = twin(dense)
        stats = with_parts(fused_stats, split_qkv_(base)) if split else fused_stats
        make = partial(decompose, base, factors=factors, centre=centre, shrink=pull)
        made = make(stats)
        for strategy in group:
            allocation = {name: getattr(strategy, name) for name in ("keep", "ranks", "energy", "form")}
            running = {"dtype": fast_dtype(), "progress": True}
            if strategy.shrink == MEASURED:
                plan, pulls, suited = plan_and_pull(base, made, stats, make, sample, allocation, running)
            else:
                plan, suited = plan_ranks(base, made, sample, allocation, running), made
                pulls = {"shrink": strategy.shrink}
            model = apply_(twin(base), plan, suited)
            score = evaluate(model, test, progress=True)
            errors = [suited[p.name].relative_error(p.rank) if p.rank else 0.0 for p in plan.layers]
            follows = compare_logits(score.logits, target)
            row = {
                "kind": "strategy",
                "strategy": dataclasses.asdict(strategy),
                "calibration_images": stats.all_images,
                "test_images": score.images,
                "mean_relative_error": sum(errors) / len(errors),
                "dense_layers": sum(p.rank is None for p in plan.layers),
                "ranks": {p.name: p.rank for p in plan.layers},
                "pull": pulls["shrink"],
                "agreement": follows.agreement,
                "kl": follows.kl,
                "correct": follows.correct,
            }
            append(out, row | summarise(model, score).to_json())
            if models is not None and strategy == low_ranks(strategy.keep):
                mixrank.save(model, checkpoint_of(models, strategy.keep))
            print(f"{strategy}: top-1 {score.top1:.1f} %", file=sys.stderr, flush=True)


def remake_models(data: Data, rows: list[dict[str, Any]], cache: Path | None, models: Path) -> None:
    """The models of the defaults that have a row but no file in ``models``: from the ranks of the row."""
    strategies = {Strategy(**row["strategy"]): row for row in rows if row["kind"] == "strategy"}
    lost = {keep: strategies[low_ranks(keep)] for keep in KEEPS if low_ranks(keep) in strategies}
    lost = {keep: row for keep, row in lost.items() if not checkpoint_of(models, keep).is_file()}
    if not lost:
        return
    dense = data.model()
    made = low_ranks(KEEPS[0])
    stats = cached_statistics(data, dense, cache, made.tokens)
    for keep, row in lost.items():
        factorisations = decompose(dense, stats, factors=made.factors, centre=made.centre, shrink=row["pull"])
        plan = plan_of(dense, factorisations, row["ranks"], made.form)
        mixrank.save(apply_(twin(dense), plan, factorisations), checkpoint_of(models, keep))


def _decomposition(strategy: Strategy) -> tuple[tuple[str, float | None], bool, str, bool, float | str]:
    tokens = (strategy.tokens.kind, strategy.tokens.level)
    return tokens, strategy.split_qkv, strategy.factors, strategy.centre, first_pull(strategy.shrink)


def with_parts(stats: CalibrationStats, split: tuple[str, ...]) -> CalibrationStats:
    """Statistics for a model whose fused layers were split after calibration: the parts share one input.

    The gradients of the fused layer are in its own coordinates and say nothing of a part.
    """
    layers = dict(stats)
    for name in split:
        shared = dataclasses.replace(layers.pop(name), gradient=None)
        layers |= {f"{name}.parts.{i}": shared for i in range(3)}
    apart = None if stats.held_out is None else with_parts(stats.held_out, split)
    return CalibrationStats(layers, stats.images, stats.seconds, apart)


def measure_costs(data: Data, out: Path) -> None:
    """Seconds and peak memory of each step, every step in a process of its own."""
    done = {row["step"] for row in read(out) if row["kind"] == "cost"}
    for name, step in COSTS.items():
        if name not in done:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
                append(out, {"kind": "cost", "step": name} | executor.submit(_measured, step, data).result())


def _measured(step: Callable[[Data], dict[str, Any]], data: Data) -> dict[str, Any]:
    row = step(data)
    # The highest point of the process, the interpreter and its libraries included.
    return row | {"peak_megabytes": peak_megabytes()}


def _calibrate(data: Data, dtype: torch.dtype | None) -> dict[str, Any]:
    model = data.model()
    batches = list(data.calibration(model, COST_IMAGES))
    stats = calibrate(model, batches, dtype=dtype)
    return {"seconds": stats.seconds, "images": stats.images}


def cost_calibrate_fp32(data: Data) -> dict[str, Any]:
    return _calibrate(data, None)


def cost_calibrate_bf16(data: Data) -> dict[str, Any]:
    return _calibrate(data, torch.bfloat16)


def cost_decompose(data: Data) -> dict[str, Any]:
    model = data.model()
    stats = calibrate(model, data.calibration(model, 8))
    started = time.perf_counter()
    decompose(model, stats)
    return {"seconds": time.perf_counter() - started, "images": 0}


def _forward(data: Data, keep: float | None) -> dict[str, Any]:
    model = data.model()
    if keep is not None:
        factorisations = decompose(model, factors="svd")
        apply_(model, allocate(model, factorisations, keep=keep), factorisations)
        del factorisations
    images = torch.cat([batch.images for batch in data.calibration(model, COST_IMAGES)])
    started = time.perf_counter()
    with torch.inference_mode():
        for chunk in images.split(32):
            model(chunk)
    return {"seconds": time.perf_counter() - started, "images": len(images)}


def cost_dense_forward(data: Data) -> dict[str, Any]:
    return _forward(data, None)


def cost_compressed_forward(data: Data) -> dict[str, Any]:
    return _forward(data, 0.5)


COSTS = {
    "calibrate, float32": cost_calibrate_fp32,
    "calibrate, bfloat16": cost_calibrate_bf16,
    "decompose": cost_decompose,
    "forward, dense, float32": cost_dense_forward,
    "forward, keep 0.5, float32": cost_compressed_forward,
}


def measure_speed(data: Data, out: Path) -> None:
    """Dense against compressed, interleaved, at batch 1 and 8: all, where one has no row yet.

    The factors are those of the plain SVD, since only the shapes count: of ranks by weight energy, and of the ranks
    that the defaults found, in their form.
    """
    rows = read(out)
    done = {(row["model"], row.get("macs")) for row in rows if row["kind"] == "speed"}
    dense = data.model()
    factorisations = decompose(dense, factors="svd", centre=False)
    plans = {f"keep {keep}": allocate(dense, factorisations, keep=keep) for keep in KEEPS}
    plans |= {speed_name(keep): plan for keep, plan in low_rank_plans(dense, factorisations, rows).items()}
    models = {"dense": dense}
    models |= {name: apply_(twin(dense), plan, factorisations) for name, plan in plans.items()}
    macs = {name: count_macs(model) for name, model in models.items()}
    if done >= set(macs.items()):
        return
    for batch in (1, SPEED_BATCH):
        results = compare_speed(models, torch.randn(batch, 3, 224, 224), rounds=9)
        for name, speed in results.items():
            append(out, {"kind": "speed", "model": name, "macs": macs[name]} | dataclasses.asdict(speed))


def _selected(strategy: Strategy, args: argparse.Namespace) -> bool:
    wanted = (args.only or {}).items()
    return (not args.keep or strategy.keep in args.keep) and wanted <= dataclasses.asdict(strategy).items()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="the file of results, added to")
    parser.add_argument("--keep", type=float, action="append", help="only this budget (repeatable)")
    parser.add_argument("--only", type=json.loads, help='only strategies with these fields, such as {"ranks": "mixed"}')
    parser.add_argument("--cache", type=Path, help="a file that keeps the calibration statistics between runs")
    parser.add_argument("--models", type=Path, help="a folder that keeps the models that the defaults make")
    parser.add_argument("--part", choices=("strategies", "costs", "speed"), action="append", help="only this part")
    args = parser.parse_args()
    if "MIXRANK_DATA" not in os.environ:
        parser.error("set MIXRANK_DATA to the folder with the model and the images")
    if args.models is not None and not args.models.is_dir():
        parser.error(f"--models must be a folder, but {args.models} is none")
    parts = args.part or ["strategies", "costs", "speed"]
    with tempfile.TemporaryDirectory() as scratch:
        data = Data(Path(os.environ["MIXRANK_DATA"]), Path(scratch))
        data.dequantize()
        if "strategies" in parts:
            wanted = [strategy for strategy in strategies() if _selected(strategy, args)]
            if args.models is not None:
                remake_models(data, read(args.out), args.cache, args.models)
            measure_strategies(data, args.out, wanted, args.cache, args.models)
        if "costs" in parts:
            measure_costs(data, args.out)
        if "speed" in parts:
            measure_speed(data, args.out)


if __name__ == "__main__":
    main()
