"""``mixrank demo``: three budgets from one calibration, measured on real images."""

from __future__ import annotations

import dataclasses
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mixrank import checkpoint
from mixrank.apply import apply_
from mixrank.arguments import Allocation, Running, Strategy
from mixrank.attributes import note_
from mixrank.calibrate import calibrate
from mixrank.cli_output import gigamacs, megabytes, percent, rate, ratio, versions, write_json
from mixrank.compress import FORM
from mixrank.data import Batch
from mixrank.decompose import decompose
from mixrank.demo import ARCHITECTURE, ASSETS, IMAGES, MEAN, MODEL_ARGS, PREPROCESSING, STD, WEIGHTS
from mixrank.demo.exported import command, export
from mixrank.errors import InputError
from mixrank.evaluate import compare_speed, evaluate, summarise
from mixrank.files import check_writable
from mixrank.measured_pull import FIRST
from mixrank.models import create_model, twin
from mixrank.planning import SENSITIVITY_IMAGES, plan_and_pull
from mixrank.report import write_report
from mixrank.result import layer_reports
from mixrank.sample import Sample
from mixrank.shrinkage import MEASURED
from mixrank.stats import CalibrationStats
from mixrank.stopwatch import Stopwatch
from mixrank.weighting import AUTOMATIC

if TYPE_CHECKING:
    from rich.table import Table

KEEPS = (0.6, 0.45, 0.3)
FACTORS: Strategy = {"factors": "fisher"}
RANKS: Allocation = {"ranks": "mixed", "energy": "sensitivity", "step": 8, "form": FORM}
TOKENS = {"weighting": AUTOMATIC.kind, "weighting_level": AUTOMATIC.level}
STRATEGY: dict[str, object] = {**FACTORS, "shrink": MEASURED, **TOKENS, **RANKS}
SPEED_BATCH = 32
BATCH = 100
COLUMNS = ("", "parameters", "MB", "GMACs", "top-1", "images/s", "speed-up")


def load_model(assets: Path = ASSETS) -> torch.nn.Module:
    """The embedded vision transformer, in float32 and evaluation mode."""
    _check_asset(assets / WEIGHTS)
    model = create_model(ARCHITECTURE, weights=assets / WEIGHTS, args=MODEL_ARGS).float()
    note_(model, "mixrank_preprocessing", PREPROCESSING)
    return model


def load_images(assets: Path = ASSETS) -> dict[str, torch.Tensor]:
    """``calibration_images`` and ``test_images`` ``[B, 28, 28]`` uint8, ``test_labels`` ``[B]`` uint8."""
    _check_asset(assets / IMAGES)
    try:
        with np.load(assets / IMAGES, allow_pickle=False) as arrays:
            names = ("calibration_images", "test_images", "test_labels")
            return {name: torch.from_numpy(arrays[name]) for name in names}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{assets / IMAGES} is damaged ({error}): write it again with {_TRAIN}") from error


_TRAIN = "`python -m mixrank.demo.train --data FOLDER_WITH_FASHION_MNIST`"


def _check_asset(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"the demo's {path.name} is missing from {path.parent}: make it with {_TRAIN}")


def batches(images: torch.Tensor, labels: torch.Tensor | None = None, size: int = BATCH) -> list[Batch]:
    """Normalised batches of ``images`` ``[B, 28, 28]`` uint8."""
    normal = (images.float() / 255 - MEAN).div_(STD).unsqueeze(1)
    result = []
    for start in range(0, len(images), size):
        part = normal[start : start + size]
        names = [f"image {start + index}" for index in range(len(part))]
        result.append(Batch(part, None if labels is None else labels[start : start + size].long(), names))
    return result


@dataclasses.dataclass
class Variant:
    """The model under one budget."""

    label: str
    keep: float
    model: torch.nn.Module
    plan: Any
    layers: list[dict[str, Any]]
    score: Any


def run(
    out: Path,
    *,
    keeps: Sequence[float] = KEEPS,
    assets: Path = ASSETS,
    export_images: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Compress the embedded model, print the table, and write checkpoints, ``report.html`` and ``demo.json``.

    Args:
        out: the folder to write to; it is created.
        keeps: the budgets, shares of all parameters that remain.
        assets: where the weights and images are.
        export_images: also write images and weights as files, and print the command that compresses these.
        progress: show progress bars.

    Returns:
        What ``demo.json`` holds.
    """
    from rich.console import Console

    started = time.perf_counter()
    _prepare_folder(out)
    watch = Stopwatch()
    with watch.stage("load"):
        dense, images = load_model(assets), load_images(assets)
        test = batches(images["test_images"], images["test_labels"])
    with watch.stage("evaluate_dense"):
        dense_score = evaluate(dense, test, progress=progress)
    with watch.stage("calibrate"):
        sample = Sample(batches(images["calibration_images"]), SENSITIVITY_IMAGES, seed=0, held_out=None)
        stats = calibrate(dense, sample, held_out=None, gradients=True, weighting=AUTOMATIC, progress=progress)
    with watch.stage("decompose"):
        make = partial(decompose, dense, **FACTORS, progress=progress)
        factorisations = make(stats, shrink=FIRST)

    with watch.stage("compress_and_evaluate"):
        variants = [_variant(dense, factorisations, stats, make, sample, keep, test, progress) for keep in keeps]
    with watch.stage("speed"):
        models = {"dense": dense} | {variant.label: variant.model for variant in variants}
        speed = compare_speed(models, test[0].images[:SPEED_BATCH])

    with watch.stage("save_and_reload"):
        files = [_save_and_reload(variant, out, test[0].images[:SPEED_BATCH]) for variant in variants]
    dense_summary = summarise(dense, dense_score, speed["dense"]).to_json()
    results = [
        {
            "label": variant.label,
            "keep": variant.keep,
            "compressed": summarise(variant.model, variant.score, speed[variant.label]).to_json(),
            "plan": variant.plan.to_json(),
            "layers": variant.layers,
            "checkpoint": file.name,
        }
        for variant, file in zip(variants, files, strict=True)
    ]
    data: dict[str, Any] = {
        "command": "demo",
        "model": {"architecture": ARCHITECTURE, "args": MODEL_ARGS, "weights": WEIGHTS},
        "dense": dense_summary,
        "results": results,
        "images": {"calibration": stats.all_images, "evaluation": dense_score.images},
        "options": STRATEGY | {"keep": list(keeps)},
        "speed": {name: dataclasses.asdict(values) for name, values in speed.items()},
        "times": watch.seconds,
        "versions": versions(),
    }
    with watch.stage("report"):
        write_report(out / "report.html", data)
    if export_images:
        with watch.stage("export_images"):
            export(out, dense, images)
    watch.seconds["total"] = time.perf_counter() - started
    write_json(out / "demo.json", data)

    console = Console()
    console.print(demo_table(data))
    console.print(
        f"top-1 on {dense_score.images} test images of Fashion-MNIST, speed on {data['versions']['threads']} threads; "
        f"every checkpoint reloads to the same outputs, bit for bit.",
        highlight=False,
    )
    for path in (*files, out / "report.html", out / "demo.json"):
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    if export_images:
        console.print(
            f"to compress the same by yourself:\n{command(out)}", markup=False, highlight=False, soft_wrap=True
        )
    console.print(f"done in {watch.seconds['total']:.0f} s", highlight=False)
    return data


def _prepare_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be made a folder: {error.strerror or error}") from None
    check_writable(out / "demo.json", "--out")


def _variant(
    dense: torch.nn.Module,
    factorisations: Any,
    stats: CalibrationStats,
    make: Callable[..., Any],
    sample: Sample,
    keep: float,
    test: list[Batch],
    progress: bool,
) -> Variant:
    label = f"keep {keep:g}"
    if progress:
        print(label, file=sys.stderr)
    running: Running = {"dtype": None, "progress": progress}
    plan, _, factorisations = plan_and_pull(
        dense, factorisations, stats, make, sample, {**RANKS, "keep": keep}, running
    )
    model = apply_(twin(dense), plan, factorisations)
    layers = [dataclasses.asdict(layer) for layer in layer_reports(plan, factorisations)]
    return Variant(label, keep, model, plan, layers, evaluate(model, test, progress=progress))


def _save_and_reload(variant: Variant, out: Path, images: torch.Tensor) -> Path:
    """Write the checkpoint and prove that what it loads to is the same model."""
    path = out / f"vit_fashion_mnist_keep{100 * variant.keep:.0f}.safetensors"
    checkpoint.save(variant.model, path, metadata={"top1": variant.score.top1, "options": STRATEGY})
    with torch.inference_mode():
        if not torch.equal(checkpoint.load(path)(images), variant.model(images)):
            raise RuntimeError(f"{path} does not reload to the same outputs")
    return path


def demo_table(data: dict[str, Any]) -> Table:
    """The one table: the dense model, then each budget."""
    from rich.table import Table

    table = Table(title="Fashion-MNIST vision transformer", title_justify="left", title_style="bold")
    for heading in COLUMNS:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    dense = data["dense"]
    for label, summary in [("dense", dense)] + [(entry["label"], entry["compressed"]) for entry in data["results"]]:
        table.add_row(
            label,
            f"{summary['parameters']:,}",
            megabytes(summary["bytes"]),
            gigamacs(summary["macs"]),
            percent(summary["top1"]),
            rate(summary["images_per_second"]),
            ratio(summary["images_per_second"], dense["images_per_second"]),
        )
    return table
