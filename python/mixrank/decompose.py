"""Decomposition: the factors of a layer for every rank at once, and the error that each rank would make.

Every strategy here projects the weight on the leading directions of its output space, ``W_R = V_R V_R^T W``, so that
``up = V_R`` and ``down = V_R^T W`` (Azizi, Nazemi, Pedram 2024, the activation-aware SVD, written without an
inverse). The strategies differ in the matrix whose leading eigenvectors are taken:

``svd``
    ``W W^T``: the truncated singular value decomposition of the weight.
``aware``
    ``W G W^T``, G the (centred) Gram matrix of the inputs: the least error of the layer's outputs on the
    calibration images. With ``shrink`` above 0 both matrices are brought to trace 1 and ``shrink`` times the first is
    added: what the calibration images do not show counts as if it were seen evenly (a ridge on G).

For N > K the work is done in the K coordinates of ``W = Q R`` instead of the N of the output space.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixrank.errors import InputError
from mixrank.models import compressible_linears
from mixrank.nn import check_rank
from mixrank.progress import track
from mixrank.stats import CalibrationStats, LayerStats

FACTORS = ("aware", "svd")


@dataclass(frozen=True)
class LayerShape:
    """What a layer's cost depends on.

    Attributes:
        in_features: K.
        out_features: N.
        bias: whether the dense layer has a bias.
        factored_bias: whether the factored layer has one: the layer's own, or the mean correction.
        element_size: bytes of one weight.
    """

    in_features: int
    out_features: int
    bias: bool
    factored_bias: bool
    element_size: int

    @classmethod
    def of(cls, linear: nn.Linear, centre: bool) -> LayerShape:
        """The shape of a linear layer whose factors are centred or not."""
        bias = linear.bias is not None
        sizes = (linear.in_features, linear.out_features)
        return cls(*sizes, bias, bias or centre, linear.weight.element_size())


@dataclass(frozen=True)
class Factorisation:
    """A layer's weight in an ordered basis of its output space. S = min(N, K).

    Attributes:
        shape: the sizes of the layer.
        frame: ``[N, S]`` float64 with orthonormal columns that span the outputs, or None for the identity (N <= K).
        core: ``[S, K]`` float64, the weight in the coordinates of ``frame``.
        basis: ``[S, S]`` float64, orthonormal columns, the most important direction first.
        weight_energy: ``[S]`` float64, squared singular values of the weight as shares of their sum.
        output_energy: ``[S]`` float64, share of the layer's (centred) output energy along each direction of ``basis``
            on the calibration images; None without statistics.
        mean: ``[S]`` float64, the mean output before the bias in the coordinates of ``frame``, where it is
            to go into the bias; else None.
        centred_share: energy about the mean as a share of all output energy; 1 where the mean is not taken out.
        bias: ``[N]`` the layer's bias or None.
        like: an empty tensor with the dtype and device that the factors are cast to.
    """

    shape: LayerShape
    frame: Tensor | None
    core: Tensor
    basis: Tensor
    weight_energy: Tensor
    output_energy: Tensor | None
    mean: Tensor | None
    centred_share: float
    bias: Tensor | None
    like: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return ``down [R, K]``, ``up [N, R]`` and ``bias [N]`` or None, in the layer's dtype, for one rank.

        Raises:
            InputError: the rank is below 1 or above min(N, K).
        """
        check_rank(rank, self.shape.in_features, self.shape.out_features)
        leading = self.basis[:, :rank]
        down, up = leading.mT @ self.core, self._outside(leading)
        bias = self.bias
        if self.mean is not None:
            lost = self._outside(self.mean - leading @ (leading.mT @ self.mean))
            bias = lost if bias is None else bias.double().cpu() + lost
        return self._cast(down), self._cast(up), None if bias is None else self._cast(bias)

    def relative_error(self, rank: int) -> float | None:
        """Squared error of the layer's output over all calibration tokens, relative to the output's energy.

        None without statistics. The value is the closed form; it holds for the exact factors.
        """
        check_rank(rank, self.shape.in_features, self.shape.out_features)
        if self.output_energy is None:
            return None
        return self.centred_share * max(0.0, 1.0 - self.output_energy[:rank].sum().item())

    def _outside(self, coordinates: Tensor) -> Tensor:
        return coordinates if self.frame is None else self.frame @ coordinates

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.like.device, self.like.dtype).contiguous()


def check_strategy(factors: str, centre: bool | None, shrink: float, *, calibrated: bool) -> bool:
    """Return whether factors are centred; raise InputError for an unknown strategy or one that needs statistics."""
    if factors not in FACTORS:
        raise InputError(f"factors must be one of {', '.join(FACTORS)}, but it was {factors!r}")
    if not 0 <= shrink < float("inf"):
        raise InputError(f"shrink must be a number of at least 0, but it was {shrink}")
    centre = factors == "aware" if centre is None else centre
    if not calibrated and (factors == "aware" or centre):
        raise InputError(f"factors={factors!r} with centre={centre} needs calibration images, but there were none")
    return centre


def factorise(
    linear: nn.Linear,
    stats: LayerStats | None = None,
    *,
    factors: str = "aware",
    centre: bool | None = None,
    shrink: float = 0.0,
) -> Factorisation:
    """Decompose one linear layer.

    Args:
        linear: the layer; its weight ``[N, K]`` is not changed.
        stats: its statistics; needed for ``factors="aware"`` and for ``centre``.
        factors: ``"aware"`` or ``"svd"``, see the module.
        centre: move the mean of what is lost into the bias, and measure errors about the mean. None: only for
            ``"aware"``, where it always lowers the error on the calibration images.
        shrink: pull of ``"aware"`` factors towards ``"svd"``, at least 0.

    Raises:
        InputError: an unknown strategy, missing statistics, or statistics of a layer of another size.
    """
    centre = check_strategy(factors, centre, shrink, calibrated=stats is not None)
    weight = linear.weight.detach().double().cpu()
    if not weight.isfinite().all():
        raise InputError(f"the weight of a layer of shape {list(weight.shape)} has NaN or infinite values")
    frame, core = (None, weight) if weight.shape[0] <= weight.shape[1] else torch.linalg.qr(weight)
    weight_gram = core @ core.mT
    weight_energy, weight_basis = _leading(weight_gram)
    if stats is None:
        output_gram = mean = None
    else:
        output_gram, mean = _output_moments(core, frame, stats)
    energy_all = None if output_gram is None else output_gram.trace()
    if centre:
        output_gram = output_gram - torch.outer(mean, mean)
    if factors == "aware":
        pull = shrink * _unit_trace(weight_gram) if shrink else 0.0
        basis = _leading(_unit_trace(output_gram) + pull)[1]
    else:
        basis = weight_basis
    output_energy, centred_share = None, 1.0
    if output_gram is not None:
        along = ((output_gram @ basis) * basis).sum(0).clamp_(min=0)
        output_energy = _shares(along)
        centred_share = (along.sum() / energy_all).item() if energy_all > 0 else 0.0
    return Factorisation(
        shape=LayerShape.of(linear, centre),
        frame=frame,
        core=core,
        basis=basis,
        weight_energy=_shares(weight_energy),
        output_energy=output_energy,
        mean=mean if centre else None,
        centred_share=centred_share,
        bias=None if linear.bias is None else linear.bias.detach(),
        like=linear.weight.detach().new_empty(0),
    )


def decompose(
    model: nn.Module,
    stats: CalibrationStats | None = None,
    *,
    factors: str = "aware",
    centre: bool | None = None,
    shrink: float = 0.0,
    progress: bool = False,
) -> dict[str, Factorisation]:
    """Decompose every compressible layer of a model, in float64 on the CPU.

    Args:
        model: the dense model; it is not changed.
        stats: what :func:`mixrank.calibrate.calibrate` returned for this model, or None for plain SVD.
        factors: ``"aware"`` or ``"svd"``.
        centre: move the mean of what is lost into the bias; None: only for ``"aware"``.
        shrink: pull of ``"aware"`` factors towards ``"svd"``, at least 0.
        progress: show a progress bar with the time left.

    Returns:
        A :class:`Factorisation` by layer name.

    Raises:
        InputError: an unknown strategy, missing statistics, or statistics that are not of this model.

    Example:
        >>> import timm
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> down, up, bias = decompose(model, factors="svd")["blocks.0.mlp.fc1"].factors(rank=16)
        >>> down.shape, up.shape
        (torch.Size([16, 192]), torch.Size([768, 16]))
    """
    result = {}
    layers = compressible_linears(model)
    for name, linear in track(layers.items(), "decomposing", total=len(layers), enabled=progress):
        if stats is not None and name not in stats:
            raise InputError(f"the statistics have no layer {name}: they are of another model")
        try:
            layer = None if stats is None else stats[name]
            result[name] = factorise(linear, layer, factors=factors, centre=centre, shrink=shrink)
        except InputError as error:
            raise InputError(f"layer {name}: {error}") from error
    return result


def _leading(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (none below zero) and eigenvectors, the largest first."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def _unit_trace(symmetric: Tensor) -> Tensor:
    trace = symmetric.trace()
    return symmetric / trace if trace > 0 else symmetric


def _shares(energy: Tensor) -> Tensor:
    """``energy`` relative to its sum; a layer without any energy gives all of it to the first direction."""
    total = energy.sum()
    if total > 0:
        return energy / total
    return torch.zeros_like(energy).index_fill_(0, torch.tensor(0), 1.0)


def _output_moments(core: Tensor, frame: Tensor | None, stats: LayerStats) -> tuple[Tensor, Tensor]:
    """Second moment ``[S, S]`` and mean ``[S]`` of the outputs before the bias, in the coordinates of ``frame``."""
    wanted = core.shape[1] if stats.side == "input" else core.shape[0] if frame is None else frame.shape[0]
    if stats.gram.shape[0] != wanted:
        raise InputError(f"statistics of the {stats.side} must be of size {wanted}, but were {stats.gram.shape[0]}")
    second, mean = stats.gram / stats.rows, stats.total / stats.rows
    if stats.side == "input":
        return core @ second @ core.mT, core @ mean
    if frame is not None:
        return frame.mT @ second @ frame, frame.mT @ mean
    return second, mean
