"""What can be removed from a vision transformer, and the multiply-adds that remain of it.

Four things can go: attention heads, value columns inside a head, hidden neurons of the MLP, and whole blocks, which
stand in a residual stream that passes them by. What is left of a block costs, for T tokens of width C,

    ``T C (2 d h + c)`` for q, k and v, ``2 T^2 d h`` for the two products of attention, ``T c C`` for the projection
    and ``2 T C n`` for the MLP,

with h heads of d columns each, c value columns in all, n hidden neurons. The second product of attention is that of
whole heads: the kernels of attention want values as wide as queries, so columns that are missing are zeros there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from mixrank.attributes import block_list
from mixrank.counting import count_macs
from mixrank.errors import InputError
from mixrank.models import preprocessing

Number = TypeVar("Number", int, Tensor)


@dataclass(frozen=True)
class BlockShape:
    """What a block has.

    Attributes:
        columns: for each of its heads, how many value columns it has, from 1 to the head's width.
        neurons: how many hidden neurons its MLP has, at least 1.
    """

    columns: tuple[int, ...]
    neurons: int


@dataclass(frozen=True)
class Structure:
    """The sizes of a vision transformer.

    Attributes:
        width: C, of a token.
        head_width: d, of the queries and keys of a head.
        tokens: T, of one image, class and register tokens included.
        blocks: in the order of the model.
        fixed_macs: multiply-adds of one image outside the blocks: patch embedding, classifier.
    """

    width: int
    head_width: int
    tokens: int
    blocks: tuple[BlockShape, ...]
    fixed_macs: int

    def block_macs(self, heads: Number, columns: Number, neurons: Number) -> Number:
        """Multiply-adds of one image in a block; differentiable where the counts are tensors.

        Args:
            heads: h.
            columns: c, value columns in all.
            neurons: n.
        """
        t, c, d = self.tokens, self.width, self.head_width
        attention = t * c * (2 * d * heads + columns) + 2 * t * t * d * heads + t * c * columns
        return attention + 2 * t * c * neurons

    def macs(self) -> int:
        """Multiply-adds of one image, as :func:`mixrank.counting.count_macs` counts them."""
        blocks = (self.block_macs(len(block.columns), sum(block.columns), block.neurons) for block in self.blocks)
        return self.fixed_macs + sum(blocks)


class AttentionPart(Protocol):
    """What a module of attention has to have, as timm's does."""

    num_heads: int
    head_dim: int
    attn_dim: int
    qkv: nn.Linear
    proj: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Dropout
    proj_drop: nn.Dropout
    training: bool


class MlpPart(Protocol):
    """What the module of an MLP has to have."""

    fc1: nn.Linear
    fc2: nn.Linear


@dataclass(frozen=True)
class BlockParts:
    """The modules of a block.

    Attributes:
        name: of the block in the model.
        attention: the rows of its ``qkv`` are all queries, then all keys, then all values, in each head after head, and
            so are the columns of ``proj``.
        mlp: has nothing that mixes neurons between its layers.
    """

    name: str
    attention: AttentionPart
    mlp: MlpPart

    @property
    def columns(self) -> tuple[int, ...]:
        """How many value columns each head has."""
        known = getattr(self.attention, "columns", None)
        return (self.attention.head_dim,) * self.attention.num_heads if known is None else known


Reader = Callable[[nn.Module], "list[BlockParts] | None"]
_READERS: list[Reader] = []


def register_reader(reader: Reader) -> Reader:
    """Teach this package a further architecture.

    Args:
        reader: takes a model and returns the parts of its blocks in order, or None where it is not of its kind; raises
            :class:`mixrank.InputError` where it is, but has something that stands in the way. The last one
            registered is asked first. The model must hold its blocks in ``model.blocks``, an ``nn.Sequential`` or
            ``nn.ModuleList`` of residual blocks, each called with the one tensor that the one before returned.
    """
    _READERS.insert(0, reader)
    return reader


def parts_of(model: nn.Module) -> list[BlockParts]:
    """The parts of every block of a model.

    Raises:
        InputError: no reader knows the architecture, or a part is not what it has to be (it says which).
    """
    for reader in _READERS:
        parts = reader(model)
        if parts is not None:
            return parts
    raise InputError(
        f"{type(model).__name__} has no blocks that heads, neurons and blocks can be removed from: what is supported "
        "are timm's VisionTransformer and DeiT (mixrank.uvc.register_reader adds others)"
    )


@register_reader
def _timm(model: nn.Module) -> list[BlockParts] | None:
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer):
        return None
    found = [_plain(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
    if not found:
        raise InputError(f"{type(model).__name__} has no blocks")
    return found


def _plain(name: str, block: nn.Module) -> BlockParts:
    """The parts of a timm block; raises InputError where something of it stands in the way."""
    from timm.layers import Attention, Mlp
    from timm.models.vision_transformer import Block, ResPostBlock

    from mixrank.uvc.attention import PrunedAttention

    _check(isinstance(block, Block | ResPostBlock), name, block, "a Block or ResPostBlock")
    attention, mlp = block.get_submodule("attn"), block.get_submodule("mlp")
    _check(isinstance(attention, Attention | PrunedAttention), f"{name}.attn", attention, "timm's Attention")
    _check(type(mlp) is Mlp, f"{name}.mlp", mlp, "timm's Mlp")
    for part, layer in ((f"{name}.attn.norm", getattr(attention, "norm", None)), (f"{name}.mlp.norm", mlp.norm)):
        _check(layer is None or isinstance(layer, nn.Identity), part, layer, "absent, as it mixes what is removed")
    gate = getattr(attention, "gate", None)
    _check(gate is None, f"{name}.attn.gate", gate, "absent")
    layers = {"attn.qkv": attention.qkv, "attn.proj": attention.proj, "mlp.fc1": mlp.fc1, "mlp.fc2": mlp.fc2}
    for part, layer in layers.items():
        _check(type(layer) is nn.Linear, f"{name}.{part}", layer, "a plain nn.Linear (prune before other compression)")
    return BlockParts(name, cast(AttentionPart, attention), cast(MlpPart, mlp))


def _check(good: bool, name: str, found: object, wanted: str) -> None:
    if not good:
        raise InputError(f"{name} must be {wanted}, but it was {type(found).__name__}")


def structure_of(model: nn.Module) -> Structure:
    """The sizes of a model, without running it on data.

    Raises:
        InputError: as :func:`parts_of`, or the forward pass cannot be traced on an empty image of the model's size.
    """
    parts = parts_of(model)
    widths = {part.attention.head_dim for part in parts}
    if len(widths) > 1:
        raise InputError(f"heads must have one width in all blocks, but they had {sorted(widths)}")
    blocks = tuple(BlockShape(part.columns, part.mlp.fc1.out_features) for part in parts)
    width = parts[0].mlp.fc1.in_features
    whole = Structure(width, widths.pop(), _tokens(model), blocks, fixed_macs=0)
    fixed = count_macs(model) - whole.macs()
    return Structure(width, whole.head_width, whole.tokens, blocks, fixed)


def _tokens(model: nn.Module) -> int:
    """T, as the first block sees it, from a pass without memory."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    hollow = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    dtype = next(tensor.dtype for tensor in hollow.values() if tensor.is_floating_point())
    image = torch.zeros(1, *preprocessing(model)["input_size"], device="meta", dtype=dtype)
    seen: list[int] = []
    first = block_list(model)[0]
    handle = first.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0].shape[1]))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            torch.func.functional_call(model, hollow, (image,))
    finally:
        handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return seen[0]
