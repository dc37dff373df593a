"""Samples against the chain: exact frequencies by chi-square, correlations, the same bits by every route."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from rgfast import MarkovChain
from rgfast.chains import sampling

SPARSE = [[0.9, 0.1, 0.0], [0.0, 0.8, 0.2], [0.5, 0.0, 0.5]]
CHAINS = [
    MarkovChain.from_correlation_length(1),
    MarkovChain.from_correlation_length(7),
    MarkovChain.from_correlation_length(3, 7, "cyclic"),
    MarkovChain.from_correlation_length(2, 9, "random-reversible"),
    MarkovChain.from_label("iid", 1),
    MarkovChain(SPARSE),
]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """p-value that ``counts`` come from ``expected`` frequencies (multinomial)."""
    live = expected > 0
    assert counts[~live].sum() == 0
    observed, probability = counts[live], expected[live] / expected.sum()
    return float(stats.chisquare(observed, probability * observed.sum()).pvalue)


@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: c.label + str(c.states))
@pytest.mark.parametrize("length", [2, 12])
def test_pairs_by_chi_square(chain: MarkovChain, length: int) -> None:
    # One pair from each sequence, at its end, so that the counts are independent.
    n, states = 3_000_000 // length, chain.states
    tokens = chain.sample(n, length, seeded(length))
    pair = (tokens[:, -2] * states + tokens[:, -1]).bincount(minlength=states**2).numpy()
    joint = (chain.stationary[:, None] * chain.transition).numpy().ravel()
    assert chi_square(pair, joint) > 1e-3
    for position in (0, length - 1):
        single = tokens[:, position].bincount(minlength=states).numpy()
        assert chi_square(single, chain.stationary.numpy()) > 1e-3


@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: c.label + str(c.states))
def test_transitions_of_few_long_sequences_by_chi_square(chain: MarkovChain) -> None:
    # Given the state before, successors are independent draws of its row (400,000 transitions).
    tokens = chain.sample(4, 100_000, seeded(5))
    states = chain.states
    counts = (tokens[:, :-1] * states + tokens[:, 1:]).flatten().bincount(minlength=states**2)
    table = counts.view(states, states).numpy()
    for state in range(states):
        assert chi_square(table[state], chain.transition[state].numpy()) > 1e-4


def test_a_wrong_chain_fails_the_chi_square() -> None:
    chain = MarkovChain.from_correlation_length(7)
    off = MarkovChain.from_correlation_length(7.3)
    tokens = chain.sample(1_500_000, 2, seeded(0))
    pair = (tokens[:, 0] * 16 + tokens[:, 1]).bincount(minlength=256).numpy()
    assert chi_square(pair, (off.stationary[:, None] * off.transition).numpy().ravel()) < 1e-3


@pytest.mark.parametrize("label", ["two-scale", "lazy", "ring-heat", "cyclic", "random-reversible"])
def test_measured_autocorrelation(label: str) -> None:
    chain = MarkovChain.from_label(label, 7)
    tokens = chain.sample(100_000, 40, seeded(3))
    basis = chain.eigenspaces()[1].basis
    features = basis[tokens]  # [n, T, m], mean 0 and variance 1 under the stationary distribution
    for lag in (1, 7, 20):
        product = (features[:, 0] * features[:, lag]).mean(1)
        error = float(product.std()) / len(product) ** 0.5
        assert abs(float(product.mean()) - float(chain.autocorrelation(lag))) < 4 * error
    observable = torch.arange(16, dtype=torch.float64).sin()
    seen = observable[tokens]
    for lag in (1, 5):
        measured = np.corrcoef(seen[:, 3].numpy(), seen[:, 3 + lag].numpy())[0, 1]
        assert abs(measured - float(chain.autocorrelation(lag, observable))) < 4 / 100_000**0.5


def test_same_seed_same_tokens_and_the_stream_goes_on() -> None:
    chain = MarkovChain.from_correlation_length(7)
    generator = seeded(4)
    first, second = chain.sample(50, 12, generator), chain.sample(50, 12, generator)
    assert torch.equal(first, chain.sample(50, 12, seeded(4)))
    assert not torch.equal(first, second)
    assert first.dtype == torch.int64
    assert first.is_contiguous()
    torch.manual_seed(4)
    assert torch.equal(chain.sample(50, 12), first)


def test_any_thread_count_gives_the_same_tokens() -> None:
    chain = MarkovChain.from_correlation_length(7)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append((chain.sample(20_000, 12, seeded(0)), chain.sample(2, 40_000, seeded(0))))
    finally:
        torch.set_num_threads(threads)
    for wide, narrow in found[1:]:
        assert torch.equal(wide, found[0][0])
        assert torch.equal(narrow, found[0][1])


@pytest.mark.parametrize("n", [1, 3, 60])
@pytest.mark.parametrize("length", [1, 2, 17, 1024])
def test_both_routes_give_the_same_tokens(n: int, length: int) -> None:
    chain = MarkovChain.from_correlation_length(3, 8, "cyclic")
    wide = sampling.sample(chain._tables, n, length, seeded(1), few=False)
    few = sampling.sample(chain._tables, n, length, seeded(1), few=True)
    assert torch.equal(wide, few)


def test_more_rows_than_are_walked_together() -> None:
    chain = MarkovChain.from_correlation_length(7)
    n = 2 * sampling._ROWS + 5
    tokens = chain.sample(n, 3, seeded(0))
    assert tokens.shape == (n, 3)
    tail = tokens[-sampling._ROWS :, 0].bincount(minlength=16).numpy()
    assert chi_square(tail, chain.stationary.numpy()) > 1e-3


def test_alias_tables_hold_the_probabilities_exactly() -> None:
    rng = np.random.default_rng(0)
    for states in (2, 3, 16, 100):
        rows = rng.dirichlet(np.full(states, 0.1), 20)
        rows[rows < 1e-3] = 0
        rows /= rows.sum(1, keepdims=True)
        for row in rows:
            threshold, alias = sampling._alias_row(row)
            held = threshold.copy()
            np.add.at(held, alias, 1 - threshold)
            np.testing.assert_allclose(held / states, row, rtol=0, atol=4e-16)
            assert (held[row == 0] == 0).all()


def test_a_transition_of_probability_zero_never_occurs_even_at_the_edges_of_a_column() -> None:
    chain = MarkovChain(SPARSE)
    column = torch.arange(3).repeat_interleave(3)[None]
    fraction = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64).repeat(3)[None]
    for state in range(3):
        after = sampling._walk(chain._tables, column, fraction, torch.full((9,), state))[0]
        assert bool((chain.transition[state][after] > 0).all())


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((0, 5), ValueError, "n must be at least 1, got 0"),
        ((5, 0), ValueError, "length must be at least 1, got 0"),
        ((5.0, 5), TypeError, "n must be a whole number, got 5.0"),
        ((5, 5, 7), TypeError, r"generator must be a torch\.Generator or None, got int"),
    ],
)
def test_refusals(arguments: tuple, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        MarkovChain(SPARSE).sample(*arguments)
