"""A sparse residual of whole blocks beside factors of lower rank, in as many numbers as factors alone.

The kernels serve such a residual; whether it is worth its numbers is a question of accuracy. Factors and blocks are
fitted in turns (as in OATS, Zhang and Papyan 2024, there for single numbers): the factors of what the blocks leave,
then the blocks of what the factors leave. Where the blocks stand costs numbers too, which are not counted here: the
residual is judged by its best.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixrank.decompose import Factorisation
from mixrank.errors import InputError
from mixrank.stats import LayerStats

TURNS = 3


def with_blocks(
    linear: nn.Linear,
    stats: LayerStats,
    make: Callable[[nn.Linear], Factorisation],
    rank: int,
    size: int,
    share: float,
) -> nn.Linear:
    """Return a linear layer whose weight is factors plus blocks, multiplied out.

    Args:
        linear: the layer, weight ``[N, K]``; it is not changed.
        stats: of the layer; the blocks that are taken are those of the largest energy, weighted by its inputs where the
            statistics are of these.
        make: decomposes a linear layer.
        rank: R, of factors in the pivoted form that the residual competes with.
        size: of a square block; it must divide N and K.
        share: of the numbers of those factors that the blocks take.

    Raises:
        InputError: the size does not divide N and K.
    """
    weight = linear.weight.detach()
    n, k = weight.shape
    if n % size or k % size:
        raise InputError(f"size must divide {n} and {k}, but it was {size}")
    numbers = rank * (k + n - rank)
    count = int(share * numbers) // size**2
    lower = max(r for r in range(1, rank + 1) if r * (k + n - r) <= numbers - count * size**2)
    scale = _input_scale(stats, weight)
    rest, sparse = copy.deepcopy(linear), torch.zeros_like(weight)
    for _ in range(TURNS):
        down, up, _ = _factors(rest, make, lower, weight - sparse)
        sparse = largest_blocks(weight - up @ down, scale, size, count)
    down, up, bias = _factors(rest, make, lower, weight - sparse)
    rest.weight = nn.Parameter(up @ down + sparse)
    rest.bias = None if bias is None else nn.Parameter(bias)
    return rest


def _factors(
    layer: nn.Linear, make: Callable[[nn.Linear], Factorisation], rank: int, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    layer.weight = nn.Parameter(weight)
    return make(layer).factors(rank)


def _input_scale(stats: LayerStats, weight: Tensor) -> Tensor:
    """Mean square of each input [K], or ones."""
    if stats.side != "input":
        return torch.ones_like(weight[0])
    return (stats.gram.diagonal() / stats.rows).to(weight)


def largest_blocks(weight: Tensor, scale: Tensor, size: int, count: int) -> Tensor:
    """``weight [N, K]`` with all but the ``count`` blocks of the largest ``sum(weight^2 * scale)`` set to zero."""
    n, k = weight.shape
    energy = (weight.square() * scale).reshape(n // size, size, k // size, size).sum((1, 3)).flatten()
    kept = torch.zeros_like(energy)
    kept[energy.topk(count).indices] = 1
    return weight * kept.reshape(n // size, 1, k // size, 1).expand(-1, size, -1, size).reshape(n, k)
