"""The rounds in which sensitivity is measured, each on images of its own."""

from __future__ import annotations

import pytest
import torch

from mixrank import calibrate, decompose
from mixrank.allocate import NEAR, allocate, ranks_to_measure
from mixrank.planning import SENSITIVITY_ROUNDS, plan_ranks, portions
from mixrank.sample import Sample
from mixrank.sensitivity import measure_sensitivity


@pytest.mark.parametrize(
    ("count", "shares", "expected"),
    [
        (8, SENSITIVITY_ROUNDS, [[0, 1], [2, 3, 4, 5, 6, 7]]),
        (3, SENSITIVITY_ROUNDS, [[0], [1, 2]]),
        (1, SENSITIVITY_ROUNDS, [[0], [0]]),
        (4, (1.0, 1.0), [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (4, (0.75, 0.75), [[0, 1, 2], [3, 0, 1]]),
    ],
)
def test_portions_follow_one_another_and_begin_again(count, shares, expected):
    images = torch.arange(count)[:, None]
    assert [portion.flatten().tolist() for portion in portions(images, shares)] == expected


def test_each_round_measures_at_the_plan_before_on_images_that_it_did_not_see(model):
    images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    sample = Sample(images.split(4), 128, seed=0, held_out=0.5)
    made = decompose(model, calibrate(model, sample, held_out=0.5))
    allocation = {"keep": 0.5, "ranks": "mixed", "energy": "sensitivity", "form": "factors"}
    found = plan_ranks(model, made, sample, allocation, {"dtype": None, "progress": False}, rounds=(0.25, 0.75))

    assert len(sample.images) == 12
    plan = allocate(model, made, **{**allocation, "energy": "weight"})
    for near, part in zip(NEAR, sample.images.split((3, 9)), strict=True):
        measured = measure_sensitivity(model, ranks_to_measure(model, made, plan), made, [part])
        plan = allocate(model, made, sensitivities=measured, near=near, **allocation)
    assert found == plan
    with_less = plan_ranks(model, made, sample, allocation, {"dtype": None, "progress": False}, rounds=(0.25,))
    assert with_less != plan
