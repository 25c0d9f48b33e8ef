"""Rounds and quantiles on a clock that the test turns by hand."""

import pytest
import torch

from benchmarks import timing


class Clock:
    """Stands still until somebody works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def turns(self, order, name, seconds=0.125):
        """A rival that notes its name and works so long."""

        def once():
            order.append(name)
            self.now += seconds
            return [seconds]

        return once


def test_quantiles_lie_on_straight_lines():
    times = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [timing.quantile(times, s) for s in (0, 0.2, 0.5, 0.8, 1)] == [1, 1.8, 3, 4.2, 5]
    assert timing.quantile([7.0], 0.8) == 7.0
    assert timing.quantiles(iter(times), "a_*_ms", 10) == {
        "a_p20_ms": pytest.approx(18),
        "a_p50_ms": 30,
        "a_p80_ms": pytest.approx(42),
    }


def test_rounds_interleave_and_change_who_goes_first():
    order, clock = [], Clock()
    times = timing.interleave({n: clock.turns(order, n) for n in "abc"}, 1.0, clock, rounds=3)
    assert "".join(order[-9:]) == "abcbcacab"
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_warm_up_is_a_fifth_of_the_time_and_is_not_kept():
    order, clock = [], Clock()
    times = timing.interleave({"a": clock.turns(order, "a")}, 5.0, clock)
    assert len(order) == 8 + 40  # one second, then five, in eighths
    assert len(times["a"]) == 40


def test_rounds_are_the_least_and_the_limit_is_the_most():
    order, clock = [], Clock()
    assert len(timing.interleave({"a": clock.turns(order, "a")}, 0, clock, rounds=7)["a"]) == 7
    slow = {"a": clock.turns(order, "a", 10.0)}
    assert len(timing.interleave(slow, 1.0, clock, rounds=5, limit=15.0)["a"]) == 2
    assert len(timing.interleave(slow, 1.0, clock, rounds=5, limit=-1.0)["a"]) == 1


def test_every_call_of_a_row_has_its_own_time_on_a_cpu():
    clock = Clock()
    calls = [clock.turns([], "a", seconds) for seconds in (1.0, 2.0)]
    assert timing.wall(calls, torch.device("cpu"), clock)() == [1.0, 2.0]
