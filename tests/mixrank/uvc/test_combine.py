"""Both systems under one budget: what goes by which of them, resumption, and what is refused."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import mixrank
from mixrank import InputError
from mixrank.counting import count_macs
from mixrank.models import create_model
from mixrank.uvc.combine import CombinedOptions, compress_combined_, states_of
from mixrank.uvc.data import TensorData
from mixrank.uvc.options import UVCOptions

OPTIONS = UVCOptions(budget=0.4, epochs=6, learning_rate=1e-3, ema=0.9)


@pytest.fixture
def model():
    torch.manual_seed(0)
    args = {"img_size": 32, "depth": 3, "embed_dim": 96, "num_heads": 3, "num_classes": 3}
    return create_model("vit_tiny_patch16_224", args=args)


def test_the_budget_is_kept_and_divided_and_what_was_learnt_stays(model, data, images, tmp_path):
    before, validation = count_macs(model), [(images[0][144:], images[1][144:])]
    result = compress_combined_(model, data, [images[0][:64]], options=OPTIONS, validation=validation)
    assert result.macs_before == before
    assert result.macs_after == count_macs(model)
    assert 0.97 * 0.4 <= result.macs_after / before <= 0.4
    between = result.macs_after + result.macs_by_ranks
    assert between == result.pruned.macs_after
    assert 0.99 * 0.4**0.25 <= between / before <= 0.4**0.25
    assert sum(result.to_json()["removed"].values()) == before - result.macs_after
    assert (result.pruned.steps, result.trained.steps) == (16, 38)
    assert result.trained.after > 95
    mixrank.save(model, tmp_path / "model.safetensors")
    loaded, x = mixrank.load(tmp_path / "model.safetensors"), validation[0][0]
    assert count_macs(loaded) == result.macs_after
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


class Interrupted(TensorData):
    """Stops at the beginning of an epoch, when it is gone through for the second time."""

    def epoch(self, number: int):
        self.seen = [*getattr(self, "seen", []), number]
        if number == 1 and self.seen.count(1) == 2:
            raise KeyboardInterrupt
        return super().epoch(number)


def test_a_run_that_was_interrupted_in_its_last_training_goes_on_to_the_same_bits(model, data, images, tmp_path):
    whole, parts, state = copy.deepcopy(model), copy.deepcopy(model), tmp_path / "run.state"
    expected = compress_combined_(whole, data, [images[0][:64]], options=OPTIONS)
    broken = Interrupted(images[0][:144], images[1][:144], batch_size=16)
    with pytest.raises(KeyboardInterrupt):
        compress_combined_(parts, broken, [images[0][:64]], options=OPTIONS, state=state)
    assert all(path.is_file() for path in states_of(state))
    assert count_macs(parts) == expected.macs_before
    result = compress_combined_(parts, data, [images[0][:64]], options=OPTIONS, state=state)
    assert result.macs_after == expected.macs_after
    assert all(torch.equal(value, parts.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"power": 1.0}, "power must be above 0 and below 1, but it was 1.0"),
        ({"last": 0.0}, "last must be above 0 and below 1, but it was 0.0"),
        (
            {"last": 0.96},
            r"last must be at most 0.95, what warm_up = 0 and search = 0.05 leave of the run, but .* 0.96",
        ),
        ({"learning_rate": -1.0}, "learning_rate must be above 0, but it was -1.0"),
    ],
)
def test_options_outside_their_range_are_refused(model, data, images, change, message):
    combined = dataclasses.replace(CombinedOptions(), **change)
    with pytest.raises(InputError, match=message):
        compress_combined_(model, data, [images[0]], options=OPTIONS, combined=combined)
