"""A sweep: the same models as compress makes, each thing made once, rows that survive an interruption."""

from __future__ import annotations

import copy
import importlib
import json

import pytest
import torch

from mixrank import InputError, SweepRow, compress, sweep
from mixrank.data import Batch
from mixrank.evaluate import evaluate
from mixrank.fidelity import compare
from mixrank.sample import Apart
from mixrank.strategies import STRATEGIES

module = importlib.import_module("mixrank.sweep")


@pytest.fixture
def many():
    return torch.randn(15, 3, 32, 32, generator=torch.Generator().manual_seed(2)) + 0.3


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "fisher"])
def test_a_row_is_what_compress_makes_of_the_images_that_are_left(name, model, many):
    options = {"held_out": 0.4, "sensitivity_images": 4, "seed": 3}
    row = sweep(model, many.split(5), [0.5], [name], **options).rows[0]
    apart = Apart(many.split(5), 0.4)
    compressed = copy.deepcopy(model)
    options = {"seed": 3, "sensitivity_images": 4, "form": "pivoted"}
    result = compress(compressed, apart, keep=0.5, **options | STRATEGIES[name])
    assert row.plan == result.plan
    images = torch.cat([batch.images for batch in apart.kept])
    assert (result.images, len(images)) == (9, 6)
    with torch.no_grad():
        expected = compare(compressed(images), model(images))
    assert row.fidelity.divergence == pytest.approx(expected.divergence, rel=1e-3, abs=1e-6)
    assert row.fidelity.images == 6
    assert row.compressed.parameters == result.plan.parameters_after


def test_each_step_is_made_once_for_all_that_share_it(model, many, monkeypatch):
    calls = []
    for original in (module.calibrate, module.decompose):

        def counted(*given, original=original, **more):
            calls.append(original.__name__)
            return original(*given, **more)

        monkeypatch.setattr(module, original.__name__, counted)
    names = ["aware", "svd", "aware-pivoted", "svd-uniform", "shrunk"]
    result = sweep(model, [many], [0.6, 0.5], names)
    assert calls == ["calibrate", "decompose", "decompose", "decompose"]
    assert [(row.strategy, row.keep) for row in result.rows] == [
        (name, keep) for name in ("aware", "aware-pivoted", "svd", "svd-uniform", "shrunk") for keep in (0.6, 0.5)
    ]
    for row in result.rows:
        assert row.compressed.parameters <= row.keep * result.dense.parameters
        assert set(row.seconds) == {"calibrate", "decompose", "allocate", "apply", "evaluate"}
        assert row.compressing == pytest.approx(sum(row.seconds.values()) - row.seconds["evaluate"])


def test_the_model_stays_as_it_was(model, many):
    before, names = copy.deepcopy(model.state_dict()), [name for name, _ in model.named_modules()]
    sweep(model, [many], [0.5], ["fisher", "sensitivity"])
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_labels_give_accuracy_on_images_of_their_own(model, many):
    labelled = [Batch(many[:8], torch.arange(8) % 7, [str(number) for number in range(8)])]
    result = sweep(model, [many], [0.6], ["aware"], evaluation=labelled)
    assert (result.calibration, result.evaluation) == (15, 8)
    assert result.dense.top1 == evaluate(model, labelled).top1
    assert 0 <= result.rows[0].compressed.top1 <= 100
    assert sweep(model, [(many, torch.zeros(15).long())], [0.6], ["svd"]).dense.top1 is None


def test_rows_come_one_by_one_and_are_not_made_again(model, many):
    seen = []
    whole = sweep(model, [many], [0.6, 0.5], ["svd", "aware"], on_row=lambda result: seen.append(len(result.rows)))
    assert seen == [1, 2, 3, 4]
    kept = [SweepRow.from_json(json.loads(json.dumps(row.to_json()))) for row in whole.rows[:3]]
    assert kept == list(whole.rows[:3])
    seen.clear()
    again = sweep(model, [many], [0.6, 0.5], ["svd", "aware"], done=kept, on_row=lambda result: seen.append(result))
    assert len(seen) == 1
    assert again.rows[:3] == whole.rows[:3]
    assert (again.rows[3].plan, again.rows[3].fidelity) == (whole.rows[3].plan, whole.rows[3].fidelity)
    finished = sweep(model, [many], [0.6], ["svd"], done=again.rows)
    assert (finished.rows, finished.calibration) == (again.rows, whole.calibration)


def test_options_of_ones_own_have_a_name_of_ones_own(model, many):
    result = sweep(model, [many], [0.5], {"mine": {"shrink": 1.0, "min_rank": 0.1}})
    assert [row.strategy for row in result.rows] == ["mine"]
    assert all(layer.rank >= 19 for layer in result.rows[0].plan.layers if layer.rank)


def test_sparse_weights_come_last_from_one_calibration_of_their_own(model, many, monkeypatch):
    calls = []

    def counted(*given, original=module.sparse_statistics, **more):
        calls.append("sparse")
        return original(*given, **more)

    monkeypatch.setattr(module, "sparse_statistics", counted)
    seen = []
    result = sweep(model, [many], [0.5, 0.6], ["sparse", "svd"], on_row=seen.append)
    assert [(row.strategy, row.keep) for row in result.rows] == [
        (name, keep) for name in ("svd", "sparse") for keep in (0.6, 0.5)
    ]
    assert (calls, len(seen)) == (["sparse"], 4)
    assert {layer.form for layer in result.rows[-1].plan.layers if layer.rank is not None} == {"sparse"}
    again = sweep(model, [many], [0.5, 0.6], ["sparse"], done=result.rows[:-1])
    assert again.rows[-1].plan == result.rows[-1].plan
    assert again.rows[-1].fidelity.divergence == pytest.approx(result.rows[-1].fidelity.divergence, rel=1e-3)
    with pytest.raises(InputError, match="again for sparse weights, but they were an iterator"):
        sweep(model, iter([many]), [0.5], ["sparse"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"strategies": {"mine": {"form": "sparse", "step": 4}}}, "'mine' must have no options but the form 'sparse'"),
        ({"strategies": ["best"]}, "strategies must be among pivoted, svd, .* but one was 'best'"),
        ({"strategies": []}, "at least one"),
        ({"strategies": {"mine": {"sequential": True}}}, "'mine' must have options among .*'sequential'"),
        ({"strategies": {"mine": {"factors": "best"}}}, "factors must be one of"),
        ({"strategies": {"mine": {"weighting": "clip"}}}, "'mine' must have None or 'none' as weighting, .*'clip'"),
        ({"keep": []}, "at least one share"),
        ({"keep": [0.5, 0.001]}, "keep must be at least"),
        ({"keep": [2.0]}, r"keep must be in \(0, 1\]"),
        ({"held_out": 1.0}, "held_out must be above 0 and below 1"),
        ({"evaluation": iter([])}, "it was an iterator"),
    ],
)
def test_bad_input_is_refused_before_the_calibration(model, many, more, message, monkeypatch):
    monkeypatch.setattr(module, "calibrate", None)
    with pytest.raises(InputError, match=message):
        sweep(model, [many], **({"keep": [0.5]} | more))


def test_too_few_images_and_rows_of_another_kind_are_refused(model, many):
    with pytest.raises(InputError, match=r"held_out=0\.2 needs more images, but there were 4"):
        sweep(model, [many[:4]], [0.5], ["svd"])
    with pytest.raises(InputError, match="not one that a sweep"):
        SweepRow.from_json({"strategy": "svd"})


def test_images_are_held_out_evenly_whatever_the_batches_are(many):
    for size in (1, 4, 15):
        apart = Apart(many.split(size), 0.2)
        rest = torch.cat([batch.images for batch in apart])
        assert torch.equal(torch.cat([batch.images for batch in apart.kept]), many[4::5])
        assert len(rest) == 12
