"""The registry: which cases there are, and what they count."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mixrank_bench import ops
from mixrank_bench.ops import Case
from mixrank_kernels import reference, testing


def test_cases_have_names_of_their_own():
    names = [(case.op, case.dtype, case.name, case.keep) for case in ops.cases()]
    assert len(names) == len(set(names))
    assert set(ops.quick_cases()) <= set(ops.cases())


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_every_layer_of_every_model_is_there_at_every_number_of_rows_and_budget(dtype):
    found = {(c.m, c.k, c.n, c.keep) for c in ops.cases() if c.op == "lowrank_linear" and c.dtype == dtype}
    for width in (192, 384, 512, 768, 1024):
        for k, n in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)):
            assert {(m, k, n, keep) for m in (1, 32, 197, 1576) for keep in (0.4, 0.6)} <= found
    grams = {(c.m, c.k) for c in ops.cases() if c.op == "gram_accumulate_" and c.dtype == dtype and not c.batch}
    assert grams == {(m, k) for m in (1576, 12608) for k in (192, 384, 768, 1024, 3072)}


@pytest.mark.parametrize(("keep", "k", "n"), [(0.4, 768, 3072), (0.6, 1024, 1024), (0.4, 192, 192)])
def test_factors_have_the_share_that_is_kept(keep, k, n):
    rank = ops.rank_of(keep, k, n)
    assert rank % 8 == 0
    assert abs(rank * (k + n) - keep * k * n) <= 4 * (k + n)


@pytest.mark.parametrize(("keep", "k", "n"), [(0.6, 768, 3072), (0.4, 1024, 1024), (0.95, 192, 192)])
def test_the_pivoted_form_has_the_share_that_is_kept_at_a_higher_rank(keep, k, n):
    rank = ops.pivoted_rank_of(keep, k, n)
    assert rank % 8 == 0
    assert abs(rank * (k + n - rank) - keep * k * n) <= 4 * (k + n - 2 * rank) + 16
    assert ops.rank_of(keep, k, n) < rank < min(k, n)


def test_operations_and_bytes_are_those_that_have_to_be():
    linear = Case("lowrank_linear", "", torch.bfloat16, 3, 64, 32, 8)
    assert linear.flops == 2 * 3 * 8 * 64 + 2 * 3 * 8 * 32
    assert linear.bytes == 2 * (3 * 64 + 8 * 64 + 32 * 8 + 32 + 3 * 32)
    pivoted = Case("pivoted_linear", "", torch.bfloat16, 3, 64, 32, 8)
    assert pivoted.flops == 2 * 3 * 8 * 64 + 2 * 3 * 8 * (32 - 8)
    assert pivoted.bytes == 2 * (3 * 64 + 8 * 64 + (32 - 8) * 8 + 32 + 3 * 32) + 2 * 32
    sparse = Case("sparse_linear", "", torch.float32, 3, 60, 32, 8, density=0.25)
    assert sparse.flops == 2 * 3 * 8 * (60 + 32) + 2 * 3 * 480
    assert sparse.bytes == 4 * (3 * 60 + 480 + 8 * (60 + 32) + 32 + 3 * 32) + 32 * 8
    branch = Case("lowrank_residual_linear", "", torch.float32, 3, 64, 32, 8, 0.4, "branch")
    assert branch.flops - linear.flops == 2 * 3 * 16 * (64 + 32)
    blocks = Case("lowrank_residual_linear", "", torch.float32, 3, 640, 320, 8, 0.4, "blocks 32")
    assert blocks.blocks == (32, 10)
    assert blocks.flops == 2 * 3 * (8 * 960 + 10 * 32 * 32)
    gram = Case("gram_accumulate_", "", torch.float32, 10, 4)
    assert (gram.flops, gram.equivalent_flops) == (10 * 4 * 5, 2 * 10 * 16)
    assert gram.bytes == 4 * 10 * 4 + 2 * 8 * 16
    codes = Case("int8_lowrank_linear", "", torch.float32, 3, 64, 32, 8)
    assert codes.flops == linear.flops
    assert codes.bytes == 8 * (64 + 32) + 4 * (8 + 32) + 4 * (32 + 3 * (64 + 32))
    dense = Case("int8_linear", "", torch.float32, 3, 64, 32, dynamic=False)
    assert (dense.flops, dense.bytes) == (2 * 3 * 64 * 32, 64 * 32 + 4 * 32 + 4 * (32 + 3 * (64 + 32)))
    assert (codes.arithmetic, dense.arithmetic) == ("int8", "float32")
    cross = Case("cross_gram_accumulate_", "", torch.float32, 10, 4, 6)
    assert cross.flops == 2 * 10 * 4 * 6


def test_arguments_are_the_same_each_time_and_fit_the_operator():
    for case in ops.quick_cases():
        if case.m > ops.TOKENS or case.dtype != torch.float32:
            continue
        first, second = case.arguments(), case.arguments()
        assert all(torch.equal(t, second[name]) for name, t in first.items() if isinstance(t, torch.Tensor))
        (answer,) = testing.run(getattr(reference, case.op), first)
        assert answer.shape == (case.m, case.n)
        assert math.isclose(answer.std(), 2**0.5, rel_tol=0.3), "values of a layer's size"


def test_blocks_of_a_residual_are_stored_in_order_without_twins():
    case = Case("lowrank_residual_linear", "", torch.float32, 3, 640, 640, 8, 0.4, "blocks 16")
    made = case.arguments()
    assert len(made["values"]) == len(made["col"]) == case.blocks[1] == 80
    for start, end in itertools.pairwise(made["crow"].tolist()):
        columns = made["col"][start:end].tolist()
        assert columns == sorted(set(columns))
    assert testing.densified(made["crow"], made["col"], made["values"], 640).count_nonzero() == 80 * 16 * 16
