"""Our factors of CorDA and EVA are those of the library peft; not in CI, as peft brings transformers with it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mixrank_bench.accuracy_peers import corda, eva
from mixrank_bench.accuracy_peers.statistics import InputStats

pytestmark = pytest.mark.peft


def observed(n: int, k: int) -> tuple[nn.Linear, torch.Tensor, InputStats]:
    linear = nn.Linear(k, n)
    x = torch.randn(300, k) @ torch.randn(k, k) * torch.linspace(0.1, 2, k)
    x = x - x.mean(0)
    wide = x.double()
    return linear, x, InputStats(wide.mT @ wide, wide.sum(0), wide.abs().sum(0), len(x))


@pytest.mark.parametrize(("n", "k"), [(12, 20), (20, 12)])
def test_corda_is_that_of_peft(n, k):
    from peft import LoraConfig
    from peft.tuners.lora.corda import collect_eigens_for_layer

    linear, _, stats = observed(n, k)
    linear.covariance_matrix = (stats.gram / stats.rows).float()
    theirs = collect_eigens_for_layer(linear, LoraConfig(init_lora_weights="corda"))
    down, up = corda.factors(linear.weight.detach().double(), stats)
    for rank in (1, 5, 12):
        expected = theirs.U_WC[:, :rank] * theirs.S_WC[:rank] @ theirs.V_WC[:, :rank].mT
        torch.testing.assert_close((up[:, :rank] @ down[:rank]).float(), expected, rtol=1e-3, atol=1e-3)


def test_eva_is_the_incremental_pca_of_peft_where_the_mean_is_zero():
    from peft.utils.incremental_pca import IncrementalPCA

    linear, x, stats = observed(20, 16)
    theirs = IncrementalPCA(n_components=6, batch_size=len(x)).fit(x).components_.double()
    down, _ = eva.factors(linear.weight.detach().double(), stats)
    torch.testing.assert_close(down[:6].mT @ down[:6], theirs.mT @ theirs, rtol=1e-3, atol=1e-3)
