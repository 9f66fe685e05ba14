"""A training with labels and a teacher by itself: of pruned and factored models, interrupted, and what goes wrong."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from mixrank import InputError, compress
from mixrank.nn import MixedRankLinear
from mixrank.uvc.data import TensorData
from mixrank.uvc.finetune import finetune_
from mixrank.uvc.options import FinetuneOptions, UVCOptions
from mixrank.uvc.run import compress_uvc_
from mixrank.uvc.shrink import KeptBlock, remaining_blocks, shrink_

OPTIONS = FinetuneOptions(epochs=5, learning_rate=1e-3, ema=0.9)


def test_a_pruned_and_factored_model_is_trained_as_it_is(model, data, validation):
    kept = [None, *(KeptBlock((tuple(range(16)), (), (0, 3)), tuple(range(0, 192, 2))) for _ in range(3))]
    small = shrink_(copy.deepcopy(model), kept)
    compress(small, validation, keep=0.7, energy="weight", factors="aware", form="factors")
    layers = {name: layer for name, layer in small.named_modules() if isinstance(layer, MixedRankLinear)}
    weights = {name: layer.down.detach().clone() for name, layer in layers.items()}
    result = finetune_(small, data, options=OPTIONS, teacher=model, validation=validation)
    assert layers
    assert all(not torch.equal(small.get_submodule(name).down, weight) for name, weight in weights.items())
    assert [(one.index, one.shape.columns, one.shape.neurons) for one in remaining_blocks(small)] == [
        (index, (16, 2), 96) for index in (1, 2, 3)
    ]
    assert result.before < 70
    assert result.after > 95
    assert [entry["step"] for entry in result.history] == [9, 18, 27, 36, 45]
    assert result.steps == 45
    assert not small.training


class Interrupted(TensorData):
    """Stops at the beginning of the fourth epoch."""

    def epoch(self, number: int):
        if number == 3:
            raise KeyboardInterrupt
        return super().epoch(number)


def test_a_training_that_was_interrupted_goes_on_to_the_same_bits(model, data, images, tmp_path):
    whole, parts, state = copy.deepcopy(model), copy.deepcopy(model), tmp_path / "run.state"
    expected = finetune_(whole, data, options=OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        finetune_(parts, Interrupted(images[0][:144], images[1][:144], batch_size=16), options=OPTIONS, state=state)
    result = finetune_(parts, data, options=OPTIONS, state=state)
    assert all(torch.equal(value, parts.state_dict()[name]) for name, value in whole.state_dict().items())
    assert dataclasses.replace(result, seconds=0.0) == dataclasses.replace(expected, seconds=0.0)


def test_the_state_of_a_search_is_not_that_of_a_training(model, data, tmp_path):
    state = tmp_path / "run.state"
    compress_uvc_(copy.deepcopy(model), data, options=UVCOptions(epochs=1), state=state)
    with pytest.raises(InputError, match="is the state of another run: its kind was 'UVCOptions'"):
        finetune_(model, data, options=FinetuneOptions(epochs=1), state=state)


def test_bad_labels_and_options_leave_the_model_as_it_was(model, data, images):
    before = copy.deepcopy(model.state_dict())
    wrong = TensorData(images[0], images[1] + 1, batch_size=16)
    with pytest.raises(InputError, match="labels must lie in 0 to 2, as the model has classes, but step 0 had 3"):
        finetune_(model, wrong, options=OPTIONS)
    with pytest.raises(InputError, match="clip must be above 0, but it was 0"):
        finetune_(model, data, options=dataclasses.replace(OPTIONS, clip=0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
