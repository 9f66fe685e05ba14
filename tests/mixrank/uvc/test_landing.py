"""Landing: what stays fits the budget to a neuron, whatever shares and gates say."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import timm
import torch

from mixrank import InputError
from mixrank.counting import count_macs
from mixrank.uvc.landing import land, macs_of
from mixrank.uvc.primal_dual import BlockVariables, Groups
from mixrank.uvc.shrink import KeptBlock, shrink_
from mixrank.uvc.structure import BlockShape, Structure, parts_of, structure_of

BLOCKS = 4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    args = {"img_size": 64, "depth": BLOCKS, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **args).eval()


def shares(seed: int, heads: int = 3) -> list[BlockVariables]:
    """Random ones."""
    source = torch.Generator().manual_seed(seed)

    def number(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=source, dtype=torch.float64)

    return [BlockVariables(number(1)[0], number(heads), number(1)[0]) for _ in range(BLOCKS)]


@pytest.mark.parametrize("budget", [0.15, 0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_lands_on_the_budget_to_a_neuron(model, budget, seed):
    structure, groups = structure_of(model), [Groups.of(part) for part in parts_of(model)]
    gates = torch.tensor([0.9, 0.4, 0.7, 0.45])
    kept = land(structure, groups, shares(seed), gates, budget)
    shrunk = shrink_(copy.deepcopy(model), kept)
    macs = count_macs(shrunk)
    assert macs == macs_of(structure, kept) == structure_of(shrunk).macs()
    assert budget * structure.macs() - structure.block_macs(0, 0, 1) < macs <= budget * structure.macs()
    # Two blocks have gates below a half; they stay only where the others cannot fill the budget.
    two = structure.fixed_macs + 2 * structure.block_macs(3, 192, 768)
    stay = [one is not None for one in kept]
    if budget * structure.macs() <= two:
        assert stay == [True, False, True, False]
    else:
        assert stay[:3:2] == [True, True]
        assert stay[3]  # the higher one of the two comes back first
    smaller = land(structure, groups, shares(seed), gates, 0.9 * budget)
    assert macs_of(structure, smaller) < macs


@pytest.mark.parametrize("budget", [0.15, 0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("multiple", [8, 24])
def test_it_lands_on_multiples_below_the_budget_by_less_than_one(model, budget, multiple):
    structure, groups = structure_of(model), [Groups.of(part) for part in parts_of(model)]
    kept = land(structure, groups, shares(4), torch.tensor([0.9, 0.4, 0.7, 0.45]), budget, multiple)
    below = budget * structure.macs() - macs_of(structure, kept)
    assert 0 <= below < structure.block_macs(0, 0, multiple)
    counts = [(len(columns), 64) for one in kept if one is not None for columns in one.columns if columns]
    counts += [(len(one.neurons), 768) for one in kept if one is not None]
    assert all(count % multiple == 0 or count == whole or count < multiple for count, whole in counts)
    assert any(count < whole for count, whole in counts)


def test_heads_of_a_block_get_the_same_number_of_columns_in_quarters(model):
    structure, groups = structure_of(model), [Groups.of(part) for part in parts_of(model)]
    shares_of_all = [replace(one, heads=torch.zeros_like(one.heads)) for one in shares(0)]

    def counts(multiple: int) -> list[set[int]]:
        kept = land(structure, groups, shares_of_all, torch.ones(BLOCKS), 0.4, multiple)
        assert all(all(one.columns) for one in kept)  # no head goes
        return [{len(columns) for columns in one.columns} for one in kept]

    assert all(len(each) == 1 for each in counts(8))
    found = set.union(*counts(8))
    assert len(found) > 1
    assert all(count < 16 or count % 16 == 0 for count in found)
    # It is the multiples that make them equal.
    assert all(len(each) > 1 for each in counts(1))


@pytest.mark.parametrize("multiple", [1, 8])
def test_groups_of_the_smallest_norm_go(model, multiple):
    structure, groups = structure_of(model), [Groups.of(part) for part in parts_of(model)]
    kept = land(structure, groups, shares(3), torch.ones(BLOCKS), 0.5, multiple)
    for one, found in zip(kept, groups, strict=True):
        for columns, norms in zip(one.columns, found.columns, strict=True):
            gone = sorted(set(range(len(norms))) - set(columns))
            assert not columns or not gone or norms[gone].max() <= norms[list(columns)].min()
        heads = [bool(columns) for columns in one.columns]
        gone = [norm for norm, stays in zip(found.heads, heads, strict=True) if not stays]
        assert not gone or max(gone) <= min(norm for norm, stays in zip(found.heads, heads, strict=True) if stays)


# Tokens 3, width 4, heads of 2: a block of h heads, c value columns and n neurons takes 84 h + 24 c + 24 n.
SMALL = Structure(width=4, head_width=2, tokens=3, blocks=(BlockShape((2, 2), 4),) * 2, fixed_macs=100)


def small(share: float) -> tuple[list[Groups], list[BlockVariables]]:
    numbers = torch.tensor([4.0, 1.0, 3.0, 2.0], dtype=torch.float64)
    groups = Groups(numbers[:2], (numbers[:2], numbers[2:]), numbers)
    return [groups] * 2, [BlockVariables.full(2, share)] * 2


def test_a_case_counted_by_hand():
    groups, removed = small(0.5)
    # 820 in all. Half of all groups gone leaves 84 + 24 + 48 of each block; 410 leaves room for two half blocks only.
    kept = land(SMALL, groups, removed, torch.ones(2), 0.51)
    assert kept == [KeptBlock(((0,), ()), (0, 2))] * 2
    assert macs_of(SMALL, kept) == 100 + 2 * (84 + 24 + 48)
    # 30 more let one neuron come back, of the norm 2.
    more = land(SMALL, groups, removed, torch.ones(2), 0.54)
    assert more == [KeptBlock(((0,), ()), (0, 2, 3)), KeptBlock(((0,), ()), (0, 2))]


def test_blocks_go_beyond_the_gates_where_nothing_else_fits():
    groups, removed = small(0.0)
    # One head, one column and one neuron of both blocks take 100 + 2 * 132 of 820; 0.3 of it is 246.
    kept = land(SMALL, groups, removed, torch.tensor([0.6, 0.8]), 0.3)
    assert kept[0] is None
    assert macs_of(SMALL, kept) <= 246
    with pytest.raises(InputError, match=r"budget must be above 0\.2829"):
        land(SMALL, groups, removed, torch.ones(2), 0.28)
