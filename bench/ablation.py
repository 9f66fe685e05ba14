"""Every switch of the method, one at a time, on two real models: how far the answers move on images not used.

    MIXRANK_DATA=FOLDER python -m mixrank_bench.ablation vit_b16
    python -m mixrank_bench.ablation fashion --assets FOLDER

``vit_b16`` is the model of :mod:`mixrank_bench.vit_b16`; ``fashion`` is the one that ``python -m mixrank.demo.train
--data FASHION_MNIST --depth 12 --patch-size 7 --out FOLDER`` trains. A fifth of the unlabelled images is held out from
all that is done here, and each variant is compared with the dense model on them; no label is read. The reference is
what ``mixrank compress --form pivoted`` does, but for two things that the ablation led to: its tokens count alike, and
its pull is fixed. Variants of the statistics and factors take the ranks of the reference, so that only the factors
differ; those of the allocation choose their own. One JSON line for each goes to ``bench/results/ablation.jsonl``; what
is there is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixrank.allocate import plan_of
from mixrank.apply import apply_, put_
from mixrank.calibrate import calibrate, held_out_images
from mixrank.compensate import CompensationOptions, compensate_
from mixrank.compress import FORM
from mixrank.decompose import decompose, factorise
from mixrank.demo import ARCHITECTURE, MODEL_ARGS, WEIGHTS
from mixrank.demo.run import batches, load_images
from mixrank.fidelity import compare, logits_of
from mixrank.measured_pull import FIRST, first_pull, measure_pull
from mixrank.models import create_model, split_qkv_
from mixrank.plan import Plan
from mixrank.planning import plan_ranks
from mixrank.precision import fast_dtype
from mixrank.sample import Sample
from mixrank.sequential import compress_blocks_
from mixrank.shrinkage import MEASURED
from mixrank.sparse_fit import put_sparse_, sparse_statistics
from mixrank.sparse_sensitivity import POWER, weigh_layers
from mixrank.views import Views, gather
from mixrank_bench.ablation_variants import BASE, VARIANTS, Variant
from mixrank_bench.block_residual import with_blocks
from mixrank_bench.environment import RESULTS, append, read
from mixrank_bench.vit_b16 import Data

OUT = RESULTS / "ablation.jsonl"
HELD_OUT = 0.2
SEED = 0
VIEW_SCALE = 0.6
FACTORS = {"factors": "fisher", "centre": True, "shrink": FIRST}
ALLOCATION = {"ranks": "mixed", "energy": "sensitivity", "form": FORM}


@dataclass(frozen=True)
class Subject:
    """A model with the images of an ablation.

    Attributes:
        model: the dense model.
        images: ``[B, C, H, W]`` that may be used.
        apart: those that judge.
        keep: the budget.
        batch_size: images that go through the model together.
        steps: of a training.
        dtype: of the autocast that everything runs under.
    """

    model: nn.Module
    images: Tensor
    apart: Tensor
    keep: float
    batch_size: int
    steps: int
    dtype: torch.dtype | None


def vit_b16(folder: Path, scratch: Path) -> Subject:
    """The ViT-B/16, at 40 % of its parameters."""
    data = Data(folder, scratch)
    data.dequantize()
    model = data.model()
    images = gather(data.calibration(model), least=1)
    return _subject(model, images, keep=0.4, batch_size=25, steps=32, dtype=fast_dtype())


def fashion(assets: Path) -> Subject:
    """A ViT-tiny of twelve blocks for Fashion-MNIST, at 15 % of its parameters."""
    args = MODEL_ARGS | {"depth": 12, "patch_size": 7}
    model = create_model(ARCHITECTURE, weights=assets / WEIGHTS, args=args).float()
    images = gather(batches(load_images(assets)["calibration_images"]), least=1)
    return _subject(model, images, keep=0.15, batch_size=100, steps=300, dtype=None)


def _subject(model: nn.Module, images: Tensor, **others: Any) -> Subject:
    apart = held_out_images(range(len(images)), HELD_OUT, 1)
    return Subject(model.eval(), images[~apart], images[apart], **others)


def _spread(total: int, count: int) -> Tensor:
    """``count`` of the first ``total`` numbers, evenly spread."""
    return torch.linspace(0, total - 1, count).round().long()


class Ablation:
    """The variants of one subject; what is made for one is kept while it serves the next one too."""

    def __init__(self, subject: Subject, ranks: Mapping[str, int | None] | None = None) -> None:
        """``ranks``: those that the reference was found to give, by layer name, where that was measured before."""
        self.subject, self.ranks = subject, ranks
        self.apart = list(subject.apart.float().split(subject.batch_size))
        self.target = logits_of(subject.model, self.apart, subject.dtype)
        self.plan: Plan | None = None
        self._statistics: tuple[tuple, tuple] | None = None
        self._factors: tuple[tuple, dict] | None = None
        self._weights: tuple[tuple, dict[str, float]] | None = None  # of sparse layers, to the default power

    def measure(self, variant: Variant) -> dict[str, Any]:
        """A row of results without what names it."""
        started = time.perf_counter()
        model = copy.deepcopy(self.subject.model)
        if variant.split:
            split_qkv_(model)
        if variant.ridge is not None:
            self._in_sequence(model, variant)
            plan = self.base()
        elif variant.sparse is not None:
            plan = self._sparse(model, variant)
        elif variant.blocks is not None:
            self._with_blocks(model, variant)
            plan = self.base()
        else:
            plan = self._at_once(model, variant)
        if variant.training is not None:
            options = CompensationOptions(**variant.training, seed=SEED)
            batches = self._batches(variant)
            compensate_(
                model, self.subject.model, batches, steps=self.subject.steps, options=options, dtype=self.subject.dtype
            )
        found = compare(logits_of(model, self.apart, self.subject.dtype), self.target)
        seen = {"kl_seen": self._divergence_seen(model, variant)} if variant.by_heart else {}
        return seen | {
            "kl": found.divergence,
            "agreement": found.agreement,
            "images": found.images,
            "parameters": plan.parameters_after,
            "ranks": {layer.name: layer.rank for layer in plan.layers},
            "seconds": time.perf_counter() - started,
        }

    def base(self) -> Plan:
        """The plan of the reference."""
        if self.plan is None:
            model = copy.deepcopy(self.subject.model)
            if self.ranks is None:
                self.plan = self._at_once(model, BASE)
            else:
                svd = decompose(model, factors="svd")  # for the shapes, which are all that a plan of given ranks reads
                self.plan = plan_of(model, svd, self.ranks, FORM)
        return self.plan

    def _at_once(self, model: nn.Module, variant: Variant) -> Plan:
        plan = self.base() if variant.allocation is None else None
        factorisations, sample = self._made(model, variant)
        running = {"dtype": self.subject.dtype, "progress": False}
        if plan is None:
            allocation = ALLOCATION | {"keep": self.subject.keep} | variant.allocation
            plan = plan_ranks(model, factorisations, sample, allocation, running, rounds=variant.sensitivity[1])
        if variant.factors.get("shrink") == MEASURED:
            stats, make = self._statistics[1][0], partial(decompose, model, **{**FACTORS, **variant.factors})
            both = {"metric": variant.factors.get("fisher_shrink") == MEASURED}
            _, factorisations = measure_pull(model, plan, factorisations, stats, make, sample.parts, running, **both)
        apply_(model, plan, factorisations)
        if variant == BASE:
            self.plan = plan
        return plan

    def _made(self, model: nn.Module, variant: Variant) -> tuple[dict, Sample]:
        if self._statistics is None or self._statistics[0] != variant.statistics:
            self._statistics = self._factors = None  # not two at a time
            share = 0 if variant.seen else None
            sample = Sample(self._batches(variant), variant.sensitivity[0], SEED, share)
            options = {"held_out": share, "gradients": True, "seed": SEED} | variant.calibration
            options |= {"dtype": self.subject.dtype}
            self._statistics = (variant.statistics, (calibrate(model, sample, **options), sample))
        stats, sample = self._statistics[1]
        options = FACTORS | variant.factors
        options["shrink"] = first_pull(options["shrink"])
        if options.get("fisher_shrink") == MEASURED:
            del options["fisher_shrink"]
        key = (variant.statistics, tuple(options.items()))
        if self._factors is None or self._factors[0] != key:
            self._factors = None
            self._factors = (key, decompose(model, stats, **options))
        return self._factors[1], sample

    def _in_sequence(self, model: nn.Module, variant: Variant) -> None:
        strategy = FACTORS | {"factors": "aware"}  # there are no gradients through what is compressed already
        options = {"ridge": variant.ridge, "strategy": strategy, "dtype": self.subject.dtype}
        plan = self.base()
        made, _ = compress_blocks_(model, self._batches(variant), plan, **options)
        put_(model, plan, made)

    def _sparse(self, model: nn.Module, variant: Variant) -> Plan:
        running = {"dtype": self.subject.dtype, "progress": False}
        key = ("sparse", *variant.statistics)
        if self._statistics is None or self._statistics[0] != key:
            self._statistics = self._factors = None
            sample = Sample(self._batches(variant), variant.sensitivity[0], SEED, None)
            options = {"held_out": None, "seed": SEED} | variant.calibration | running
            self._statistics = (key, (sparse_statistics(model, sample, **options), sample))
        (stats, sample), keep, weights = self._statistics[1], self.subject.keep, None
        if variant.weighed:
            key = (key, tuple(variant.sparse.items()))
            if self._weights is None or self._weights[0] != key:
                made = weigh_layers(model, stats, sample.parts, {"keep": keep}, **variant.sparse, **running)
                self._weights = (key, made)
            weights = {name: weight ** (variant.weighed / POWER) for name, weight in self._weights[1].items()}
        return put_sparse_(model, stats, keep, weights=weights, **variant.sparse)[0]

    def _with_blocks(self, model: nn.Module, variant: Variant) -> None:
        plan = self.base()
        self._made(model, BASE)
        stats = self._statistics[1][0]
        for layer in plan.layers:
            if layer.rank is not None:
                linear, both = model.get_submodule(layer.name), stats[layer.name] + stats.held_out[layer.name]
                make = partial(factorise, stats=both, **FACTORS)
                model.set_submodule(layer.name, with_blocks(linear, both, make, layer.rank, *variant.blocks))

    def _divergence_seen(self, model: nn.Module, variant: Variant) -> float:
        """On as many of the images that calibration had as are held out from it, or on all that it had."""
        images = self._images(variant)
        chosen = images[_spread(len(images), min(len(images), len(self.subject.apart)))].float()
        batches = list(chosen.split(self.subject.batch_size))
        dense = logits_of(self.subject.model, batches, self.subject.dtype)
        return compare(logits_of(model, batches, self.subject.dtype), dense).divergence

    def _images(self, variant: Variant) -> Tensor:
        images = self.subject.images
        return images if variant.images is None else images[_spread(len(images), variant.images)]

    def _batches(self, variant: Variant) -> Iterable[Tensor]:
        images, size = self._images(variant), self.subject.batch_size
        yield from (batch.float() for batch in images.split(size))
        if variant.views:
            views = Views(images, size, seed=SEED, min_scale=VIEW_SCALE)
            yield from (views.batch(step) for step in range(variant.views * len(images) // size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("vit_b16", "fashion"))
    parser.add_argument("--assets", type=Path, help="the folder of the fashion model")
    parser.add_argument("--switch", action="append", help="only variants of this switch (repeatable)")
    parser.add_argument("--value", action="append", help="only those that set it to this (repeatable)")
    parser.add_argument("--threads", type=int, default=1, help="threads of one operation")
    parser.add_argument("--out", type=Path, default=OUT, help="the file of results, added to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    done = {(row["model"], row["switch"], row["value"]) for row in read(args.out)}
    wanted = [v for v in VARIANTS if (args.model, v.switch, v.value) not in done]
    wanted = [v for v in wanted if args.switch is None or v.switch in args.switch]
    wanted = [v for v in wanted if args.value is None or v.value in args.value]
    with tempfile.TemporaryDirectory() as scratch:
        if args.model == "vit_b16":
            if "MIXRANK_DATA" not in os.environ:
                parser.error("set MIXRANK_DATA to the folder with the model and the images")
            subject = vit_b16(Path(os.environ["MIXRANK_DATA"]), Path(scratch))
        elif args.assets is None:
            parser.error("--assets must name the folder of the fashion model")
        else:
            subject = fashion(args.assets)
        known = (row["ranks"] for row in read(args.out) if (row["model"], row["switch"]) == (args.model, BASE.switch))
        ablation = Ablation(subject, next(known, None))
        for variant in wanted:
            row = {"model": args.model, "keep": subject.keep, "switch": variant.switch, "value": variant.value}
            row |= {"seed": SEED, "calibration": variant.images or len(subject.images)} | ablation.measure(variant)
            append(args.out, row)
            print(f"{variant.switch} {variant.value}: KL {row['kl']:.6f}, {row['agreement']:.1f} %", flush=True)


if __name__ == "__main__":
    main()
