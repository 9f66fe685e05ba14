"""What of a model compression does not touch, by name: nothing is passed over in silence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mixrank.counting import count_parameters
from mixrank.models import compressible_linears, skipped_linears
from mixrank.nn_sparse import SparseLinear

TOLD = 0.2
"""The share of a model's parameters above which a note tells what stays as it is."""


@dataclass(frozen=True)
class LeftAlone:
    """A module whose own matrices stay as they are.

    Attributes:
        name: of the module in the model, empty for the model itself.
        reason: why, as the end of a sentence.
        parameters: numbers in its own weights, those of modules inside it not counted; of a sparse layer also what the
            places of its entries count as, see :func:`mixrank.counting.count_parameters`.
    """

    name: str
    reason: str
    parameters: int


def left_alone(model: nn.Module) -> list[LeftAlone]:
    """The modules with weights of two dimensions or more that are no layers to compress, in the order of the model.

    Vectors (biases, norms, layer scales) are not told.
    """
    wanted, skipped = compressible_linears(model), skipped_linears(model)
    found: list[LeftAlone] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = {id(weight): weight.numel() for weight in module.parameters(recurse=False) if weight.squeeze().dim() > 1}
        if isinstance(module, SparseLinear):
            own |= {id(module.values): module.entries, id(module.mask): module.places}
        count = sum(numbers for key, numbers in own.items() if key not in seen)
        seen |= own.keys()
        if count and name not in wanted:
            found.append(LeftAlone(name, skipped.get(name, f"it is a {type(module).__name__}"), count))
    return found


def describe(found: list[LeftAlone], model: nn.Module) -> str:
    """The largest of them in a sentence."""
    largest = sorted(found, key=lambda one: -one.parameters)[:3]
    share = 100 * sum(one.parameters for one in found) / count_parameters(model)
    named = ", ".join(f"{one.name or 'the model itself'} ({one.reason})" for one in largest)
    return f"{share:.1f} % of the parameters stay as they are, {len(found)} modules: {named}" + (
        ", ..." if len(found) > len(largest) else ""
    )


def remarks_of(found: list[LeftAlone], model: nn.Module) -> list[str]:
    """:func:`describe` where it is more than :data:`TOLD` of the parameters, else nothing."""
    much = sum(module.parameters for module in found) > TOLD * count_parameters(model)
    return [describe(found, model)] if much else []
