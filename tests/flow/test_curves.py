import math

import pytest

from rgfast.flow import descent, effective_transitions, paired_interval, top_share


def test_descent_of_a_fall():
    d = descent([10, 8, 8.1, 5])
    assert (d.first, d.last, d.ratio, d.drop) == (10, 5, 0.5, 5)
    assert d.largest_rise == pytest.approx(0.1)
    assert d.rise_share == pytest.approx(0.02)
    assert d.falls()
    assert not d.falls(tolerance=0.01)


def test_descent_of_a_rise_and_of_a_constant():
    assert descent([5, 6]).rise_share == math.inf
    assert not descent([5, 6]).falls()
    flat = descent([5, 5, 5])
    assert flat.ratio == 1
    assert not flat.falls()


def test_descent_of_undefined_values_is_undefined():
    assert math.isnan(descent([1, math.nan, 2]).ratio)
    assert math.isnan(descent([0, 0]).ratio)
    with pytest.raises(ValueError, match="at least two layers"):
        descent([1.0])


def test_top_share_and_effective_transitions():
    assert top_share([0.5, 0.1, 0.3, 0.1]) == pytest.approx(0.8)
    assert effective_transitions([1, 1, 1, 1]) == pytest.approx(4)
    assert effective_transitions([1, 0, 0]) == pytest.approx(1)
    assert math.isnan(top_share([0, 0]))
    assert math.isnan(effective_transitions([0, 0]))


def test_paired_interval():
    three = paired_interval([1, 2, 3])
    assert three.mean == 2
    assert math.isnan(three.low)
    five = paired_interval([1, 2, 3, 4, 5])
    assert five.high - five.mean == pytest.approx(2.7764451 * math.sqrt(2.5 / 5))
    assert paired_interval([math.nan]).n == 0
