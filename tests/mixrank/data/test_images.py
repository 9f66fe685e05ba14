"""Images of folders and of what else loaders yield, prepared for a model."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import tarfile
import warnings
from pathlib import Path

import pytest
import timm.data
import torch
from PIL import Image
from timm.data import IterableImageDataset

from mixrank.data import as_batch, open_images
from mixrank.errors import InputError
from mixrank.launch import usable_processors
from mixrank.prepare import check_preprocessing

from .pictures import CONFIG, GREY, levels, noise, picture


def test_a_folder_in_natural_order_and_again(folder):
    source = open_images(folder, CONFIG)
    assert source.names == [f"{number}.png" for number in range(1, 11)]
    assert (len(source), source.labelled, source.classes, source.skipped) == (10, False, None, [])
    batches = source.batches(4)
    assert len(batches) == 3
    for _ in range(2):
        found = list(batches)
        assert [len(batch.images) for batch in found] == [4, 4, 2]
        assert [name for batch in found for name in batch.names] == source.names
        assert [level for batch in found for level in levels(batch)] == [20 * number for number in range(1, 11)]
        assert all(batch.labels is None and batch.images.dtype == torch.float32 for batch in found)


def test_images_are_prepared_as_timm_prepares_them(tmp_path):
    noise(tmp_path / "a.png")
    expected = timm.data.create_transform(**CONFIG)(Image.open(tmp_path / "a.png").convert("RGB"))
    assert torch.equal(next(iter(open_images(tmp_path, CONFIG).batches(1))).images[0], expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "P"])
@pytest.mark.parametrize("config", [CONFIG, GREY], ids=["colour", "grey"])
def test_every_kind_of_picture_fits_the_model(tmp_path, mode, config):
    picture(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), mode=mode)
    (batch,) = open_images(tmp_path, config).batches(1)
    assert list(batch.images.shape) == [1, *config["input_size"]]


def test_subfolders_are_classes(tmp_path):
    for name in ("2/x.png", "10/x.jpg", "2/y.PNG", "1/z.webp"):
        picture(tmp_path / name)
    source = open_images(tmp_path, CONFIG)
    assert source.labelled
    assert source.classes == ["1", "2", "10"]
    (batch,) = source.batches(8)
    assert dict(zip(batch.names, batch.labels.tolist(), strict=True)) == {
        "1/z.webp": 0,
        "2/x.png": 1,
        "2/y.PNG": 1,
        "10/x.jpg": 2,
    }
    assert batch.labels.dtype == torch.int64
    assert source.batches(8).classes == source.classes


@pytest.mark.parametrize("names", [["all/x.png", "all/y.png"], ["a/x.png", "b/y.png", "z.png"]], ids=["one", "stray"])
def test_subfolders_that_cannot_be_classes(tmp_path, names):
    for name in names:
        picture(tmp_path / name)
    source = open_images(tmp_path, CONFIG)
    assert not source.labelled
    assert next(iter(source.batches(4))).labels is None


def test_a_limit_takes_the_same_random_images_each_time(folder):
    some = open_images(folder, CONFIG, limit=4, seed=1)
    assert len(some) == len(set(some.names)) == 4
    assert some.names == open_images(folder, CONFIG, limit=4, seed=1).names
    assert some.names != open_images(folder, CONFIG, limit=4, seed=2).names
    assert [name for batch in some.batches(3) for name in batch.names] == some.names
    assert len(open_images(folder, CONFIG, limit=99)) == 10


def test_loading_leaves_the_random_stream_alone(folder):
    before = torch.get_rng_state()
    list(open_images(folder, CONFIG).batches(4, workers=0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_change_nothing(folder, monkeypatch, method):
    (folder / "5.png").write_bytes(b"not an image")
    source = open_images(folder, CONFIG)
    alone = list(source.batches(4, workers=0))
    previous = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(method, force=True)
    try:
        shared = list(source.batches(4, workers=1))
    finally:
        multiprocessing.set_start_method(previous, force=True)
    assert [batch.names for batch in shared] == [batch.names for batch in alone]
    assert all(torch.equal(one.images, other.images) for one, other in zip(alone, shared, strict=True))
    assert len(source.skipped) == 1


def _spoil(folder: Path, how: str) -> Path:
    path = folder / "5.png"
    if how == "truncated":
        path.write_bytes(noise(path)[:-2000])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("I am a picture")
    elif how == "bomb":
        picture(path, size=(9500, 9500), mode="L")
    elif how == "narrow":
        picture(path, size=(1, 2_000_000), mode="L")
    elif how == "dangling":
        path.unlink()
        path.symlink_to("nowhere.png")
    return path


SPOILT = {
    "truncated": "truncated|broken PNG",
    "empty": "cannot identify image file",
    "text": "cannot identify image file",
    "bomb": "could be decompression bomb",
    "narrow": "1 x 2000000 pixels is too narrow",
    "dangling": "No such file",
}


@pytest.mark.parametrize(("how", "reason"), SPOILT.items(), ids=SPOILT)
def test_an_image_that_does_not_decode_is_skipped_and_counted(folder, how, reason):
    _spoil(folder, how)
    source = open_images(folder, CONFIG)
    for _ in range(2):
        found = list(source.batches(4))
        assert [len(batch.images) for batch in found] == [4, 3, 2]
        assert [name for batch in found for name in batch.names] == [n for n in source.names if n != "5.png"]
        (skipped,) = source.skipped
        assert re.match(f"5.png: .*({reason})", skipped)
    with pytest.raises(InputError, match=f"5.png does not decode: .*({reason})"):
        list(open_images(folder, CONFIG, strict=True).batches(4))


def test_images_of_which_none_decodes(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "b.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"no image of .* decodes \(a.png: cannot identify"):
        list(open_images(tmp_path, CONFIG).batches(1))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent", "do not exist: give a folder"),
        ("empty", "has no image"),
        ("notes.txt", "is a file, but it must be a folder"),
        ("broken.tar", "cannot be opened"),
        ("empty.tar", "has no image"),
    ],
)
def test_sources_without_images(tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "broken.tar").write_bytes(b"x" * 2000)
    tarfile.open(tmp_path / "empty.tar", "w").close()
    with pytest.raises(InputError, match=message):
        open_images(tmp_path / source, CONFIG)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be bound to processors here")
def test_no_more_workers_than_processors_that_may_be_used(folder, monkeypatch):
    monkeypatch.setattr("mixrank.data._FEW_IMAGES", 1)
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns of more
            list(open_images(folder, CONFIG).batches(4))
        assert usable_processors() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert usable_processors() == len(allowed)


def test_arguments_outside_their_range(folder):
    with pytest.raises(InputError, match="limit must be at least 1, but it was 0"):
        open_images(folder, CONFIG, limit=0)
    with pytest.raises(InputError, match="batch_size must be at least 1, but it was 0"):
        open_images(folder, CONFIG).batches(0)
    with pytest.raises(InputError, match="workers must be at least 0, but it was -1"):
        open_images(folder, CONFIG).batches(1, workers=-1)


class Stream:
    """What a reader of timm for an endless or remote data set looks like."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self):
        for number in range(self.count):
            yield Image.new("RGB", (0 if number == 1 else 9, 9)), number


def test_a_stream(monkeypatch):
    monkeypatch.setattr(timm.data, "create_dataset", lambda **_: IterableImageDataset(None, reader=Stream(9)))
    source = open_images("wds/shards", CONFIG, limit=5)
    assert (len(source), len(source.batches(2)), source.labelled) == (5, 3, True)
    for _ in range(2):
        found = list(source.batches(2))
        assert [batch.labels.tolist() for batch in found] == [[0], [2, 3], [4]]
        assert found[1].names == ["image 2", "image 3"]
        assert [text.split(":")[0] for text in source.skipped] == ["image 1"]
    assert sum(len(batch.images) for batch in open_images("wds/shards", CONFIG).batches(4)) == 8
    with pytest.raises(InputError, match="is a stream, of which there are no further views: set augment to 0"):
        open_images("wds/shards", CONFIG, augment=1)
    with pytest.raises(InputError, match="is a stream without file names"):
        open_images("wds/shards", CONFIG, labels="labels.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": [3, 8]}, r"input_size cannot be used: \[3, 8\]"),
        ({"input_size": [3, 0, 8]}, "input_size cannot be used"),
        ({"input_size": [3, 8, 10**9]}, "input_size cannot be used"),
        ({"input_size": "3, 8, 8"}, "input_size cannot be used"),
        ({"mean": [0.5]}, r"mean cannot be used: \[0.5\]"),
        ({"std": [0.5, 0.0, 0.5]}, "std cannot be used"),
        ({"std": None}, "std cannot be used: None"),
        ({"crop_pct": 1e-6}, "crop_pct cannot be used"),
        ({"crop_pct": "all"}, "crop_pct cannot be used: 'all'"),
        ({"interpolation": "magic"}, "interpolation cannot be used: 'magic'"),
        ({"interpolation": []}, "interpolation cannot be used"),
        ({"crop_mode": 3}, "crop_mode cannot be used"),
        ({"tf_preprocessing": True}, "tf_preprocessing cannot be used: True"),
    ],
)
def test_preprocessing_that_cannot_be_used(folder, change, message):
    with pytest.raises(InputError, match=message):
        check_preprocessing(CONFIG | change)
    with pytest.raises(InputError, match=message):
        open_images(folder, CONFIG | change)


def test_a_model_of_many_channels_has_no_pictures(folder):
    config = CONFIG | {"input_size": [4, 8, 8], "mean": [0.5] * 4, "std": [0.5] * 4}
    with pytest.raises(InputError, match="images have 1 or 3 channels, but the model wants 4"):
        open_images(folder, config)


IMAGES = torch.zeros(2, 3, 4, 4)
LABELS = torch.tensor([4, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("item", "labels"),
    [
        (IMAGES, None),
        ((IMAGES,), None),
        ([IMAGES, LABELS], [4, 5]),
        ((IMAGES, [4, 5]), [4, 5]),
        ((IMAGES, torch.rand(2, 10)), None),
        ((IMAGES, {"file": "x"}), None),
        ({"image": IMAGES, "label": LABELS}, [4, 5]),
        ({"pixel_values": IMAGES}, None),
    ],
)
def test_as_batch_reads_what_loaders_yield(item, labels):
    batch = as_batch(item, 10)
    assert batch.images is IMAGES
    assert batch.names == ["image 10", "image 11"]
    assert (None if batch.labels is None else batch.labels.tolist()) == labels
    assert batch.labels is None or batch.labels.dtype == torch.int64
    assert as_batch(batch) is batch


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (IMAGES[0], r"\[B, C, H, W\], but it held torch.float32 \[3, 4, 4\]"),
        (IMAGES.byte(), "held torch.uint8"),
        ("images", "held str"),
        ([], "held list"),
        ({"pictures": IMAGES}, "held NoneType"),
        ((IMAGES, torch.tensor([1])), "a batch of 2 images came with 1 labels"),
    ],
)
def test_as_batch_refuses(item, message):
    with pytest.raises(InputError, match=message):
        as_batch(item)


def test_views_follow_their_image_and_repeat(folder_of_noise):
    """Image by image, the plain view first; the same in each pass, in workers and beside other random numbers."""
    plain = torch.cat([batch.images for batch in open_images(folder_of_noise, CONFIG).batches(2)])
    source = open_images(folder_of_noise, CONFIG, augment=2, seed=4)
    batches = source.batches(3)
    assert (source.views, batches.views, len(source), len(batches)) == (3, 3, 12, 4)
    random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), torch.rand(1)
    random.seed(1)
    torch.manual_seed(1)
    first = list(batches)
    assert (random.random(), torch.rand(1)) == expected
    views = torch.cat([batch.images for batch in first])
    assert torch.equal(views[::3], plain)
    assert [name for batch in first for name in batch.names] == [name for name in source.names for _ in range(3)]
    assert len({view.sum().item() for view in views}) == 12
    again = torch.cat([batch.images for batch in source.batches(5, workers=1)])
    assert torch.equal(again, views)
    other = torch.cat([batch.images for batch in open_images(folder_of_noise, CONFIG, augment=2, seed=5).batches(3)])
    assert torch.equal(other[::3], plain)
    assert not torch.equal(other[1::3], views[1::3])
    part = open_images(folder_of_noise, CONFIG, augment=2, seed=4, limit=2)
    some = torch.cat([batch.images for batch in part.batches(6)])
    index = [source.names.index(name) for name in part.names]
    assert torch.equal(some.unflatten(0, (2, 3)), views.unflatten(0, (4, 3))[index])


@pytest.fixture
def folder_of_noise(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for number in range(4):
        pixels = torch.randint(0, 256, (40, 50, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


def test_views_that_cannot_be_are_refused(folder_of_noise):
    with pytest.raises(InputError, match="augment must be at least 0, but it was -1"):
        open_images(folder_of_noise, CONFIG, augment=-1)
