"""``mixrank evaluate``: top-1 and speed of a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixrank.cli_input import check_outputs, check_positive, first_images
from mixrank.cli_output import comparison_table, versions, write_json
from mixrank.errors import InputError
from mixrank.stopwatch import Stopwatch

if TYPE_CHECKING:
    from mixrank.checkpoint import Header
    from mixrank.evaluate import Evaluation


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """The arguments of the command, under their own names."""

    file: Path
    images: str
    labels: Path | None
    data_root: Path | None
    split: str
    json: Path | None
    limit: int | None
    batch_size: int
    strict: bool
    seed: int
    quiet: bool

    def check(self) -> None:
        """Everything that can be known before the checkpoint is read."""
        if not self.file.is_file():
            raise InputError(f"{self.file} does not exist or is not a file")
        check_positive("batch_size", self.batch_size)
        check_positive("limit", self.limit)
        check_outputs({"--json": self.json}, self.file, self.labels)


def run(options: EvaluateOptions) -> None:
    """Measure the checkpoint; ``dense`` is the architecture's size and the speed with the factors multiplied out."""
    options.check()
    from mixrank import checkpoint
    from mixrank.data import open_images
    from mixrank.evaluate import compare_speed, evaluate, summarise
    from mixrank.models import create_model, model_spec, preprocessing
    from mixrank.plain import merged

    watch = Stopwatch()
    with watch.stage("load"):
        header = checkpoint.read_header(options.file)
        model = checkpoint.load(options.file)
        source = open_images(
            options.images,
            preprocessing(model),
            labels=options.labels,
            limit=options.limit,
            seed=options.seed,
            strict=options.strict,
            root=options.data_root,
            split=options.split,
        )
    with watch.stage("evaluate_compressed"):
        score = evaluate(model, source.batches(options.batch_size), progress=not options.quiet)
    with watch.stage("speed"):
        sample = first_images(source, options.batch_size)
        speed = compare_speed({"dense": merged(model), "compressed": model}, sample)

    spec = model_spec(model)
    dense = summarise(create_model(spec.architecture, args=spec.args), None, speed["dense"]).to_json()
    compressed = summarise(model, score, speed["compressed"]).to_json()
    _write(options, header, dense, compressed, score, list(source.skipped), speed, watch)


def _write(
    options: EvaluateOptions,
    header: Header,
    dense: dict[str, Any],
    compressed: dict[str, Any],
    score: Evaluation,
    skipped: list[str],
    speed: dict[str, Any],
    watch: Stopwatch,
) -> None:
    from rich.console import Console

    images = {"evaluation": score.images, "evaluation_skipped": skipped}
    if options.json is not None:
        data = {
            "command": "evaluate",
            "model": {"architecture": header.architecture, "args": header.args},
            "dense": dense,
            "compressed": compressed | {"top5": score.top5},
            "plan": None if header.plan is None else header.plan.to_json(),
            "quantization": header.quantization,
            "images": images,
            "options": dataclasses.asdict(options),
            "speed": {side: dataclasses.asdict(values) for side, values in speed.items()},
            "times": watch.seconds,
            "versions": versions(),
        }
        write_json(options.json, data)

    console = Console()
    console.print(comparison_table(dense, compressed, f"{options.file.name} ({header.architecture})"))
    console.print(f"measured on {score.images} images", highlight=False)
    if skipped:
        console.print(f"{len(skipped)} images were skipped, the first: {skipped[0]}", markup=False)
    if score.top1 is None:
        console.print("top-1 needs labels: give --labels or one subfolder for each class")
    if options.json is not None:
        console.print(f"JSON        {options.json}", markup=False, soft_wrap=True, highlight=False)
