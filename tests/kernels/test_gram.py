"""What holds for the Gram operators beyond their values: symmetry, definiteness, and sums over many calls."""

from __future__ import annotations

import pytest
import torch

from mixrank_kernels import ops

GRAM, CROSS = "gram_accumulate_", "cross_gram_accumulate_"


def accumulate(op: str, master: torch.Tensor, x: torch.Tensor) -> None:
    """``master += x^T x`` by either operator: the cross Gram matrix of x with a copy of itself is its Gram matrix."""
    ops.gram_accumulate_(master, x) if op == GRAM else ops.cross_gram_accumulate_(master, x, x.clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("k", [5, 33, 65])
@pytest.mark.operators(GRAM)
def test_symmetric_and_positive_semidefinite(implementation, dtype, k):
    gram = torch.zeros(k, k, dtype=torch.float64)
    ops.gram_accumulate_(gram, torch.randn(k // 2 + 1, k).to(dtype))
    assert torch.equal(gram, gram.mT)
    assert torch.linalg.eigvalsh(gram).min() >= -1e-6 * gram.trace()


@pytest.mark.operators(GRAM)
def test_many_calls_equal_one_with_weights_and_sums(implementation):
    x = torch.randint(-8, 9, (57, 21)).float()
    weight, whole, parts = (
        torch.ones(57),
        torch.zeros(21, 21, dtype=torch.float64),
        torch.zeros(21, 21, dtype=torch.float64),
    )
    total, sums = torch.zeros(21, dtype=torch.float64), torch.zeros(21, dtype=torch.float64)
    ops.gram_accumulate_(whole, x, weight, total)
    for chunk in x.split(10):
        ops.gram_accumulate_(parts, chunk, None, sums)
    assert torch.equal(whole, parts)
    assert torch.equal(total, sums)


@pytest.mark.operators(CROSS)
def test_many_cross_calls_equal_one(implementation):
    x, z = torch.randint(-8, 9, (57, 21)).float(), torch.randint(-8, 9, (57, 13)).float()
    whole, parts = (torch.zeros(21, 13, dtype=torch.float64) for _ in range(2))
    ops.cross_gram_accumulate_(whole, x, z)
    for x_chunk, z_chunk in zip(x.split(10), z.split(10), strict=True):
        ops.cross_gram_accumulate_(parts, x_chunk, z_chunk)
    assert torch.equal(whole, parts)


@pytest.mark.operators(CROSS)
def test_cross_of_a_concatenation_is_a_block_of_its_gram(implementation):
    x, z = torch.randint(-8, 9, (19, 7)).float(), torch.randint(-8, 9, (19, 34)).float()
    gram, cross = torch.zeros(41, 41, dtype=torch.float64), torch.zeros(7, 34, dtype=torch.float64)
    ops.gram_accumulate_(gram, torch.cat([x, z], 1))
    ops.cross_gram_accumulate_(cross, x, z)
    assert torch.equal(cross, gram[:7, 7:])


@pytest.mark.operators(GRAM, CROSS)
def test_ones_count_the_rows(implementation, op):
    master = torch.zeros(40, 40, dtype=torch.float64)
    for _ in range(3):
        accumulate(op, master, torch.ones(1000, 40))
    assert torch.equal(master, torch.full_like(master, 3000))


@pytest.mark.operators(GRAM, CROSS)
def test_an_fp64_master_keeps_what_fp32_would_lose(implementation, op):
    master = torch.full((9, 9), 2.0**30, dtype=torch.float64)
    for _ in range(3):
        accumulate(op, master, torch.ones(1, 9))
    assert torch.equal(master, torch.full_like(master, 2.0**30 + 3))


@pytest.mark.operators(GRAM)
def test_negative_weights_take_back(implementation):
    gram, x = torch.zeros(7, 7, dtype=torch.float64), torch.randn(12, 7)
    ops.gram_accumulate_(gram, x, torch.ones(12))
    ops.gram_accumulate_(gram, x, -torch.ones(12))
    assert gram.abs().max() < 1e-5
