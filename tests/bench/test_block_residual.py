"""Sparse blocks beside factors: where they stand, how many numbers both take, and when they help."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from mixrank.decompose import factorise
from mixrank.errors import InputError
from mixrank.stats import LayerStats
from mixrank_bench.block_residual import largest_blocks, with_blocks

N, K, SIZE, RANK = 48, 64, 16, 20


def test_blocks_of_most_weighted_energy_are_kept_as_they_are():
    weight = torch.ones(32, 32)
    weight[:16, 16:] = 2.0
    weight[16:, :16] = 1.5
    even = largest_blocks(weight, torch.ones(32), 16, 1)
    assert torch.equal(even[:16, 16:], weight[:16, 16:])
    assert even.count_nonzero() == 256
    scale = torch.ones(32)
    scale[:16] = 5.0
    scaled = largest_blocks(weight, scale, 16, 2)
    assert torch.equal(scaled[:, :16], weight[:, :16])
    assert scaled.count_nonzero() == 512


@pytest.fixture
def statistics():
    torch.manual_seed(0)
    x = torch.randn(500, K, dtype=torch.float64)
    return LayerStats("input", gram=x.T @ x, total=x.sum(0), rows=500, images=10)


def test_factors_and_blocks_together_take_no_more_numbers_than_factors_alone(statistics):
    linear = nn.Linear(K, N)
    before = linear.weight.detach().clone()
    share = 0.4
    found = with_blocks(linear, statistics, partial(factorise, stats=statistics), RANK, SIZE, share)
    assert torch.equal(linear.weight, before)
    numbers = RANK * (K + N - RANK)
    count = int(share * numbers) // SIZE**2
    lower = max(r for r in range(1, RANK + 1) if r * (K + N - r) <= numbers - count * SIZE**2)
    assert count >= 1
    assert 1 <= lower < RANK
    # A weight of that rank, and so many blocks, each of which adds at most its size to the rank.
    singular = torch.linalg.svdvals(found.weight.detach().double())
    assert (singular > 1e-4 * singular[0]).sum() <= lower + count * SIZE < min(N, K)


def test_a_weight_of_low_rank_and_one_block_is_found_again(statistics):
    torch.manual_seed(1)
    linear = nn.Linear(K, N)
    block = torch.zeros(N, K)
    block[16:32, 32:48] = 3 * torch.randn(16, 16)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(N, 4) @ torch.randn(4, K) + block)
    make = partial(factorise, stats=statistics)
    rank = 8
    found = with_blocks(linear, statistics, make, rank, SIZE, 0.4)
    down, up, _ = make(linear).factors(rank)
    alone = (linear.weight - up @ down).norm()
    assert (linear.weight - found.weight).norm() < 0.2 * alone


def test_a_size_that_does_not_divide_is_refused(statistics):
    with pytest.raises(InputError, match="size must divide 48 and 64, but it was 20"):
        with_blocks(nn.Linear(K, N), statistics, factorise, RANK, 20, 0.1)
