"""Training a compressed model on labelled images, with the dense model as teacher.

python examples/finetune.py
"""

from __future__ import annotations

import torch

import mixrank
from mixrank.demo import MEAN, STD
from mixrank.demo.run import batches, load_images, load_model
from mixrank.uvc.data import TensorData
from mixrank.uvc.finetune import finetune_
from mixrank.uvc.options import FinetuneOptions, FinetuneResult


def main(keep: float = 0.07, epochs: float = 2.0) -> FinetuneResult:
    """Returns what the training did."""
    dense, images = load_model(), load_images()
    model = load_model()
    # Factors are better to train than the pivoted form; `mixrank.compensate_` needs no labels instead.
    mixrank.compress(model, batches(images["calibration_images"][:300]), keep=keep, form="factors")

    # A thousand images stand for a training set; others tell what it brought.
    labelled, labels = images["test_images"], images["test_labels"]
    shown = ((labelled.float() / 255 - MEAN) / STD).unsqueeze(1)
    training, rest = slice(0, 1000), slice(1000, 1500)
    result = finetune_(
        model,
        TensorData(shown[training], labels[training], batch_size=25),
        options=FinetuneOptions(epochs=epochs, learning_rate=1e-4, distillation=0.9, ema=0.0),
        teacher=dense,
        validation=batches(labelled[rest], labels[rest]),
    )
    print(f"top-1 on images that it was not trained on: {result.before:.1f} to {result.after:.1f} %")
    return result


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
