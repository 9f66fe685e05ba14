"""What cannot be saved, and what is left behind then."""

from __future__ import annotations

import copy
import os
import resource

import pytest
import safetensors.torch
import torch
from torch import nn

import mixrank
from mixrank import checkpoint, models
from mixrank.errors import InputError
from mixrank.plan import Plan

from .files import VIT, assert_same


def test_save_refuses_what_could_not_be_loaded(small, path):
    model = copy.deepcopy(small)
    model.reset_classifier(3)
    model.mixrank_spec = models.ModelSpec(*VIT)
    with pytest.raises(InputError, match=r"the model does not fit vit_tiny_patch16_224 with its plan: .* head.weight"):
        mixrank.save(model, path)
    with pytest.raises(InputError, match=r"the plan of the model does not fit|missing"):
        mixrank.save(models.create_model(*VIT[:1], args=VIT[1]), path, plan=small.mixrank_plan)
    with pytest.raises(InputError, match="metadata and plan must be in terms of JSON"):
        mixrank.save(small, path, metadata={"seen": {1}})
    with pytest.raises(InputError, match="metadata and plan must be in terms of JSON"):
        mixrank.save(small, path, metadata={"loss": float("nan")})
    with pytest.raises(InputError, match="does not say which timm architecture"):
        mixrank.save(nn.Linear(2, 2), path)
    model = models.create_model(VIT[0], args=VIT[1])
    model.norm.weight = nn.Parameter(torch.zeros(192, dtype=torch.complex64))
    with pytest.raises(InputError, match=r"norm.weight is torch.complex64, which a checkpoint cannot hold"):
        mixrank.save(model, path)
    assert not path.exists()


def test_an_explicit_plan_is_the_one_that_is_saved(small, path):
    model = copy.deepcopy(small)
    plan = Plan.from_json(model.mixrank_plan.to_json() | {"options": {"note": "mine"}})
    mixrank.save(model, path, plan=plan)
    assert checkpoint.read_header(path).plan.options == {"note": "mine"}


def _no_replace(monkeypatch):
    def fail(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "replace", fail)


def _no_sync(monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)


def _full(monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    write = safetensors.torch.save_file

    def fail(*args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            write(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(safetensors.torch, "save_file", fail)


@pytest.mark.parametrize("before", [None, b"older"], ids=["new", "over"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [(_no_replace, "Operation not permitted"), (_no_sync, "Input/output error"), (_full, "File too large")],
)
def test_a_failed_save_leaves_nothing_behind_and_the_old_file_in_place(
    small, path, monkeypatch, fault, message, before
):
    if before is not None:
        path.write_bytes(before)
    fault(monkeypatch)
    with pytest.raises(InputError, match=f"model.safetensors cannot be written: .*{message}"):
        mixrank.save(small, path)
    assert [file.name for file in path.parent.iterdir()] == ([] if before is None else [path.name])
    assert before is None or path.read_bytes() == before


def test_an_interrupted_save_leaves_nothing_behind(small, path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    path.write_bytes(b"older")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        mixrank.save(small, path)
    assert [file.read_bytes() for file in path.parent.iterdir()] == [b"older"]


@pytest.mark.parametrize(
    ("target", "message"),
    [(".", "is a folder: name a file"), ("absent/model.safetensors", "the folder .*absent does not exist")],
)
def test_places_that_cannot_be_written(small, tmp_path, target, message):
    with pytest.raises(InputError, match=message):
        mixrank.save(small, tmp_path / target)
    assert list(tmp_path.iterdir()) == []


def test_save_writes_over_a_checkpoint(small, path):
    path.write_bytes(b"older")
    mixrank.save(small, path)
    assert_same(small, mixrank.load(path))
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
