"""Accuracy, agreement and divergence of a model beside the dense one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mixrank.data import Batch
from mixrank.errors import InputError
from mixrank_bench.fidelity import compare, compare_logits, reference


class Fixed(nn.Module):
    """A classifier whose logits of an image are its first pixels, moved by a shift."""

    def __init__(self, shift: torch.Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(shift)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, 0, : len(self.shift)] + self.shift


def batches() -> list[Batch]:
    pixels = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [0.0, 0.1, 0.0]])
    images = pixels[:, None, None, :]
    return [Batch(images[:2], torch.tensor([0, 2]), ["a", "b"]), Batch(images[2:], torch.tensor([1]), ["c"])]


def test_the_dense_model_agrees_with_itself():
    dense = Fixed(torch.zeros(3))
    found = compare(dense, reference(dense, batches()))
    assert (found.images, found.agreement, found.kl, found.correct) == (3, 100.0, 0.0, "101")
    assert found.top1 == pytest.approx(100 * 2 / 3)


def test_another_model_is_compared_with_labels_and_with_the_dense_one():
    dense = Fixed(torch.zeros(3))
    shift = torch.tensor([0.0, 0.0, 2.5])
    found = compare(Fixed(shift), reference(dense, batches()))
    assert found.correct == "010"
    assert found.agreement == 0.0
    logits = torch.cat([batch.images[:, 0, 0] for batch in batches()])
    expected = nn.functional.kl_div((logits + shift).log_softmax(-1), logits.softmax(-1), reduction="batchmean")
    assert found.kl == pytest.approx(expected.item(), rel=1e-5)


def test_known_logits_are_not_computed_again():
    known = reference(Fixed(torch.zeros(3)), batches()).logits
    assert torch.equal(reference(nn.Linear(1, 1), batches(), logits=known).logits, known)


def test_bad_input_is_refused():
    dense = Fixed(torch.zeros(3))
    with pytest.raises(InputError, match="at least one image"):
        reference(dense, [])
    with pytest.raises(InputError, match="label for every image"):
        reference(dense, [batches()[0]._replace(labels=None)])
    with pytest.raises(InputError, match="must be of the 3 images"):
        reference(dense, batches(), logits=torch.zeros(2, 3))
    with pytest.raises(InputError, match="must return logits"):
        compare(Fixed(torch.zeros(2)), reference(dense, batches()))
    with pytest.raises(InputError, match="finite"):
        compare_logits(torch.full((3, 3), torch.nan), reference(dense, batches()))
