"""The embedded model: a small vision transformer for Fashion-MNIST, with the images that ``mixrank demo`` uses.

Everything that the training script and the demo must agree on stands here.
"""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).with_name("assets")
WEIGHTS = "vit_fashion_mnist.safetensors"
IMAGES = "fashion_mnist.npz"

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 28, "patch_size": 4, "in_chans": 1, "num_classes": 10, "depth": 6}
MEAN, STD = 0.2860, 0.3530
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
PREPROCESSING = {
    "input_size": [1, 28, 28],
    "interpolation": "bicubic",
    "mean": [MEAN],
    "std": [STD],
    "crop_pct": 1.0,
    "crop_mode": "center",
}
