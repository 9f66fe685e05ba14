"""A model that is not timm's: compress it, keep it in a file, and build it again.

python examples/custom_model.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mixrank
from mixrank.apply import restructure_
from mixrank.plan import Plan


class Classifier(nn.Module):
    """Any module will do whose nn.Linear layers are called as modules."""

    def __init__(self, width: int = 256, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(784, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images.flatten(1)))

    def get_classifier(self) -> nn.Module:
        """What is named here stays dense; without it the last layer is compressed as well."""
        return self.head


def main(folder: Path = Path(".")) -> float:
    """Returns the largest difference of the model that was built again."""
    torch.manual_seed(0)
    model, images = Classifier().eval(), torch.randn(64, 1, 28, 28)
    result = mixrank.compress(model, images.split(16), keep=0.5)
    print(result.plan.describe())

    # Tensors in one file, the ranks in another: nothing that loading would execute.
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "plan.json").write_text(json.dumps(result.plan.to_json()))

    again = Classifier().eval()
    restructure_(again, Plan.from_json(json.loads((folder / "plan.json").read_text())))
    again.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        difference = (again(images) - model(images)).abs().max().item()
    print(f"largest difference after loading: {difference:g}")
    return difference


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
