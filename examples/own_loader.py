"""Calibration images from a DataLoader of your own, decoded as they are needed.

python examples/own_loader.py
"""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader, Dataset

import mixrank
from mixrank.demo import MEAN, STD
from mixrank.demo.run import load_images, load_model


class Unlabelled(Dataset):
    """Images one by one; a dict with "image" (and perhaps "label") is understood, and so are tensors and tuples."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": ((self.images[index].float() / 255 - MEAN) / STD).unsqueeze(0)}


def main(keep: float = 0.6) -> mixrank.CompressionResult:
    """Returns what compression tells."""
    model = load_model()
    loader = DataLoader(Unlabelled(load_images()["calibration_images"][:300]), batch_size=64, num_workers=1)
    # The loader is gone through a batch at a time, and several times, as two forms are tried and the better one is
    # made. All images together need not fit into memory. By form="pivoted" alone it is gone through once.
    result = mixrank.compress(model, loader, keep=keep)
    for layer in result.layers[:4]:
        print(f"{layer.name:<20} rank {layer.rank}, error on images held out {100 * layer.held_out_error:.2f} %")
    return result


if __name__ == "__main__":
    main()
