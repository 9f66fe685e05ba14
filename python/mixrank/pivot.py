"""The pivoted form of a low-rank weight: R of its own rows, and the others as combinations of these.

A weight ``W = up @ down`` of rank R has R rows ``W[P]`` that span all rows, so ``W[others] = Z @ W[P]`` with ``Z``
``[N - R, R]`` (PIFA: Zhao, Zhang, Cannistraci 2025): the same matrix in ``R (K + N - R)`` numbers instead of
``R (K + N)``.

Which rows depends on up alone, as ``Z = up[others] @ inv(up[P])``. Rounding errors of ``W[P]`` are multiplied by ``Z``,
so its entries should be small. Gaussian elimination with partial pivoting gives a first choice; then rows are swapped
while an entry of ``Z`` is above a bound, each swap raising the volume ``|det up[P]|`` by that entry (Goreinov,
Oseledets, Savostyanov, Tyrtyshnikov, Zamarashkin 2010: how to find a good submatrix). All of this happens to an
orthonormal basis of the columns of up, which exists and is well-conditioned whatever the rank of up is: no weight is
refused, none gives NaN, and no rank has to be lowered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixrank.errors import InputError

BOUND = 1.05
STEPS_PER_RANK = 4


@dataclass(frozen=True)
class Pivots:
    """A low-rank weight ``[N, K]`` in the pivoted form.

    Attributes:
        index: ``[N]`` int64: the R rows that are stored, then the others, rising in both parts.
        down: ``[R, K]`` float64, the stored rows.
        coefficients: ``[N - R, R]`` float64: the others are ``coefficients @ down``.
        largest: the largest magnitude among the coefficients, 0 where there are none.
        swaps: how many rows were swapped after the first choice.
    """

    index: Tensor
    down: Tensor
    coefficients: Tensor
    largest: float
    swaps: int


def pivot(down: Tensor, up: Tensor, *, bound: float = BOUND) -> Pivots:
    """Bring the weight ``up @ down`` into the pivoted form, in float64 on the CPU.

    Args:
        down: ``[R, K]``, finite.
        up: ``[N, R]`` with R <= N, finite.
        bound: rows are swapped while a coefficient is larger than this, above 1; at most ``4 R`` times, which is more
            than weights need. The form is exact also where the bound is missed.

    Returns:
        The form; it gives the weight again up to rounding in float64.

    Raises:
        InputError: shapes that do not fit, values that are not finite, or a bound that is not above 1.
    """
    if down.dim() != 2 or up.dim() != 2 or up.shape[1] != down.shape[0] or not 1 <= up.shape[1] <= up.shape[0]:
        raise InputError(
            f"down and up must have shapes [R, K] and [N, R] with 1 <= R <= N, but they were {list(down.shape)} and "
            f"{list(up.shape)}"
        )
    if not bound > 1:
        raise InputError(f"bound must be above 1, but it was {bound}")
    down, up = (tensor.detach().double().cpu() for tensor in (down, up))
    for name, tensor in (("down", down), ("up", up)):
        if not tensor.isfinite().all():
            raise InputError(f"{name} must be finite, but it has NaN or infinite values")
    rank = up.shape[1]
    basis = torch.linalg.qr(up)[0]
    order, swaps = _order(basis, bound)
    stored, others = order[:rank].sort().values, order[rank:].sort().values
    coefficients = torch.linalg.solve(basis[stored], basis[others], left=False)
    largest = coefficients.abs().max().item() if len(others) else 0.0
    return Pivots(torch.cat([stored, others]), up[stored] @ down, coefficients, largest, swaps)


def _order(basis: Tensor, bound: float) -> tuple[Tensor, int]:
    """The rows of ``basis`` [N, R], those first that all others are small combinations of; and the swaps it took."""
    n, rank = basis.shape
    packed, exchanges = torch.linalg.lu_factor(basis)
    order = torch.arange(n)
    for row, other in enumerate((exchanges - 1).tolist()):
        order[[row, other]] = order[[other, row]]
    # With basis[order] = [lower; rest] @ upper, the coefficients are rest @ inv(lower).
    lower, rest = packed[:rank], packed[rank:]
    coefficients = torch.linalg.solve_triangular(lower, rest, upper=False, left=False, unitriangular=True)
    swaps = 0
    while len(coefficients) and swaps < STEPS_PER_RANK * rank:
        other, stored = divmod(coefficients.abs().argmax().item(), rank)
        pivot_entry = coefficients[other, stored].item()
        if abs(pivot_entry) <= bound:
            break
        # The two rows change places; every row is then a combination with the new one in place of the old one.
        column = coefficients[:, stored].clone()
        row = coefficients[other].clone()
        row[stored] -= 1
        column[other] += 1
        coefficients.addr_(column, row, alpha=-1 / pivot_entry)
        order[[stored, rank + other]] = order[[rank + other, stored]]
        swaps += 1
    return order, swaps
