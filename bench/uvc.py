"""Unified compression beside other ways to choose what goes: same model, same multiply-adds, same training.

    python -m mixrank_bench.uvc --data FASHION_MNIST --models MODELS

FASHION_MNIST is the folder with its four IDX files; the model is the one that ships with the package (``--assets``
names another of its kind, as for :mod:`mixrank_bench.ablation`). Every method gets the same epochs: where nothing has
to be searched for, all of them train what stays. One JSON line for each method, budget and seed goes to
``bench/results/uvc.jsonl``; what is there is not measured again. Our models are written into MODELS, for
:mod:`mixrank_bench.uvc_speed`. Test images decide nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mixrank
from mixrank.counting import count_macs, count_parameters
from mixrank.demo import ARCHITECTURE, ASSETS, MODEL_ARGS, PREPROCESSING, WEIGHTS
from mixrank.demo.run import batches
from mixrank.demo.train import CALIBRATION_IMAGES, augment, normalise, read_fashion_mnist
from mixrank.demo.uvc import BATCH, EPOCHS
from mixrank.errors import InputError
from mixrank.models import create_model
from mixrank.precision import fast_dtype
from mixrank.uvc.combine import compress_combined_, lower_ranks_
from mixrank.uvc.data import TensorData
from mixrank.uvc.finetune import finetune_
from mixrank.uvc.landing import kept_by, land, macs_of
from mixrank.uvc.options import FinetuneOptions, UVCOptions
from mixrank.uvc.primal_dual import BlockVariables, Groups
from mixrank.uvc.run import compress_uvc_
from mixrank.uvc.shrink import KeptBlock, shrink_
from mixrank.uvc.structure import parts_of, structure_of
from mixrank_bench.accuracy_peers.structured import prune_to_
from mixrank_bench.environment import RESULTS, append, read

OUT = RESULTS / "uvc.jsonl"
BUDGETS = (0.5, 0.7, 0.3, 0.15, 0.1)
OURS = "unified"
NORMS = "unified, by norms"
RATIOS = 256
"""The ratios that are tried for Torch-Pruning are multiples of one part in so many."""

Chosen = list[KeptBlock | None]


def magnitude(model: nn.Module, budget: float, seed: int) -> Chosen:
    """The heads, columns and neurons of the smallest squared norms, relative to the mean of their kind and block."""
    return _below_a_threshold(model, budget, [Groups.of(part) for part in parts_of(model)])


def at_random(model: nn.Module, budget: float, seed: int) -> Chosen:
    """Heads, columns and neurons drawn at random."""
    source = torch.Generator().manual_seed(seed)

    def drawn(like: torch.Tensor) -> torch.Tensor:
        return torch.rand(like.shape, generator=source, dtype=torch.float64)

    groups = [Groups.of(part) for part in parts_of(model)]
    return _below_a_threshold(
        model, budget, [Groups(drawn(g.heads), tuple(map(drawn, g.columns)), drawn(g.neurons)) for g in groups]
    )


def _below_a_threshold(model: nn.Module, budget: float, groups: list[Groups]) -> Chosen:
    """All groups below one threshold go, the least one that fits the budget."""
    structure, everything = structure_of(model), torch.ones(len(groups))

    def shares(threshold: float) -> list[BlockVariables]:
        def share(norms: torch.Tensor) -> torch.Tensor:
            below = int((norms < threshold * norms.mean()).sum())
            return torch.tensor((below - 0.5) / len(norms) if below else 0.0, dtype=torch.float64)

        return [BlockVariables(share(g.heads), torch.stack([*map(share, g.columns)]), share(g.neurons)) for g in groups]

    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        kept = [kept_by(found, one) for found, one in zip(groups, shares(middle), strict=True)]
        low, high = (low, middle) if macs_of(structure, kept) <= budget * structure.macs() else (middle, high)
    return land(structure, groups, shares(high), everything, budget, UVCOptions.multiple)


def depth(model: nn.Module, budget: float, seed: int) -> Chosen:
    """Whole blocks, the last ones first; of the last one that stays, so many neurons that the budget is filled."""
    structure, groups = structure_of(model), [Groups.of(part) for part in parts_of(model)]
    shares = [BlockVariables.full(len(block.columns), 0.0) for block in structure.blocks]
    count, each = len(groups), structure.block_macs(len(groups[0].heads), structure.width, len(groups[0].neurons))
    stay = max(1, int((budget * structure.macs() - structure.fixed_macs) / each))
    gates = torch.tensor([1.0 if index < stay else 0.4 - 0.001 * index for index in range(count)])
    return land(structure, groups, shares, gates, budget, UVCOptions.multiple)


CHOICES: dict[str, Callable[[nn.Module, float, int], Chosen] | None] = {
    OURS: None,
    NORMS: None,
    "magnitude": magnitude,
    "random": at_random,
    "depth": depth,
}
PRUNERS = {"Torch-Pruning, bottleneck": True, "Torch-Pruning, uniform": False}
LOW_RANK = "mixed-rank alone"
BOTH = "both"
METHODS = (*CHOICES, *PRUNERS, LOW_RANK, BOTH)


def load(assets: Path, args: dict[str, Any]) -> nn.Module:
    """The dense model."""
    model = create_model(ARCHITECTURE, weights=assets / WEIGHTS, args=MODEL_ARGS | args).float()
    model.mixrank_preprocessing = PREPROCESSING
    return model


def measure(dense: nn.Module, data: Path, method: str, options: UVCOptions, models: Path | None) -> dict[str, Any]:
    """Compress by one method, train, and return a row without what names it."""
    images, labels, test_images, test_labels = read_fashion_mnist(data)
    used = len(images) - CALIBRATION_IMAGES
    training = TensorData(
        images[:used], labels[:used], BATCH, lambda x, generator: normalise(augment(x, generator)), seed=options.seed
    )
    model, full = copy.deepcopy(dense), count_macs(dense)
    common = {"validation": batches(test_images, test_labels), "dtype": fast_dtype(), "progress": True}
    # The teacher is the dense model in all of them, which often is not what the training starts with.
    training_alone = {"options": of_the_same(options), "teacher": dense} | common
    if method in (OURS, NORMS):
        options = replace(options, observed=0) if method == NORMS else options
        found = compress_uvc_(model, training, options=options, **common).to_json()
    elif method == BOTH:
        unlabelled = batches(images[used:])
        both = compress_combined_(model, training, unlabelled, options=options, **common)
        told = both.to_json()
        found = both.trained.to_json() | {"landed": both.trained.before}
        found |= {name: told[name] for name in ("removed", "power", "tried")}
    elif method == LOW_RANK:
        _, trained = lower_ranks_(model, training, batches(images[used:]), int(options.budget * full), **training_alone)
        found = trained.to_json() | {"landed": trained.before}
    else:
        if method in PRUNERS:
            prune_to_(model, count_macs, options.budget, "budget", RATIOS, bottleneck=PRUNERS[method])
        else:
            shrink_(model, CHOICES[method](model, options.budget, options.seed))
        found = finetune_(model, training, **training_alone).to_json()
        found["landed"] = found.pop("before")
    if models is not None and method == OURS:
        mixrank.save(model, models / file_of(options.budget, options.seed))
    return {
        "macs": count_macs(model),
        "share": count_macs(model) / full,
        "parameters": count_parameters(model),
        "result": found,
    }


def of_the_same(options: UVCOptions) -> FinetuneOptions:
    """The options of a training alike."""
    return FinetuneOptions(**{field.name: getattr(options, field.name) for field in fields(FinetuneOptions)})


def name_of(model: nn.Module) -> str:
    """What a model is called in the tables."""
    return f"{model.embed_dim} wide, {len(model.blocks)} blocks"


def file_of(budget: float, seed: int) -> str:
    """The name of our model."""
    return f"uvc_{budget:g}_{seed}.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four IDX files")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder with the dense model")
    parser.add_argument("--args", type=json.loads, default={}, help="of the dense model, as JSON")
    parser.add_argument("--models", type=Path, help="a folder that keeps our models")
    parser.add_argument("--budget", type=float, action="append", help="only this budget (repeatable)")
    parser.add_argument("--method", choices=METHODS, action="append", help="only this one (repeatable)")
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", type=json.loads, default={}, help="further ones of UVCOptions, as JSON")
    parser.add_argument("--out", type=Path, default=OUT, help="the file of results, added to")
    args = parser.parse_args()
    dense = load(args.assets, args.args)
    name = name_of(dense)
    options = UVCOptions(epochs=args.epochs, seed=args.seed, **args.options)
    done = {
        (row["model"], row["method"], row["budget"], row["seed"], row["epochs"])
        for row in read(args.out)
        if row["kind"] == "method"
    }
    for budget in args.budget or BUDGETS:
        for method in args.method or METHODS:
            if (name, method, budget, args.seed, args.epochs) in done:
                continue
            row = {"kind": "method", "model": name, "method": method, "budget": budget, "seed": args.seed}
            row |= {"epochs": args.epochs}
            try:
                row |= measure(dense, args.data, method, replace(options, budget=budget), args.models)
            except InputError as error:
                if method not in PRUNERS:  # these cannot reach every budget
                    raise
                print(f"{method} at {budget}: {error}", file=sys.stderr, flush=True)
                continue
            append(args.out, row)
            found = row["result"]
            print(f"{method} at {budget}: {found['landed']:.2f} to {found['after']:.2f} %", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
