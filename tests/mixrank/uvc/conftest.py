"""Data that a small model learns in seconds."""

from __future__ import annotations

import pytest
import torch

from mixrank.models import create_model
from mixrank.uvc.data import TensorData


@pytest.fixture(scope="session")
def images():
    """Noisy images of three kinds, and their labels."""
    source = torch.Generator().manual_seed(0)
    kinds, labels = torch.randn(3, 3, 32, 32, generator=source), torch.arange(180) % 3
    return kinds[labels] + torch.randn(180, 3, 32, 32, generator=source), labels


@pytest.fixture
def data(images):
    """Images to train on, in batches."""
    return TensorData(images[0][:144], images[1][:144], batch_size=16)


@pytest.fixture
def validation(images):
    """The others."""
    return [(images[0][144:], images[1][144:])]


@pytest.fixture
def model():
    torch.manual_seed(0)
    args = {"img_size": 32, "depth": 4, "embed_dim": 48, "num_heads": 3, "num_classes": 3}
    return create_model("vit_tiny_patch16_224", args=args)
