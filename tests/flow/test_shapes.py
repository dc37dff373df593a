"""The shape of a drift by transition, and the nulls that it has to beat."""

import itertools
import math

import numpy as np
import pytest

from rgfast.flow import broken_stick_share, drift_shape, flat_quantile, top_share, top_share_quantile
from rgfast.flow.shapes import common_shape, rest_of


def bic_by_hand(v, k, best):
    """BIC of a least squares fit whose residuals are ``best``."""
    n = len(v)
    return n * math.log(sum(best**2) / n) + k * math.log(n)


def brute_force(v):
    """BICs of flat, decay and the best step at any one or two transitions, by trying all of them."""
    y, n = np.log(v), len(v)
    flat = bic_by_hand(v, 2, y - y.mean())
    decay = bic_by_hand(v, 3, y - np.polyval(np.polyfit(np.arange(n), y, 1), np.arange(n)))
    steps = {}
    for width in (1, 2):
        for places in itertools.combinations(range(n), width):
            high = np.isin(np.arange(n), places)
            if y[high].mean() <= y[~high].mean():
                continue
            fit = np.where(high, y[high].mean(), y[~high].mean())
            steps[places] = bic_by_hand(v, 4, y - fit)
    places = min(steps, key=steps.get)
    placed = min(bic + 2 * math.log(math.comb(n, len(at))) for at, bic in steps.items())
    return flat, decay, steps[places], placed, places


@pytest.mark.parametrize("n", [4, 5, 6, 8, 13])
@pytest.mark.parametrize("seed", range(4))
def test_the_fits_are_those_of_a_search_over_all_places(n, seed):
    v = np.random.default_rng(seed).exponential(size=n) + 1e-3
    flat, decay, step, placed, places = brute_force(v)
    shape = drift_shape(v)
    assert shape.step_at == places
    assert shape.bic_difference == pytest.approx(decay - step)
    assert shape.over_flat == pytest.approx(flat - min(decay, placed))


@pytest.mark.parametrize(("seeds", "quantile"), [(1, 0.826), (3, 0.748), (5, 0.726), (11, 0.701)])
def test_quantiles_of_the_two_largest_of_six_broken_sticks(seeds, quantile):
    assert top_share_quantile(6, seeds) == pytest.approx(quantile, abs=0.002)


def test_a_quantile_is_exceeded_by_chance_in_five_of_a_hundred():
    sticks = np.random.default_rng(7).exponential(size=(20_000, 3, 9))
    shares = (np.sort(sticks, -1)[..., -2:].sum(-1) / sticks.sum(-1)).mean(-1)
    assert (shares > top_share_quantile(9, 3)).mean() == pytest.approx(0.05, abs=0.008)
    assert top_share_quantile(2, 4) == pytest.approx(1)
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        top_share_quantile(6, 0)


@pytest.mark.parametrize(("transitions", "about"), [(6, 6.7), (8, 4.8), (12, 3.1), (24, 1.4)])
def test_quantiles_of_the_evidence_that_flat_draws_show(transitions, about):
    assert flat_quantile(transitions) == pytest.approx(about, abs=0.1)
    draws = np.exp(0.3 * np.random.default_rng(5).standard_normal((1500, transitions)))
    beaten = [(s := drift_shape(v)).over_flat > s.over_flat_null for v in draws]
    assert np.mean(beaten) == pytest.approx(0.05, abs=0.025)
    with pytest.raises(ValueError, match="transitions must be at least 4, got 3"):
        flat_quantile(3)


def test_broken_stick_is_the_mean_share_of_exponential_drifts():
    draws = np.random.default_rng(0).exponential(size=(40_000, 6))
    shares = np.sort(draws, axis=1)[:, -2:].sum(1) / draws.sum(1)
    assert shares.mean() == pytest.approx(broken_stick_share(6), abs=4 * shares.std() / 200)
    assert broken_stick_share(2) == pytest.approx(1)


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.8])
def test_a_geometric_decay_is_named_with_its_rate(rate):
    shape = drift_shape(0.3 * rate ** np.arange(8))
    assert shape.word == "geometric decay"
    assert shape.decay_rate == pytest.approx(rate)
    assert shape.decay_rss == pytest.approx(0, abs=1e-20)
    assert str(shape) == f"geometric decay, rate {rate:g} per transition"


def test_a_drift_that_grows_is_named_so():
    assert str(drift_shape(0.01 * 1.8 ** np.arange(7))) == "growing, rate 1.8 per transition"


@pytest.mark.parametrize("places", [(0,), (0, 1), (3,), (1, 4), (5,)])
@pytest.mark.parametrize("layers", [6, 8, 24])
def test_a_step_at_any_one_or_two_transitions_is_a_step(places, layers):
    rng = np.random.default_rng(layers)
    drift = np.where(np.isin(np.arange(layers), places), 0.3, 0.01)
    drift = drift * np.exp(0.05 * rng.standard_normal(layers))
    shape = drift_shape(drift)
    assert shape.word == "step + plateau"
    assert shape.step_at == places
    assert shape.step_high == pytest.approx(0.3, rel=0.2)
    assert shape.step_low == pytest.approx(0.01, rel=0.2)
    assert shape.top2 == top_share(drift)


@pytest.mark.parametrize("scale", [1e-6, 0.05])
@pytest.mark.parametrize("layers", [6, 12, 48])
def test_a_drift_without_a_trend_is_flat(layers, scale):
    for seed in range(5):
        v = scale * np.exp(0.2 * np.random.default_rng(seed).standard_normal(layers))
        assert drift_shape(v).word == "flat"
    assert drift_shape(np.full(layers, scale)).word == "flat"


def test_a_trend_that_hardly_moves_the_level_is_flat():
    """Without noise the evidence is overwhelming, and yet the largest is not twice the median."""
    shape = drift_shape(0.01 * 0.97 ** np.arange(12))
    assert shape.over_flat > shape.over_flat_null
    assert shape.largest_over_median < 2
    assert shape.word == "flat"


def test_evidence_for_two_shapes_alike_is_undecided():
    shape = drift_shape([0.3737, 0.15, 0.0331, 0.03, 0.028, 0.0197])
    assert not shape.flat
    assert abs(shape.bic_difference) < 6
    assert shape.word == "undecided"


def test_five_transitions_are_not_judged():
    shape = drift_shape([0.4, 0.2, 0.1, 0.05, 0.025])
    assert shape.word == "not judged"
    assert str(shape) == "shape not judged: 5 transitions, and it takes 6"


@pytest.mark.parametrize("drift", [[0.1, 0.2, 0.3], [0.1, 0.0, 0.1, 0.1], [0.1, math.nan, 0.1, 0.1]])
def test_a_drift_without_a_logarithm_has_no_shape(drift):
    assert drift_shape(drift) is None


def test_seeds_share_a_shape_if_most_agree_and_the_sum_is_decisive():
    decay, step = (drift_shape(v) for v in (0.3 * 0.5 ** np.arange(6), [0.3, 0.01, 0.011, 0.01, 0.012, 0.01]))
    weak = drift_shape([0.3737, 0.15, 0.0331, 0.03, 0.028, 0.0197])
    assert common_shape([decay] * 4, decay) == "geometric decay"
    assert common_shape([step] * 4 + [decay], step) == "undecided"  # the exact decay outweighs them
    assert common_shape([step] * 4 + [weak], step) == "step + plateau"
    assert common_shape([step, step, step, decay, decay], step) == "undecided"
    flat = drift_shape([0.01, 0.011, 0.012, 0.01, 0.013, 0.011])
    assert common_shape([step, step], flat) == "flat"


def test_the_rest_is_all_but_the_two_largest():
    assert rest_of([0.01, 0.4, 0.03, 0.2, 0.02]) == (0.02, pytest.approx(0.05))
    assert all(math.isnan(value) for v in ([0.1, 0.2], [0, 0, 0]) for value in rest_of(v))
