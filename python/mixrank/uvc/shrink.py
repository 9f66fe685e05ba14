"""Removing heads, value columns, neurons and blocks from a model for good: smaller matrices, the same answers.

A model whose removed parts are masked, and one from which they are gone, compute the same up to rounding: a head or
column contributes through its columns of ``proj`` alone, a neuron through its column of ``fc2``, and a block through
what it adds to the residual stream.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from mixrank.attributes import block_list, note_
from mixrank.errors import InputError
from mixrank.models import model_spec
from mixrank.uvc.attention import PrunedAttention
from mixrank.uvc.structure import BlockParts, BlockShape, parts_of


@dataclass(frozen=True)
class KeptBlock:
    """What stays of a block.

    Attributes:
        columns: for each head of the block, which of its value columns stay, rising; none: the head goes. At least one
            head stays.
        neurons: which hidden neurons stay, rising; at least one.
    """

    columns: tuple[tuple[int, ...], ...]
    neurons: tuple[int, ...]

    @property
    def shape(self) -> BlockShape:
        """The sizes of what stays."""
        return BlockShape(tuple(len(columns) for columns in self.columns if columns), len(self.neurons))


@dataclass(frozen=True)
class RemainingBlock:
    """A block of a model that was shrunk.

    Attributes:
        index: of the block in the model as it was built.
        shape: what it has now.
    """

    index: int
    shape: BlockShape

    def to_json(self) -> dict:
        """Return the block in terms of JSON."""
        return {"index": self.index, "columns": list(self.shape.columns), "neurons": self.shape.neurons}

    @classmethod
    def from_json(cls, data: dict) -> RemainingBlock:
        """Read what :meth:`to_json` wrote.

        Raises:
            InputError: a field is missing, unknown, of the wrong type or out of range.
        """
        good = isinstance(data, dict) and data.keys() == {"index", "columns", "neurons"}
        good = good and isinstance(data["columns"], list)
        numbers = [*data["columns"], data["neurons"]] if good else []
        whole = all(type(number) is int for number in (*numbers, data["index"])) if good else False
        if not whole or not all(number > 0 for number in numbers) or len(numbers) < 2 or data["index"] < 0:
            raise InputError(f"a remaining block must have an index, columns and neurons, but it was {data!r}")
        return cls(data["index"], BlockShape(tuple(data["columns"]), data["neurons"]))


def shrink_(model: nn.Module, kept: Sequence[KeptBlock | None]) -> nn.Module:
    """Remove in place all that is not kept. Nothing is changed unless all of it fits the model.

    Args:
        model: one that :func:`mixrank.uvc.structure.parts_of` knows; also one that was shrunk before.
        kept: for each block what stays of it, or None: the block goes. At least one block stays.

    Returns:
        ``model``; its blocks are numbered anew, and ``model.mixrank_blocks`` says what they are, for checkpoints.

    Raises:
        InputError: an architecture that is not supported, a wrong number of blocks or heads, or a column or neuron that
            the block does not have (it says which).
    """
    parts = _checked(model, kept)
    _note_origin_(model)
    shrunk = remaining_blocks(model)
    indices = range(len(parts)) if shrunk is None else [block.index for block in shrunk]
    remaining = [RemainingBlock(index, one.shape) for index, one in zip(indices, kept, strict=True) if one is not None]
    with torch.no_grad():
        for part, one in zip(parts, kept, strict=True):
            if one is not None:
                _shrink_block_(model.get_submodule(part.name), part, one)
    _drop_blocks_(model, [one is not None for one in kept])
    note_(model, "mixrank_blocks", tuple(remaining))
    return model


def remaining_blocks(model: nn.Module) -> tuple[RemainingBlock, ...] | None:
    """What :func:`shrink_` left of the blocks of a model; None where it was never shrunk."""
    return getattr(model, "mixrank_blocks", None)


def restructure_pruned_(model: nn.Module, blocks: Sequence[RemainingBlock]) -> nn.Module:
    """Give a freshly built model the blocks of a shrunken one, with weights that wait for a checkpoint's tensors.

    Raises:
        InputError: the model has no such blocks, or is of an architecture that is not supported.
    """
    parts = parts_of(model)
    indices = [block.index for block in blocks]
    if any(first >= second for first, second in pairwise(indices)) or not all(0 <= i < len(parts) for i in indices):
        raise InputError(f"blocks must rise and lie in 0 to {len(parts) - 1}, but they were {indices}")
    kept: list[KeptBlock | None] = [None] * len(parts)
    for index, shape in ((block.index, block.shape) for block in blocks):
        removed = ((),) * (len(parts[index].columns) - len(shape.columns))
        columns = tuple(tuple(range(count)) for count in shape.columns)
        kept[index] = KeptBlock(columns + removed, tuple(range(shape.neurons)))
    return shrink_(model, kept)


def mask_(model: nn.Module, kept: Sequence[KeptBlock | None]) -> nn.Module:
    """Set the weights of all that is not kept to zero, in place; a block that goes passes on what it is given.

    Args:
        model: as for :func:`shrink_`.
        kept: as for :func:`shrink_`.

    Raises:
        InputError: as :func:`shrink_`.
    """
    parts = _checked(model, kept)
    with torch.no_grad():
        for index, (part, one) in enumerate(zip(parts, kept, strict=True)):
            if one is None:
                block_list(model)[index] = nn.Identity()
            else:
                _mask(part.attention.proj, columns_that_stay(part, one))
                _mask(part.mlp.fc2, list(one.neurons))
    return model


def _mask(layer: nn.Linear, columns: list[int]) -> None:
    gone = torch.ones(layer.in_features, dtype=torch.bool, device=layer.weight.device)
    gone[columns] = False
    layer.weight[:, gone] = 0


def _note_origin_(model: nn.Module) -> None:
    """Note how the model is built, where that is known: from its shapes it cannot be told any more."""
    try:
        note_(model, "mixrank_spec", model_spec(model))
    except InputError:
        return  # it works all the same, and saving it says what is missing


def _checked(model: nn.Module, kept: Sequence[KeptBlock | None]) -> list[BlockParts]:
    """The parts of the blocks, once all of ``kept`` fits them."""
    parts = parts_of(model)
    if len(kept) != len(parts):
        raise InputError(f"kept must have an entry for each of the {len(parts)} blocks, but it had {len(kept)}")
    if all(one is None for one in kept):
        raise InputError("kept must keep at least one block, but it kept none")
    for part, one in zip(parts, kept, strict=True):
        if one is not None:
            _check(part, one)
    return parts


def _check(part: BlockParts, kept: KeptBlock) -> None:
    if len(kept.columns) != len(part.columns):
        raise InputError(f"{part.name} has {len(part.columns)} heads, but kept names {len(kept.columns)}")
    for head, (columns, count) in enumerate(zip(kept.columns, part.columns, strict=True)):
        _check_indices(f"columns of head {head} of {part.name}", columns, count)
    if not any(kept.columns):
        raise InputError(f"kept must keep at least one head of {part.name}, but it kept none")
    _check_indices(f"neurons of {part.name}", kept.neurons, part.mlp.fc1.out_features)
    if not kept.neurons:
        raise InputError(f"kept must keep at least one neuron of {part.name}, but it kept none")


def _check_indices(what: str, indices: tuple[int, ...], count: int) -> None:
    rising = all(first < second for first, second in pairwise(indices))
    if not rising or (indices and not 0 <= indices[0] <= indices[-1] < count):
        raise InputError(f"{what} must rise and lie in 0 to {count - 1}, but they were {indices}")


def columns_that_stay(part: BlockParts, kept: KeptBlock) -> list[int]:
    """The columns of ``attn.proj`` that stay, rising."""
    first, found = 0, []
    for columns, count in zip(kept.columns, part.columns, strict=True):
        found += [first + column for column in columns]
        first += count
    return found


def _shrink_block_(block: nn.Module, part: BlockParts, kept: KeptBlock) -> None:
    attention, mlp = part.attention, part.mlp
    columns = columns_that_stay(part, kept)
    if len(columns) < attention.proj.in_features:
        block.attn = _shrunk_attention(part, kept, columns)
    neurons = list(kept.neurons)
    if len(neurons) < mlp.fc1.out_features:
        mlp.fc1 = _linear(mlp.fc1, rows=neurons)
        mlp.fc2 = _linear(mlp.fc2, columns=neurons)


def _shrunk_attention(part: BlockParts, kept: KeptBlock, columns: list[int]) -> PrunedAttention:
    old, width = part.attention, part.attention.head_dim
    heads = [head for head, taken in enumerate(kept.columns) if taken]
    whole = [head * width + i for head in heads for i in range(width)]
    rows = whole + [old.attn_dim + row for row in whole] + [2 * old.attn_dim + column for column in columns]
    new = PrunedAttention(
        old.qkv.in_features,
        width,
        kept.shape.columns,
        attn_drop=old.attn_drop.p,
        proj_drop=old.proj_drop.p,
        q_norm=copy.deepcopy(old.q_norm),
        k_norm=copy.deepcopy(old.k_norm),
    )
    new.qkv, new.proj = _linear(old.qkv, rows=rows), _linear(old.proj, columns=columns)
    return new.to(old.qkv.weight.device).train(old.training)


def _linear(layer: nn.Linear, *, rows: list[int] | None = None, columns: list[int] | None = None) -> nn.Linear:
    """Some rows or columns of a linear layer; the bias goes with the rows."""
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    if rows is not None:
        index = torch.tensor(rows, device=weight.device)
        weight, bias = weight[index], None if bias is None else bias[index]
    if columns is not None:
        weight = weight[:, torch.tensor(columns, device=weight.device)]
    new = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    new.weight = nn.Parameter(weight.clone(), requires_grad=layer.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.clone(), requires_grad=layer.bias.requires_grad)
    return new.train(layer.training)


def _drop_blocks_(model: nn.Module, stays: list[bool]) -> None:
    old = block_list(model)
    blocks = [block for block, stay in zip(old, stays, strict=True) if stay]
    if len(blocks) < len(stays):
        model.blocks = type(old)(*blocks) if isinstance(old, nn.Sequential) else nn.ModuleList(blocks)
