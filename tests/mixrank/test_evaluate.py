from __future__ import annotations

import importlib
import json

import pytest
import torch
from torch import nn

from mixrank.counting import count_macs
from mixrank.data import Batch
from mixrank.errors import InputError
from mixrank.evaluate import ModelSummary, SpeedResult, compare_speed, evaluate, summarise
from mixrank.models import create_model

# The package's attribute of this name is the function.
module = importlib.import_module("mixrank.evaluate")


class Pixels(nn.Module):
    """The logits are the first pixels of the image, so that a test says what the model answers."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes, self.scale = classes, nn.Parameter(torch.ones(()))
        self.seen: list[tuple[torch.dtype, bool, bool]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((x.dtype, self.training, torch.is_inference_mode_enabled()))
        return self.scale * x.flatten(1)[:, : self.classes]


def answers(*ranked: list[int], classes: int = 8) -> torch.Tensor:
    """Images whose logits rank the given classes first, best first."""
    images = torch.zeros(len(ranked), 1, 3, 3)
    for row, best in enumerate(ranked):
        for place, label in enumerate(best):
            images[row].view(-1)[label] = 9.0 - place
    return images


def batch(images: torch.Tensor, labels: list[int] | None) -> Batch:
    names = [f"{number}.png" for number in range(len(images))]
    return Batch(images, None if labels is None else torch.tensor(labels), names)


def test_accuracy_counts_over_uneven_batches():
    first = batch(answers([1, 2, 3, 4, 5, 0], [2, 1], [3]), [1, 1, 3])  # right, second, right
    second = batch(answers([1, 2, 3, 4, 5, 0]), [0])  # sixth
    model = Pixels(8).train().half()
    result = evaluate(model, [first, second])
    assert (result.images, result.top1, result.top5, result.skipped) == (4, 50.0, 75.0, 0)
    assert result.seconds > 0
    assert result.images_per_second == pytest.approx(4 / result.seconds)
    assert model.training
    assert model.seen == [(torch.float16, False, True)] * 2


@pytest.mark.parametrize(("classes", "top5"), [(5, None), (6, 100.0)])
def test_top5_means_nothing_with_five_classes(classes, top5):
    result = evaluate(Pixels(classes), [batch(answers([4, 3, 2, 1, 0]), [0])])
    assert (result.top1, result.top5) == (0.0, top5)


def test_images_without_labels_have_no_accuracy():
    result = evaluate(Pixels(8), [answers([1]), (answers([1], [2]),)])
    assert (result.images, result.top1, result.top5) == (3, None, None)


class Folders(list):
    """Batches as they come from an image source."""

    classes = ("cat", "dog")
    skipped = ("broken.png: not an image", "empty.png: not an image")


def test_skipped_images_are_reported():
    assert evaluate(Pixels(2), Folders([batch(answers([1]), [1])])).skipped == 2


def broken(value: float) -> torch.Tensor:
    images = answers([1], [2])
    images[1] = value
    return images


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (Pixels(8), [], "there is no image to evaluate"),
        (Pixels(8), [batch(answers([1], [1]), [1, 8])], "1.png has the label 8, but the model has 8 classes"),
        (Pixels(8), [batch(answers([1]), [-1])], "0.png has the label -1"),
        (Pixels(8), [batch(answers([1]), [1]), batch(answers([1]), None)], "only 1 of 2 images have a label"),
        (Pixels(8), [batch(broken(float("nan")), [1, 2])], "the model's output for 1.png is not finite"),
        (Pixels(8), [broken(float("inf"))], "the model's output for image 1 is not finite"),
        (Pixels(8), Folders([batch(answers([1]), [1])]), "lie in 2 class folders, but the model has 8 classes"),
        (nn.Identity(), [answers([1])], r"must return logits \[1, classes\], but it returned \[1, 1, 3, 3\]"),
        (Pixels(8), [torch.zeros(3, 3)], r"images \[B, C, H, W\]"),
    ],
)
def test_evaluate_refuses(model, batches, message):
    with pytest.raises(InputError, match=message):
        evaluate(model, batches)


def test_nothing_is_printed_but_progress_on_standard_error(capsys):
    evaluate(Pixels(8), [answers([1])])
    assert capsys.readouterr() == ("", "")
    evaluate(Pixels(8), [answers([1])], progress=True)
    assert capsys.readouterr().out == ""


def test_speeds_are_taken_in_turns(monkeypatch):
    order, clock = [], iter(range(10**6))

    class Named(Pixels):
        def __init__(self, name: str) -> None:
            super().__init__(8)
            self.name = name

        def forward(self, x):
            order.append(self.name)
            return super().forward(x)

    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
    models = {"b": Named("b"), "a": Named("a").train()}
    result = compare_speed(models, answers([1], [2]), rounds=3, warm_up=1, min_seconds=2)
    assert order == list("ba" + "bbaa" + "aabb" + "bbaa")
    assert list(result) == ["b", "a"]
    # Two calls of two images in two ticks of the clock.
    assert result["a"] == SpeedResult(2.0, 2.0, 2.0, rounds=3, batch=2, threads=torch.get_num_threads())
    assert models["a"].training


def test_the_median_and_the_spread_of_the_rounds(monkeypatch):
    rates = iter([3.0, 1.0, 10.0])
    monkeypatch.setattr(module, "_images_per_second", lambda *_: next(rates))
    result = compare_speed({"a": Pixels(8)}, answers([1]), rounds=3)["a"]
    assert (result.images_per_second, result.low, result.high) == (3.0, 1.0, 10.0)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(0, 1, 3, 3), {}, r"with at least one image, but were \[0, 1, 3, 3\]"),
        (torch.zeros(3, 3), {}, r"images must be \[B, C, H, W\]"),
        (answers([1]), {"rounds": 0}, "rounds must be at least 1, but it was 0"),
        (answers([1]), {"warm_up": -1}, "warm_up must be at least 0, but it was -1"),
        (answers([1]), {"min_seconds": float("nan")}, "min_seconds must be at least 0, but it was nan"),
        (broken(float("nan")), {"warm_up": 0}, "the output of model 'a' is not a finite tensor"),
    ],
)
def test_compare_speed_refuses(images, options, message):
    with pytest.raises(InputError, match=message):
        compare_speed({"a": Pixels(8)}, images, **options)


def test_summaries_put_size_and_measurements_together():
    model = create_model("vit_tiny_patch16_224", args={"img_size": 32, "depth": 1, "num_classes": 7})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = {"parameters": parameters, "bytes": 4 * parameters, "macs": count_macs(model)}
    assert summarise(model) == ModelSummary(top1=None, top5=None, images_per_second=None, **size)
    labelled = [Batch(torch.randn(2, 3, 32, 32), torch.tensor([0, 6]), ["a", "b"])]
    evaluation, speed = evaluate(model, labelled), SpeedResult(5.0, 4.0, 6.0, 3, 2, 1)
    summary = summarise(model, evaluation, speed).to_json()
    assert json.loads(json.dumps(summary)) == size | {
        "top1": evaluation.top1,
        "top5": evaluation.top5,
        "images_per_second": 5.0,
    }
