"""Removing at once by one threshold, and the division of a budget that is measured with it."""

from __future__ import annotations

import copy

import pytest
import torch

from mixrank import InputError, compress
from mixrank.counting import count_macs
from mixrank.fidelity import compare, logits_of
from mixrank.models import create_model
from mixrank.sample import Apart
from mixrank.uvc.combine import POWER, CombinedOptions, compress_combined_
from mixrank.uvc.importance import observe
from mixrank.uvc.landing import kept_by, macs_of
from mixrank.uvc.once import below_a_threshold, prune_once_
from mixrank.uvc.options import UVCOptions
from mixrank.uvc.primal_dual import Groups
from mixrank.uvc.shrink import remaining_blocks
from mixrank.uvc.split import HELD_OUT, POWERS, measure_split
from mixrank.uvc.structure import BlockShape, Structure

OPTIONS = UVCOptions(budget=0.4, epochs=2, observed=64, multiple=4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    args = {"img_size": 32, "depth": 3, "embed_dim": 96, "num_heads": 3, "num_classes": 3}
    return create_model("vit_tiny_patch16_224", args=args).eval()


def test_one_threshold_by_hand():
    # Tokens 3, width 4, heads of 2: a column or neuron takes 24, a head 84 and its columns, 820 in all.
    structure = Structure(width=4, head_width=2, tokens=3, blocks=(BlockShape((2, 2), 4),) * 2, fixed_macs=100)
    columns = (torch.tensor([9.0, 2.0]).double(), torch.tensor([8.0, 7.0]).double())
    first = Groups(torch.tensor([90.0, 4.0]).double(), columns, torch.tensor([6.0, 1.0, 5.0, 9.0]).double(), True)
    second = Groups(torch.tensor([90.0, 80.0]).double(), columns, torch.tensor([3.0, 9.0, 9.0, 9.0]).double(), True)

    def stays(budget: float) -> list:
        shares = below_a_threshold(structure, (first, second), budget)
        kept = [kept_by(one, share) for one, share in zip((first, second), shares, strict=True)]
        return [*kept, macs_of(structure, kept)]

    # A head of 4 for 84 + 48 is worth less than a neuron of 1 for 24.
    one, two, macs = stays(0.95)
    assert (one.columns, one.neurons) == (((0, 1), ()), (0, 1, 2, 3))
    assert (two.columns, two.neurons) == (((0, 1), (0, 1)), (0, 1, 2, 3))
    assert macs == 820 - 84 - 48
    one, two, macs = stays(0.81)
    assert (one.columns, one.neurons) == (((0, 1), ()), (0, 2, 3))
    assert macs == 820 - 84 - 48 - 24
    one, two, _ = stays(0.755)
    assert (one.columns, one.neurons) == (((0,), ()), (0, 2, 3))
    assert (two.columns, two.neurons) == (((0,), (0, 1)), (0, 1, 2, 3))


@pytest.mark.parametrize("budget", [0.3, 0.6])
def test_parts_go_at_once_and_the_others_take_over(model, data, budget):
    found = observe(model, data, 144, seed=0, dtype=None)
    small = prune_once_(copy.deepcopy(model), found, budget)
    each = count_macs(model) * 0.01
    assert budget * count_macs(model) - each < count_macs(small) <= budget * count_macs(model)
    assert len(remaining_blocks(small)) == 3
    aligned = prune_once_(copy.deepcopy(model), found, budget, multiple=4)
    assert all(block.shape.neurons % 4 == 0 for block in remaining_blocks(aligned))


def test_attempts_are_judged_on_images_held_out_and_the_least_divergence_wins(model, data, images):
    unlabelled = list(images[0][:100].split(20))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tried = measure_split(model, data, unlabelled, OPTIONS, powers=(0.25, 0.5))
    assert list(tried) == [0.25, 0.5]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    apart = Apart(unlabelled, HELD_OUT)
    trial = prune_once_(copy.deepcopy(model), observe(model, data, 64, seed=0, dtype=None), 0.4**0.5, 4)
    compress(trial, apart, max_macs=int(0.4 * count_macs(model)), seed=0)
    judged = [batch.images for batch in apart.kept]
    assert sum(map(len, judged)) == 20
    expected = compare(logits_of(trial, judged), logits_of(model, judged)).divergence
    assert tried[0.5] == pytest.approx(expected, rel=1e-3)

    whole = compress_combined_(copy.deepcopy(model), data, unlabelled, options=OPTIONS)
    assert tuple(whole.tried) == POWERS
    assert whole.power == min(POWERS, key=whole.tried.__getitem__)
    assert whole.pruned.macs_after / whole.macs_before <= 0.4**whole.power
    assert whole.to_json()["tried"][f"{whole.power:g}"] == min(whole.tried.values())


def test_what_cannot_be_reached_is_left_out_and_nothing_else_is_an_error(model, data, images):
    unlabelled = [images[0][:50]]
    tight = UVCOptions(budget=0.2, observed=32)
    tried = measure_split(model, data, unlabelled, tight, powers=(0.05, 0.9))
    assert list(tried) == [0.9]  # from 0.93 the ranks do not get there
    with pytest.raises(InputError, match="max_macs"):
        measure_split(model, data, unlabelled, tight, powers=(0.05,))
    with pytest.raises(InputError, match="needs more images, but there were 2"):
        measure_split(model, data, [images[0][:2]], OPTIONS)


def test_a_given_power_is_taken_and_nothing_measured(model, data, images):
    result = compress_combined_(model, data, [images[0][:50]], options=OPTIONS, combined=CombinedOptions(power=POWER))
    assert (result.power, result.tried) == (POWER, {})
