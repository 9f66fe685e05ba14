"""Models of the defaults whose files were lost: they are made anew from the ranks of their rows."""

from __future__ import annotations

import copy
import dataclasses

import timm
import torch

import mixrank
from mixrank_bench import vit_b16


class Folder:
    """In place of the folder with the real model."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.dense = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=7).eval()

    def model(self) -> torch.nn.Module:
        return copy.deepcopy(self.dense)


def test_lost_models_are_made_from_the_ranks_of_their_rows(tmp_path, monkeypatch) -> None:
    data = Folder()
    dense = data.model()
    batches = [torch.randn(4, 3, 32, 32)]
    stats = mixrank.calibrate(dense, batches, gradients=True)
    monkeypatch.setattr(vit_b16, "cached_statistics", lambda *_: stats)
    ranks = dict.fromkeys(mixrank.decompose(dense, factors="svd"), 8)
    first, second, _ = vit_b16.KEEPS
    rows = [
        {
            "kind": "strategy",
            "strategy": dataclasses.asdict(vit_b16.defaults(keep)),
            "ranks": ranks | {"blocks.0.attn.proj": own},
        }
        for keep, own in ((first, 16), (second, None))
    ]
    vit_b16.checkpoint_of(tmp_path, first).write_bytes(b"kept")
    vit_b16.remake_models(data, [{"kind": "dense"}, *rows], None, tmp_path)
    assert vit_b16.checkpoint_of(tmp_path, first).read_bytes() == b"kept"
    assert {path.name for path in tmp_path.iterdir()} == {f"keep_{keep}.safetensors" for keep in (first, second)}
    model = mixrank.load(vit_b16.checkpoint_of(tmp_path, second))
    assert isinstance(model.blocks[0].attn.proj, torch.nn.Linear)
    assert model.blocks[0].mlp.fc1.rank == 8
    monkeypatch.setattr(vit_b16, "cached_statistics", None)
    vit_b16.remake_models(data, rows, None, tmp_path)  # nothing is lost
