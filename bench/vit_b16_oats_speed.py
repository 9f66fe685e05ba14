"""How fast a ViT-B/16 of sparse plus low-rank weights runs, beside the dense one and ours of the same count of numbers.

    python -m mixrank_bench.vit_b16_oats_speed --models DIR

OATS (:mod:`mixrank_bench.accuracy_peers.oats`) is measured for accuracy with dense weights. Here its layers run as they
would be stored: S in compressed rows, multiplied by torch's sparse product (MKL's on x86), and two factors; and the
same numbers once more in :class:`mixrank.SparseLinear`. The places of the nonzeros are drawn at random, as their number
decides the work; ours of low rank has the last ranks in ``bench/results/vit_b16.jsonl``. Ours of sparse
weights is what ``python -m mixrank_bench.vit_b16_peers --models DIR`` made of real weights. One JSON line for
each model goes to ``bench/results/vit_b16_oats_speed.jsonl``, and a table of docs/accuracy.md is made from it.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from mixrank.apply import apply_
from mixrank.checkpoint import load
from mixrank.decompose import decompose
from mixrank.evaluate import compare_speed
from mixrank.models import compressible_linears, create_model
from mixrank.nn_sparse import SparseLinear
from mixrank_bench import vit_b16, vit_b16_peers
from mixrank_bench.accuracy_peers import oats
from mixrank_bench.accuracy_peers.factored import layer_share
from mixrank_bench.environment import RESULTS, append, read

OUT = RESULTS / "vit_b16_oats_speed.jsonl"
KEEPS = (0.5, 0.4)
OURS = "mixrank, sparse"
ROUNDS = 9


class SparsePlusLowRank(nn.Module):
    """``y = S x + U (V x) + b`` with S in compressed rows.

    Args:
        sparse: S ``[N, K]`` with zeros.
        up: U ``[N, R]``.
        down: V ``[R, K]``.
        bias: ``[N]`` or None.
    """

    def __init__(self, sparse: Tensor, up: Tensor, down: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch calls its compressed rows a beta at every first use
            self.register_buffer("sparse", sparse.to_sparse_csr())
        self.register_buffer("up", up)
        self.register_buffer("down", down)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., N]``."""
        tokens = x.reshape(-1, x.shape[-1])
        # Rows of S by columns of tokens: linear() with a sparse weight is slower.
        found = torch.sparse.mm(self.sparse, tokens.mT.contiguous()).mT
        found = torch.addmm(found, tokens @ self.down.mT, self.up.mT)
        return (found if self.bias is None else found + self.bias).reshape(*x.shape[:-1], -1)


def sparse_(
    model: nn.Module,
    keep: float,
    hold: Callable[[Tensor, Tensor, Tensor, Tensor | None], nn.Module] = SparsePlusLowRank,
) -> nn.Module:
    """Give every compressible layer the sizes that OATS has at a budget, held by ``hold``, in place."""
    share, generator = layer_share(model, keep), torch.Generator().manual_seed(0)
    for name, linear in compressible_linears(model).items():
        weight = linear.weight.detach()
        rank, entries = oats.sizes(*weight.shape, share)
        places = torch.rand(weight.shape, generator=generator).topk(entries, dim=1).indices
        sparse = torch.zeros_like(weight).scatter_(1, places, weight.gather(1, places))
        u, s, v = torch.svd_lowrank(weight - sparse, rank)
        bias = None if linear.bias is None else linear.bias.detach()
        model.set_submodule(name, hold(sparse, (u * s).contiguous(), v.mT.contiguous(), bias))
    return model


def ours(sparse: Tensor, up: Tensor, down: Tensor, bias: Tensor | None) -> SparseLinear:
    """The same layer as :class:`SparsePlusLowRank`."""
    return SparseLinear.from_weights(sparse, down, up, bias)


def sparse_name(keep: float) -> str:
    """Of the model of ours in the rows of results."""
    return f"keep {keep}, sparse weights"


def measure(batch: int, rounds: int, out: Path, kept: Path | None) -> None:
    """Time all models in turns and add a row for each."""
    dense = create_model(vit_b16.ARCHITECTURE).eval()
    factorisations = decompose(dense, factors="svd", centre=False)
    models = {"dense": dense}
    plans = vit_b16.low_rank_plans(dense, factorisations, read(vit_b16.OUT))
    for keep in KEEPS:
        models[f"OATS, keep {keep}"] = sparse_(copy.deepcopy(dense), keep)
        models[f"OATS, keep {keep}, by sparse_linear"] = sparse_(copy.deepcopy(dense), keep, ours)
    for keep in vit_b16.KEEPS:
        models[vit_b16.speed_name(keep)] = apply_(copy.deepcopy(dense), plans[keep], factorisations)
        if kept is not None and (path := vit_b16_peers.kept_at(kept, OURS, keep)).is_file():
            models[sparse_name(keep)] = load(path)
    for name, speed in compare_speed(models, torch.randn(batch, 3, 224, 224), rounds=rounds).items():
        append(out, {"model": name} | asdict(speed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=vit_b16.SPEED_BATCH)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--models", type=Path, help="the folder of our models of sparse weights; None: without these")
    parser.add_argument("--out", type=Path, default=OUT, help="the file of results, added to")
    args = parser.parse_args()
    measure(args.batch, args.rounds, args.out, args.models)


if __name__ == "__main__":
    main()
