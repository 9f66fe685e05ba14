"""The trainings of the real model, on a small one: what is trained, what the row says, what the table shows."""

from __future__ import annotations

import timm
import torch

import mixrank
from mixrank.compensate import CompensationOptions
from mixrank.data import Batch
from mixrank.models import twin
from mixrank_bench import tables_vit, vit_b16_compensation
from mixrank_bench.environment import read
from mixrank_bench.fidelity import reference


class SmallData:
    """A small classifier with a few images."""

    def __init__(self):
        torch.manual_seed(0)
        self.dense = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5).eval()
        self.images = torch.randn(16, 3, 32, 32)

    def model(self):
        return twin(self.dense)

    def calibration(self, _model):
        return [Batch(self.images, None, [str(i) for i in range(16)])]


def test_a_sparse_model_is_trained_and_stays_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(vit_b16_compensation, "OUT", tmp_path / "rows.jsonl")
    data, out = SmallData(), vit_b16_compensation.OUT
    batch = Batch(data.images, torch.arange(16) % 5, [str(i) for i in range(16)])
    test = reference(data.dense, [batch])
    options = CompensationOptions(learning_rate=1e-3, min_scale=1.0)
    path = vit_b16_compensation.untrained_of(tmp_path, 0.4, "sparse")
    model = data.model()
    mixrank.compress(model, [data.images], 0.4, form="sparse")
    mixrank.save(model, path)
    vit_b16_compensation.measure(data, test, tmp_path, out, 0.4, 0.03, options, "sparse")
    vit_b16_compensation.measure(data, test, tmp_path, out, 0.4, 0.03, options, "sparse")
    first, second = read(out)
    assert (first["form"], first["keep"], first["seed"]) == ("sparse", 0.4, 0)
    assert [row["before"]["kl"] for row in (first, second)] == [first["before"]["kl"]] * 2
    assert first["training"]["after"]["divergence"] <= first["training"]["before"]["divergence"]
    assert isinstance(mixrank.load(path).blocks[0].mlp.fc1, mixrank.SparseLinear)
    trained = mixrank.load(path.with_stem(f"{path.stem}_trained"))
    assert torch.equal(trained.blocks[0].mlp.fc1.mask, mixrank.load(path).blocks[0].mlp.fc1.mask)
    assert vit_b16_compensation.untrained_of(tmp_path, 0.4, "pivoted").name == "keep_0.4.safetensors"
    lines = tables_vit.compensation().splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:3]] == [["| 0.4", "sparse"]]
