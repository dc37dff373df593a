import math

import numpy as np
import pytest

from rgfast.flow import (
    broken_stick_share,
    descent,
    drift_shape,
    effective_transitions,
    paired_interval,
    top_share,
)


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


def test_broken_stick_is_the_mean_share_of_exponential_drifts():
    draws = np.random.default_rng(0).exponential(size=(40_000, 6))
    shares = np.sort(draws, axis=1)[:, -2:].sum(1) / draws.sum(1)
    assert shares.mean() == pytest.approx(broken_stick_share(6), abs=4 * shares.std() / 200)
    assert broken_stick_share(2) == pytest.approx(1)


def test_top_share_and_effective_transitions():
    assert top_share([0.5, 0.1, 0.3, 0.1]) == pytest.approx(0.8)
    assert effective_transitions([1, 1, 1, 1]) == pytest.approx(4)
    assert effective_transitions([1, 0, 0]) == pytest.approx(1)
    assert math.isnan(top_share([0, 0]))
    assert math.isnan(effective_transitions([0, 0]))


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.9])
def test_a_geometric_decay_is_a_decay(rate):
    shape = drift_shape(0.3 * rate ** np.arange(8))
    assert shape.preferred == "decay"
    assert shape.decay_rate == pytest.approx(rate)
    assert shape.decay_rss == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("layers", [5, 6, 8, 24])
def test_a_step_is_a_step_and_its_plateau_is_named(width, layers):
    rng = np.random.default_rng(layers)
    drift = np.where(np.arange(layers) < width, 0.3, 0.01) * np.exp(0.05 * rng.standard_normal(layers))
    shape = drift_shape(drift)
    assert shape.preferred == "step"
    assert shape.step_width == width
    assert shape.plateau == (width, layers - 1)
    assert shape.step_high == pytest.approx(0.3, rel=0.2)
    assert shape.step_low == pytest.approx(0.01, rel=0.2)
    assert shape.plateau_mean == pytest.approx(drift[width:].mean())


def test_a_step_upwards_is_never_preferred():
    assert drift_shape([0.01, 0.3, 0.3, 0.3, 0.3, 0.3]).preferred == "decay"


@pytest.mark.parametrize("drift", [[0.1, 0.2, 0.3], [0.1, 0.0, 0.1, 0.1], [0.1, math.nan, 0.1, 0.1]])
def test_a_drift_without_a_logarithm_has_no_shape(drift):
    assert drift_shape(drift) is None


def test_paired_interval():
    three = paired_interval([1, 2, 3])
    assert three.mean == 2
    assert math.isnan(three.low)
    five = paired_interval([1, 2, 3, 4, 5])
    assert five.high - five.mean == pytest.approx(2.7764451 * math.sqrt(2.5 / 5))
    assert paired_interval([math.nan]).n == 0
