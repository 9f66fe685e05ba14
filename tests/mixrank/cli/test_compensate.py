"""``mixrank compensate``: what it writes, what it refuses, and that an interrupted run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixrank import checkpoint
from mixrank.views import Views


def arguments(world, out: Path, *more: str) -> list[str]:
    fixed = ["compensate", str(world.checkpoint), "--weights", str(world.weights), "--images", str(world.flat)]
    fixed += ["--out", str(out), "--quiet", "--batch-size", "4", "--held-out", "0.3", "--learning-rate", "1e-3"]
    return [*fixed, *more]


def test_it_writes_a_checkpoint_that_follows_the_dense_model_at_least_as_well(world, tmp_path: Path) -> None:
    out, data_file = tmp_path / "trained.safetensors", tmp_path / "result.json"
    result = world.invoke(*arguments(world, out, "--steps", "4", "--json", str(data_file)))
    assert result.exit_code == 0, result.output
    assert "divergence" in result.stdout
    data = json.loads(data_file.read_text())
    assert data["compensation"]["after"]["divergence"] <= data["compensation"]["before"]["divergence"]
    assert data["compensation"]["steps"] == 4
    before, after = checkpoint.read_header(world.checkpoint), checkpoint.read_header(out)
    assert after.plan == before.plan
    assert after.metadata["compensation"]["options"]["batch_size"] == 4
    assert {name: info.shape for name, info in after.tensors.items()} == {
        name: info.shape for name, info in before.tensors.items()
    }
    assert {path.name for path in tmp_path.iterdir()} == {"trained.safetensors", "result.json"}
    page = tmp_path / "page.html"
    assert world.invoke("report", str(data_file), "--out", str(page)).exit_code == 0
    assert page.read_text().count("<svg") == 3  # the training, the ranks, the parameters


def test_an_interrupted_run_goes_on_with_resume_and_writes_the_same_bytes(world, tmp_path: Path, monkeypatch) -> None:
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    assert world.invoke(*arguments(world, whole, "--steps", "10")).exit_code == 0
    batch, calls = Views.batch, []

    def interrupted(self, step: int) -> torch.Tensor:
        calls.append(step)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Views, "batch", interrupted)
        assert world.invoke(*arguments(world, broken, "--steps", "10")).exit_code == 130
    assert not broken.exists()
    state = tmp_path / "broken.safetensors.state"
    assert state.exists()
    assert "--resume" in world.refused(*arguments(world, broken, "--steps", "10"))
    assert "another run" in world.refused(*arguments(world, broken, "--steps", "11", "--resume"))
    assert world.invoke(*arguments(world, broken, "--steps", "10", "--resume")).exit_code == 0
    assert broken.read_bytes() == whole.read_bytes()
    assert not state.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "exactly one of --steps and --minutes must be given"),
        (["--steps", "1", "--minutes", "1"], "exactly one of --steps and --minutes must be given"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--steps", "1", "--min-scale", "2"], "min_scale must be in (0, 1]"),
        (["--steps", "1", "--limit", "1"], "at least 2 images are needed, but there were 1"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(world, tmp_path: Path, more: list[str], message: str) -> None:
    assert message in world.refused(*arguments(world, tmp_path / "out.safetensors", *more))
    assert not list(tmp_path.iterdir())


def test_other_dense_weights_than_the_checkpoints_own_are_refused(world, tmp_path: Path) -> None:
    weights, trained = tmp_path / "other.safetensors", tmp_path / "trained.safetensors"
    state = load_file(world.weights)
    state["head.bias"] = state["head.bias"] + 1e-3
    save_file(state, weights)
    assert world.invoke(*arguments(world, trained, "--steps", "1")).exit_code == 0
    for file in (world.checkpoint, trained):  # what was trained still follows the same model
        own = ["compensate", str(file), "--weights", str(weights), "--images", str(world.flat), "--steps", "1"]
        told = world.refused(*own, "--out", str(tmp_path / "out.safetensors"))
        assert f"{file} was not compressed from {weights}, which it would be trained to follow" in told
    assert not (tmp_path / "out.safetensors").exists()


def test_a_checkpoint_that_names_no_origin_is_trained_all_the_same(world, tmp_path: Path) -> None:
    nameless = tmp_path / "nameless.safetensors"
    checkpoint.save(checkpoint.load(world.checkpoint), nameless)
    given = [str(nameless) if word == str(world.checkpoint) else word for word in arguments(world, tmp_path / "out")]
    assert world.invoke(*given, "--steps", "1").exit_code == 0


def test_a_missing_checkpoint_and_an_output_over_the_input_are_refused(world, tmp_path: Path) -> None:
    missing = ["compensate", str(tmp_path / "none"), "--images", str(world.flat), "--out", str(tmp_path / "o")]
    assert "does not exist" in world.refused(*missing, "--steps", "1")
    assert "would overwrite an input" in world.refused(*arguments(world, world.checkpoint, "--steps", "1"))
