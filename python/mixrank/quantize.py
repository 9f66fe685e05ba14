"""Quantising a model: its linear layers, factored or dense, get weights of 8 bits."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from mixrank.counting import count_bytes
from mixrank.errors import InputError
from mixrank.models import CLASSIFIER, skipped_linears
from mixrank.nn import LinearLike, MixedRankLinear
from mixrank.nn_int8 import Int8Layer, Int8Linear, Int8MixedRankLinear, Int8PivotedLinear
from mixrank.nn_int8_sparse import Int8SparseLinear
from mixrank.nn_pivoted import PivotedLinear
from mixrank.nn_sparse import SparseLinear
from mixrank.stats import LayerStats
from mixrank_kernels.reference import expanded, unpacked_bits

Layer = TypeVar("Layer", bound=nn.Module)

LARGEST_CODE = 127
CLIPPING = tuple(1 - step / 50 for step in range(16))
"""Shares of a row's largest magnitude that its largest code may stand for: 1.00, 0.98, ... 0.70."""


@dataclass(frozen=True)
class QuantizedLayer:
    """What became of one layer.

    Attributes:
        name: the layer's name in the model.
        dynamic: whether its input is quantised too.
        relative_error: Frobenius norm of the change of its ``[N, K]`` weight, over that of the weight.
        bytes_before: of its tensors.
        bytes_after: of its tensors.
    """

    name: str
    dynamic: bool
    relative_error: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantizationResult:
    """What :func:`quantize_` did.

    Attributes:
        layers: those that were quantised, in the order of the model.
        skipped: why each of the other layers with a weight matrix stays as it is, by name.
        bytes_before: of the whole model, as in a checkpoint.
        bytes_after: of the whole model.
    """

    layers: tuple[QuantizedLayer, ...]
    skipped: dict[str, str]
    bytes_before: int
    bytes_after: int

    def describe(self) -> str:
        """Return the result as a table in plain text, one line a layer, totals last."""
        width = max([len(layer.name) for layer in self.layers], default=5)
        lines = [f"{'layer':<{width}}  {'input':>6}  {'error':>7}  {'before':>10}  {'after':>10}"]
        for layer in self.layers:
            kind = "8 bits" if layer.dynamic else "as is"
            lines.append(
                f"{layer.name:<{width}}  {kind:>6}  {layer.relative_error:>7.2%}  {layer.bytes_before:>10}  "
                f"{layer.bytes_after:>10}"
            )
        lines += [f"{name}: left as it is, {reason}" for name, reason in self.skipped.items()]
        lines.append(f"all bytes: {self.bytes_before} -> {self.bytes_after}")
        return "\n".join(lines)

    def to_json(self) -> dict:
        """Return the result in terms of JSON."""
        return asdict(self)


def quantize_rows(weight: Tensor, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise each row of a weight to symmetric 8-bit codes.

    The scale of a row is that of the ratios in ``CLIPPING`` with the least squared error of the row.

    Args:
        weight: ``[N, K]``, floating.
        moments: ``[K]``, what the squared error of each column counts, such as the mean square of its input; None: all
            the same.

    Returns:
        Codes ``[N, K]`` int8 from -127 to 127, and scales ``[N]`` float32: ``weight`` is about ``codes * scale``.

    Raises:
        InputError: the weight is not finite.
    """
    wide = weight.detach().float()
    if not wide.isfinite().all():
        raise InputError("a weight must be finite to be quantised, but it has NaN or infinite entries")
    largest = wide.abs().amax(1, keepdim=True) / LARGEST_CODE
    # Where a scale would be subnormal, codes of a larger one are zero as well.
    largest = torch.where(largest > torch.finfo(torch.float32).tiny, largest, 1)
    best = torch.full_like(largest, torch.inf)
    scale = largest.clone()
    for ratio in CLIPPING:
        trial = largest * ratio
        error = (_codes(wide, trial) * trial - wide).square_()
        error = error.sum(1, keepdim=True) if moments is None else error @ moments.float()[:, None]
        scale = torch.where(error < best, trial, scale)
        best = torch.minimum(error, best)
    return _codes(wide, scale).to(torch.int8), scale[:, 0]


def _codes(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)


def _linear(layer: nn.Linear, stats: LayerStats | None, dynamic: bool) -> nn.Module:
    codes, scale = quantize_rows(layer.weight, _moments(stats))
    return Int8Linear.from_codes(codes, scale, layer.bias, dynamic=dynamic)


def _empty_linear(layer: nn.Linear, dynamic: bool) -> nn.Module:
    sizes = (layer.in_features, layer.out_features, layer.bias is not None)
    return Int8Linear(*sizes, dynamic=dynamic, device=layer.weight.device, dtype=layer.weight.dtype)


def _mixed_rank(layer: MixedRankLinear, stats: LayerStats | None, dynamic: bool) -> nn.Module:
    codes, scale = quantize_rows(layer.down, _moments(stats))
    moments = _moments(stats, layer.down)
    share = _balance(layer.down, moments) if dynamic else torch.ones_like(scale)
    up = quantize_rows(layer.up.detach().float() * share, None if moments is None else moments / share.square())
    return Int8MixedRankLinear.from_codes(codes, scale / share, *up, layer.bias, dynamic=dynamic)


def _balance(down: Tensor, moments: Tensor | None) -> Tensor:
    """What each column of the intermediate ``[R]`` is divided by, and each column of ``up`` multiplied with: [R].

    The columns of a truncated SVD differ a thousandfold in size. Rows of the intermediate have one step for all of
    them, in which the small ones would vanish; divided by their size they would make those of ``up`` as uneven. The
    square root of the size (SmoothQuant, Xiao et al. 2023, with alpha = 0.5) has the least sum of both errors where
    the columns of ``up`` are of one size. Scales of ``down`` take the division, so its codes lose nothing.
    """
    size = down.detach().float().norm(dim=1) if moments is None else moments.sqrt().float()
    largest = size.amax()
    return (size / largest).clamp(min=1e-6).sqrt() if largest > 0 else torch.ones_like(size)


def _empty_mixed_rank(layer: MixedRankLinear, dynamic: bool) -> nn.Module:
    sizes = (layer.in_features, layer.out_features, layer.rank, layer.bias is not None)
    return Int8MixedRankLinear(*sizes, dynamic=dynamic, device=layer.down.device, dtype=layer.down.dtype)


def _pivoted(layer: PivotedLinear, stats: LayerStats | None, dynamic: bool) -> nn.Module:
    # The intermediate is part of the output, so its columns are what they are: nothing is balanced.
    down = quantize_rows(layer.down, _moments(stats))
    coefficients = quantize_rows(layer.coefficients, _moments(stats, layer.down))
    return Int8PivotedLinear.from_codes(*down, *coefficients, layer.index, layer.bias, dynamic=dynamic)


def _empty_pivoted(layer: PivotedLinear, dynamic: bool) -> nn.Module:
    sizes = (layer.in_features, layer.out_features, layer.rank, layer.bias is not None)
    return Int8PivotedLinear(*sizes, dynamic=dynamic, device=layer.down.device, dtype=layer.down.dtype)


def _sparse(layer: SparseLinear, stats: LayerStats | None, dynamic: bool) -> nn.Module:
    # The input stays as it is, whatever is asked for, and so does the intermediate: nothing is balanced.
    rows, scale = quantize_rows(expanded(layer.mask, layer.values.detach(), layer.in_features), _moments(stats))
    codes = rows[unpacked_bits(layer.mask, layer.in_features)]
    mask = layer.mask.clone()  # what is packed is known by it
    factors: dict[str, Tensor] = {}
    if layer.down is not None:
        factors["down_codes"], factors["down_scale"] = quantize_rows(layer.down, _moments(stats))
        moments = _moments(stats, layer.down)
        factors["up_codes"], factors["up_scale"] = quantize_rows(cast(Tensor, layer.up), moments)
    return Int8SparseLinear.from_codes(mask, codes, scale, **factors, bias=layer.bias, in_features=layer.in_features)


def _empty_sparse(layer: SparseLinear, dynamic: bool) -> nn.Module:
    sizes = (layer.in_features, layer.out_features, layer.entries, layer.rank, layer.bias is not None)
    return Int8SparseLinear(*sizes, device=layer.values.device, dtype=layer.values.dtype)


def _moments(stats: LayerStats | None, down: Tensor | None = None) -> Tensor | None:
    """Mean squares of a layer's input ``[K]``, or of ``down`` times it ``[R]``; None where the statistics lack them."""
    if stats is None or stats.side != "input":
        return None
    if down is None:
        return stats.gram.diagonal() / stats.rows
    wide = down.detach().double()
    return ((wide @ stats.gram) * wide).sum(1).clamp(min=0) / stats.rows


@dataclass(frozen=True)
class Converter(Generic[Layer]):
    """How layers of one class are quantised.

    Attributes:
        quantise: layer, statistics of its input or None, ``dynamic``: the layer that replaces it.
        empty: layer, ``dynamic``: the same without values, for a checkpoint's tensors to fill.
    """

    quantise: Callable[[Layer, LayerStats | None, bool], nn.Module]
    empty: Callable[[Layer, bool], nn.Module]


CONVERTERS: dict[type, Converter[Any]] = {
    nn.Linear: Converter(_linear, _empty_linear),
    MixedRankLinear: Converter(_mixed_rank, _empty_mixed_rank),
    PivotedLinear: Converter(_pivoted, _empty_pivoted),
    SparseLinear: Converter(_sparse, _empty_sparse),
}
"""By the class of a layer, which is what its converter takes; a subclass may promise more than a linear map."""


def quantize_(
    model: nn.Module,
    *,
    dynamic: bool = True,
    skip: Iterable[str] = (),
    weight_only: Iterable[str] = (),
    stats: Mapping[str, LayerStats] | None = None,
) -> QuantizationResult:
    """Replace the linear layers of a model by layers of 8-bit weights, in place.

    Factored, sparse and dense layers are replaced, the classifier among them; convolutions, normalisation and
    embeddings stay. Nothing is changed if it fails. The model is for inference afterwards: no parameter asks for a
    gradient.

    Args:
        model: a timm model, compressed or not.
        dynamic: quantise the input of each layer as well, for each row anew: the products are then of integers, which
            is fast. Without, only the weights take less memory. Sparse layers take their input as it is.
        skip: names of layers that stay as they are; ``*`` stands for anything, as in ``"blocks.*.mlp.fc2"``.
        weight_only: names of layers whose input is not quantised although ``dynamic`` says so.
        stats: what :func:`mixrank.calibrate` returned for the same inputs: errors of weights then count by the mean
            square of what they are multiplied with, where the statistics of a layer have it.

    Returns:
        What became of each layer, and the bytes before and after.

    Raises:
        InputError: a name in ``skip`` or ``weight_only`` fits no layer, a weight is not finite, or there is no layer
            that can be quantised.

    Example:
        >>> import mixrank
        >>> model = mixrank.create_model("vit_tiny_patch16_224", args={"img_size": 32, "depth": 1})
        >>> result = quantize_(model)
        >>> result.bytes_after < 0.5 * result.bytes_before
        True
    """
    candidates, skipped = _candidates(model)
    patterns = {"skip": tuple(skip), "weight_only": tuple(weight_only)}
    for argument, names in patterns.items():
        for pattern in names:
            if not fnmatch.filter(candidates, pattern):
                raise InputError(f"{argument} names {pattern!r}, which is no layer of this model that can be quantised")
    replacements, layers = {}, []
    for name, layer in candidates.items():
        if _fits(name, patterns["skip"]):
            skipped[name] = "skip names it"
            continue
        quantises_input = dynamic and not isinstance(layer, SparseLinear) and not _fits(name, patterns["weight_only"])
        try:
            new = CONVERTERS[type(layer)].quantise(layer, None if stats is None else stats.get(name), quantises_input)
        except InputError as error:
            raise InputError(f"layer {name} cannot be quantised: {error}") from error
        replacements[name] = new.train(layer.training)
        layers.append(
            QuantizedLayer(name, quantises_input, _relative_error(layer, new), count_bytes(layer), count_bytes(new))
        )
    if not replacements:
        raise InputError("there is no layer to quantise: a model needs linear layers that are not quantised yet")
    before = count_bytes(model)
    for name, new in replacements.items():
        model.set_submodule(name, new)
    model.requires_grad_(False)
    return QuantizationResult(tuple(layers), skipped, before, count_bytes(model))


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _candidates(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers that can be quantised, and why each of the other layers with a weight matrix cannot."""
    reasons = {name: reason for name, reason in skipped_linears(model).items() if reason != CLASSIFIER}
    candidates, skipped = {}, {}
    for name, module in model.named_modules():
        if name and type(module) in CONVERTERS and name not in reasons:
            candidates[name] = module
        elif name in reasons:
            skipped[name] = reasons[name]
        elif isinstance(module, Int8Layer):
            skipped[name] = "it is quantised already"
        elif any(
            tensor.dim() > 1 and part == "weight" for part, tensor in module._parameters.items() if tensor is not None
        ):
            skipped[name] = f"it is a {type(module).__name__}"
    return candidates, skipped


def _relative_error(layer: nn.Module, quantised: nn.Module) -> float:
    weight, rounded = (cast(LinearLike, module).weight.detach().float() for module in (layer, quantised))
    norm = weight.norm().item()
    return (rounded - weight).norm().item() / norm if norm else 0.0


def quantized_layers(model: nn.Module) -> dict[str, bool]:
    """Return for each quantised layer, by name, whether its input is quantised too."""
    return {name: module.dynamic for name, module in model.named_modules() if isinstance(module, Int8Layer)}


def restructure_quantized_(model: nn.Module, layers: Mapping[str, bool]) -> nn.Module:
    """Give a model the quantised layers that :func:`quantized_layers` named, without values: a checkpoint has them.

    Raises:
        InputError: a name is not that of a layer that can be quantised.
    """
    candidates, _ = _candidates(model)
    for name in layers:
        if name not in candidates:
            raise InputError(f"it has 8-bit weights for {name}, which is no layer of this model that can be quantised")
    for name, dynamic in layers.items():
        layer = candidates[name]
        model.set_submodule(name, CONVERTERS[type(layer)].empty(layer, dynamic).train(layer.training))
    return model.requires_grad_(False)
