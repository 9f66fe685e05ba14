"""Interleaved timing, with a clock made by hand."""

from __future__ import annotations

import pytest

from mixrank_bench.timing import SETTLE_SECONDS, interleaved


class Clock:
    """Time that passes only in calls and in sleep."""

    def __init__(self, settle: float = SETTLE_SECONDS) -> None:
        self.settle = settle
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds == self.settle
        self.now += seconds
        self.log.append("sleep")

    def variant(self, name: str, *seconds: float):
        """A call that takes the given times in turn, then the last one."""
        left = list(seconds)

        def call() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]
            self.log.append(name)

        return call


def time(clock: Clock, variants: dict, **options):
    return interleaved(variants, clock=clock, sleep=clock.sleep, **options)


def test_milliseconds_of_one_call_without_the_pauses():
    clock = Clock()
    found = time(clock, {"a": clock.variant("a", 0.001), "b": clock.variant("b", 0.004)}, rounds=4, turn_seconds=0.01)
    assert found["a"].median == pytest.approx(1.0)
    assert found["b"].median == pytest.approx(4.0)
    assert found["a"].rounds == 4


def test_the_pause_before_a_turn_is_chosen_by_the_caller():
    clock = Clock(settle=0.5)
    found = time(clock, {"a": clock.variant("a", 0.001)}, rounds=3, turn_seconds=0.01, settle_seconds=0.5)
    assert clock.log.count("sleep") == 3
    assert found["a"].median == pytest.approx(1.0)


def test_median_and_spread_over_the_rounds():
    clock = Clock()
    times = (0.1, 0.1, 0.1, 0.5, 0.2)
    found = time(clock, {"a": clock.variant("a", *times)}, rounds=3, turn_seconds=0.01)
    assert (found["a"].low, found["a"].median, found["a"].high) == pytest.approx((100, 200, 500))
    assert found["a"].quartiles == pytest.approx((150, 350))


def test_a_timing_is_divided_among_the_calls_that_were_timed_as_one():
    clock = Clock()
    found = time(clock, {"a": clock.variant("a", 0.004)}, rounds=1, turn_seconds=0.001)["a"].divided(4)
    assert (found.low, found.median, found.high, *found.quartiles) == pytest.approx((1.0,) * 5)
    assert found.rounds == 1


def test_a_turn_is_timed_as_the_caller_wants():
    clock = Clock()
    times = {clock.variant("a", 0.001): 3.0, clock.variant("b", 0.001): 5.0}
    variants = dict(zip("ab", times, strict=True))
    found = time(clock, variants, rounds=3, turn=lambda call, seconds: times[call])
    assert (found["a"].median, found["b"].median) == (3.0, 5.0)


def test_nothing_to_time_takes_no_time():
    assert interleaved({}) == {}


def test_order_turns_around_every_round_and_long_calls_are_not_repeated():
    clock = Clock()
    time(clock, {"a": clock.variant("a", 1.0), "b": clock.variant("b", 1.0)}, rounds=2, turn_seconds=0.01)
    turns = [name for name in clock.log if name != "sleep"]
    assert turns == [*"aabb", *"abba"]


def test_short_calls_get_one_that_does_not_count():
    clock = Clock()
    time(clock, {"a": clock.variant("a", 0.25)}, rounds=1, turn_seconds=0.5)
    assert clock.log == ["a", "a", "sleep", "a", "a", "a"]


@pytest.mark.parametrize(("limit", "rounds"), [(100.0, 9), (5.0, 5), (1.0, 3)])
def test_fewer_rounds_where_all_would_take_too_long(limit, rounds):
    clock = Clock()
    found = time(clock, {"a": clock.variant("a", 1.0)}, rounds=9, turn_seconds=0.01, limit_seconds=limit)
    assert found["a"].rounds == rounds


def test_no_round_is_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1, but it was 0"):
        interleaved({}, rounds=0)
