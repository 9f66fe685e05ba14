"""Decomposition: the factors of a layer for every rank at once, and the error that each rank would make.

Every strategy projects the weight on the leading directions of its output space, ``W_R = U_R D_R^T W``, so that
``up = U_R`` and ``down = D_R^T W`` (Azizi, Nazemi, Pedram 2024, the activation-aware SVD, written without an
inverse of a Gram matrix). The strategies differ in the directions:

``svd``
    U = D, the leading eigenvectors of ``W W^T``: the truncated singular value decomposition of the weight.
``aware``
    U = D, the leading eigenvectors of ``W G W^T``, G the (centred) Gram matrix of the inputs: the least error of the
    layer's outputs on the calibration images. ``shrink`` pulls them towards ``svd``, see :mod:`mixrank.shrinkage`.
``fisher``
    The least error ``|O^1/2 (W - W_R) G^1/2|``, O the Gram matrix of the gradients of the loss with respect to the
    outputs: what the loss loses to second order where O and G are independent (Kronecker-factored Fisher information,
    Martens and Grosse 2015). With the leading eigenvectors V of ``O^1/2 W G W^T O^1/2``, ``U = O^-1/2 V`` and
    ``D = O^1/2 V``: an oblique projection. O is brought to mean eigenvalue 1, and ``fisher_shrink`` times the identity
    added, which bounds its inverse.

For N > K the work is done in the K coordinates of ``W = Q R`` instead of the N of the output space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mixrank import shrinkage
from mixrank.arguments import Strategy
from mixrank.directions import Directions, Space
from mixrank.errors import InputError
from mixrank.memory import trim
from mixrank.models import compressible_linears
from mixrank.nn import check_rank
from mixrank.processes import divided, is_first
from mixrank.progress import track
from mixrank.stats import CalibrationStats, LayerStats, output_frame

FACTORS = ("aware", "svd", "fisher")
FISHER_SHRINK = 2.0


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

    @property
    def sizes(self) -> tuple[int, int]:
        """N and K."""
        return self.out_features, self.in_features

    @classmethod
    def of(cls, linear: nn.Linear, centre: bool) -> LayerShape:
        """The shape of a linear layer whose factors are centred or not."""
        bias = linear.bias is not None
        sizes = (linear.in_features, linear.out_features)
        return cls(*sizes, bias, bias or centre, linear.weight.element_size())


@dataclass(frozen=True)
class Factorisation:
    """A layer's weight in ordered directions of its output space. S = min(N, K).

    Errors are relative to the energy of all outputs (before the bias), for each rank from 0 (nothing but the mean,
    where that goes into the bias) to S; they hold for the exact factors.

    Matrices are float32, or float64 for a layer in float64; factors are multiplied out of them in float64.

    Attributes:
        shape: the sizes of the layer.
        frame: ``[N, S]`` with orthonormal columns that span the outputs, or None for the identity (N <= K).
        core: ``[S, K]``, the weight in the coordinates of ``frame``; for N <= K the layer's own, not a copy of it.
        up_basis: ``[S, S]``, the columns of ``up`` in the coordinates of ``frame``, the most important first; fewer
            columns where no more ranks were asked for.
        down_basis: as many columns of its inverse transposed: what ``down`` reads. The same matrix, with orthonormal
            columns, but for ``"fisher"``.
        weight_energy: ``[S]`` float64, squared singular values of the weight as shares of their sum.
        output_error: ``[S + 1]`` float64, squared error on the calibration images; None without statistics.
        held_out_error: ``[S + 1]`` float64, squared error on images held out, of factors that were made without them;
            None without such images.
        fisher_error: ``[S + 1]`` float64, squared error on the calibration images in the metric O of ``"fisher"``; None
            for the others.
        shrink: the pull towards ``"svd"`` that these factors have; None for ``"svd"``.
        mean: ``[S]`` float64, the mean output before the bias in the coordinates of ``frame``, where it is
            to go into the bias; else None.
        bias: ``[N]`` the layer's bias or None.
        like: an empty tensor with the dtype and device that the factors are cast to.
        trial: the factors that were made without the images held out, to be judged on these; None without such images,
            or where they were not kept.
    """

    shape: LayerShape
    frame: Tensor | None
    core: Tensor
    up_basis: Tensor
    down_basis: Tensor
    weight_energy: Tensor
    output_error: Tensor | None
    held_out_error: Tensor | None
    fisher_error: Tensor | None
    shrink: float | None
    mean: Tensor | None
    bias: Tensor | None
    like: Tensor
    trial: Factorisation | None = None

    def factors(self, rank: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return ``down [R, K]``, ``up [N, R]`` and ``bias [N]`` or None, in the layer's dtype, for one rank.

        Args:
            rank: R, from 1 to min(N, K).

        Raises:
            InputError: the rank is below 1, above min(N, K), or above the ranks that were asked for.
        """
        check_rank(rank, self.shape.in_features, self.shape.out_features)
        if rank > (most := self.up_basis.shape[1]):
            raise InputError(f"rank must be at most {most}, as no more directions were kept, but it was {rank}")
        writes, reads = self.up_basis[:, :rank].double(), self.down_basis[:, :rank].double()
        down, up = reads.mT @ self.core.double(), self._outside(writes)
        bias = self.bias
        if self.mean is not None:
            lost = self._outside(self.mean - writes @ (reads.mT @ self.mean))
            bias = lost if bias is None else bias.double().cpu() + lost
        return self._cast(down), self._cast(up), None if bias is None else self._cast(bias)

    def relative_error(self, rank: int, *, held_out: bool = False) -> float | None:
        """Squared error of the layer's output over all calibration tokens, relative to the output's energy.

        Args:
            rank: R, from 1 to min(N, K).
            held_out: over the tokens of the images held out instead.

        Returns:
            The closed form, which holds for the exact factors; None without such statistics.

        Raises:
            InputError: the rank is below 1 or above min(N, K).
        """
        check_rank(rank, self.shape.in_features, self.shape.out_features)
        errors = self.held_out_error if held_out else self.output_error
        return None if errors is None else errors[rank].item()

    def limited(self, rank: int) -> Factorisation:
        """The same with fewer directions, in memory of its own; the errors are still those of all ranks.

        Args:
            rank: how many directions are kept at most, at least 0.
        """
        writes = self.up_basis[:, :rank].clone()
        reads = writes if self.down_basis is self.up_basis else self.down_basis[:, :rank].clone()
        trial = None if self.trial is None else self.trial.limited(rank)
        return replace(self, up_basis=writes, down_basis=reads, trial=trial)

    def placed_as(self, linear: nn.Linear) -> Factorisation:
        """The same, whose factors are cast to the dtype and device of this layer.

        Args:
            linear: the layer, weight ``[N, K]``; its bias becomes that of the factors.
        """
        like, bias = linear.weight.detach().new_empty(0), None if linear.bias is None else linear.bias.detach()
        trial = None if self.trial is None else self.trial.placed_as(linear)
        return replace(self, like=like, bias=bias, trial=trial)

    def _outside(self, coordinates: Tensor) -> Tensor:
        return coordinates if self.frame is None else self.frame.double() @ coordinates

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.like.device, self.like.dtype).contiguous()


def check_strategy(
    factors: str,
    centre: bool | None,
    shrink: float | str,
    *,
    calibrated: bool,
    held_out: bool = True,
    fisher_shrink: float = FISHER_SHRINK,
) -> bool:
    """Return whether factors are centred; raise InputError for an unknown strategy or one that needs statistics."""
    if factors not in FACTORS:
        raise InputError(f"factors must be one of {', '.join(FACTORS)}, but it was {factors!r}")
    shrinkage.check_shrink(shrink)
    if not 0 < fisher_shrink < math.inf:
        raise InputError(f"fisher_shrink must be a number above 0, but it was {fisher_shrink}")
    centre = factors != "svd" if centre is None else centre
    if not calibrated and (factors != "svd" or centre):
        raise InputError(f"factors={factors!r} with centre={centre} needs calibration images, but there were none")
    if factors != "svd" and shrink == "auto" and not held_out:
        raise InputError("shrink='auto' needs images that are held out, but there were none")
    return centre


def factorise(
    linear: nn.Linear,
    stats: LayerStats | None = None,
    *,
    held_out: LayerStats | None = None,
    factors: str = "aware",
    centre: bool | None = None,
    shrink: float | str = 0.0,
    fisher_shrink: float = FISHER_SHRINK,
    known: Factorisation | None = None,
    keep_trial: bool = True,
) -> Factorisation:
    """Decompose one linear layer.

    Args:
        linear: the layer; its weight ``[N, K]`` is not changed.
        stats: its statistics; needed for ``factors="aware"`` and ``"fisher"`` and for ``centre``.
        held_out: statistics of other images. Factors that are made without them tell the error on them (and
            ``shrink="auto"``); the factors returned are made from both.
        factors: ``"aware"``, ``"svd"`` or ``"fisher"``, see the module.
        centre: move the mean of what is lost into the bias, and measure errors about the mean. None: not for
            ``"svd"``; it always lowers the error on the calibration images.
        shrink: pull of the factors towards ``"svd"``, at least 0; ``"auto"``: the one of a few with the least error
            on the images held out; ``"oas"``: by a formula, from the number of images.
        fisher_shrink: pull of O towards the identity, above 0.
        known: another factorisation of the same weight, whose coordinates serve this one too.
        keep_trial: keep the factors made without the images held out, not only their errors.

    Raises:
        InputError: an unknown strategy, missing statistics, or statistics of a layer of another size.
    """
    calibrated = stats is not None
    apart = held_out is not None
    centre = check_strategy(factors, centre, shrink, calibrated=calibrated, held_out=apart, fisher_shrink=fisher_shrink)
    weight = linear.weight.detach()
    if not weight.isfinite().all():
        raise InputError(f"the weight of a layer of shape {list(weight.shape)} has NaN or infinite values")
    frame, core = output_frame(weight) if known is None else (known.frame, known.core)
    space = Space(frame, core)
    output_error = held_out_error = fisher_error = None
    moments = trial = None
    if stats is not None:
        make = Directions(space, factors, centre, fisher_shrink)
        if held_out is not None:
            trial = make.tried(stats, held_out, shrink)
            shrink, held_out_error = trial.shrink, trial.errors
            stats = stats + held_out
        moments, metric = space.moments(stats), make.metric(stats)
        pull = make.pull(moments, shrink, stats.images)
        up, down = make.bases(moments, metric, pull)
        output_error = make.errors(up, down, moments, moments.mean)
        if factors == "fisher":
            fisher_error = make.errors(up, down, moments, moments.mean, metric)
    else:
        up = down = space.weight_directions[1]
        pull = None
    writes, reads = _rounded(up, down, core.dtype)
    made = Factorisation(
        shape=LayerShape.of(linear, centre),
        frame=frame,
        core=core,
        up_basis=writes,
        down_basis=reads,
        weight_energy=_shares(space.weight_directions[0]) if known is None else known.weight_energy,
        output_error=output_error,
        held_out_error=held_out_error,
        fisher_error=fisher_error,
        shrink=None if factors == "svd" else pull,
        mean=moments.mean if centre and moments is not None else None,
        bias=None if linear.bias is None else linear.bias.detach(),
        like=linear.weight.detach().new_empty(0),
    )
    if trial is None or not keep_trial:
        return made
    writes, reads = _rounded(trial.up, trial.down, core.dtype)
    without = replace(made, up_basis=writes, down_basis=reads, mean=trial.mean if centre else None)
    return replace(made, trial=without)


def decompose(
    model: nn.Module,
    stats: CalibrationStats | None = None,
    *,
    factors: str = "aware",
    centre: bool | None = None,
    shrink: float | str = 0.0,
    fisher_shrink: float = FISHER_SHRINK,
    known: Mapping[str, Factorisation] | None = None,
    keep_trials: bool = True,
    ranks: Mapping[str, int] | None = None,
    progress: bool = False,
) -> dict[str, Factorisation]:
    """Decompose every compressible layer of a model, in float64 on the CPU; several processes divide the layers.

    Args:
        model: the dense model; it is not changed.
        stats: what :func:`mixrank.calibrate.calibrate` returned for this model, or None for plain SVD. Images held
            out tell the errors of factors that were made without them; the factors returned are made from all.
        factors: ``"aware"``, ``"svd"`` or ``"fisher"``.
        centre: move the mean of what is lost into the bias; None: not for ``"svd"``.
        shrink: pull of the factors towards ``"svd"``: at least 0, ``"auto"`` or ``"oas"``, see :func:`factorise`.
        fisher_shrink: pull of O towards the identity, for ``"fisher"``.
        known: other factorisations of the same model; what does not depend on the strategy is taken over from them,
            which saves time and memory and changes nothing.
        keep_trials: keep the factors made without the images held out, not only their errors.
        ranks: the highest rank that is needed, by layer name, and none where it is missing: no further directions are
            kept, which saves memory, see :meth:`mixrank.plan.Plan.ranks`. None: all.
        progress: show a progress bar with the time left.

    Returns:
        A :class:`Factorisation` by layer name, for the layers that have statistics.

    Raises:
        InputError: an unknown strategy, missing statistics, or statistics or ``known`` that are not of this model.

    Example:
        >>> import timm
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> down, up, bias = decompose(model, factors="svd")["blocks.0.mlp.fc1"].factors(rank=16)
        >>> down.shape, up.shape
        (torch.Size([16, 192]), torch.Size([768, 16]))
    """
    idle = () if stats is None else stats.idle
    layers = {name: linear for name, linear in compressible_linears(model).items() if name not in idle}
    strategy: Strategy = {"factors": factors, "centre": centre, "shrink": shrink, "fisher_shrink": fisher_shrink}

    def work(names: list[str]) -> dict[str, Factorisation]:
        shown = progress and is_first()
        return {name: made(name, layers[name]) for name in track(names, "decomposing", enabled=shown)}

    def made(name: str, linear: nn.Linear) -> Factorisation:
        layer = apart = None
        if stats is not None:
            if name not in stats:
                raise InputError(f"the statistics have no layer {name}: they are of another model")
            layer, apart = stats[name], None if stats.held_out is None else stats.held_out[name]
        earlier = None if known is None else known.get(name)
        if known is not None and (earlier is None or earlier.shape.sizes != tuple(linear.weight.shape)):
            raise InputError(f"known must be of this model, but it has no layer {name} of its size")
        try:
            found = factorise(linear, layer, held_out=apart, known=earlier, keep_trial=keep_trials, **strategy)
            return found if ranks is None else found.limited(ranks.get(name, 0))
        except InputError as error:
            raise InputError(f"layer {name}: {error}") from error

    costs = {name: min(one.weight.shape) ** 2 * max(one.weight.shape) for name, one in layers.items()}
    found = {name: each.placed_as(layers[name]) for name, each in divided(costs, work).items()}
    trim()  # of the float64 matrices in between
    return found


def _rounded(up: Tensor, down: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both bases in a dtype, one object where they are one."""
    writes = up.to(dtype)
    return writes, writes if down is up else down.to(dtype)


def _shares(energy: Tensor) -> Tensor:
    """``energy`` relative to its sum; a layer without any energy gives all of it to the first direction."""
    total = energy.sum()
    if total > 0:
        return energy / total
    return torch.zeros_like(energy).index_fill_(0, torch.tensor(0), 1.0)
