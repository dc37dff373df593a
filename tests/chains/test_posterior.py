"""The Bayes posterior against enumeration of all sequences, and the captured fraction."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rgfast import MarkovChain
from rgfast.chains import captured_fraction

SPARSE = [[0.9, 0.1, 0.0], [0.0, 0.8, 0.2], [0.5, 0.0, 0.5]]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def enumerated(chain: MarkovChain, tokens: Tensor, mask: Tensor, radius: int | None = None) -> Tensor:
    """Posterior by summing the probability of every sequence of the chain's states."""
    n, length = tokens.shape
    states = chain.states
    pi, p = chain.stationary.numpy(), chain.transition.numpy()
    paths = np.array(list(itertools.product(range(states), repeat=length)))
    weight = pi[paths[:, 0]] * np.prod(p[paths[:, :-1], paths[:, 1:]], axis=1)
    out = np.zeros((n, length, states))
    for i in range(n):
        for t in range(length):
            near = np.ones(length, bool) if radius is None else np.abs(np.arange(length) - t) <= radius
            used = near & ~mask[i].numpy()
            fits = (paths[:, used] == tokens[i].numpy()[used]).all(1)
            np.add.at(out[i, t], paths[fits, t], weight[fits])
            out[i, t] /= out[i, t].sum()
    return torch.from_numpy(out)


def textbook(chain: MarkovChain, tokens: Tensor, mask: Tensor) -> Tensor:
    """Scaled forward-backward over every position, one-hot evidence where visible (Rabiner 1989)."""
    n, length = tokens.shape
    p, evidence = chain.transition, torch.ones(n, length, chain.states, dtype=torch.float64)
    evidence[~mask] = torch.nn.functional.one_hot(tokens[~mask], chain.states).double()
    forward, backward = torch.empty_like(evidence), torch.ones_like(evidence)
    message = chain.stationary.expand(n, -1)
    for t in range(length):
        forward[:, t] = message * evidence[:, t]
        forward[:, t] /= forward[:, t].sum(1, keepdim=True)
        message = forward[:, t] @ p
    for t in range(length - 2, -1, -1):
        backward[:, t] = (backward[:, t + 1] * evidence[:, t + 1]) @ p.T
        backward[:, t] /= backward[:, t].sum(1, keepdim=True)
    both = forward * backward
    return both / both.sum(2, keepdim=True)


@pytest.mark.parametrize("radius", [None, 0, 1, 2, 3, 6])
@pytest.mark.parametrize(
    "chain",
    [
        MarkovChain.from_correlation_length(2, 4, clusters=2),
        MarkovChain.from_correlation_length(3, 3, "cyclic"),
        MarkovChain.from_correlation_length(1, 3, "random-reversible"),
        MarkovChain(SPARSE),
        MarkovChain([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0.5, 0.5], [0, 0, 0.25, 0.75]]),
    ],
    ids=lambda chain: chain.label + str(chain.states),
)
def test_against_enumeration(chain: MarkovChain, radius: int | None) -> None:
    length = 6
    tokens = chain.sample(60, length, seeded(0))
    mask = torch.rand(60, length, generator=seeded(1)) < torch.rand(60, 1, generator=seeded(2))
    mask[0], mask[1] = True, False
    found = chain.bayes_posterior(tokens, mask, radius=radius)
    assert found.dtype == torch.float64
    assert found.shape == (60, length, chain.states)
    torch.testing.assert_close(found, enumerated(chain, tokens, mask, radius), rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 4), st.integers(1, 5), st.integers(0, 2**31), st.integers(0, 5) | st.none())
def test_against_enumeration_for_any_chain(states: int, length: int, seed: int, radius: int | None) -> None:
    rng = np.random.default_rng(seed)
    chain = MarkovChain(rng.dirichlet(np.full(states, 0.5), states))
    tokens = chain.sample(5, length, seeded(seed))
    mask = torch.from_numpy(rng.random((5, length)) < 0.5)
    found = chain.bayes_posterior(tokens, mask, radius)
    torch.testing.assert_close(found, enumerated(chain, tokens, mask, radius), rtol=0, atol=1e-12)


def test_all_hidden_is_the_stationary_distribution_and_none_hidden_the_tokens() -> None:
    chain = MarkovChain.from_label("random-reversible", 7)
    tokens = chain.sample(3, 9, seeded(0))
    hidden = chain.bayes_posterior(tokens, torch.ones(3, 9, dtype=torch.bool))
    torch.testing.assert_close(hidden, chain.stationary.expand(3, 9, 16), rtol=1e-14, atol=0)
    seen = chain.bayes_posterior(tokens, torch.zeros(3, 9, dtype=torch.bool))
    assert torch.equal(seen, torch.nn.functional.one_hot(tokens, 16).double())
    zero = chain.bayes_posterior(tokens, torch.zeros(3, 9, dtype=torch.bool), radius=0)
    assert torch.equal(zero, seen)


@pytest.mark.parametrize("label", ["two-scale", "cyclic", "random-reversible", "ring-heat"])
def test_long_sequences_against_textbook_forward_backward(label: str) -> None:
    chain = MarkovChain.from_label(label, 50)
    tokens = chain.sample(4, 4096, seeded(0))
    mask = torch.rand(4, 4096, generator=seeded(1)) < torch.tensor([0.2, 0.9, 0.999, 0.5])[:, None]
    mask[3, 10:4090] = True
    found = chain.bayes_posterior(tokens, mask)
    torch.testing.assert_close(found, textbook(chain, tokens, mask), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.sum(2), torch.ones(4, 4096, dtype=torch.float64), rtol=0, atol=1e-14)


def test_rare_evidence_keeps_its_precision() -> None:
    # Each side of the hidden token has probability around 1e-160: their product is denormal, short of digits.
    a, b = 3e-160, 7e-160
    p = [[1 - 2 * a, a, a, 0.0], [0.0, 1 - b, 0.0, b], [0.0, 0.0, 1 - a, a], [a, 0.0, 0.0, 1 - a]]
    chain = MarkovChain(p)
    found = chain.bayes_posterior(torch.tensor([[0, 1, 3]]), torch.tensor([[False, True, False]]))
    expected = torch.tensor([0.0, b, a, 0.0], dtype=torch.float64) / (a + b)
    torch.testing.assert_close(found[0, 1], expected, rtol=1e-14, atol=0)


def test_hidden_tokens_are_never_looked_at() -> None:
    chain = MarkovChain(SPARSE)
    tokens = chain.sample(20, 8, seeded(0))
    mask = torch.rand(20, 8, generator=seeded(1)) < 0.4
    expected = chain.bayes_posterior(tokens, mask)
    for value in (-1, 3, 10**9):
        assert torch.equal(chain.bayes_posterior(tokens.masked_fill(mask, value), mask), expected)
    assert torch.equal(chain.bayes_posterior(tokens.int().T.contiguous().T, mask.T.contiguous().T), expected)


def test_radius_of_the_length_is_everything_and_widening_it_informs() -> None:
    chain = MarkovChain.from_correlation_length(7)
    tokens = chain.sample(4000, 12, seeded(0))
    mask = torch.rand(4000, 12, generator=seeded(1)) < 0.6
    full = chain.bayes_posterior(tokens, mask)
    assert torch.equal(chain.bayes_posterior(tokens, mask, radius=12), full)
    truth = tokens[mask][:, None]
    scores = [
        float(chain.bayes_posterior(tokens, mask, radius=w)[mask].gather(1, truth).log().mean())
        for w in range(6)
    ]
    assert scores[0] == pytest.approx(-math.log(16), abs=1e-12)
    assert scores == sorted(scores)


def test_posterior_is_calibrated() -> None:
    chain = MarkovChain.from_correlation_length(3, kind="cyclic")
    tokens = chain.sample(40_000, 12, seeded(0))
    mask = torch.rand(40_000, 12, generator=seeded(1)) < 0.3
    stated = chain.bayes_posterior(tokens, mask)[mask]
    hit = torch.nn.functional.one_hot(tokens[mask], 16).double()
    bins = (stated * 20).long().clamp(max=19)
    for b in range(20):
        here = bins == b
        count, variance = int(here.sum()), float((stated[here] * (1 - stated[here])).sum())
        if count > 100:
            assert abs(float((hit[here] - stated[here]).sum())) < 4 * math.sqrt(variance)


def test_empty_batch() -> None:
    chain = MarkovChain(SPARSE)
    for shape in ((0, 4), (3, 0)):
        found = chain.bayes_posterior(
            torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
        )
        assert found.shape == (*shape, 3)


HIDE = torch.tensor([[False, True, False]])


@pytest.mark.parametrize(
    ("tokens", "mask", "radius", "error", "sentence"),
    [
        (
            [[0, 0, 2], [0, 1, 2]],
            [[False] * 3] * 2,
            None,
            ValueError,
            "token 2 at position 2 of sequence 0 after",
        ),
        (
            [[0, 1, 2]] * 3 + [[1, 0, 1]],
            [[False] * 3] * 4,
            0,
            ValueError,
            "token 0 at position 1 of sequence 3",
        ),
        ([[0, 1, 3]], [[False] * 3], None, ValueError, r"0\.\.2 where they are visible, got 3 at position 2"),
        (
            [[-1, 1, 3]],
            [[False, False, True]],
            None,
            ValueError,
            "visible, got -1 at position 0 of sequence 0",
        ),
        ([0, 1], [False, True], None, ValueError, r"tokens must have shape \[n, T\], got \(2,\)"),
        (
            [[0, 1]],
            [[False]],
            None,
            ValueError,
            r"mask must have the shape of tokens, \(1, 2\), got \(1, 1\)",
        ),
        ([[0, 1]], [[False, True]], -1, ValueError, "radius must be at least 0, got -1"),
        ([[0, 1]], [[False, True]], 1.5, TypeError, "radius must be a whole number, got 1.5"),
        ([[0.0, 1.0]], [[False, True]], None, TypeError, r"tokens must be an integer torch\.Tensor"),
        ([[0, 1]], [[0, 1]], None, TypeError, r"mask must be a bool torch\.Tensor, got torch\.int64"),
    ],
)
def test_refusals(
    tokens: list, mask: list, radius: int | None, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        MarkovChain(SPARSE).bayes_posterior(torch.tensor(tokens), torch.tensor(mask), radius)


def test_impossible_first_token() -> None:
    chain = MarkovChain([[0, 1, 0], [0, 0.5, 0.5], [0, 0.5, 0.5]])
    with pytest.raises(ValueError, match="token 0 at position 0 of sequence 0, which has probability 0"):
        chain.bayes_posterior(torch.tensor([[0, 1]]), torch.tensor([[False, False]]))
    with pytest.raises(ValueError, match="token 0 at position 1 of sequence 0, which has probability 0"):
        chain.bayes_posterior(torch.tensor([[0, 0]]), torch.tensor([[True, False]]))


def problem() -> tuple[MarkovChain, Tensor, Tensor]:
    chain = MarkovChain.from_label("random-reversible", 7)
    tokens = chain.sample(50, 12, seeded(0))
    mask = torch.rand(50, 12, generator=seeded(1)) < 0.3
    return chain, chain.bayes_posterior(tokens, mask), mask


def test_captured_fraction_of_bayes_of_the_prior_and_of_a_mixture() -> None:
    chain, posterior, mask = problem()
    pi = chain.stationary
    assert float(captured_fraction(posterior.log(), posterior, mask, pi)) == pytest.approx(1, abs=1e-12)
    prior = pi.log().expand_as(posterior)
    assert float(captured_fraction(prior, posterior, mask, pi)) == pytest.approx(0, abs=1e-12)
    half = (posterior + pi).div(2).log()
    lost = told = 0.0
    for i, t in mask.nonzero().tolist():
        q, m = posterior[i, t].numpy(), half[i, t].numpy()
        lost += float((q * (np.log(q) - m)).sum())
        told += float((q * np.log(q / pi.numpy())).sum())
    found = captured_fraction(half, posterior, mask, pi)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(1 - lost / told, abs=1e-13)
    assert float(captured_fraction(half.float(), posterior, mask, pi)) == pytest.approx(
        1 - lost / told, abs=1e-6
    )
    wrong = torch.log_softmax(10 * torch.randn(50, 12, 16, generator=seeded(2)), -1)
    assert float(captured_fraction(wrong, posterior, mask, pi)) < 0


def test_captured_fraction_reads_masked_positions_only() -> None:
    chain, posterior, mask = problem()
    half = (posterior + chain.stationary).div(2).log()
    poisoned = half.masked_fill(~mask[..., None], math.nan)
    found = captured_fraction(poisoned, posterior, mask, chain.stationary)
    assert torch.equal(found, captured_fraction(half, posterior, mask, chain.stationary))


def test_captured_fraction_is_undefined_without_information() -> None:
    chain = MarkovChain.from_label("iid", 1)
    mask = torch.ones(4, 5, dtype=torch.bool)
    posterior = chain.bayes_posterior(chain.sample(4, 5, seeded(0)), mask)
    assert math.isnan(captured_fraction(posterior.log(), posterior, mask, chain.stationary))


def test_captured_fraction_where_the_posterior_excludes_states() -> None:
    chain = MarkovChain(SPARSE)
    posterior = chain.bayes_posterior(torch.tensor([[0, 1, 1]]), HIDE)
    assert float(posterior[0, 1, 2]) == 0
    assert float(captured_fraction(posterior.log(), posterior, HIDE, chain.stationary)) == pytest.approx(1)
    blind = torch.tensor([0.0, 0.0, 1.0]).log().expand(1, 3, 3)
    assert float(captured_fraction(blind, posterior, HIDE, chain.stationary)) == -math.inf


def test_captured_fraction_refusals() -> None:
    chain, posterior, mask = problem()
    good = posterior.clamp(min=1e-300).log()
    pi = chain.stationary
    none = torch.zeros_like(mask)
    cases = [
        (TypeError, "log_probs must be a floating", (good.long(), posterior, mask, pi)),
        (TypeError, "mask must be a bool", (good, posterior, mask.long(), pi)),
        (ValueError, "posterior must have the shape of log_probs", (good[..., :8], posterior, mask, pi)),
        (ValueError, r"mask must have shape \(50, 12\)", (good, posterior, mask[:, :3], pi)),
        (ValueError, r"stationary must have shape \(16,\), got \(3,\)", (good, posterior, mask, pi[:3])),
        (ValueError, "mask must select at least one position", (good, posterior, none, pi)),
        (ValueError, "log_probs must be normalised log-probabilities", (good + 2, posterior, mask, pi)),
        (
            ValueError,
            "log_probs must be normalised .* got log-sum-exp nan",
            (good * math.nan, posterior, mask, pi),
        ),
    ]
    for error, sentence, arguments in cases:
        with pytest.raises(error, match=sentence):
            captured_fraction(*arguments)
