"""Hostile input, a fixed corpus of it; ``python -m mixrank_bench.hostile`` has a hundred thousand cases more."""

from __future__ import annotations

import random

import pytest

from mixrank import InputError
from mixrank_bench import hostile
from mixrank_bench.hostile_targets import SHARES, TARGETS, Target, mutated, twisted

CASES = {"checkpoint": 150, "labels": 300, "image": 300, "operator": 400, "result": 15, "recipe": 300}


@pytest.mark.filterwarnings("ignore")  # of decoders
@pytest.mark.parametrize("name", TARGETS)
def test_every_case_ends_as_promised_and_soon(name):
    found = hostile.run(TARGETS[name], 0, CASES[name], seed=12)
    assert found.failures == []
    assert found.cases == CASES[name]
    assert 0 < found.refused < CASES[name]
    assert found.slowest < hostile.LIMIT_SECONDS


def test_what_is_not_promised_is_found(monkeypatch):
    def prepare(folder):
        def attempt(source: random.Random) -> None:
            if source.random() < 0.5:
                raise InputError("refused")
            raise ZeroDivisionError("found")

        return attempt

    found = hostile.run(Target(prepare), 0, 40, seed=0)
    assert found.refused + len(found.failures) == 40
    assert 5 < found.refused < 35
    assert {message for _, message in found.failures} == {"ZeroDivisionError: found"}
    monkeypatch.setattr(hostile, "LIMIT_SECONDS", -1.0)
    slow = hostile.run(Target(lambda folder: lambda source: None), 0, 1, seed=0)
    assert "seconds" in slow.failures[0][1]


def test_cases_are_functions_of_their_number():
    data, value = bytes(range(200)), {"a": [1, 2, {"b": "c"}], "d": '{"e": 1}'}
    for number in range(50):
        assert mutated(data, random.Random(number)) == mutated(data, random.Random(number))
        assert repr(twisted(value, random.Random(number))) == repr(twisted(value, random.Random(number)))
    assert sum(mutated(data, random.Random(number)) != data for number in range(50)) > 40
    assert value == {"a": [1, 2, {"b": "c"}], "d": '{"e": 1}'}
    assert sum(SHARES.values()) == pytest.approx(1)
    assert SHARES.keys() == TARGETS.keys() == CASES.keys()
