"""Which form is chosen, and what is refused."""

import sys

import pytest
import timm
import torch

import mixrank
from mixrank.calibrate import DEFAULT_HELD_OUT
from mixrank.compress import _usual_form
from mixrank.compress_sparse import compress_sparse_
from mixrank.errors import InputError
from mixrank.fidelity import compare
from mixrank.forms import TRIED, best_of, measure_forms
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
    assert DEFAULT_HELD_OUT == 0.2
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


def test_what_is_no_classifier_is_refused_before_the_long_work(images):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0).eval()
    with pytest.raises(InputError, match="form='auto' needs logits of classes"):
        measure_forms(model, images, lambda *_: pytest.fail("nothing is to be compressed"))


def test_a_single_image_cannot_be_held_out():
    with pytest.raises(InputError, match="tries two forms, but it takes 5 images at least, but there were 1"):
        mixrank.compress(classifier(depth=1), [torch.randn(1, 3, 32, 32)], KEEP, form="auto")


def forms_of(result):
    return {layer.form for layer in result.plan.layers if layer.rank is not None}


@pytest.mark.parametrize("nearer", TRIED)
def test_without_options_the_nearer_form_is_taken(images, monkeypatch, nearer):
    asked = []

    def found(model, batches, make, **_):
        for form in TRIED:
            trial = twin(model)
            asked.append(make(trial, batches, form))
        return {form: 0.1 if form == nearer else 0.2 for form in TRIED}

    monkeypatch.setattr(sys.modules["mixrank.compress"], "measure_forms", found)
    result = mixrank.compress(classifier(), images, KEEP)
    assert forms_of(result) == {nearer}
    assert result.notes[-1].startswith(f"layers are {nearer}: divergence")
    assert result.seconds["form"] > 0
    assert [forms_of(trial) for trial in asked] == [{form} for form in TRIED]
    assert "shrink" not in asked[0].seconds, "a trial measures no pull"
    assert "sensitivity" not in asked[1].seconds, "nor does it weigh layers"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"step": 4}, None),
        ({"split_qkv": True}, None),
        ({"held_out": 0.0}, None),
        ({"images": iter}, "layers are pivoted, as no other form can be tried: the images go by once"),
        ({"images": lambda batches: [batches[0][:4]]}, "it takes 5 images at least, but there were 4"),
    ],
)
def test_layers_are_pivoted_where_forms_are_not_measured(images, options, said):
    options = dict(options)
    result = mixrank.compress(classifier(), options.pop("images", list)(images), KEEP, **options)
    assert forms_of(result) == {"pivoted"}
    assert "form" not in result.seconds
    assert any(said in note for note in result.notes) if said else not any("layers are" in n for n in result.notes)


def test_what_is_no_classifier_is_pivoted(images):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0).eval()
    assert forms_of(mixrank.compress(model, images, KEEP)) == {"pivoted"}


def test_no_form_is_measured_elsewhere_than_on_a_cpu(images):
    model = classifier(depth=1).to("meta")
    assert _usual_form(model, images, held_out=None)[0] == "pivoted"
    assert _usual_form(classifier(depth=1), images, held_out=None)[0] == "auto"


def test_no_form_is_measured_by_several_views_of_each_image(images):
    class Viewed(list):
        views = 2

    assert _usual_form(classifier(depth=1), Viewed(images), held_out=None)[0] == "pivoted"


def test_no_form_is_measured_by_several_processes(images, monkeypatch):
    monkeypatch.setattr(sys.modules["mixrank.compress"], "are_several", lambda: True)
    assert _usual_form(classifier(depth=1), images, held_out=None)[0] == "pivoted"


def test_low_ranks_take_gradients_as_they_are_and_sparse_weights_do_not(images):
    plain, even = ([mixrank.compress(classifier(), images, KEEP, form=form, gradient_power=power).plan
                    for power in (None, 1.0, 0.25)] for form in ("pivoted", "sparse"))  # fmt: skip
    assert [plan.layers == plain[0].layers for plan in plain] == [True, True, False]
    assert [plan.layers == even[0].layers for plan in even] == [True, False, True]
