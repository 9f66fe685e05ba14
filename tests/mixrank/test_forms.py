"""Which form is chosen, and what is refused; gradients that are scaled by image."""

import pytest
import timm
import torch

import mixrank
from mixrank.calibrate import calibrate
from mixrank.errors import InputError
from mixrank.fidelity import compare
from mixrank.forms import HELD_OUT, TRIED, best_of, measure_forms
from mixrank.gradients import tempered
from mixrank.models import twin

KEEP = 0.5


def classifier(depth=2):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=depth, num_classes=7).eval()
    torch.nn.init.normal_(model.head.weight, std=0.2)
    return model


@pytest.fixture(scope="module")
def images():
    return list(torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(1)).split(6))


def test_the_measured_form_is_that_of_the_nearer_model(images):
    model = classifier()
    apart = torch.arange(20) % 5 == 4
    held = torch.cat(images)[apart]
    rest = [batch[~chosen] for batch, chosen in zip(images, apart.split(6), strict=True)]
    expected = {}
    for form in TRIED:
        trial = twin(model)
        mixrank.compress(trial, rest, KEEP, form=form)
        with torch.no_grad():
            expected[form] = compare(trial(held), model(held)).divergence
    assert HELD_OUT == 0.2
    found = measure_forms(model, images, lambda trial, fitted, form: mixrank.compress(trial, fitted, KEEP, form=form))
    assert found == pytest.approx(expected, rel=1e-3)

    chosen, again = twin(model), twin(model)
    result = mixrank.compress(chosen, images, KEEP, form="auto")
    best = min(expected, key=expected.get)
    assert {layer.form for layer in result.plan.layers if layer.rank is not None} == {best}
    assert result.notes[-1].startswith(f"layers are {best}: divergence on images held out")
    mixrank.compress(again, images, KEEP, form=best)
    with torch.no_grad():
        torch.testing.assert_close(chosen(held), again(held))


def test_the_least_divergence_wins_and_nan_never_does():
    assert best_of({"pivoted": 0.2, "sparse": 0.1})[0] == "sparse"
    assert best_of({"pivoted": 0.2, "sparse": float("nan")})[0] == "pivoted"
    assert best_of({"pivoted": 0.25, "sparse": 0.5})[1].endswith("in nats: pivoted 0.25, sparse 0.5")


def test_sparse_is_what_compress_sparse_makes(images):
    from mixrank.compress_sparse import compress_sparse_

    one, other = classifier(), classifier()
    result = mixrank.compress(one, images, KEEP, form="sparse", seed=3)
    assert result.plan == compress_sparse_(other, images, KEEP, seed=3).plan
    with torch.no_grad():
        assert torch.equal(one(images[0]), other(images[0]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "sparse", "factors": "aware"}, "factors is of low ranks .* form='sparse', but it was 'aware'"),
        ({"form": "sparse", "min_rank": 8}, "min_rank is of low ranks"),
        ({"form": "sparse", "gradient_power": 0.0}, "gradient_power must be above 0 and at most 1, but it was 0.0"),
        ({"form": "auto", "keep": 1.5}, "keep must be in"),
        ({"form": "dense"}, "form must be one of factors, pivoted, sparse, auto, but it was 'dense'"),
        ({"gradient_power": 1.5}, "gradient_power must be above 0 and at most 1, but it was 1.5"),
    ],
)
def test_bad_options_leave_the_model_as_it_was(images, options, said):
    model = classifier(depth=1)
    with pytest.raises(InputError, match=said):
        mixrank.compress(model, images, **{"keep": KEEP} | options)
    assert type(model.blocks[0].mlp.fc1) is torch.nn.Linear


@pytest.mark.parametrize("form", ["sparse", "auto"])
def test_images_are_needed(form):
    with pytest.raises(InputError, match=f"form='{form}' needs calibration images"):
        mixrank.compress(classifier(depth=1), None, KEEP, form=form)


def test_what_can_be_gone_through_once_is_refused_where_it_is_measured(images):
    with pytest.raises(InputError, match="they were an iterator"):
        mixrank.compress(classifier(depth=1), iter(images), KEEP, form="auto")


def test_a_single_image_cannot_be_held_out():
    with pytest.raises(InputError, match="needs more images, but there were 1"):
        mixrank.compress(classifier(depth=1), [torch.randn(1, 3, 32, 32)], KEEP, form="auto")


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
    model = classifier()
    whole = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    name, numbered = "blocks.1.mlp.fc1", [mixrank.data.Batch(whole[i : i + 1], None, [str(i)], [i]) for i in range(5)]
    alone = [calibrate(model, [one], inputs=True, gradients=True)[name].squares for one in numbered]
    energies = torch.stack([each.sum() for each in alone])
    for power in (1.0, 0.5, 0.25):
        found = calibrate(model, numbered, inputs=True, gradients=True, gradient_power=power)[name].squares
        shape = sum(each * energy ** (power - 1) for each, energy in zip(alone, energies, strict=True))
        level = 5 * (energies**power).mean() ** (1 / power)
        torch.testing.assert_close(found, shape / shape.sum() * level, rtol=1e-4, atol=0)


def test_low_ranks_take_gradients_as_they_are_and_sparse_weights_do_not(images):
    plain, even = ([mixrank.compress(classifier(), images, KEEP, form=form, gradient_power=power).plan
                    for power in (None, 1.0, 0.25)] for form in ("pivoted", "sparse"))  # fmt: skip
    assert [plan.layers == plain[0].layers for plan in plain] == [True, True, False]
    assert [plan.layers == even[0].layers for plan in even] == [True, False, True]


def test_one_unsure_image_does_not_decide_the_squares():
    """Of images alike in direction but for their size, powers below 1 bring the largest one's share down."""
    large, small = torch.randn(1, 4, 3) * 100, torch.randn(9, 4, 3)
    gradient = torch.cat([large, small])

    def share(power):
        energy = tempered(gradient, 10, power).square().sum((1, 2))
        return (energy[0] / energy.sum()).item()

    assert share(1.0) > 0.99
    assert share(0.25) < 0.6
