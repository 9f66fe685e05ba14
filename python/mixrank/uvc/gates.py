"""Gates that learn which blocks a model can do without.

Block l of gate g in [0, 1] passes on ``x + g (block(x) - x)``. In training g is a sample of the Gumbel-softmax
distribution (Jang, Gu, Poole 2017) over skip and keep, which for two outcomes is the binary concrete distribution
(Maddison, Mnih, Teh 2017) of one logit, so that gradients reach that; what is learnt is evaluated with blocks that are
there or not. Steps of the logits are limited, and so are the logits: a gate that is nearly shut still lets samples
through that can open it again, where the released code of the paper loses blocks at once and for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mixrank.errors import InputError

START = 2.0
"""The logit that each block starts with: kept with probability 0.88, as in the paper."""
_LARGEST = 4.0


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
        self.logits = nn.Parameter(torch.full((count,), START))

    def probability(self) -> Tensor:
        """The probability ``[blocks]`` that each block is kept; differentiable."""
        return self.logits.sigmoid()

    def sample(self, uniform: Tensor) -> Tensor:
        """A relaxed draw ``[blocks]`` in [0, 1]; differentiable.

        Args:
            uniform: ``[blocks]`` random numbers in (0, 1).
        """
        smallest = torch.finfo(uniform.dtype).eps
        noise = uniform.clamp(smallest, 1 - smallest).logit()
        return ((self.logits + noise) / self.temperature).sigmoid()

    def step_(self, slope: Tensor, rate: float) -> None:
        """Move the logits down a slope ``[blocks]``, each by ``rate`` at the most, in place."""
        with torch.no_grad():
            self.logits.sub_(rate * slope.clamp(-1, 1)).clamp_(-_LARGEST, _LARGEST)


@contextmanager
def gated(blocks: nn.Sequential | nn.ModuleList, values: Tensor) -> Iterator[None]:
    """Inside, each block passes on its input and ``values[l]`` times what it adds to that.

    Args:
        blocks: an ``nn.Sequential`` or ``nn.ModuleList`` of residual blocks, each of one tensor to one of its shape.
        values: ``[blocks]`` in [0, 1]; gradients reach them.

    Raises:
        InputError: another number of values than of blocks.
    """
    if len(values) != len(blocks):
        raise InputError(f"values must be {len(blocks)} numbers, one for each block, but they were {len(values)}")

    def gate(value: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda _block, arguments, output: torch.lerp(arguments[0], output, value.to(output.dtype))

    handles = [block.register_forward_hook(gate(value)) for block, value in zip(blocks, values, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
