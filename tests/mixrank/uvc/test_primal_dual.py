"""The updates of unified compression against steps computed by hand, and where they lead."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import timm
import torch

from mixrank import InputError
from mixrank.uvc.primal_dual import Groups, PrimalDual, Rates, bottom_energy, next_energy, removed
from mixrank.uvc.structure import BlockShape, Structure, parts_of, structure_of

# Tokens 3, width 4, heads of 2: a block of h heads, c value columns and n neurons takes 84 h + 24 c + 24 n.
SMALL = Structure(width=4, head_width=2, tokens=3, blocks=(BlockShape((2, 2), 4),) * 2, fixed_macs=100)
FULL = 100 + 2 * 360


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def small_groups() -> list[Groups]:
    first = Groups(numbers(1, 3), (numbers(0.25, 0.75), numbers(1, 2)), numbers(4, 1, 3, 2))
    return [first, Groups(numbers(5, 2), (numbers(1, 4), numbers(1, 1)), numbers(1, 1, 1, 1))]


def test_groups_are_removed_from_the_smallest_on_and_one_stays():
    norms = numbers(4, 1, 3, 2)
    expected = {0.0: [], 0.01: [1], 0.25: [1], 0.26: [1, 3], 0.75: [1, 3, 2], 1.0: [1, 3, 2]}
    for share, gone in expected.items():
        assert removed(norms, numbers(share)[0]).tolist() == gone
    assert bottom_energy(norms, numbers(0.26)[0]).item() == pytest.approx(3)
    assert next_energy(norms, numbers(0.26)[0]).item() == pytest.approx(12)


def test_families_count_relative_to_their_sums_unless_they_are_comparable():
    groups = Groups(numbers(1, 3), (numbers(0, 0), numbers(1, 2)), numbers(4, 1, 3, 2))
    heads, none, columns, neurons = groups.energies()
    assert heads.tolist() == [0.25, 0.75]
    assert none.tolist() == [0, 0]
    assert columns.tolist() == pytest.approx([1 / 3, 2 / 3])
    assert neurons.tolist() == pytest.approx([0.4, 0.1, 0.3, 0.2])
    assert groups.relative().neurons.tolist() == pytest.approx([1.6, 0.4, 1.2, 0.8])
    comparable = dataclasses.replace(groups, comparable=True)
    assert comparable.relative() is comparable
    assert [one.tolist() for one in comparable.energies()] == [[1, 3], [0, 0], [1, 2], [4, 1, 3, 2]]


def test_the_first_steps_are_those_computed_by_hand():
    run = PrimalDual(SMALL, budget=0.5, rates=Rates(share=0.5, group=2.0))
    share, gate_pull = run.update(small_groups(), numbers(1, 1), target=0.95)
    assert share == 1.0
    # dR/ds = -(168 + 96) / 820, dR/dr = -48 / 820 of each head, dR/dn = -96 / 820, in both blocks; no resistance yet.
    square = 2 * (264**2 + 2 * 48**2 + 96**2) / FULL**2
    z = 0.05 / (0.5 * square)
    assert run.pressure == pytest.approx(z, rel=2e-3)
    assert gate_pull.tolist() == pytest.approx([run.pressure * 360 / FULL] * 2)
    for shares, duals in zip(run.shares, run.multipliers, strict=True):
        assert shares.heads.item() == pytest.approx(0.5 * run.pressure * 264 / FULL)
        assert shares.columns.tolist() == pytest.approx([0.5 * run.pressure * 48 / FULL] * 2)
        assert shares.neurons.item() == pytest.approx(0.5 * run.pressure * 96 / FULL)
        assert (duals.heads, duals.neurons, *duals.columns) == (0, 0, 0, 0)  # nothing was removed yet

    a, b, c = run.shares[0].heads.item(), run.shares[0].columns[0].item(), run.shares[0].neurons.item()
    kept = 2 * (1 - a)
    columns, neurons = kept * 2 * (1 - b), 4 * (1 - c)
    expected = (100 + 1.5 * (84 * kept + 24 * columns + 24 * neurons)) / FULL
    share, _ = run.update(small_groups(), numbers(1, 0.5), target=expected + 1e-9)
    assert share == pytest.approx(expected)
    assert run.pressure == 0  # the target is met already, by the gate
    assert run.shares[0].heads.item() == a
    # Of each family one group is to go now; its energy relative to all, times the rate.
    assert run.multipliers[0].heads.item() == pytest.approx(2 * 1 / 4)
    assert run.multipliers[0].columns.tolist() == pytest.approx([2 * 0.25, 2 / 3])
    assert run.multipliers[0].neurons.item() == pytest.approx(2 * 1 / 10)
    assert run.multipliers[1].heads.item() == pytest.approx(2 * 2 / 7)


def test_a_multiplier_holds_its_share_back_by_the_norm_of_the_next_group():
    run = PrimalDual(SMALL, budget=0.9, rates=Rates(share=0.01))
    run.shares[0].neurons += 0.5
    run.multipliers[0].neurons += 0.3
    run.update(small_groups(), numbers(1, 1), target=1.0)
    # No pressure: the two smallest of 4, 1, 3, 2 are to go, the next is 3 of a mean of 2.5.
    assert run.shares[0].neurons.item() == pytest.approx(0.5 - 0.01 * 0.3 * 3 / 2.5)
    assert run.shares[1].neurons == 0


def test_steps_are_limited_however_far_the_target_is():
    run = PrimalDual(SMALL, budget=0.3, rates=Rates(share=0.02, clip=0.5))
    run.update(small_groups(), numbers(1, 1), target=0.3)
    for shares in run.shares:
        assert shares.heads.item() == shares.neurons.item() == pytest.approx(0.01)
        assert shares.columns.tolist() == pytest.approx([0.01] * 2)


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5).eval()


def test_the_proximal_step_divides_what_is_to_go_and_nothing_else():
    net = model()
    parts = parts_of(net)
    groups = [Groups.of(part) for part in parts]
    run = PrimalDual(structure_of(net), budget=0.5)
    shares, duals = run.shares[1], run.multipliers[1]
    shares.heads += 0.1
    shares.neurons += 0.5
    duals.heads += 2.0
    duals.neurons += 3.0
    before = copy.deepcopy(net)
    run.shrink_weights_(parts, groups, rate=0.1)
    for index in (0, 2):
        for name, value in net.blocks[index].state_dict().items():
            assert torch.equal(value, before.blocks[index].state_dict()[name])
    head = int(groups[1].heads.argmin())
    proj, old = net.blocks[1].attn.proj.weight, before.blocks[1].attn.proj.weight
    factor = torch.ones(192)
    factor[64 * head : 64 * (head + 1)] = 1 + 2 * 0.1 * 2
    assert torch.allclose(proj, old / factor)
    gone = groups[1].neurons.argsort()[:384]
    factor = torch.ones(768)
    factor[gone] = 1 + 2 * 0.1 * 3
    assert torch.allclose(net.blocks[1].mlp.fc2.weight, before.blocks[1].mlp.fc2.weight / factor)
    assert torch.equal(net.blocks[1].attn.qkv.weight, before.blocks[1].attn.qkv.weight)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.7])
def test_it_follows_its_target_to_the_budget(budget):
    net = model()
    structure, parts = structure_of(net), parts_of(net)
    run, gates, steps = PrimalDual(structure, budget), torch.ones(3), 300
    for step in range(steps):
        target = max(budget, 1 - (1 - budget) * step / (0.8 * steps))
        groups = [Groups.of(part) for part in parts]
        share, _ = run.update(groups, gates, target)
        assert step < 5 or abs(share - target) < 0.01
        run.shrink_weights_(parts, groups, rate=0.05)


@pytest.mark.parametrize("budget", [0.0, 0.2, 1.0, 1.5])
def test_a_budget_out_of_reach_says_what_the_least_is(budget):
    least = (100 + 84 + 48) / FULL
    with pytest.raises(InputError, match=f"budget must be above {least:.4f} .* and below 1, but it was {budget}"):
        PrimalDual(SMALL, budget)
