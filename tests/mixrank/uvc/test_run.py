"""Whole runs of unified compression on a few small images: the budget, the result, and what goes wrong."""

from __future__ import annotations

import copy
import dataclasses
import random

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mixrank
from mixrank import InputError
from mixrank.counting import count_macs
from mixrank.uvc.data import TensorData, seeded
from mixrank.uvc.objective import check_labels, objective
from mixrank.uvc.options import UVCOptions
from mixrank.uvc.run import compress_uvc_

OPTIONS = UVCOptions(epochs=5, learning_rate=1e-3, ema=0.9)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.7])
def test_it_lands_just_below_the_budget_and_learns(model, data, validation, budget, tmp_path):
    before, seen = count_macs(model), []
    options = dataclasses.replace(OPTIONS, budget=budget, multiple=4)  # eight neurons are 1.8 % of the lowest budget
    result = compress_uvc_(model, data, options=options, validation=validation, log=seen.append)
    assert result.macs_before == before
    assert result.macs_after == count_macs(model)
    assert 0.99 * budget <= result.macs_after / before <= budget
    assert sum(dataclasses.asdict(result.removed).values()) == before - result.macs_after
    assert result.before < 70
    assert result.after > 95
    assert not model.training
    assert seen == result.history
    steps = [entry["step"] for entry in result.history]
    assert steps == sorted(steps)
    targets = [entry["target"] for entry in result.history if "target" in entry]
    assert targets == sorted(targets, reverse=True)
    assert targets[-1] == budget
    mixrank.save(model, tmp_path / "model.safetensors")
    loaded, x = mixrank.load(tmp_path / "model.safetensors"), validation[0][0]
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_equal_runs_are_equal_and_another_seed_is_another_run(model, data):
    options = dataclasses.replace(OPTIONS, epochs=2, mixup=0.2, cutmix=0.5)
    models = [copy.deepcopy(model) for _ in range(3)]
    compress_uvc_(models[0], data, options=options)
    torch.manual_seed(99), random.seed(99)
    compress_uvc_(models[1], data, options=options)
    compress_uvc_(models[2], data, options=dataclasses.replace(options, seed=1))
    first, second, third = (each.state_dict() for each in models)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], third["head.weight"])


class Interrupted(TensorData):
    """Stops at the beginning of one epoch."""

    def epoch(self, number: int):
        if number == self.last:
            raise KeyboardInterrupt
        return super().epoch(number)


@pytest.mark.parametrize("last", [1, 2, 3, 4])
def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(model, data, images, validation, last, tmp_path):
    whole, parts, state = copy.deepcopy(model), copy.deepcopy(model), tmp_path / "run.state"
    options = dataclasses.replace(OPTIONS, mixup=0.2, warm_up=0.1, search=0.4)  # two epochs of it
    expected = compress_uvc_(whole, data, options=options, validation=validation)
    broken = Interrupted(images[0][:144], images[1][:144], batch_size=16)
    broken.last = last
    with pytest.raises(KeyboardInterrupt):
        compress_uvc_(parts, broken, options=options, validation=validation, state=state)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in parts.state_dict().items())
    result = compress_uvc_(parts, data, options=options, validation=validation, state=state)
    assert all(torch.equal(value, parts.state_dict()[name]) for name, value in whole.state_dict().items())
    assert dataclasses.replace(result, seconds=0.0) == dataclasses.replace(expected, seconds=0.0)


class Short(TensorData):
    """One batch fewer in each epoch than it says."""

    def epoch(self, number: int):
        yield from list(super().epoch(number))[:-1]


def test_data_that_ends_too_soon_is_an_error(model, images):
    data = Short(images[0][:144], images[1][:144], batch_size=16)
    with pytest.raises(InputError, match="data must give 9 batches in each epoch, but it ended at step 40"):
        compress_uvc_(model, data, options=OPTIONS)


def test_a_state_of_another_run_is_refused(model, data, tmp_path):
    state = tmp_path / "run.state"
    options = dataclasses.replace(OPTIONS, epochs=2)
    compress_uvc_(copy.deepcopy(model), data, options=options, state=state)
    with pytest.raises(InputError, match=r"is the state of another run: its budget was 0\.5, now it is 0\.4"):
        compress_uvc_(copy.deepcopy(model), data, options=dataclasses.replace(options, budget=0.4), state=state)
    torn = load_file(state)
    del torn["search.gates"]
    with safe_open(state, "pt") as file:
        save_file({**torn}, tmp_path / "torn.state", metadata=file.metadata())
    with pytest.raises(InputError, match=r"torn\.state is not the whole state of such a run: 'gates'"):
        compress_uvc_(copy.deepcopy(model), data, options=options, state=tmp_path / "torn.state")
    state.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="is not the state of such a run"):
        compress_uvc_(copy.deepcopy(model), data, options=options, state=state)


def test_gates_that_are_pulled_hard_drop_blocks_and_the_rest_fills_the_budget(model, data):
    options = dataclasses.replace(OPTIONS, budget=0.6, gate_weight=100.0)
    result = compress_uvc_(model, data, options=options)
    assert result.removed.blocks > 0
    assert len(result.blocks) == len(model.blocks) < 4
    assert 0.99 * 0.6 <= result.macs_after / result.macs_before <= 0.6


def test_without_distillation_validation_and_average(model, data):
    options = dataclasses.replace(OPTIONS, epochs=1.5, distillation=0.0, ema=0.0)
    result = compress_uvc_(model, data, options=options, dtype=torch.bfloat16)
    assert result.before is result.landed is result.after is None
    assert result.steps == 14
    assert result.macs_after <= 0.5 * result.macs_before


def test_a_run_that_fails_leaves_the_model_as_it_was(model, data, images):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"the loss was not finite at step \d+ of 45: take a lower learning_rate"):
        compress_uvc_(model, data, options=dataclasses.replace(OPTIONS, learning_rate=1e12))
    wrong = TensorData(images[0], images[1] + 1, batch_size=16)
    with pytest.raises(InputError, match="labels must lie in 0 to 2, as the model has classes, but step 0 had 3"):
        compress_uvc_(model, wrong, options=OPTIONS)
    with pytest.raises(InputError, match=r"budget must be above 0\.2211 \(one block of one head\)"):
        compress_uvc_(model, data, options=dataclasses.replace(OPTIONS, budget=0.001))
    with pytest.raises(InputError, match="ResNet has no blocks"):
        compress_uvc_(timm.create_model("resnet18", num_classes=3), data, options=OPTIONS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 1.0}, "budget must be above 0 and below 1, but it was 1.0"),
        ({"epochs": 0}, "epochs must be above 0, but it was 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, but it was nan"),
        ({"warm_up": 1.0}, "warm_up must be at least 0 and below 1, but it was 1.0"),
        ({"mixup": -1.0}, "mixup must be at least 0, but it was -1.0"),
        ({"interval": 0}, "interval must be at least 1, but it was 0"),
        ({"observed": -1}, "observed must be at least 0, but it was -1"),
        ({"multiple": 0}, "multiple must be at least 1, but it was 0"),
        ({"reached": 0.0}, "reached must be above 0 and at most 1, but it was 0.0"),
        ({"warm_up": 0.5, "search": 0.6}, "search must be above 0 and at most 0.5, but it was 0.6"),
    ],
)
def test_options_outside_their_range_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(OPTIONS, **change).check()


def test_data_is_a_function_of_the_epoch_and_processes_share_it(images):
    def prepare(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return batch + torch.rand(len(batch), 1, 1, 1, generator=generator)

    data = TensorData(images[0], images[1], 16, prepare, seed=3)
    first, again, other = (list(data.epoch(number)) for number in (4, 4, 5))
    assert len(first) == data.steps == 11
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    parts = [TensorData(images[0], torch.arange(180), 8, rank=rank, processes=2) for rank in (0, 1)]
    seen = torch.cat([labels for part in parts for _, labels in part.epoch(0)])
    assert len(seen) == len(seen.unique()) == 176
    with pytest.raises(InputError, match="labels must be one for each of 180 images, but there were 3"):
        TensorData(images[0], torch.arange(3), 1)
    with pytest.raises(InputError, match="batch_size must be from 1 to 90 with 180 images and 2 processes"):
        TensorData(images[0], images[1], 91, processes=2)


def test_random_numbers_are_a_function_of_seed_and_epoch_and_go_on_as_before():
    def drawn() -> list:
        return [torch.rand(2).tolist(), np.random.rand(), random.random()]  # noqa: NPY002

    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
    expected = drawn()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
    inside = []
    for epoch in (0, 0, 1):
        with seeded(5, epoch):
            inside.append(drawn())
    assert inside[0] == inside[1] != inside[2]
    assert drawn() == expected


def test_the_objective_is_what_its_equation_says():
    torch.manual_seed(0)
    logits, teacher, labels = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 4, 2, 1])
    kinds = {"share": 0.3, "temperature": 2.0, "smoothing": 0.1}
    found = objective(logits, labels, teacher, **kinds)
    wanted = 0.9 * F.one_hot(labels, 5) + 0.1 / 5
    cross = -(wanted * logits.log_softmax(-1)).sum(-1).mean()
    p, q = (teacher / 2).softmax(-1), (logits / 2).softmax(-1)
    distance = (p * (p.log() - q.log())).sum(-1).mean()
    assert found.item() == pytest.approx((0.7 * cross + 0.3 * 4 * distance).item())
    # Mixed labels are smooth already.
    soft = torch.rand(4, 5).softmax(-1)
    cross = -(soft * logits.log_softmax(-1)).sum(-1).mean()
    assert objective(logits, soft, None, **kinds).item() == pytest.approx(cross.item())


def test_labels_that_are_no_class_indices_are_refused():
    check_labels(torch.tensor([0, 4]), 5, "a batch")
    for labels, message in (
        (torch.tensor([0.0, 1.0]), "labels must be class indices .B., but a batch had torch.float32"),
        (torch.zeros(2, 5, dtype=torch.int64), r"but a batch had torch.int64 of \[2, 5\]"),
        (torch.tensor([0, -1]), "labels must lie in 0 to 4, as the model has classes, but a batch had -1"),
        (torch.tensor([0, 5]), "labels must lie in 0 to 4, as the model has classes, but a batch had 5"),
    ):
        with pytest.raises(InputError, match=message):
            check_labels(labels, 5, "a batch")
