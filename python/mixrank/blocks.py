"""The repeated blocks of a model: where its layers stand, and whether each passes one tensor on to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mixrank.accumulate import hooked
from mixrank.errors import InputError
from mixrank.models import compressible_linears
from mixrank.nn import LowRankLinear


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that hold the model's linear layers, dense or factored, by name and in the model's order.

    A block is an entry of an ``nn.ModuleList`` or ``nn.Sequential`` that holds at least two of the layers and no
    smaller block: ``blocks.3`` of a ViT, ``layers.2.blocks.0`` of a Swin. A layer that stands in none is one by itself.
    """
    modules = dict(model.named_modules())
    dense = compressible_linears(model)
    layers = [name for name, module in modules.items() if name in dense or isinstance(module, LowRankLinear)]
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


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model that pass one tensor on, each to the next.

    Attributes:
        modules: the blocks in their order, by name.
        keywords: the other arguments that each block is called with, which do not depend on the images.
    """

    modules: dict[str, nn.Module]
    keywords: dict[str, dict]


def find_blocks(model: nn.Module, images: Tensor) -> Blocks:
    """Find the blocks that hold every compressible layer, and check that they form a chain.

    Args:
        model: a model with an ``nn.ModuleList`` or ``nn.Sequential`` of blocks (or of stages).
        images: ``[B, C, H, W]``, at least one.

    Raises:
        InputError: no such list holds every layer, or a block takes or returns anything but the one tensor and
            arguments by name that are the same for every image.
    """
    layers = compressible_linears(model)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module)
        and all(layer.startswith(f"{name}.") for layer in layers)
    ]
    # The innermost list with more than one block: the others hold it as one of their blocks.
    lists = [found for found in lists if len(found[1]) > 1] or lists
    if not lists:
        raise InputError(
            f"sequential calibration needs a ModuleList of blocks that holds every layer, but {type(model).__name__} "
            "has none"
        )
    name, found = lists[-1]
    modules = {f"{name}.{key}": block for key, block in found.named_children()}
    calls, others = (_calls(model, modules, image) for image in (images[:1], images[-1:]))
    passed: Tensor | None = None
    for key in modules:
        good = len(calls[key]) == 1
        arguments, keywords, output = calls[key][0] if good else ((), {}, None)
        good = good and len(arguments) == 1 and isinstance(arguments[0], Tensor) and isinstance(output, Tensor)
        good = good and (passed is None or torch.equal(arguments[0], passed))
        if not good or not _same(keywords, others[key][0][1]):
            raise InputError(
                f"sequential calibration needs blocks that pass one tensor from each to the next, but {key} of "
                f"{type(model).__name__} does not"
            )
        passed = cast(Tensor, output)
    return Blocks(modules, {key: calls[key][0][1] for key in modules})


def _calls(
    model: nn.Module, modules: dict[str, nn.Module], image: Tensor
) -> dict[str, list[tuple[tuple, dict, object]]]:
    """Arguments, those by name, and result of each call of the modules, while one image passes through the model."""
    calls: dict[str, list[tuple[tuple, dict, object]]] = {key: [] for key in modules}

    def recorder(key: str) -> Callable[..., None]:
        return lambda _module, arguments, keywords, output: calls[key].append((arguments, keywords, output))

    with hooked(block.register_forward_hook(recorder(key), with_kwargs=True) for key, block in modules.items()):
        model(image.clone())
    return calls


def _same(one: dict, other: dict) -> bool:
    """Whether arguments by name are equal."""
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        for key, value in one.items()
    )
