"""The variables and multipliers of unified compression, and their updates (Yu et al., ICLR 2022).

Each block has four kinds of variables: which share of its heads is removed (s), of the value columns of each head (r),
of its hidden neurons (n), and a gate g, the probability that the block is kept. With e(.) the energy of the least
groups of a family, R the share of the multiply-adds that remains, and multipliers at least zero, the problem is the
saddle point

    ``min over W, s, r, n, g   max over y, p, q, z
    loss(W, g) + y e(s) + p e(r) + q e(n) + z (R(s, r, n, g) - budget)``

solved by a step of each in turn: the weights by their optimizer, then :meth:`PrimalDual.shrink_weights_` (the
proximal step on the groups that are to go), then :meth:`PrimalDual.update`. A removed group is one of the
``ceil(share * count)`` of the least energy; the derivative passes straight through the rounding: of e, it is the
energy of the group that would go next.

Three things differ from the paper. Shares and relative energies, where it counts groups and takes plain squared norms,
make the steps independent of a model's width and of the scale of its weights. Energies are those of the loss where it
was observed (:mod:`mixrank.uvc.importance`), which makes them comparable between families and blocks. And z is not
raised by small steps, which overshoot: once the groups that are to go have shrunk to nothing, nothing draws them back.
It is solved for in each update instead, as the least multiplier under which R does not exceed a target that falls from
1 to the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixrank.errors import InputError
from mixrank.uvc.importance import Importance, squared_norms
from mixrank.uvc.structure import BlockParts, Structure

KINDS = ("heads", "columns", "neurons")


@dataclass
class BlockVariables:
    """The variables or multipliers of one block, float64.

    Attributes:
        heads: a number: the share of the heads that is removed, or its multiplier.
        columns: ``[H]``: the same for the value columns of each head.
        neurons: a number: the same for the hidden neurons.
    """

    heads: Tensor
    columns: Tensor
    neurons: Tensor

    @classmethod
    def full(cls, heads: int, value: float) -> BlockVariables:
        """All of one value."""
        number = torch.tensor(value, dtype=torch.float64)
        return cls(number.clone(), torch.full((heads,), value, dtype=torch.float64), number.clone())


@dataclass(frozen=True)
class Groups:
    """Energies of what can be removed from a block, float64: of columns of ``proj`` and of ``fc2``.

    Attributes:
        heads: ``[H]``.
        columns: one tensor for each head, ``[value columns of the head]``.
        neurons: ``[n]``.
        comparable: whether all families of all blocks are in one unit; else each counts relative to its own sum.
    """

    heads: Tensor
    columns: tuple[Tensor, ...]
    neurons: Tensor
    comparable: bool = False

    def families(self) -> list[Tensor]:
        """The groups that compete with one another, in the order of :class:`BlockVariables`."""
        return [self.heads, *self.columns, self.neurons]

    @classmethod
    def of(cls, part: BlockParts) -> Groups:
        """Squared norms, as the weights of a block are now."""
        columns, neurons = squared_norms(part)
        by_head = columns.split(part.columns)
        return cls(torch.stack([one.sum() for one in by_head]), by_head, neurons)

    def weighed(self, importance: Importance) -> Groups:
        """Their importance instead, which follows the squared norms from where it was measured."""
        columns = torch.cat(self.columns) * importance.columns
        by_head = columns.split([len(one) for one in self.columns])
        return Groups(self.heads * importance.heads, by_head, self.neurons * importance.neurons, comparable=True)

    def divided(self, by: Tensor) -> Groups:
        """In another unit."""
        return replace(
            self, heads=self.heads / by, columns=tuple(one / by for one in self.columns), neurons=self.neurons / by
        )

    def relative(self) -> Groups:
        """Each family relative to its mean, unless they are comparable."""
        if self.comparable:
            return self
        heads, *columns, neurons = (one / one.mean().clamp(min=torch.finfo(one.dtype).tiny) for one in self.families())
        return Groups(heads, tuple(columns), neurons)

    def energies(self) -> list[Tensor]:
        """The families, each relative to its sum unless they are comparable."""
        if self.comparable:
            return self.families()
        return [family / family.sum().clamp(min=torch.finfo(family.dtype).tiny) for family in self.families()]


def groups_of(parts: Sequence[BlockParts], importance: Sequence[Importance] | None = None) -> list[Groups]:
    """The groups of every block by their squared norms, or by their importance, a family's being 1 on average."""
    found = [Groups.of(part) for part in parts]
    if importance is None:
        return found
    weighed = [one.weighed(each) for one, each in zip(found, importance, strict=True)]
    unit = torch.stack([family.sum() for one in weighed for family in one.families()]).mean()
    return [one.divided(unit.clamp(min=torch.finfo(unit.dtype).tiny)) for one in weighed]


def removed(norms: Tensor, share: Tensor) -> Tensor:
    """The indices of the groups that a share removes, those of the smallest norm; at least one group stays."""
    count = min(math.ceil(share.item() * len(norms)), len(norms) - 1)
    return norms.argsort(stable=True)[:count]


def bottom_energy(energies: Tensor, share: Tensor) -> Tensor:
    """e: the energy of the groups that a share removes."""
    return energies[removed(energies, share)].sum()


def next_energy(energies: Tensor, share: Tensor) -> Tensor:
    """de/dshare: the energy of the group that would go next, times how many groups there are."""
    ordered, gone = energies.sort().values, len(removed(energies, share))
    return ordered[gone] * len(energies)


@dataclass(frozen=True)
class Rates:
    """Step sizes.

    Attributes:
        share: of the shares s, r and n.
        group: of the multipliers y, p and q.
        clip: the longest step of a share is ``share * clip``.
    """

    share: float = 0.01
    group: float = 0.1
    clip: float = 1.0


class PrimalDual:
    """Variables and multipliers of a model, and one update of them.

    Args:
        structure: of the model.
        budget: the share of the multiply-adds that may remain, in (0, 1).
        rates: step sizes.

    Raises:
        InputError: the budget is outside its range, or below what remains of a model with one block of one head, one
            column and one neuron (it says how much that is).
    """

    def __init__(self, structure: Structure, budget: float, rates: Rates | None = None) -> None:
        least = (structure.fixed_macs + structure.block_macs(1, 1, 1)) / structure.macs()
        if not least < budget < 1:
            raise InputError(
                f"budget must be above {least:.4f} (one block of one head) and below 1, but it was {budget}"
            )
        self.structure, self.budget, self.rates = structure, budget, rates or Rates()
        heads = [len(block.columns) for block in structure.blocks]
        self.shares = [BlockVariables.full(count, 0.0) for count in heads]
        self.multipliers = [BlockVariables.full(count, 0.0) for count in heads]
        self.pressure = 0.0  # z

    def remaining(self, groups: list[Groups], gates: Tensor) -> Tensor:
        """R, as the shares are now: the expected share of the multiply-adds that remain; differentiable.

        Args:
            groups: of each block.
            gates: ``[blocks]``, the probability that each is kept.
        """
        structure, total = self.structure, torch.tensor(float(self.structure.fixed_macs), dtype=torch.float64)
        for shape, shares, found, gate in zip(structure.blocks, self.shares, groups, gates.double(), strict=True):
            count = len(shape.columns)
            widths = torch.tensor(shape.columns, dtype=torch.float64)
            stays = torch.ones(count, dtype=torch.float64)
            stays[removed(found.heads, shares.heads.detach())] = 0.0
            # Of the heads that stay, the mean number of columns; of the heads, as many as the share says.
            kept = count * (1 - shares.heads)
            columns = kept * ((1 - shares.columns) * widths * stays).sum() / stays.sum()
            total = total + gate * structure.block_macs(kept, columns, shape.neurons * (1 - shares.neurons))
        return total / structure.macs()

    def update(self, groups: list[Groups], gates: Tensor, target: float) -> tuple[float, Tensor]:
        """One step of the shares down the gradient and of the multipliers up theirs.

        Args:
            groups: of each block, after the step of the weights.
            gates: ``[blocks]``, the probability that each is kept.
            target: what R is to be after the step, or below; steps are limited, so that it may take several.

        Returns:
            R before the step, and ``z dR/dgates`` ``[blocks]``, which the owner of the gates adds to their gradient.
        """
        gates = gates.detach().double().clone().requires_grad_()
        inputs = [getattr(shares, kind).requires_grad_() for shares in self.shares for kind in KINDS]
        remaining = self.remaining(groups, gates)
        *slopes, gate_slope = torch.autograd.grad(remaining, [*inputs, gates])
        for value in inputs:
            value.requires_grad_(False)
        families = [family for found in groups for family in found.energies()]
        shares, duals, slope = (
            torch.cat([value.reshape(-1) for value in values])
            for values in (inputs, [getattr(dual, kind) for dual in self.multipliers for kind in KINDS], slopes)
        )
        energies = torch.stack([bottom_energy(*pair) for pair in zip(families, shares, strict=True)])
        resistance = duals * torch.stack([next_energy(*pair) for pair in zip(families, shares, strict=True)])
        most = torch.tensor([1 - 1 / len(family) for family in families], dtype=torch.float64)

        def moved(pressure: float) -> Tensor:
            step = (resistance + pressure * slope).clamp(-self.rates.clip, self.rates.clip)
            return torch.minimum((shares - self.rates.share * step).clamp(min=0), most)

        # From there on every step is as long as it can be.
        most_pressure = ((self.rates.clip + resistance) / slope.abs().clamp(min=1e-12))[slope < 0].max().item()
        enough = lambda z: (remaining.item() + slope @ (moved(z) - shares)).item() <= target  # noqa: E731
        self.pressure = _least(enough, most_pressure)
        _scatter(inputs, moved(self.pressure))
        _scatter(
            [getattr(dual, kind) for dual in self.multipliers for kind in KINDS], duals + self.rates.group * energies
        )
        return remaining.item(), self.pressure * gate_slope

    def shrink_weights_(self, parts: Iterable[BlockParts], groups: list[Groups], rate: float) -> None:
        """The proximal step: the groups that are to go are divided by ``1 + 2 rate * multiplier``, in place.

        Args:
            parts: of each block.
            groups: their norms.
            rate: the learning rate of the weights.
        """
        with torch.no_grad():
            for part, found, shares, duals in zip(parts, groups, self.shares, self.multipliers, strict=True):
                proj, fc2 = part.attention.proj.weight, part.mlp.fc2.weight
                _divide(fc2, removed(found.neurons, shares.neurons), 1 + 2 * rate * duals.neurons)
                starts = torch.tensor((0, *part.columns)).cumsum(0).tolist()
                for head, norms in enumerate(found.columns):
                    gone = removed(norms, shares.columns[head])
                    _divide(proj, starts[head] + gone, 1 + 2 * rate * duals.columns[head])
                for head in removed(found.heads, shares.heads).tolist():
                    whole = torch.arange(starts[head], starts[head + 1])
                    _divide(proj, whole, 1 + 2 * rate * duals.heads)


def _least(enough: Callable[[float], bool], most: float) -> float:
    """The least number from 0 to ``most`` that is enough, to a thousandth of itself; ``most`` where none is."""
    if enough(0.0):
        return 0.0
    if not enough(most):
        return most
    low, high = 0.0, most
    while high - low > 1e-3 * high and high > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _scatter(into: list[Tensor], values: Tensor) -> None:
    """Write consecutive parts of ``values`` into tensors."""
    for tensor, part in zip(into, values.split([tensor.numel() for tensor in into]), strict=True):
        tensor.copy_(part.reshape(tensor.shape))


def _divide(weight: Tensor, columns: Tensor, by: Tensor) -> None:
    if len(columns):
        weight[:, columns.to(weight.device)] /= by.item()
