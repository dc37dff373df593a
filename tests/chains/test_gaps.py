"""Slow chains whose second eigenvalue is 1 to rounding, against eigenvalues in hundreds of digits."""

import math
import sys
from itertools import pairwise

import mpmath  # torch brings it
import numpy as np
import pytest
import torch

import rgfast
from rgfast.chains.gaps import period

mp = mpmath.mp.clone()
mp.dps = 400


def gap_of(matrix):
    """1 − |λ| of the slowest mode of the chain whose largest entry of each row is what the others leave."""
    exact = mp.matrix(len(matrix), len(matrix))
    for i, row in enumerate(np.asarray(matrix)):
        large = int(np.argmax(row))
        for j, value in enumerate(row):
            exact[i, j] = mp.mpf(float(value))
        exact[i, large] = 1 - sum(exact[i, j] for j in range(len(row)) if j != large)
    values = sorted(mp.eig(exact, left=False, right=False), key=lambda value: abs(value - 1))[1:]
    return min(1 - abs(value) for value in values)


def blocks(number, e, *, cyclic, seed=0):
    """Classes of two states, one of them with a way out of probability about ``e``."""
    draw = np.random.default_rng(seed)
    out = np.zeros((2 * number, 2 * number))
    for k in range(number):
        own = slice(2 * k, 2 * k + 2)
        inside = draw.uniform(0.2, 0.4, 2)
        out[own, own] = [[1 - inside[0], inside[0]], [inside[1], 1 - inside[1]]]
        for other in range(number):
            if other != k and (not cyclic or other == (k + 1) % number):
                way = e * draw.uniform(0.5, 1.0)
                out[2 * k, 2 * other + 1] += way
                out[2 * k, 2 * k] -= way
    return out


CHAINS = {
    "two states": lambda e: [[1 - e, e], [2 * e, 1 - 2 * e]],
    "two classes": lambda e: blocks(2, e, cyclic=False),
    "three classes": lambda e: blocks(3, e, cyclic=False),
    "three classes in a ring": lambda e: blocks(3, e, cyclic=True),
    "six classes in a ring": lambda e: blocks(6, e, cyclic=True),
    "nearly of period 2": lambda e: [[e, 1 - e], [1 - 2 * e, 2 * e]],
    "nearly of period 3": lambda e: [[e, 1 - e, 0], [0, 0, 1], [1, 0, 0]],
    "nearly absorbing": lambda e: [[1 - e, e, 0], [0, 0.5, 0.5], [e, 0, 1 - e]],
    "absorbing": lambda e: [[1 - e, e, 0], [0, 0.5, 0.5], [0, 0, 1]],
    "two nearly periodic classes": lambda e: [[0, 1 - e, e, 0], [1, 0, 0, 0], [0, 0, 0, 1], [e, 0, 1 - e, 0]],
    "two rates": lambda e: [[1 - e, e, 0], [1e-3 * e, 1 - 2e-3 * e, 1e-3 * e], [0, e, 1 - e]],
}


@pytest.mark.parametrize("e", [1e-9, 1e-12, 1e-16, 1e-17, 1e-40, 1e-150])
@pytest.mark.parametrize("name", CHAINS)
def test_relaxation_time_of_nearly_reducible_and_nearly_periodic_chains(name, e):
    matrix = CHAINS[name](e)
    chain = rgfast.MarkovChain(matrix)
    if period(np.asarray(matrix, dtype=float), chain.stationary.numpy()) > 1:
        assert chain.relaxation_time == math.inf
        return
    gap = gap_of(matrix)
    assert abs(float(chain.relaxation_time * gap) - 1) < 1e-8
    assert abs(float(-chain.correlation_length * mp.log(1 - gap)) - 1) < 1e-8
    assert "inf" not in repr(chain)


def test_the_way_from_eigenvalues_to_probabilities_is_smooth():
    """Either side of where the eigenvalue is no longer asked, the time is that of the two-state formula."""
    for e in np.geomspace(1e-10, 1e-6, 41):
        chain = rgfast.MarkovChain([[1 - e, e], [2 * e, 1 - 2 * e]])
        assert chain.relaxation_time == pytest.approx(1 / (3 * e), rel=2e-8)


@pytest.mark.parametrize("e", [1e-300, 5e-324])
def test_times_beyond_fp64_are_its_largest_number(e):
    chain = rgfast.MarkovChain(np.eye(5) * (1 - e) + np.roll(np.eye(5), 1, 1) * e)
    assert 1e299 < chain.relaxation_time <= sys.float_info.max
    assert 1e299 < chain.correlation_length <= sys.float_info.max


@pytest.mark.parametrize("cycle", [2, 3, 5, 12])
def test_periodic_chains_have_no_relaxation_time(cycle):
    ring = np.roll(np.eye(cycle), 1, 1)
    for matrix in (ring, np.block([[np.zeros((1, 1)), np.eye(1, cycle)], [np.zeros((cycle, 1)), ring]])):
        chain = rgfast.MarkovChain(matrix)
        assert period(matrix, chain.stationary.numpy()) == cycle
        assert chain.correlation_length == chain.relaxation_time == math.inf


def test_the_period_is_that_of_all_cycles():
    # Cycles of 4 and 6 share the first state: period 2, with a second class of odd cycles that is left.
    follows = np.zeros((11, 11))
    for path in ([0, 1, 2, 3, 0], [0, 4, 5, 6, 7, 8, 0], [9, 10, 9], [9, 9], [10, 0]):
        for one, next_one in pairwise(path):
            follows[one, next_one] = 1
    matrix = follows / follows.sum(1, keepdims=True)
    chain = rgfast.MarkovChain(matrix)
    assert period(matrix, chain.stationary.numpy()) == 2
    assert chain.relaxation_time == math.inf


def test_a_fast_chain_is_read_from_its_eigenvalues():
    matrix = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
    assert rgfast.MarkovChain(matrix).relaxation_time == pytest.approx(2.5, rel=1e-14)
    assert rgfast.MarkovChain(np.full((3, 3), 1 / 3)).correlation_length == 0.0
