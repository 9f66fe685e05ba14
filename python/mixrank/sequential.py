"""Sequential calibration: every layer is fitted to the inputs that the compressed layers before it really give.

Blocks are compressed in order. The layers of a block see ``X^``, what the compressed prefix makes of the images, and
aim at ``Y = X W^T``, the outputs of the dense model. The weight that reaches them best,

    ``W* = argmin |X^ W*^T - Y|^2 + ridge m |W* - W|^2``,  m the mean eigenvalue of X^'s Gram matrix,

is ``W + Delta`` with ``(X^^T X^ + ridge m I) Delta^T = X^^T (X - X^) W^T``: no drift, no change. It is then factored
like any weight, in the metric of the Gram matrix of ``X^``; means go into the bias. The inputs of one block, of the
dense and of the compressed model, are all that is held of the images.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import Tensor, nn

from mixrank.accumulate import groups_of, hooked
from mixrank.arguments import Strategy
from mixrank.blocks import Blocks, find_blocks
from mixrank.data import as_batch
from mixrank.decompose import Factorisation, LayerShape, factorise
from mixrank.errors import InputError
from mixrank.models import compressible_linears
from mixrank.nn import MixedRankLinear
from mixrank.plan import Plan
from mixrank.progress import track
from mixrank.stats import LayerStats
from mixrank_kernels import ops

RIDGE = 0.1


class _Stop(Exception):
    """Ends a forward pass where what was wanted of it is there."""


def compress_blocks_(
    model: nn.Module,
    batches: Iterable,
    plan: Plan,
    *,
    ridge: float = RIDGE,
    strategy: Strategy | None = None,
    dtype: torch.dtype | None = None,
    buffer_dtype: torch.dtype | None = None,
    progress: bool = False,
) -> tuple[dict[str, Factorisation], int]:
    """Replace the layers that the plan gives a rank, block after block, in place.

    Where anything fails, the model is as it was. A layer that stays dense keeps its weight.

    Args:
        model: the dense model that the plan was made from, with the same layers split; in evaluation mode.
        batches: calibration images, as for :func:`mixrank.calibrate.calibrate`, all of one size.
        plan: the ranks.
        ridge: pull towards the original weight, above 0, in units of the mean eigenvalue of the inputs' Gram matrix.
        strategy: ``factors`` (``"aware"`` or ``"svd"``), ``centre`` and ``shrink`` of
            :func:`mixrank.decompose.factorise`.
        dtype: run the model under autocast in this dtype.
        buffer_dtype: hold the inputs of a block in this dtype; None: as they are.
        progress: show a progress bar with the time left.

    Returns:
        The factorisations of the layers that were replaced, and the number of images. The errors are those of the
        truncation alone, on the inputs that the compressed model gives.

    Raises:
        InputError: the blocks are no chain (see :func:`mixrank.blocks.find_blocks`), images of several sizes or none,
            a layer that sees NaN or infinite values.
    """
    check_ridge(ridge)
    training = model.training
    originals = {name: model.get_submodule(name) for name in compressible_linears(model)}
    parameter = next(model.parameters())
    results: dict[str, Factorisation] = {}
    try:
        model.eval()
        autocast = torch.autocast(parameter.device.type, dtype, enabled=dtype is not None)
        with torch.no_grad(), autocast:
            blocks, dense = _first_inputs(model, batches, buffer_dtype)
            images = sum(len(x) for x in dense) // getattr(batches, "views", 1)
            drifted = list(dense)
            for name, block in track(blocks.modules.items(), "compressing blocks", enabled=progress):
                target = copy.deepcopy(block)
                pair = _Pair(name, block, target, blocks.keywords[name], parameter.dtype)
                ranks = {layer.name: layer.rank for layer in plan.layers}
                results |= pair.compress_(dense, drifted, ranks, images, ridge, strategy or {})
                for module, inputs in ((target, dense), (block, drifted)):
                    for i, x in enumerate(inputs):
                        inputs[i] = _kept(pair.run(module, x), buffer_dtype)
    except BaseException:
        for name, module in originals.items():
            model.set_submodule(name, module)
        raise
    finally:
        model.train(training)
    return results, images


def check_ridge(ridge: float) -> None:
    """Raise InputError unless ``ridge`` is a number above 0."""
    if not 0 < ridge < math.inf:
        raise InputError(f"ridge must be a number above 0, but it was {ridge}")


def _kept(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype)


def _first_inputs(model: nn.Module, batches: Iterable, dtype: torch.dtype | None) -> tuple[Blocks, list[Tensor]]:
    """The blocks, and what the first of them is called with for every batch."""
    parameter = next(model.parameters())
    blocks: Blocks | None = None
    inputs: list[Tensor] = []
    size: torch.Size | None = None

    def take(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs.append(_kept(arguments[0].clone(), dtype))
        raise _Stop

    for item in batches:
        images = as_batch(item).images.to(parameter.device, parameter.dtype)
        if len(images) == 0:
            continue
        if blocks is None or size is None:
            blocks, size = find_blocks(model, images), images.shape[1:]
        if images.shape[1:] != size:
            sizes = f"{list(size)} and {list(images.shape[1:])}"
            raise InputError(f"sequential calibration needs images of one size, but they had {sizes}")
        first = next(iter(blocks.modules.values()))
        with hooked([first.register_forward_pre_hook(take)]), _stopping():
            model(images)
    if blocks is None:
        raise InputError("calibration needs at least one image, but there was none")
    return blocks, inputs


@contextmanager
def _stopping() -> Iterator[None]:
    with suppress(_Stop):
        yield


@dataclasses.dataclass
class _Drift:
    """Sums over the tokens of one input, as the compressed prefix gives it (x^) and as the dense one does (x)."""

    gram: Tensor  # [K, K], of x^
    total: Tensor  # [K], of x^
    cross: Tensor  # [K, K] of x^ with x - x^; or [K, N] of x^ with (x - x^) W^T
    drift: Tensor  # [K], of x - x^
    rows: int = 0


class _Pair:
    """A block that is being compressed, and the same block as it was."""

    def __init__(self, name: str, block: nn.Module, target: nn.Module, keywords: dict, dtype: torch.dtype) -> None:
        self.name, self.block, self.target, self.keywords, self.dtype = name, block, target, keywords, dtype
        # Differences of bfloat16 activations would lose what they are taken for.
        self.wide = torch.promote_types(dtype, torch.float32)

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        return module(x.to(self.dtype), **self.keywords)

    def compress_(
        self,
        dense: list[Tensor],
        drifted: list[Tensor],
        ranks: dict[str, int | None],
        images: int,
        ridge: float,
        strategy: Strategy,
    ) -> dict[str, Factorisation]:
        """Replace the layers in the order of their calls, those with the same input together."""
        linears = compressible_linears(self.block)
        calls: dict[str, int] = dict.fromkeys(linears, 0)

        def count(name: str) -> Callable[..., None]:
            def hook(*_: object) -> None:
                calls[name] += 1

            return hook

        with hooked(linear.register_forward_pre_hook(count(name)) for name, linear in linears.items()):
            groups = groups_of(linears, lambda: self.run(self.block, drifted[0][:1]))
        results = {}
        for group in groups:
            ranked = {name: rank for name in group if (rank := ranks.get(f"{self.name}.{name}")) is not None}
            if not ranked:
                continue
            names = list(ranked)
            sums = self._sums(names, linears, calls[names[0]], dense, drifted)
            for name, rank in ranked.items():
                linear, full = linears[name], f"{self.name}.{name}"
                made = refit(linear, sums, images, ridge, strategy)
                layer = MixedRankLinear.from_factors(*made.factors(rank)).train(linear.training)
                self.block.set_submodule(name, layer)
                results[full] = made
        return results

    def _sums(
        self, group: list[str], linears: dict[str, nn.Linear], calls: int, dense: list[Tensor], drifted: list[Tensor]
    ) -> _Drift:
        """Sums over the common input of some layers, each called as many times."""
        weight = linears[group[0]].weight
        n, k = weight.shape
        narrow = len(group) == 1 and n < k
        zeros = partial(torch.zeros, dtype=torch.float64, device=weight.device)
        sums = _Drift(zeros(k, k), zeros(k), zeros(k, n if narrow else k), zeros(k))
        for x, x_drifted in zip(dense, drifted, strict=True):
            pairs = (
                self._inputs(module, group[0], calls, part)
                for module, part in ((self.target, x), (self.block, x_drifted))
            )
            for true, given in zip(*pairs, strict=True):
                with torch.autocast(weight.device.type, enabled=False):
                    given = given.to(self.wide)
                    drift = true.to(self.wide) - given
                    ops.gram_accumulate_(sums.gram, given, None, sums.total)
                    lost = nn.functional.linear(drift, weight.to(self.wide)) if narrow else drift
                    ops.cross_gram_accumulate_(sums.cross, given, lost)
                    sums.drift += drift.flatten(0, -2).sum(0, dtype=torch.float64)
                    sums.rows += given.numel() // k
            if not (sums.total.isfinite().all() and sums.drift.isfinite().all()):
                raise InputError(f"the input of layer {self.name}.{group[0]} has NaN or infinite values")
        return sums

    def _inputs(self, module: nn.Module, name: str, calls: int, x: Tensor) -> list[Tensor]:
        """What a layer of the block is called with; the block is left after the last of these calls."""
        seen: list[Tensor] = []

        def take(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen.append(arguments[0].clone())
            if len(seen) == calls:
                raise _Stop

        with hooked([module.get_submodule(name).register_forward_pre_hook(take)]), _stopping():
            self.run(module, x)
        return seen


def refit(linear: nn.Linear, sums: _Drift, images: int, ridge: float, strategy: Strategy) -> Factorisation:
    """Factor the weight that reaches a layer's dense outputs best from the inputs that it really gets."""
    weight = linear.weight.detach().double()
    centre = strategy.get("centre")
    centre = strategy.get("factors") != "svd" if centre is None else centre
    mean, drift = sums.total / sums.rows, sums.drift / sums.rows
    gram = sums.gram / sums.rows
    narrow = sums.cross.shape[1] != weight.shape[1]
    cross = sums.cross / sums.rows if narrow else sums.cross / sums.rows @ weight.mT  # [K, N]
    if centre:
        gram = gram - torch.outer(mean, mean)
        cross = cross - torch.outer(mean, weight @ drift)
    change = _solve(gram, cross, ridge).mT
    bias = None if linear.bias is None else linear.bias.detach().double()
    if centre:
        bias = (0 if bias is None else bias) + weight @ drift - change @ mean
    fitted = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    fitted.weight = nn.Parameter(weight + change)
    if bias is not None:
        fitted.bias = nn.Parameter(bias)
    stats = LayerStats("input", sums.gram.cpu(), sums.total.cpu(), sums.rows, images=images)
    made = factorise(fitted, stats, **strategy)
    return dataclasses.replace(made, shape=LayerShape.of(linear, centre), like=linear.weight.detach().new_empty(0))


def _solve(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """``(gram + ridge m I)^-1 cross``, m the mean eigenvalue; zero where there is no input at all."""
    mean = gram.trace() / len(gram)
    if mean <= 0:
        return torch.zeros_like(cross)
    factor, failed = torch.linalg.cholesky_ex(
        gram + ridge * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    )
    if not failed:
        return torch.cholesky_solve(cross, factor)
    # Rounding of the sums made eigenvalues more negative than the ridge is positive.
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ ((vectors.mT @ cross) / (values.clamp(min=0) + ridge * mean)[:, None])
