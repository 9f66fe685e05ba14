"""Gates that learn which blocks a model can do without.

Block l of gate g in [0, 1] passes on ``x + g (block(x) - x)``. In training g is a sample of the Gumbel-softmax
distribution (Jang, Gu, Poole 2017; Maddison, Mnih, Teh 2017) of two logits, skip and keep, so that gradients reach
these; what is learnt is evaluated with blocks that are there or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mixrank.errors import InputError

START = (-1.0, 1.0)
"""Logits of skip and keep that each block starts with: kept with probability 0.88, as in the paper."""


class Gates(nn.Module):
    """One gate for each of some blocks.

    Args:
        count: how many, at least 1.
        temperature: of the samples, above 0; towards 0 they become 0 or 1.

    Raises:
        InputError: an argument is outside its range.
    """

    def __init__(self, count: int, temperature: float = 0.5) -> None:
        super().__init__()
        if count < 1:
            raise InputError(f"count must be at least 1, but it was {count}")
        if not temperature > 0:
            raise InputError(f"temperature must be above 0, but it was {temperature}")
        self.temperature = temperature
        self.logits = nn.Parameter(torch.tensor(START).repeat(count, 1))

    def probability(self) -> Tensor:
        """The probability ``[blocks]`` that each block is kept; differentiable."""
        return self.logits.softmax(-1)[:, 1]

    def sample(self, uniform: Tensor) -> Tensor:
        """A relaxed draw ``[blocks]``, in (0, 1); differentiable.

        Args:
            uniform: ``[blocks, 2]`` random numbers in (0, 1).
        """
        smallest = torch.finfo(uniform.dtype).tiny
        noise = -(-uniform.clamp(min=smallest).log()).clamp(min=smallest).log()
        return ((self.logits + noise) / self.temperature).softmax(-1)[:, 1]


@contextmanager
def gated(blocks: nn.Module, values: Tensor) -> Iterator[None]:
    """Inside, each block passes on its input and ``values[l]`` times what it adds to that.

    Args:
        blocks: an ``nn.Sequential`` or ``nn.ModuleList`` of residual blocks, each of one tensor to one of its shape.
        values: ``[blocks]`` in [0, 1]; gradients reach them.

    Raises:
        InputError: another number of values than of blocks.
    """
    if len(values) != len(blocks):
        raise InputError(f"values must be {len(blocks)} numbers, one for each block, but they were {len(values)}")

    def gate(value: Tensor):
        return lambda _block, arguments, output: torch.lerp(arguments[0], output, value.to(output.dtype))

    handles = [block.register_forward_hook(gate(value)) for block, value in zip(blocks, values, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
