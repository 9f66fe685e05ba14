"""Gradients that are scaled by image before they are summed."""

import pytest
import timm
import torch

from mixrank.calibrate import calibrate
from mixrank.data import Batch
from mixrank.gradients import tempered


@pytest.mark.parametrize("shape", [(6, 5, 8), (12, 5, 8), (6, 8)])  # tokens; windows, two to an image; one token
@pytest.mark.parametrize("power", [1.0, 0.5, 0.25])
def test_each_image_has_the_power_of_its_sum(shape, power):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * torch.rand(
        shape[0], *[1] * (len(shape) - 1)
    )
    gradient.reshape(6, -1)[2] = 0
    before = gradient.reshape(6, -1).square().sum(1)
    found = tempered(gradient, 6, power)
    after = found.reshape(6, -1).square().sum(1)
    torch.testing.assert_close(after, torch.where(before > 0, before**power, 0.0))
    cosine = torch.nn.functional.cosine_similarity(found.reshape(6, -1), gradient.reshape(6, -1), dim=1)
    torch.testing.assert_close(cosine, (before > 0).float())
    assert found.shape == gradient.shape


def test_what_is_not_by_image_is_one_image():
    gradient = torch.randn(7, 3)
    torch.testing.assert_close(tempered(gradient, 2, 0.5).square().sum(), gradient.square().sum().sqrt())


def test_squares_are_the_power_mean_of_the_images():
    """A layer whose gradients are known: what is summed over its images, each alone, has the same squares."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=7).eval()
    whole = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    name, numbered = "blocks.1.mlp.fc1", [Batch(whole[i : i + 1], None, [str(i)], [i]) for i in range(5)]
    alone = [calibrate(model, [one], inputs=True, gradients=True)[name].squares for one in numbered]
    energies = torch.stack([each.sum() for each in alone])
    for power in (1.0, 0.5, 0.25):
        found = calibrate(model, numbered, inputs=True, gradients=True, gradient_power=power)[name].squares
        shape = sum(each * energy ** (power - 1) for each, energy in zip(alone, energies, strict=True))
        level = 5 * (energies**power).mean() ** (1 / power)
        torch.testing.assert_close(found, shape / shape.sum() * level, rtol=1e-4, atol=0)


def test_one_unsure_image_does_not_decide_the_squares():
    """Of images alike in direction but for their size, powers below 1 bring the largest one's share down."""
    large, small = torch.randn(1, 4, 3) * 100, torch.randn(9, 4, 3)
    gradient = torch.cat([large, small])

    def share(power):
        energy = tempered(gradient, 10, power).square().sum((1, 2))
        return (energy[0] / energy.sum()).item()

    assert share(1.0) > 0.99
    assert share(0.25) < 0.6
