"""The repeated blocks of a model: where its layers stand, in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from mixrank.models import compressible_linears
from mixrank.nn import MixedRankLinear


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that hold the model's linear layers, dense or factored, by name and in the model's order.

    A block is an entry of an ``nn.ModuleList`` or ``nn.Sequential`` that holds at least two of the layers and no
    smaller block: ``blocks.3`` of a ViT, ``layers.2.blocks.0`` of a Swin. A layer that stands in none is one by itself.
    """
    modules = dict(model.named_modules())
    dense = compressible_linears(model)
    layers = [name for name, module in modules.items() if name in dense or isinstance(module, MixedRankLinear)]
    candidates = [
        name
        for name in modules
        if isinstance(modules.get(name.rpartition(".")[0]), nn.ModuleList | nn.Sequential)
        and sum(layer.startswith(f"{name}.") for layer in layers) >= 2
    ]
    innermost = {name for name in candidates if not any(other.startswith(f"{name}.") for other in candidates)}
    names = [next((block for block in innermost if layer.startswith(f"{block}.")), layer) for layer in layers]
    return {name: modules[name] for name in names}


def block_of(layer: str, blocks: Iterable[str]) -> str:
    """The name of the block in which a layer stands."""
    return next(block for block in blocks if layer == block or layer.startswith(f"{block}."))
