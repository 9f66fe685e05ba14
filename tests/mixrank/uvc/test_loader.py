"""Training data from folders: a function of the epoch, shared by processes; and recipes, whole or refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mixrank import InputError
from mixrank.data import open_images
from mixrank.uvc.loader import LoaderData
from mixrank.uvc.options import UVCOptions
from mixrank.uvc.recipe import SHIPPED, Recipe, read_recipe

CONFIG = {
    "input_size": [3, 16, 16],
    "interpolation": "bicubic",
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "crop_pct": 0.9,
    "crop_mode": "center",
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Ten noisy images of each of two classes."""
    root, source = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("a", "b"):
        (root / name).mkdir()
        for number in range(10):
            pixels = source.integers(0, 256, (24, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def test_an_epoch_is_a_function_of_seed_and_number(tree):
    source = open_images(tree, CONFIG)
    torch.manual_seed(0)
    data, other = LoaderData(source, CONFIG, 4), LoaderData(source, CONFIG, 4, seed=1)
    first, later, another = list(data.epoch(0)), list(data.epoch(1)), list(other.epoch(0))
    assert len(first) == data.steps == 5
    assert first[0][0].shape == (4, 3, 16, 16)
    labels = [torch.cat([labels for _, labels in epoch]) for epoch in (first, later, another)]
    assert sorted(labels[0].tolist()) == [0] * 10 + [1] * 10
    assert not torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[0], labels[2])
    again = list(data.epoch(0))
    assert torch.equal(torch.cat([labels for _, labels in again]), labels[0])
    assert data.skipped == []


def test_workers_draw_the_same_views_whenever_they_are_asked(tree):
    data = LoaderData(open_images(tree, CONFIG), CONFIG, 4, workers=1, views={"color_jitter": 0.4, "re_prob": 0.5})
    first = [images for images, _ in data.epoch(3)]
    torch.manual_seed(7)
    again = [images for images, _ in data.epoch(3)]
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


def test_processes_share_the_images(tree):
    source = open_images(tree, CONFIG)
    views = {"no_aug": True}
    parts = [LoaderData(source, CONFIG, 3, views=views, rank=rank, processes=2) for rank in (0, 1)]
    assert [part.steps for part in parts] == [3, 3]
    seen = torch.cat([images for part in parts for images, _ in part.epoch(0)])
    assert len(seen) == 18
    assert len(seen.flatten(1).unique(dim=0)) == 18


def test_images_that_do_not_decode_are_skipped_and_told_or_refused(tree, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for image in (tree / name).iterdir():
            (tmp_path / name / image.name).write_bytes(image.read_bytes())
    (tmp_path / "a" / "3.png").write_bytes(b"nonsense")
    data = LoaderData(open_images(tmp_path, CONFIG), CONFIG, 5)
    assert sum(len(images) for images, _ in data.epoch(0)) == 19
    assert len(data.skipped) == 1
    assert "3.png" in data.skipped[0]
    strict = LoaderData(open_images(tmp_path, CONFIG), CONFIG, 5, strict=True)
    with pytest.raises(InputError, match=r"a.3\.png does not decode"):
        list(strict.epoch(0))
    for image in (tmp_path / "a").iterdir():
        image.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="none of 1 images decodes"):
        list(LoaderData(open_images(tmp_path, CONFIG), CONFIG, 1).epoch(0))


def test_what_cannot_be_trained_on_is_refused(tree, tmp_path):
    source = open_images(tree, CONFIG)
    with pytest.raises(
        InputError, match="batch_size must be from 1 to 10 with 20 images and 2 processes, but it was 11"
    ):
        LoaderData(source, CONFIG, 11, processes=2)
    with pytest.raises(InputError, match=r"timm has no training views with \{'colour': 1\}"):
        LoaderData(source, CONFIG, 2, views={"colour": 1})
    with pytest.raises(InputError, match="has no labels: training needs one folder for each class"):
        LoaderData(open_images(tree / "a", CONFIG), CONFIG, 2)


def test_a_recipe_names_what_it_changes(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("epochs = 3\nseed = 4\nbatch_size = 32\n[mixed_rank]\npower = 0.7\n[views]\nre_prob = 0.1\n")
    recipe = read_recipe(path, {"budget": 0.3, "seed": None})
    assert recipe.options == UVCOptions(epochs=3.0, seed=4, budget=0.3)
    assert (recipe.combined.power, recipe.batch_size, recipe.views) == (0.7, 32, {"re_prob": 0.1})
    assert read_recipe(None, {}) == Recipe()
    # A long search leaves both systems too little, which matters only where both are used.
    path.write_text("search = 0.4\n")
    assert read_recipe(path, {}).options.search == 0.4


def test_the_recipes_that_ship_can_be_read():
    names = [path.stem for path in SHIPPED.glob("*.toml")]
    assert "deit_small_imagenet" in names
    for name in names:
        read_recipe(name, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("budget =", "is not a readable TOML file"),
        ("budgets = 0.5", "there is no option budgets, only epochs, learning_rate"),
        ("budget = '0.5'", "budget must be a number, but it was '0.5'"),
        ("interval = 2.5", "interval must be a whole number, but it was 2.5"),
        ("interval = true", "interval must be a whole number, but it was True"),
        ("batch_size = 0", "batch_size must be a whole number of at least 1, but it was 0"),
        ("budget = 1.5", "budget must be above 0 and below 1, but it was 1.5"),
        ("views = 3", "views must be a table, but it was 3"),
        ("[mixed_rank]\npower = 2", r"power must be above 0 and below 1, but it was 2\.0"),
        ("[mixed_rank]\nbudget = 2", "there is no option budget, only power, last, learning_rate"),
    ],
)
def test_a_bad_recipe_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "my.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_recipe(path, {})
