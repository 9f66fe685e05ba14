"""What ``mixrank compress`` does: every check first, then the long work, then the files."""

from __future__ import annotations

import copy
import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixrank.cli_input import (
    check_budgets,
    check_device,
    check_outputs,
    check_positive,
    chosen_device,
    chosen_dtype,
    first_images,
    model_arguments,
)
from mixrank.cli_output import comparison_table, plain, versions, write_json
from mixrank.errors import InputError
from mixrank.launch import started_processes
from mixrank.precision import Precision
from mixrank.processes import are_several, gathered, is_first, joined, place
from mixrank.stopwatch import Stopwatch

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mixrank.compensate import CompensationOptions, CompensationResult
    from mixrank.data import ImageSource
    from mixrank.evaluate import Evaluation

AUTOMATIC = ("auto", "oas", "measured")
STRATEGY = (
    "factors", "ranks", "energy", "sensitivity_images", "centre", "fisher_shrink", "held_out", "gradient_power",
    "draws", "split_qkv", "step", "min_rank", "max_rank", "form", "sequential", "ridge", "seed",
)  # fmt: skip
# What may change between a training that was interrupted and the one that goes on with it: not the compressed model.
AFTERWARDS = (
    "out", "eval_images", "labels", "eval_split", "steps", "minutes", "learning_rate", "resume", "json", "report",
    "quiet",
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
    sensitivity_images: int
    centre: bool | None
    shrink: str | None
    fisher_shrink: float
    weighting: str | None
    weighting_level: float | None
    held_out: float | None
    gradient_power: float | None
    draws: int
    augment: int
    sequential: bool
    ridge: float
    split_qkv: bool
    step: int
    min_rank: float | None
    max_rank: float | None
    form: str | None
    eval_images: str | None
    labels: Path | None
    steps: int | None
    minutes: float | None
    learning_rate: float
    resume: bool
    data_root: Path | None
    split: str
    eval_split: str
    json: Path | None
    report: Path | None
    limit: int | None
    batch_size: int
    device: str
    dtype: Precision
    strict: bool
    seed: int
    quiet: bool

    def check(self) -> None:
        """Everything that can be known before a model is built."""
        if sum(budget is not None for budget in (self.keep, self.max_bytes, self.max_macs)) != 1:
            raise InputError("exactly one of --keep, --max-bytes and --max-macs must be given")
        if self.keep is not None:
            check_budgets("--keep", self.keep)
        for name in ("max_bytes", "max_macs", "step", "batch_size", "limit", "draws", "sensitivity_images", "steps"):
            check_positive(name, getattr(self, name))
        if self.augment < 0:
            raise InputError(f"--augment must be at least 0, got {self.augment}")
        check_device(self.device)
        self.pull()
        if self.weighting_level is not None and self.weighting is None:
            raise InputError("--weighting-level belongs to --weighting, which is missing")
        if self.weights is not None and not self.weights.is_file():
            raise InputError(f"--weights {self.weights} does not exist or is not a file")
        if self.labels is not None and self.eval_images is None:
            raise InputError("--labels belongs to --eval-images, which is missing (calibration needs no labels)")
        check_outputs({"--out": self.out, "--json": self.json, "--report": self.report}, self.weights, self.labels)
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise InputError(f"--minutes must be above 0, got {self.minutes:g}")
        if self.steps is not None and self.minutes is not None:
            raise InputError("at most one of --steps and --minutes can be given")
        if self.trains and started_processes() > 1:
            raise InputError("--steps and --minutes train in one process: use mixrank compensate after torchrun")
        if self.resume and not self.trains:
            raise InputError("--resume belongs to --steps or --minutes, which are missing")
        for path in (self.compressed, self.state):
            if self.trains and not self.resume and path.exists():
                raise InputError(f"{path} is of an interrupted run: go on with --resume, or delete it")

    def pull(self) -> float | str | None:
        """``--shrink`` as a number, where it is one."""
        if self.shrink is None or self.shrink in AUTOMATIC:
            return self.shrink
        try:
            return float(self.shrink)
        except ValueError:
            raise InputError(f"--shrink must be a number or one of {', '.join(AUTOMATIC)}, got {self.shrink}") from None

    def strategy(self) -> dict[str, Any]:
        """The arguments of :func:`mixrank.compress` that are neither images, their weights nor budget."""
        chosen = {name: getattr(self, name) for name in STRATEGY}
        return chosen | {"shrink": self.pull()}

    def budget(self) -> dict[str, Any]:
        return {"keep": self.keep, "max_bytes": self.max_bytes, "max_macs": self.max_macs}

    def training(self) -> CompensationOptions | None:
        """How to train afterwards, checked; None where that was not asked for."""
        if not self.trains:
            return None
        from mixrank.compensate import CompensationOptions

        options = CompensationOptions(learning_rate=self.learning_rate, seed=self.seed)
        options.check()
        return options

    @property
    def trains(self) -> bool:
        return self.steps is not None or self.minutes is not None

    @property
    def compressed(self) -> Path:
        """The checkpoint of the compressed model before training, kept until ``out`` is written."""
        return self.out.with_name(f"{self.out.name}.compressed")

    @property
    def state(self) -> Path:
        """Where the training is kept while it lasts."""
        return self.out.with_name(f"{self.out.name}.state")

    def deciding(self) -> dict[str, Any]:
        """The options that decide what the compressed model is, in terms of JSON."""
        values = dataclasses.asdict(self)
        return plain({name: value for name, value in values.items() if name not in AFTERWARDS})


def run(options: CompressOptions) -> None:
    """Compress, train if asked to, measure, write; ``out`` is not written unless everything before it worked."""
    options.check()
    with joined(chosen_device(options.device)) as device:
        _run(options, device)


def _run(options: CompressOptions, device: torch.device) -> None:
    args, training = model_arguments(options.model_args), options.training()

    from mixrank import checkpoint
    from mixrank.data import open_images
    from mixrank.evaluate import compare_speed, evaluate, summarise
    from mixrank.fidelity import compare
    from mixrank.identity import compressed_from
    from mixrank.models import create_model, preprocessing

    watch, progress = Stopwatch(), not options.quiet
    with watch.stage("load"):
        dense = create_model(options.model, pretrained=options.weights is None, weights=options.weights, args=args)
        dense = dense.to(device)
        data_config = preprocessing(dense)
        opened = partial(
            open_images,
            options.images,
            data_config,
            limit=options.limit,
            seed=options.seed,
            strict=options.strict,
            root=options.data_root,
            split=options.split,
        )
        calibration = opened(augment=options.augment)
        evaluation = _open_evaluation(options, data_config)
    if not is_first():
        _compress(options, dense, calibration, watch)
        return
    if training is not None and len(calibration) == 1:
        raise InputError(f"--steps and --minutes need at least 2 images, but --images {options.images} has 1")

    dense_score = None

    def evaluate_dense(source: ImageSource) -> Evaluation:
        with watch.stage("evaluate_dense"):
            score = evaluate(dense, source.batches(options.batch_size), progress=progress)
        compare(score.logits, score.logits)
        return score

    if evaluation is not None and not are_several():
        dense_score = evaluate_dense(evaluation)  # what is no classifier is refused before the long work
    model, made = _compressed(options, dense, calibration, watch)
    if evaluation is not None and dense_score is None:
        dense_score = evaluate_dense(evaluation)  # not before: the other processes would wait for it
    compensation = None
    if training is not None:
        from mixrank.cli_compensate import noted, train

        with watch.stage("compensate"):
            compensation = train(model, copy.deepcopy(dense), opened().batches(options.batch_size), options, training)

    score = fidelity = None
    if evaluation is not None and dense_score is not None:
        with watch.stage("evaluate_compressed"):
            score = evaluate(model, evaluation.batches(options.batch_size), progress=progress)
        fidelity = dataclasses.asdict(compare(score.logits, dense_score.logits))
    with watch.stage("speed"):
        sample = first_images(calibration if evaluation is None else evaluation, options.batch_size)
        speed = compare_speed({"dense": dense, "compressed": model}, sample)

    summaries = {
        "dense": summarise(dense, dense_score, speed["dense"]).to_json(),
        "compressed": summarise(model, score, speed["compressed"]).to_json(),
    }
    images = {
        "calibration": made["images"],
        "calibration_skipped": made["skipped"],
        "evaluation": None if score is None else score.images,
        "evaluation_skipped": [] if evaluation is None else list(evaluation.skipped),
    }
    with watch.stage("save"):
        metadata = _provenance(options, summaries, fidelity, images) | compressed_from(dense)
        if compensation is not None:
            metadata["compensation"] = noted(compensation)
        checkpoint.save(model, options.out, metadata=metadata)
    if training is not None:
        options.state.unlink(missing_ok=True)
        options.compressed.unlink(missing_ok=True)
    data = {
        "command": "compress",
        "model": {"architecture": options.model, "args": args, "weights": options.weights or "pretrained"},
        **summaries,
        "fidelity": fidelity,
        "compensation": None if compensation is None else compensation.to_json(),
        "plan": made["plan"],
        "layers": made["layers"],
        "images": images,
        "notes": made["notes"],
        "left_alone": made["left_alone"],
        "options": dataclasses.asdict(options),
        "speed": {side: dataclasses.asdict(values) for side, values in speed.items()},
        "times": watch.seconds | made["seconds"],
        "versions": versions(),
    }
    _write(options, data, compensation)


def _compressed(
    options: CompressOptions, dense: nn.Module, calibration: ImageSource, watch: Stopwatch
) -> tuple[nn.Module, dict[str, Any]]:
    """The compressed model and what is to be told of it; before a training by way of a checkpoint of its own.

    A training thus always starts from what the checkpoint holds, whether it begins or goes on.
    """
    from mixrank import checkpoint

    if not (options.trains and options.compressed.exists()):
        model, made = _compress(options, dense, calibration, watch)
        if not options.trains:
            return model, made
        metadata = {"options": options.deciding(), "made": plain(made)}
        checkpoint.save(model, options.compressed, metadata=metadata)
    metadata = checkpoint.read_header(options.compressed).metadata
    earlier = metadata.get("options", {})
    other = [name for name, value in options.deciding().items() if earlier.get(name) != value]
    if other:
        raise InputError(
            f"{options.compressed} was compressed with another --{other[0].replace('_', '-')}: "
            "give the same options, or delete it"
        )
    return checkpoint.load(options.compressed, next(dense.parameters()).device), metadata["made"]


def _compress(
    options: CompressOptions, dense: nn.Module, calibration: ImageSource, watch: Stopwatch
) -> tuple[nn.Module, dict[str, Any]]:

    from mixrank.compress import compress
    from mixrank.models import twin
    from mixrank.weighting import Weighting

    result = compress(
        model := twin(dense),
        calibration.batches(options.batch_size, part=place()),
        **options.budget(),
        **options.strategy(),
        weighting=None if options.weighting is None else Weighting(options.weighting, options.weighting_level),
        dtype=chosen_dtype(options.dtype, next(dense.parameters()).device),
        progress=not options.quiet,
    )
    skipped = [image for part in gathered(list(calibration.skipped)) for image in part]
    return model, result.to_json() | {"skipped": skipped}


def _open_evaluation(options: CompressOptions, data_config: dict[str, Any]) -> ImageSource | None:
    from mixrank.data import open_images

    if options.eval_images is None:
        return None
    return open_images(
        options.eval_images,
        data_config,
        labels=options.labels,
        strict=options.strict,
        root=options.data_root,
        split=options.eval_split,
    )


def _provenance(
    options: CompressOptions, summaries: dict[str, Any], fidelity: dict[str, Any] | None, images: dict[str, Any]
) -> dict[str, Any]:
    """What the checkpoint says of its origin: no times and no paths, so that equal runs give equal bytes."""
    made = options.budget() | options.strategy() | {"weighting": options.weighting}
    made |= {"weighting_level": options.weighting_level, "augment": options.augment}
    kept = ("top1", "parameters", "bytes", "macs")
    scores = {side: {key: values.get(key) for key in kept} for side, values in summaries.items()}
    return {"options": made, "images": {"calibration": images["calibration"]}, "fidelity": fidelity, **scores}


def _write(options: CompressOptions, data: dict[str, Any], compensation: CompensationResult | None) -> None:
    from rich.console import Console

    if options.report is not None:
        from mixrank.report import write_report

        write_report(options.report, plain(data))
    if options.json is not None:
        write_json(options.json, data)

    console = Console()
    console.print(comparison_table(data["dense"], data["compressed"], options.model, data["fidelity"]))
    images = data["images"]
    if images["evaluation"] is not None:
        console.print(f"measured on {images['evaluation']} images", highlight=False)
        if data["dense"]["top1"] is None:
            console.print("top-1 needs labels: give --labels or one subfolder for each class")
    if compensation is not None:
        from mixrank.cli_compensate import summary

        console.print(f"training: {summary(compensation)}", highlight=False)
    skipped = images["calibration_skipped"] + images["evaluation_skipped"]
    if skipped:
        console.print(f"{len(skipped)} images were skipped, the first: {skipped[0]}", markup=False)
    for note in data["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True, highlight=False)
    for label, path in (("checkpoint", options.out), ("report", options.report), ("JSON", options.json)):
        if path is not None:
            console.print(f"{label:<11} {path}", markup=False, soft_wrap=True, highlight=False)
