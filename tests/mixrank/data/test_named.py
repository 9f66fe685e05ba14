"""Data sets that timm finds by name, and archives."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from mixrank.data import open_images
from mixrank.errors import InputError

from .pictures import CONFIG, noise, picture


def make_tar(path: Path, images: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in images.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tar_of_class_folders(tmp_path, workers):
    image = noise(tmp_path / "a.png")
    images = {f"{label}/{number}.png": image for label in ("cat", "dog") for number in range(3)}
    source = open_images(make_tar(tmp_path / "set.tar", images | {"dog/3.png": b"broken"}), CONFIG)
    assert source.classes == ["cat", "dog"]
    found = list(source.batches(4, workers))
    assert [label for batch in found for label in batch.labels.tolist()] == [0, 0, 0, 1, 1, 1]
    assert [len(batch.names) for batch in found] == [4, 2]
    assert len(source.skipped) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "set.tar"]


def test_a_named_data_set_with_an_index(tmp_path):
    for name in ("cat/a.png", "cat/b.png", "dog/c.png"):
        picture(tmp_path / name)
    source = open_images("torch/image_folder", CONFIG, root=tmp_path)
    assert (len(source), source.labelled, source.names) == (3, True, ["image 0", "image 1", "image 2"])
    (batch,) = source.batches(4)
    assert batch.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("name", "root", "message"),
    [
        ("torch/cifar10", None, "torch/cifar10 needs a root"),
        ("torch/nonsense", ".", "torch/nonsense cannot be opened: Unknown torchvision dataset nonsense"),
        ("torch/cifar10", "absent", "torch/cifar10 cannot be opened: Dataset not found"),
        ("hfds/", None, "do not exist"),
    ],
)
def test_named_data_sets_that_cannot_be_opened(name, root, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        open_images(name, CONFIG, root=root)
    assert capsys.readouterr().out == ""
