"""Published training-free compression of a real ViT-B/16 beside ours: same images, same budgets, same evaluation.

    MIXRANK_DATA=FOLDER python -m mixrank_bench.vit_b16_peers --cache FILE

FOLDER is that of :mod:`mixrank_bench.vit_b16`. One JSON line for each method and budget, and one for the dense model,
goes to ``bench/results/vit_b16_peers.jsonl``, with which test images are right; what is there already for the same
calibration images is not measured again, so an interrupted run goes on. ``--models DIR`` keeps what our methods made,
for :mod:`mixrank_bench.vit_b16_oats_speed`. No option is chosen by the test images: each
method has its paper's. ``python -m mixrank_bench.report`` makes a table of docs/accuracy.md from it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixrank.checkpoint import save
from mixrank.counting import count_parameters
from mixrank.data import open_images
from mixrank.errors import InputError
from mixrank.models import preprocessing
from mixrank.precision import fast_dtype
from mixrank_bench import vit_b16
from mixrank_bench.accuracy_peers import statistics
from mixrank_bench.accuracy_peers.methods import METHODS
from mixrank_bench.accuracy_peers.statistics import Calibration
from mixrank_bench.environment import RESULTS, append, read
from mixrank_bench.fidelity import Reference, compare, compare_logits, reference

OUT = RESULTS / "vit_b16_peers.jsonl"
OURS = "mixrank, "
KEEPS = (0.5, 0.4, 0.6)
CALIBRATION_IMAGES = 512
CALIBRATION_BATCH = 32
CALIBRATION_DTYPE = fast_dtype()
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


def prepared_data(
    data: vit_b16.Data, dense: nn.Module, seed: int, dtype: str, cache: Path | None, *, inputs: bool
) -> tuple[Calibration, Reference]:
    """A random subset of the calibration images with the statistics on it, and the dense model on the test images.

    What takes a pass of the dense model comes from ``cache``, or is written to it; where ``inputs`` is false and there
    is no such file, there are no statistics.
    """
    source = open_images(data.folder / "calibration", preprocessing(dense), limit=CALIBRATION_IMAGES, seed=seed)
    images = [batch.images for batch in source.batches(CALIBRATION_BATCH, workers=0)]
    made_from = {"images": CALIBRATION_IMAGES, "seed": seed, "dtype": str(CALIBRATION_DTYPE), "evaluation": dtype}
    if cache is not None and cache.is_file():
        layers, others = statistics.load(cache, made_from)
        test = reference(dense, data.test(dense), logits=others["logits"])
    else:
        print("running the dense model on all images", file=sys.stderr, flush=True)
        layers = statistics.input_statistics(dense, images, dtype=CALIBRATION_DTYPE) if inputs else {}
        test = reference(dense, data.test(dense), dtype=DTYPES[dtype])
        if cache is not None and inputs:
            statistics.save(cache, layers, made_from, logits=test.logits)
    return Calibration(images, layers, CALIBRATION_DTYPE), test


def missing(out: Path, names: list[str], keeps: list[float], conditions: dict[str, Any]) -> list[tuple[str, float]]:
    """The pairs of method and budget that have no row under these conditions yet, methods that share work together."""
    done = {(row["method"], row["keep"]) for row in read(out) if conditions.items() <= row.items()}
    return [pair for pair in itertools.product(names, keeps) if pair not in done]


def measure(
    data: vit_b16.Data, out: Path, wanted: list[tuple[str, float]], args: argparse.Namespace, conditions: dict[str, Any]
) -> None:
    """Compress by each wanted method to each wanted budget and add a row for each."""
    dense = data.model()
    inputs = any(METHODS[name].reads_inputs for name, _ in wanted)
    calibration, test = prepared_data(data, dense, args.seed, args.dtype, args.cache, inputs=inputs)
    if not any(row["method"] == "dense" and conditions.items() <= row.items() for row in read(out)):
        details = {"method": "dense", "source": "", "keep": 1.0, "parameters": count_parameters(dense)}
        append(out, details | conditions | compare_logits(test.logits, test).to_json())
    for prepare, group in itertools.groupby(wanted, key=lambda pair: METHODS[pair[0]].prepare):
        started = time.perf_counter()
        prepared = prepare(dense, calibration)
        seconds = time.perf_counter() - started
        for name, keep in group:
            row = _row(name, keep, prepared, dense, test, DTYPES[args.dtype], args.models)
            append(out, row | {"seconds_prepare": seconds} | conditions)
            print(f"{name} at {keep}: {row['top1']:.1f} %, KL {row['kl']:.3f}", file=sys.stderr, flush=True)


def _row(
    name: str,
    keep: float,
    prepared: Any,
    dense: nn.Module,
    test: Reference,
    dtype: torch.dtype | None,
    models: Path | None,
) -> dict[str, Any]:
    method, model = METHODS[name], copy.deepcopy(dense)
    started = time.perf_counter()
    compressed = method.compress(model, prepared, keep)
    seconds = time.perf_counter() - started
    if compressed.parameters > keep * count_parameters(dense):
        raise InputError(f"{name} must leave at most {keep} of the parameters, but left {compressed.parameters}")
    if models is not None and name.startswith(OURS):
        models.mkdir(parents=True, exist_ok=True)
        save(model, kept_at(models, name, keep))
    row = {"method": name, "source": method.source, "how": method.ranks, "keep": keep}
    row |= {"parameters": compressed.parameters, "seconds_compress": seconds} | compressed.details
    return row | compare(model, test, dtype=dtype).to_json()


def kept_at(models: Path, name: str, keep: float) -> Path:
    """Where what a method of ours made is kept."""
    return models / f"{name.removeprefix(OURS).replace(' ', '_')}_{keep}.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="the file of results, added to")
    parser.add_argument("--cache", type=Path, help="a file that keeps the calibration statistics between runs")
    parser.add_argument("--models", type=Path, help="a folder to keep the models in that our methods make")
    parser.add_argument("--keep", type=float, action="append", help="only this budget (repeatable)")
    parser.add_argument("--method", choices=METHODS, action="append", help="only this method (repeatable)")
    parser.add_argument("--seed", type=int, default=0, help="of the random subset of the calibration images")
    parser.add_argument("--threads", type=int, default=1, help="threads of one operation")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="autocast of the evaluation")
    args = parser.parse_args()
    if "MIXRANK_DATA" not in os.environ:
        parser.error("set MIXRANK_DATA to the folder with the model and the images")
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, but it was {args.threads}")
    torch.set_num_threads(args.threads)
    conditions = {"evaluation_dtype": args.dtype, "calibration_images": CALIBRATION_IMAGES, "seed": args.seed}
    wanted = missing(args.out, args.method or list(METHODS), args.keep or list(KEEPS), conditions)
    if not wanted:
        return
    with tempfile.TemporaryDirectory() as scratch:
        data = vit_b16.Data(Path(os.environ["MIXRANK_DATA"]), Path(scratch))
        data.dequantize()
        measure(data, args.out, wanted, args, conditions)


if __name__ == "__main__":
    main()
