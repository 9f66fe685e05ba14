"""``mixrank compress``: every check first, then the long work, then the files."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixrank.cli_input import check_outputs, check_positive, first_images
from mixrank.cli_output import Stopwatch, comparison_table, plain, versions, write_json
from mixrank.errors import InputError

if TYPE_CHECKING:
    from mixrank.data import ImageSource

AUTOMATIC = ("auto", "oas")
STRATEGY = (
    "factors", "ranks", "energy", "centre", "fisher_shrink", "held_out", "draws", "split_qkv", "step", "min_rank",
    "max_rank", "form", "sequential", "ridge", "seed",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CompressOptions:
    """The arguments of the command, under their own names."""

    model: str
    images: str
    out: Path
    weights: Path | None
    model_args: str | None
    keep: float | None
    max_bytes: int | None
    max_macs: int | None
    factors: str
    ranks: str
    energy: str
    centre: bool | None
    shrink: str
    fisher_shrink: float
    weighting: str
    weighting_level: float | None
    held_out: float | None
    draws: int
    augment: int
    sequential: bool
    ridge: float
    split_qkv: bool
    step: int
    min_rank: float | None
    max_rank: float | None
    form: str
    eval_images: str | None
    labels: Path | None
    data_root: Path | None
    split: str
    eval_split: str
    json: Path | None
    report: Path | None
    limit: int | None
    batch_size: int
    dtype: str
    strict: bool
    seed: int
    quiet: bool

    def check(self) -> None:
        """Everything that can be known before a model is built."""
        if sum(budget is not None for budget in (self.keep, self.max_bytes, self.max_macs)) != 1:
            raise InputError("exactly one of --keep, --max-bytes and --max-macs must be given")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise InputError(f"--keep must be above 0 and at most 1, got {self.keep:g}")
        for name in ("max_bytes", "max_macs", "step", "batch_size", "limit", "draws"):
            check_positive(name, getattr(self, name))
        if self.augment < 0:
            raise InputError(f"--augment must be at least 0, got {self.augment}")
        self.pull()
        if self.weights is not None and not self.weights.is_file():
            raise InputError(f"--weights {self.weights} does not exist or is not a file")
        if self.labels is not None and self.eval_images is None:
            raise InputError("--labels belongs to --eval-images, which is missing (calibration needs no labels)")
        check_outputs({"--out": self.out, "--json": self.json, "--report": self.report}, self.weights, self.labels)

    def pull(self) -> float | str:
        """``--shrink`` as a number, where it is one."""
        if self.shrink in AUTOMATIC:
            return self.shrink
        try:
            return float(self.shrink)
        except ValueError:
            raise InputError(f"--shrink must be a number, {' or '.join(AUTOMATIC)}, got {self.shrink}") from None

    def strategy(self) -> dict[str, Any]:
        """The arguments of :func:`mixrank.compress` that are neither images nor budget."""
        chosen = {name: getattr(self, name) for name in STRATEGY}
        return chosen | {"shrink": self.pull(), "weighting": self.weighting}

    def timm_args(self) -> dict[str, Any]:
        """``--model-args`` as a dictionary."""
        try:
            args = json.loads(self.model_args or "{}")
        except json.JSONDecodeError as error:
            raise InputError(f"--model-args is not JSON: {error}") from None
        if not isinstance(args, dict):
            raise InputError(f"--model-args must be a JSON object, got {self.model_args}")
        return args


def run(options: CompressOptions) -> None:
    """Compress, measure, write; nothing is written unless everything before it worked."""
    options.check()
    args = options.timm_args()

    import torch

    from mixrank import checkpoint
    from mixrank.compress import compress
    from mixrank.data import open_images
    from mixrank.evaluate import compare_speed, evaluate, summarise
    from mixrank.models import create_model, preprocessing
    from mixrank.weighting import Weighting

    weighting = Weighting(options.weighting, options.weighting_level)
    watch, progress = Stopwatch(), not options.quiet
    with watch.stage("load"):
        model = create_model(options.model, pretrained=options.weights is None, weights=options.weights, args=args)
        data_config = preprocessing(model)
        calibration = open_images(
            options.images,
            data_config,
            limit=options.limit,
            seed=options.seed,
            strict=options.strict,
            root=options.data_root,
            split=options.split,
            augment=options.augment,
        )
        evaluation = _open_evaluation(options, data_config)

    dense, dense_score = copy.deepcopy(model), None
    if evaluation is not None:
        with watch.stage("evaluate_dense"):
            dense_score = evaluate(dense, evaluation.batches(options.batch_size), progress=progress)

    budget = {name: getattr(options, name) for name in ("keep", "max_bytes", "max_macs")}
    strategy = options.strategy()
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else None
    batches = calibration.batches(options.batch_size)
    running = {"weighting": weighting, "dtype": dtype, "progress": progress}
    result = compress(model, batches, **(budget | strategy | running))
    watch.seconds |= result.seconds

    score = None
    if evaluation is not None:
        with watch.stage("evaluate_compressed"):
            score = evaluate(model, evaluation.batches(options.batch_size), progress=progress)
    with watch.stage("speed"):
        sample = first_images(calibration if evaluation is None else evaluation, options.batch_size)
        speed = compare_speed({"dense": dense, "compressed": model}, sample)

    summaries = {
        "dense": summarise(dense, dense_score, speed["dense"]).to_json(),
        "compressed": summarise(model, score, speed["compressed"]).to_json(),
    }
    images = {
        "calibration": result.images,
        "calibration_skipped": list(calibration.skipped),
        "evaluation": None if score is None else score.images,
        "evaluation_skipped": [] if evaluation is None else list(evaluation.skipped),
    }
    with watch.stage("save"):
        made = budget | strategy | {"weighting_level": options.weighting_level, "augment": options.augment}
        checkpoint.save(model, options.out, metadata=_provenance(made, summaries, images))
    _write(options, args, result, summaries, images, speed, watch)


def _open_evaluation(options: CompressOptions, data_config: dict[str, Any]) -> ImageSource | None:
    from mixrank.data import open_images

    if options.eval_images is None:
        return None
    source = open_images(
        options.eval_images,
        data_config,
        labels=options.labels,
        strict=options.strict,
        root=options.data_root,
        split=options.eval_split,
    )
    # Asked of an image and not of the source, because a named data set only knows its labels by reading.
    batch = next(iter(source.batches(1, workers=0)), None)
    if batch is None or batch.labels is None:
        raise InputError(
            f"--eval-images {options.eval_images} has no labels: give --labels or one subfolder for each class"
        )
    return source


def _provenance(options: dict[str, Any], summaries: dict[str, Any], images: dict[str, Any]) -> dict[str, Any]:
    """What the checkpoint says of its origin: no times and no paths, so that equal runs give equal bytes."""
    kept = ("top1", "parameters", "bytes", "macs")
    scores = {side: {key: values.get(key) for key in kept} for side, values in summaries.items()}
    return {"options": options, "images": {"calibration": images["calibration"]}, **scores}


def _write(
    options: CompressOptions,
    args: dict[str, Any],
    result: Any,
    summaries: dict[str, Any],
    images: dict[str, Any],
    speed: dict[str, Any],
    watch: Stopwatch,
) -> None:
    from rich.console import Console

    details = result.to_json()
    data = {
        "command": "compress",
        "model": {"architecture": options.model, "args": args, "weights": options.weights or "pretrained"},
        **summaries,
        "plan": details["plan"],
        "layers": details["layers"],
        "images": images,
        "notes": result.notes,
        "options": dataclasses.asdict(options),
        "speed": {side: dataclasses.asdict(values) for side, values in speed.items()},
        "times": watch.seconds,
        "versions": versions(),
    }
    if options.report is not None:
        from mixrank.report import write_report

        write_report(options.report, plain(data))
    if options.json is not None:
        write_json(options.json, data)

    console = Console()
    console.print(comparison_table(summaries["dense"], summaries["compressed"], options.model))
    skipped = len(images["calibration_skipped"]) + len(images["evaluation_skipped"])
    if skipped:
        first = (images["calibration_skipped"] + images["evaluation_skipped"])[0]
        console.print(f"{skipped} images were skipped, the first: {first}", markup=False)
    for note in result.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True, highlight=False)
    for label, path in (("checkpoint", options.out), ("report", options.report), ("JSON", options.json)):
        if path is not None:
            console.print(f"{label:<11} {path}", markup=False, soft_wrap=True, highlight=False)
