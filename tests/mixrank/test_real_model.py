"""A real ViT-B/16 on real photographs, from the folder named by MIXRANK_DATA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mixrank
from mixrank.counting import count_parameters
from mixrank.data import open_images
from mixrank.models import preprocessing

pytestmark = [pytest.mark.real_data, pytest.mark.slow]

IMAGES = 100


def test_vit_b16_keeps_its_accuracy(tmp_path):
    """Plain SVD with mixed ranks, 60 % kept, through a checkpoint and back, on 100 labelled photographs.

    The top-1 on all 500 is in docs/accuracy.md; 100 of them scatter around it by three to four points.
    """
    data, weights = Path(os.environ["MIXRANK_DATA"]), tmp_path / "vit_b16.safetensors"
    subprocess.run([sys.executable, str(data / "dequantize.py"), str(weights)], check=True)
    model = mixrank.create_model("vit_base_patch16_224", weights=weights)
    before = count_parameters(model)
    mixrank.compress(model, keep=0.6, factors="svd")
    assert 0.59 * before < count_parameters(model) <= 0.6 * before
    mixrank.save(model, tmp_path / "compressed.safetensors")
    loaded = mixrank.load(tmp_path / "compressed.safetensors")
    test = open_images(data / "test", preprocessing(loaded), labels=data / "test.csv", limit=IMAGES)
    evaluation = mixrank.evaluate(loaded, test.batches(25))
    assert evaluation.images == IMAGES
    assert evaluation.top1 >= 78
