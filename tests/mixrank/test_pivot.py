"""The pivoted form: the same weight, from rows that all others are small combinations of."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixrank import InputError
from mixrank.pivot import BOUND, Pivots, pivot


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows(found: Pivots) -> Tensor:
    """The weight that the form stands for."""
    parts = torch.cat([found.down, found.coefficients @ found.down])
    return torch.full_like(parts, float("nan")).index_copy(0, found.index, parts)


def assert_pivoted(found: Pivots, down: Tensor, up: Tensor, *, bound: float = BOUND) -> None:
    rank, weight = up.shape[1], up @ down
    assert (rows(found) - weight).norm() <= 1e-12 * weight.norm()
    assert torch.equal(found.down, (up[found.index[:rank]] @ down))
    assert found.index.sort().values.tolist() == list(range(len(up)))
    for part in (found.index[:rank], found.index[rank:]):
        assert torch.equal(part, part.sort().values)
    assert found.largest == (found.coefficients.abs().max().item() if found.coefficients.numel() else 0)
    assert found.largest <= bound


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**31))
def test_the_weight_comes_back_and_coefficients_are_small(n, k, share, seed):
    rank = 1 + int(share * (min(n, k) - 1))
    down, up = normal(rank, k, seed=seed), normal(n, rank, seed=seed + 1)
    assert_pivoted(pivot(down, up), down, up)


@pytest.mark.parametrize("bound", [1.01, 1.2, 4.0])
def test_swaps_go_on_until_the_bound_is_met(bound):
    down, up = normal(30, 50), normal(90, 30, seed=1)
    assert_pivoted(found := pivot(down, up, bound=bound), down, up, bound=bound)
    assert (found.swaps > 0) == (bound < 2)


def test_elimination_alone_can_leave_large_coefficients_which_swaps_bring_down():
    """The worst case of partial pivoting: coefficients double from column to column."""
    rank = 12
    top = torch.eye(rank, dtype=torch.float64) - torch.ones(rank, rank, dtype=torch.float64).tril(-1)
    up, down = torch.cat([top, -0.99 * torch.ones(1, rank, dtype=torch.float64)]), normal(rank, 20)
    assert (up[rank] @ torch.linalg.inv(top)).abs().max() > 500
    assert_pivoted(pivot(down, up), down, up)


@pytest.mark.parametrize("largest_power", [4, 8, 14])
def test_ill_conditioned_factors_are_harmless(largest_power):
    scale = torch.logspace(0, -largest_power, 20, dtype=torch.float64)
    down, up = normal(20, 30), normal(50, 20, seed=1) * scale
    assert_pivoted(pivot(down, up), down, up)


@pytest.mark.parametrize("true_rank", [0, 1, 7])
def test_factors_of_less_rank_than_they_have_columns_are_harmless(true_rank):
    low = normal(50, true_rank, seed=1) @ normal(true_rank, 20, seed=2)
    for down, up in ((normal(20, 30), low), (low[:20] @ normal(20, 30), normal(50, 20, seed=3))):
        found = pivot(down, up)
        assert_pivoted(found, down, up)
        assert found.coefficients.isfinite().all()


def test_every_row_can_be_a_pivot():
    down, up = normal(9, 30), normal(9, 9, seed=1)
    found = pivot(down, up)
    assert_pivoted(found, down, up)
    assert found.coefficients.shape == (0, 9)
    assert (found.largest, found.swaps) == (0.0, 0)


def test_equal_rows_have_coefficients_of_one():
    down, up = normal(4, 9), normal(4, 4, seed=1).repeat(3, 1)
    found = pivot(down, up)
    assert_pivoted(found, down, up)
    assert sorted(found.coefficients.abs().round(decimals=9).unique().tolist()) == [0, 1]


@pytest.mark.parametrize(
    ("shapes", "bound", "message"),
    [
        (((3, 8), (5, 4)), 1.5, r"down and up must have shapes .* but they were \[3, 8\] and \[5, 4\]"),
        (((6, 8), (5, 6)), 1.5, r"with 1 <= R <= N, but they were \[6, 8\] and \[5, 6\]"),
        (((0, 8), (5, 0)), 1.5, r"with 1 <= R <= N, but they were \[0, 8\] and \[5, 0\]"),
        (((3,), (5, 3)), 1.5, r"down and up must have shapes"),
        (((3, 8), (5, 3)), 1.0, r"bound must be above 1, but it was 1.0"),
        (((3, 8), (5, 3)), float("nan"), r"bound must be above 1, but it was nan"),
    ],
)
def test_what_does_not_fit_is_refused(shapes, bound, message):
    with pytest.raises(InputError, match=message):
        pivot(*(torch.ones(shape) for shape in shapes), bound=bound)


@pytest.mark.parametrize("name", ["down", "up"])
def test_values_that_are_not_finite_are_refused(name):
    factors = {"down": torch.ones(3, 8), "up": torch.ones(5, 3)}
    factors[name][1, 1] = float("inf")
    with pytest.raises(InputError, match=f"{name} must be finite, but it has NaN or infinite values"):
        pivot(**factors)
