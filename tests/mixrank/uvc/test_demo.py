"""The recipe of unified compression, on few images: it goes on where it was, and writes a model that loads."""

from __future__ import annotations

import gzip
import json
import struct
import sys

import numpy as np
import pytest
import torch

import mixrank
from mixrank.counting import count_macs
from mixrank.demo import uvc
from mixrank.demo.run import batches, load_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The four files of the data set with the images that ship with the package."""
    folder, found = tmp_path_factory.mktemp("fashion"), load_images()
    images, labels = found["test_images"].numpy(), found["test_labels"].numpy()
    parts = {"train": slice(0, 1384), "t10k": slice(1384, 1500)}
    for name, part in parts.items():
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", images[part])
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", labels[part])
    return folder


def write_idx(path, array: np.ndarray) -> None:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def test_it_compresses_to_the_budget_and_writes_what_it_did(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "model.safetensors"
    arguments = ["--data", str(folder), "--out", str(out), "--json", str(tmp_path / "run.json")]
    monkeypatch.setattr(sys, "argv", ["uvc", *arguments, "--epochs", "2", "--budget", "0.6"])
    uvc.main()
    assert "top-1" in capsys.readouterr().out
    result = json.loads((tmp_path / "run.json").read_text())["result"]
    model = mixrank.load(out)
    assert count_macs(model) == result["macs_after"]
    assert 0.99 * 0.6 <= result["macs_after"] / result["macs_before"] <= 0.6
    assert result["before"] > 80
    assert result["steps"] == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "run.json"]
    images = load_images()["test_images"][:8]
    with torch.no_grad():
        assert model(batches(images)[0].images).shape == (8, 10)


def test_a_budget_out_of_reach_is_one_sentence_and_no_file(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "model.safetensors"
    monkeypatch.setattr(sys, "argv", ["uvc", "--data", str(folder), "--out", str(out), "--budget", "0.001"])
    with pytest.raises(SystemExit):
        uvc.main()
    assert "budget must be above" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
