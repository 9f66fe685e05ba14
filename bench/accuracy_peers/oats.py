"""OATS: a sparse matrix plus a low-rank one (Zhang and Papyan, ICLR 2025, arXiv 2409.13652, section 2, algorithm 1).

The weight is scaled by the second moments of its inputs, ``W D`` with ``D = sqrt(diag(X^T X))``, and split into
``S + L`` by alternating thresholding: L is the truncated SVD of ``W D - S``, S the entries of largest magnitude of each
row of ``W D - L``. The compressed weight is ``(S + L) D^-1``. At a share rho of the dense weight, rank(L) =
kappa rho N K / (N + K) and each row of S has (1 - kappa) rho K entries, so that both together are rho N K numbers. The
paper's settings for vision transformers: kappa = 0.2, 80 iterations, one block after the other, each on the inputs that
the compressed blocks before it give.

Only accuracy is measured, so the model holds ``(S + L) D^-1`` as a dense weight; what would be stored is counted apart.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixrank.counting import count_parameters
from mixrank.errors import InputError
from mixrank.models import compressible_linears
from mixrank_bench.accuracy_peers.blocks import check_blocks, first_inputs, run_block
from mixrank_bench.accuracy_peers.factored import Compressed, layer_share
from mixrank_bench.accuracy_peers.statistics import Calibration

RANK_RATIO = 0.2
ITERATIONS = 80
VALUE_BITS = 32
OVERSAMPLING = 16
IMAGES = 128
"""Each block takes two passes over so many calibration images; a diagonal of second moments needs no more."""


def sizes(rows: int, columns: int, share: float) -> tuple[int, int]:
    """The rank of L and the entries of S in each row of a weight ``[N, K]``, together at most ``share`` N K numbers."""
    rank = int(RANK_RATIO * share * rows * columns / (rows + columns))
    return rank, int((1 - RANK_RATIO) * share * columns)


def alternate(scaled: Tensor, rank: int, entries: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Split ``W D`` ``[N, K]`` into S with ``entries`` nonzeros a row and L of the given rank, both ``[N, K]``.

    The residual changes little from one iteration to the next, so its leading subspace is followed by one step of a
    block power iteration each; the first and the last are exact.
    """
    if len(scaled) > scaled.shape[1]:
        return _alternate(scaled, rank, entries, iterations, lambda matrix: matrix.mT)
    return _alternate(scaled, rank, entries, iterations, lambda matrix: matrix)


def _alternate(
    scaled: Tensor, rank: int, entries: int, iterations: int, wide: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    sparse = low = torch.zeros_like(scaled)
    basis = None
    for number in range(iterations):
        residual = wide(scaled - sparse)
        if rank:
            basis = _leading(residual, rank, None if number == iterations - 1 else basis)
            found = basis[:, :rank]
            low = wide(found @ (found.mT @ residual))
        sparse = _largest(scaled - low, entries)
    return sparse, low


def _leading(matrix: Tensor, rank: int, basis: Tensor | None) -> Tensor:
    """The leading left singular vectors of ``[N, K]``, N <= K, and a few more: ``[N, Q]``, the first ones first.

    From a basis of what was leading before, by one power iteration and the Rayleigh-Ritz method; else exactly.
    """
    if basis is None:
        return torch.linalg.eigh(matrix @ matrix.mT)[1].flip(1)[:, : rank + OVERSAMPLING]
    basis = torch.linalg.qr(matrix @ (matrix.mT @ basis))[0]
    inside = basis.mT @ matrix
    return basis @ torch.linalg.eigh(inside @ inside.mT)[1].flip(1)


def _largest(matrix: Tensor, entries: int) -> Tensor:
    """The given number of entries of largest magnitude in each row, the others zero."""
    if entries == 0:
        return torch.zeros_like(matrix)
    magnitude = matrix.abs()
    # A row of many equal entries could keep more than its share: ties go to the first, as topk has them.
    threshold = magnitude.kthvalue(matrix.shape[1] - entries + 1, dim=1, keepdim=True).values
    kept = magnitude >= threshold
    if int(kept.sum()) != entries * len(matrix):
        kept = torch.zeros_like(kept).scatter_(1, magnitude.topk(entries, dim=1).indices, True)
    return matrix * kept


def compress_layer(
    weight: Tensor, second: Tensor, share: float, *, iterations: int = ITERATIONS
) -> tuple[Tensor, dict[str, int]]:
    """Compress one weight.

    Args:
        weight: ``[N, K]``.
        second: ``[K]``, the diagonal of ``X^T X`` up to a factor; not negative.
        share: rho, of the dense weight.
        iterations: of the alternating thresholding.

    Returns:
        ``(S + L) D^-1`` ``[N, K]`` and the numbers of ``rank``, ``nonzeros`` and ``index_bits`` (the smaller of a
        bitmap and of one column index of 16 bits for each nonzero).
    """
    rows, columns = weight.shape
    # A channel that was never active has no scale; any will do, as its weights meet zeros only.
    diagonal = second.sqrt().to(weight.dtype)
    diagonal = torch.where(diagonal > 0, diagonal, diagonal.max() * torch.finfo(weight.dtype).eps)
    rank, entries = sizes(rows, columns, share)
    sparse, low = alternate(weight * diagonal, rank, entries, iterations)
    nonzeros = rows * entries
    index_bits = min(rows * columns, 16 * nonzeros)
    return (sparse + low) / diagonal, {"rank": rank, "nonzeros": nonzeros, "index_bits": index_bits}


class _SecondMoments:
    """The sum of the squares of a layer's inputs ``[K]``: a forward hook."""

    def __init__(self, linear: nn.Linear) -> None:
        self.total = torch.zeros(linear.in_features, dtype=torch.float64)

    def __call__(self, _module: nn.Module, arguments: tuple[Tensor, ...], _output: Tensor) -> None:
        self.total += arguments[0].float().square().flatten(0, -2).sum(0, dtype=torch.float64)


def compress(model: nn.Module, calibration: Calibration, keep: float, *, iterations: int = ITERATIONS) -> Compressed:
    """Replace the weights of every block by sparse plus low-rank ones, in place and as dense weights."""
    linears = compressible_linears(model)
    blocks = check_blocks(model)
    inside = sum(len(compressible_linears(block)) for block in blocks)
    if inside != len(linears):
        raise InputError(f"model must have all its {len(linears)} compressible layers in blocks, but {inside} are")
    share = layer_share(model, keep)
    saved, index_bits, ranks = 0, 0, {}
    images = torch.cat(calibration.images)[:IMAGES].split(len(calibration.images[0]))
    states = first_inputs(model, images, dtype=calibration.dtype)
    for number, block in enumerate(blocks):
        local = compressible_linears(block)
        moments = {name: _SecondMoments(linear) for name, linear in local.items()}
        handles = [linear.register_forward_hook(moments[name]) for name, linear in local.items()]
        try:
            run_block(block, states, dtype=calibration.dtype)
        finally:
            for handle in handles:
                handle.remove()
        for name, linear in local.items():
            weight = linear.weight.detach()
            compressed, found = compress_layer(weight, moments[name].total, share, iterations=iterations)
            linear.weight = nn.Parameter(compressed)
            stored = found["rank"] * (linear.in_features + linear.out_features) + found["nonzeros"]
            saved += weight.numel() - stored
            index_bits += found["index_bits"]
            ranks[f"blocks.{number}.{name}"] = found["rank"]
        states = run_block(block, states, dtype=calibration.dtype)
    parameters = count_parameters(model) - saved
    with_indices = parameters + -(-index_bits // VALUE_BITS)
    details = {"ranks": ranks, "parameters_with_indices": with_indices, "iterations": iterations}
    details |= {"images_used": sum(len(batch) for batch in images)}
    return Compressed(parameters, details)
