"""Applying a plan: dense layers are replaced in place by mixed-rank or sparse ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from mixrank.attributes import note_
from mixrank.decompose import Factorisation
from mixrank.errors import InputError
from mixrank.models import compressible_linears
from mixrank.nn import LowRankLinear, MixedRankLinear, SplitLinear
from mixrank.nn_pivoted import PivotedLinear
from mixrank.nn_sparse import SparseLinear
from mixrank.plan import LayerPlan, Plan

QKV_SECTIONS = 3
_LAYERS: dict[str, type[MixedRankLinear] | type[PivotedLinear]] = {"factors": MixedRankLinear, "pivoted": PivotedLinear}


def apply_(model: nn.Module, plan: Plan, factorisations: Mapping[str, Factorisation]) -> nn.Module:
    """Replace the layers that the plan gives a rank by layers of that rank, in the form that it says, in place.

    Nothing is changed unless the whole plan fits the model. The plan is kept as ``model.mixrank_plan``.

    Args:
        model: the dense model that the plan and the factorisations were made from, with the same layers split.
        plan: what :func:`mixrank.allocate.allocate` returned.
        factorisations: what :func:`mixrank.decompose.decompose` returned.

    Returns:
        ``model`` itself, changed.

    Raises:
        InputError: the plan names a layer that the model or the factorisations do not have, or of another size, or
            holds a layer as sparse, which no factorisation gives.

    Example:
        >>> import timm
        >>> from mixrank import allocate, decompose
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
        >>> factorisations = decompose(model, factors="svd")
        >>> plan = allocate(model, factorisations, keep=0.6)
        >>> apply_(model, plan, factorisations).mixrank_plan is plan
        True
    """
    linears = compressible_linears(model)
    for layer in plan.layers:
        _checked(layer, linears.get(layer.name))
        if layer.rank is not None and layer.form == "sparse":
            raise InputError(f"the plan holds layer {layer.name} as sparse, which its factorisation does not give")
        if layer.rank is not None and layer.name not in factorisations:
            raise InputError(f"the plan gives layer {layer.name} a rank, but it was not decomposed")
    return put_(model, plan, factorisations)


def put_(model: nn.Module, plan: Plan, factorisations: Mapping[str, Factorisation]) -> nn.Module:
    """Put layers of the plan's ranks and forms in the place of whatever is there, dense or not, in place."""
    for layer in plan.layers:
        if layer.rank is not None:
            _replace(model, layer.name, _layer(layer, layer.rank, factorisations[layer.name]))
    note_(model, "mixrank_plan", plan)
    return model


def restructure_(model: nn.Module, plan: Plan) -> nn.Module:
    """Give a freshly built dense model the layers of a plan, with factors that wait for a checkpoint's tensors.

    Raises:
        InputError: the plan names a layer that the model does not have, or of another size.
    """
    for name in plan.split:
        linear = _module(model, name)
        if not isinstance(linear, nn.Linear) or linear.out_features % QKV_SECTIONS:
            raise InputError(f"the plan splits {name}, which is not a fused linear layer of this model")
        model.set_submodule(name, SplitLinear.from_linear(linear, QKV_SECTIONS))
    linears = compressible_linears(model)
    for layer in plan.layers:
        like = _checked(layer, linears.get(layer.name)).weight
        if layer.rank is not None:
            _replace(model, layer.name, _empty(layer, layer.rank, like))
    note_(model, "mixrank_plan", plan)
    return model


def _empty(layer: LayerPlan, rank: int, like: Tensor) -> LowRankLinear:
    """A layer of the plan's form and sizes, on the device and in the dtype of ``like``."""
    sizes = (layer.in_features, layer.out_features)
    if layer.form == "sparse":
        return SparseLinear(*sizes, layer.entries, rank, layer.bias, device=like.device, dtype=like.dtype)
    return _LAYERS[layer.form](*sizes, rank, layer.bias, device=like.device, dtype=like.dtype)


def _layer(layer: LayerPlan, rank: int, factorisation: Factorisation) -> LowRankLinear:
    if layer.form == "factors":
        return MixedRankLinear.from_factors(*factorisation.factors(rank))
    like = factorisation.like
    # Rows are chosen and coefficients solved for before anything is rounded to the layer's dtype.
    exact = replace(factorisation, like=torch.empty(0, dtype=torch.float64))
    return PivotedLinear.from_factors(*exact.factors(rank)).to(like.device, like.dtype)


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _checked(layer: LayerPlan, linear: nn.Linear | None) -> nn.Linear:
    if linear is None:
        raise InputError(f"the plan names the layer {layer.name}, which this model does not have as a linear layer")
    if (linear.in_features, linear.out_features) != (layer.in_features, layer.out_features):
        raise InputError(
            f"the plan has layer {layer.name} with {layer.in_features} inputs and {layer.out_features} outputs, "
            f"but this model's has {linear.in_features} and {linear.out_features}"
        )
    return linear


def _replace(model: nn.Module, name: str, replacement: nn.Module) -> None:
    replacement.train(model.get_submodule(name).training)
    model.set_submodule(name, replacement)
