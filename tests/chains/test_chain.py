"""The chain's matrix and spectrum: exact correlation lengths, properties of every kind, refusals."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rgfast import MarkovChain
from rgfast.chains import modes

LABELS = [
    "two-scale",
    "two-scale:r=30",
    "two-scale:K=2",
    "two-scale:K=2,r=1.5",
    "lazy",
    "ring-heat",
    "cyclic",
    "random-reversible",
    "random-reversible:seed=3",
    "zipf-tree",
    "zipf-tree:spread=2.5",
]
BIASED = [[0.9, 0.1, 0.0], [0.0, 0.8, 0.2], [0.5, 0.0, 0.5]]


def uniform(states: int) -> torch.Tensor:
    return torch.full((states, states), 1 / states, dtype=torch.float64)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("states", [4, 16, 36])
@pytest.mark.parametrize("xi", [0.2, 0.5, 1, 1.2, 3, 6.7, 7, 50, 200])
def test_correlation_length_is_exact_by_formula_and_in_the_matrix(label: str, states: int, xi: float) -> None:
    chain = MarkovChain.from_label(label, xi, states)
    p = chain.transition.numpy()
    assert chain.label == label
    assert chain.states == states
    assert chain.correlation_length == pytest.approx(xi, rel=1e-12)
    assert -1 / math.log(np.sort(np.abs(np.linalg.eigvals(p)))[-2]) == pytest.approx(xi, rel=1e-12)
    assert chain.relaxation_time == pytest.approx(1 / (1 - math.exp(-1 / xi)), rel=1e-12)
    assert (p >= 0).all()
    np.testing.assert_allclose(p.sum(1), 1, rtol=0, atol=1e-15)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("xi", [0.05, 5000])
def test_ends_of_the_range_are_resolved_by_the_matrix(label: str, xi: float) -> None:
    chain = MarkovChain.from_label(label, xi)
    held = MarkovChain(chain.transition).correlation_length
    assert chain.correlation_length == pytest.approx(xi, rel=1e-12)
    assert held == pytest.approx(xi, rel=1e-7)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("xi", [0.3, 1, 7])
def test_formula_spectrum_is_that_of_the_matrix(label: str, xi: float) -> None:
    chain = MarkovChain.from_label(label, xi)
    computed = MarkovChain(chain.transition).eigenvalues.to(torch.complex128)
    known = chain.eigenvalues.to(torch.complex128)
    # Sorting by modulus can swap eigenvalues equal to rounding, so match each to its nearest.
    assert float((computed[:, None] - known).abs().min(1).values.max()) < 1e-13
    assert float((computed[:, None] - known).abs().min(0).values.max()) < 1e-13
    assert complex(known[0]) == 1
    assert bool((known.abs().diff() <= 1e-15).all())


def test_two_scale_is_the_formula() -> None:
    lam, states, clusters, r = math.exp(-1 / 7), 12, 3, 2.5
    p = MarkovChain.from_correlation_length(7, states, clusters=clusters, fast_exponent=r).transition
    member = torch.arange(states) * clusters // states
    c = (member[:, None] == member).double() * clusters / states
    eye = torch.eye(states, dtype=torch.float64)
    expected = uniform(states) + lam * (c - uniform(states)) + lam**r * (eye - c)
    torch.testing.assert_close(p, expected, rtol=0, atol=1e-15)
    values = MarkovChain.from_correlation_length(7, states, clusters=clusters, fast_exponent=r).eigenvalues
    expected_values = torch.tensor([1.0] + [lam] * 2 + [lam**r] * 9, dtype=torch.float64)
    torch.testing.assert_close(values, expected_values, rtol=1e-14, atol=0)


def test_lazy_and_iid_are_their_formulas() -> None:
    lam = math.exp(-1 / 3)
    lazy = MarkovChain.from_correlation_length(3, 5, "lazy").transition
    expected = (1 - lam) * uniform(5) + lam * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(lazy, expected, rtol=0, atol=1e-15)
    iid = MarkovChain.from_label("iid", 7, 5)
    assert torch.equal(iid.transition, uniform(5))
    assert iid.correlation_length == 0
    assert iid.relaxation_time == 1
    assert iid.mutual_information() == 0


def test_ring_heat_is_the_matrix_exponential_of_the_ring_laplacian() -> None:
    from scipy.linalg import expm

    shift = np.roll(np.eye(9), 1, axis=1)
    rate = 2 - 2 * math.cos(2 * math.pi / 9)
    heat = MarkovChain.from_correlation_length(3, 9, "ring-heat").transition.numpy()
    np.testing.assert_allclose(heat, expm((shift + shift.T - 2 * np.eye(9)) / (3 * rate)), rtol=0, atol=1e-14)
    drift = MarkovChain.from_correlation_length(3, 9, "cyclic").transition.numpy()
    np.testing.assert_allclose(drift, expm((shift - np.eye(9)) / (3 * rate / 2)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("label", [label for label in LABELS if not label.startswith("zipf-tree")])
@pytest.mark.parametrize("k", [2, 7])
def test_every_kind_but_one_is_a_semigroup(label: str, k: int) -> None:
    long = MarkovChain.from_label(label, 7)
    short = MarkovChain.from_label(label, 7 / k)
    power = long.power(k)
    torch.testing.assert_close(power.transition, short.transition, rtol=0, atol=1e-14)
    torch.testing.assert_close(long.decimate(k).transition, power.transition, rtol=0, atol=0)
    assert power.label == label
    assert power.correlation_length == pytest.approx(7 / k, rel=1e-12)


@pytest.mark.parametrize("states", [2, 3, 5, 16])
@pytest.mark.parametrize("xi", [0.5, 1.2, 6.7])
def test_zipf_tree_has_another_stationary_distribution_at_every_xi(states: int, xi: float) -> None:
    chain = MarkovChain.from_label("zipf-tree", xi, states)
    weight = np.arange(1, states + 1.0) ** (-2 / (1 + xi))
    pi = weight / weight.sum()
    np.testing.assert_allclose(chain.stationary.numpy(), pi, rtol=1e-13)
    p = chain.transition.numpy()
    # Reversible, so that the modes are real and orthogonal under pi.
    np.testing.assert_allclose(pi[:, None] * p, (pi[:, None] * p).T, rtol=0, atol=1e-16)
    lengths = -1 / np.log(np.sort(np.linalg.eigvals(p).real)[::-1][1:])
    expected = xi * 5.0 ** (-np.arange(states - 1) / max(1, states - 2))
    np.testing.assert_allclose(lengths, expected, rtol=1e-10)
    assert all(space.multiplicity == 1 for space in chain.eigenspaces())


def test_zipf_tree_of_three_states_is_its_formula() -> None:
    chain = MarkovChain.from_label("zipf-tree:spread=2", 3, 3)
    weight = np.array([1, 2**-0.5, 3**-0.5])
    pi = np.tile(weight / weight.sum(), (3, 1))
    halves = np.zeros((3, 3))
    halves[:2, :2], halves[2, 2] = weight[:2] / weight[:2].sum(), 1
    slow, fast = math.exp(-1 / 3), math.exp(-2 / 3)
    expected = pi + slow * (halves - pi) + fast * (np.eye(3) - halves)
    np.testing.assert_allclose(chain.transition.numpy(), expected, rtol=0, atol=1e-15)


def test_a_power_of_zipf_tree_is_no_zipf_tree() -> None:
    chain = MarkovChain.from_label("zipf-tree", 6)
    power = chain.power(3)
    assert (chain.power(1).label, power.label) == ("zipf-tree", "zipf-tree^3")
    assert power.correlation_length == pytest.approx(2, rel=1e-12)
    torch.testing.assert_close(power.stationary, chain.stationary, rtol=1e-12, atol=0)
    assert power.power(2).label == "zipf-tree^3^2"


def test_power_of_a_matrix_says_so_in_its_label() -> None:
    chain = MarkovChain(BIASED)
    assert chain.power(1).label == "matrix"
    assert chain.power(3).label == "matrix^3"
    assert chain.power(3).correlation_length == pytest.approx(chain.correlation_length / 3, rel=1e-12)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        chain.power(0)


def test_cyclic_is_not_reversible_and_has_complex_pairs() -> None:
    chain = MarkovChain.from_correlation_length(7, kind="cyclic")
    p, values = chain.transition, chain.eigenvalues
    assert float((p - p.T).abs().max()) > 1e-2
    assert values.dtype == torch.complex128
    assert float(values[1].imag) > 0
    assert complex(values[2]) == complex(values[1]).conjugate()


def test_random_reversible_is_reversible_under_an_uneven_stationary_distribution() -> None:
    chain = MarkovChain.from_label("random-reversible:seed=5", 2, 11)
    flow = chain.stationary[:, None] * chain.transition
    torch.testing.assert_close(flow, flow.T, rtol=0, atol=1e-16)
    assert float(chain.stationary.max() / chain.stationary.min()) > 1.5
    other = MarkovChain.from_label("random-reversible:seed=6", 2, 11)
    assert float((chain.transition - other.transition).abs().max()) > 1e-2


@pytest.mark.parametrize("label", [*LABELS, "iid"])
def test_stationary_is_stationary(label: str) -> None:
    chain = MarkovChain.from_label(label, 3)
    torch.testing.assert_close(chain.stationary @ chain.transition, chain.stationary, rtol=0, atol=1e-16)
    assert float(chain.stationary.sum()) == pytest.approx(1, abs=1e-15)


def test_stationary_keeps_tiny_probabilities_and_leaves_transient_states() -> None:
    # Birth-death with up 1e-6: pi is geometric by detailed balance, down to 1e-30.
    up, down = 1e-6, 0.5
    p = np.diag([up] * 5, 1) + np.diag([down] * 5, -1)
    p += np.diag(1 - p.sum(1))
    ratio = (up / down) ** np.arange(6)
    np.testing.assert_allclose(MarkovChain(p).stationary.numpy(), ratio / ratio.sum(), rtol=1e-9)
    leaving = MarkovChain([[0.5, 0.25, 0.25], [0, 0.9, 0.1], [0, 0.3, 0.7]])
    np.testing.assert_allclose(leaving.stationary.numpy(), [0, 0.75, 0.25], atol=1e-16)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(0, 2**32 - 1), st.floats(0, 0.7))
def test_any_matrix(states: int, seed: int, zeros: float) -> None:
    rng = np.random.default_rng(seed)
    p = rng.random((states, states)) * (rng.random((states, states)) >= zeros) + 1e-3 * np.eye(states, k=1)
    p[-1, 0] += 1e-3
    p /= p.sum(1, keepdims=True)
    chain = MarkovChain(p)
    pi = chain.stationary.numpy()
    np.testing.assert_allclose(pi @ p, pi, atol=1e-14)
    moduli = np.sort(np.abs(np.linalg.eigvals(p)))[::-1]
    np.testing.assert_allclose(chain.eigenvalues.abs().numpy(), moduli, atol=1e-6)
    assert chain.eigenvalues[0] == 1
    assert 0 <= chain.mutual_information() <= math.log(states) + 1e-12


@pytest.mark.parametrize("wrap", [np.array, torch.tensor, list, lambda p: torch.tensor(p).float()])
def test_matrices_of_any_make(wrap: Callable[..., Any]) -> None:
    chain = MarkovChain(wrap(BIASED))
    assert chain.transition.dtype == torch.float64
    np.testing.assert_allclose(chain.transition.numpy(), BIASED, atol=1e-7)
    np.testing.assert_allclose(chain.transition.sum(1).numpy(), 1, atol=1e-15)


def test_periodic_chain_never_forgets() -> None:
    chain = MarkovChain([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    assert chain.correlation_length == math.inf
    assert chain.relaxation_time == math.inf
    with pytest.raises(ValueError, match="transition must have a unique stationary distribution, got 3"):
        chain.power(3)


def test_chain_is_immutable_and_survives_pickling() -> None:
    given = np.array(BIASED)
    chain = MarkovChain(given)
    given[0] = 0
    chain.transition.zero_()
    chain.stationary.zero_()
    chain.eigenvalues.zero_()
    for name in ("transition", "stationary", "eigenvalues", "label", "states", "correlation_length"):
        with pytest.raises(AttributeError):
            setattr(chain, name, None)
    np.testing.assert_array_equal(chain.transition.numpy(), BIASED)
    built = MarkovChain.from_correlation_length(7)
    built.sample(2, 3)
    again = pickle.loads(pickle.dumps(built))
    assert torch.equal(again.transition, built.transition)
    assert again.correlation_length == built.correlation_length
    assert torch.equal(
        again.sample(5, 7, torch.Generator().manual_seed(1)),
        built.sample(5, 7, torch.Generator().manual_seed(1)),
    )


def test_autocorrelation_of_modes_and_observables() -> None:
    chain = MarkovChain.from_correlation_length(7)
    lags = torch.tensor([[0, 1], [7, 30]])
    torch.testing.assert_close(chain.autocorrelation(lags), torch.exp(-lags.double() / 7), rtol=1e-13, atol=0)
    fast = chain.eigenspaces()[2].basis[:, 0]
    expected = torch.exp(-lags.double() * 4 / 7)
    torch.testing.assert_close(chain.autocorrelation(lags, fast), expected, rtol=1e-11, atol=1e-14)
    assert chain.autocorrelation(3).shape == ()
    skewed = MarkovChain(BIASED)
    f = np.array([1.0, -2.0, 5.0])
    pi, p = skewed.stationary.numpy(), skewed.transition.numpy()
    mean = pi @ f
    covariance = [f @ np.diag(pi) @ np.linalg.matrix_power(p, k) @ f - mean**2 for k in range(4)]
    np.testing.assert_allclose(
        skewed.autocorrelation(range(4), f).numpy(), np.array(covariance) / covariance[0]
    )


def test_autocorrelation_of_a_complex_pair_is_the_average_over_its_modes() -> None:
    chain = MarkovChain.from_correlation_length(7, kind="cyclic")
    lags = list(range(12))
    basis = chain.eigenspaces()[1].basis
    mean = torch.stack([chain.autocorrelation(lags, basis[:, i]) for i in range(2)]).mean(0)
    torch.testing.assert_close(chain.autocorrelation(lags), mean, rtol=0, atol=1e-13)
    assert float(chain.autocorrelation(lags).min()) < 0


def test_mutual_information_against_entropies() -> None:
    chain = MarkovChain(BIASED)
    joint = (chain.stationary[:, None] * chain.transition).numpy()

    def h(q: np.ndarray) -> float:
        return float(-(q[q > 0] * np.log(q[q > 0])).sum())

    expected = h(joint.sum(0)) + h(joint.sum(1)) - h(joint)
    assert chain.mutual_information() == pytest.approx(expected, abs=1e-14)
    assert chain.mutual_information(4) == pytest.approx(chain.power(4).mutual_information(), abs=1e-15)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: MarkovChain.from_correlation_length(0), "xi must be positive and finite, got 0"),
        (lambda: MarkovChain.from_correlation_length(-1.5), "xi must be positive and finite, got -1.5"),
        (lambda: MarkovChain.from_correlation_length(math.nan), "xi must be positive and finite, got nan"),
        (lambda: MarkovChain.from_correlation_length(math.inf), "xi must be positive and finite, got inf"),
        (lambda: MarkovChain.from_correlation_length(0.01), "xi must lie between 0.05 and 5000, .* got 0.01"),
        (
            lambda: MarkovChain.from_correlation_length(1e6),
            "xi must lie between 0.05 and 5000, .* got 1000000.0",
        ),
        (
            lambda: MarkovChain.from_correlation_length(1, 18),
            r"states must be divisible by clusters \(4\), got 18",
        ),
        (lambda: MarkovChain.from_correlation_length(1, 1), "states must be at least 2, got 1"),
        (lambda: MarkovChain.from_correlation_length(1, clusters=1), "clusters must be at least 2, got 1"),
        (
            lambda: MarkovChain.from_correlation_length(1, fast_exponent=0.5),
            "fast_exponent must be .* at least 1 .* 0.5",
        ),
        (lambda: MarkovChain.from_correlation_length(1, fast_exponent=-2), "fast_exponent must be .* got -2"),
        (lambda: MarkovChain.from_correlation_length(1, fast_exponent=math.nan), "fast_exponent .* got nan"),
        (
            lambda: MarkovChain.from_correlation_length(1, kind="markov"),
            "kind must be one of 'two-scale', .*'markov'",
        ),
        (lambda: MarkovChain.from_correlation_length(1, 2, "cyclic"), "states must be at least 3 .* got 2"),
        (lambda: MarkovChain.from_label("random-reversible:seed=-1", 1), "seed must be at least 0, got -1"),
        (
            lambda: MarkovChain.from_label("three-scale", 1),
            "label must start with one of two-scale, .*'three-scale'",
        ),
        (lambda: MarkovChain.from_label("lazy:K=2", 1), "label: lazy takes no options, got 'lazy:K=2'"),
        (lambda: MarkovChain.from_label("two-scale:q=2", 1), "label: two-scale takes each of K, r once"),
        (lambda: MarkovChain.from_label("two-scale:K=2,K=2", 1), "label: two-scale takes each of K, r once"),
        (lambda: MarkovChain.from_label("two-scale:", 1), "label: two-scale takes each of K, r once"),
        (lambda: MarkovChain.from_label("two-scale:K=two", 1), "label: K must be a number"),
        (lambda: MarkovChain.from_label("two-scale:K=2.5", 1), "label: K must be a number"),
        (
            lambda: MarkovChain([[0.5, 0.4], [0.5, 0.5]]),
            "transition must have rows that sum to 1, got 0.9 in row 0",
        ),
        (lambda: MarkovChain([[0.5, 0.5]]), r"transition must be a square matrix, got shape \(1, 2\)"),
        (
            lambda: MarkovChain([[0.5, 0.5], [1.0]]),
            "transition must be a square matrix, got rows of different",
        ),
        (
            lambda: MarkovChain([[1.5, -0.5], [0.5, 0.5]]),
            "finite and nonnegative, got -0.5 at row 0, column 1",
        ),
        (
            lambda: MarkovChain([[0.5, 0.5], [math.nan, 1]]),
            "finite and nonnegative, got nan at row 1, column 0",
        ),
        (lambda: MarkovChain([[math.inf, 0], [0, 1]]), "finite and nonnegative, got inf at row 0, column 0"),
        (lambda: MarkovChain([[1.0]]), "transition must have at least 2 states, got 1"),
        (lambda: MarkovChain(np.eye(3)), "unique stationary distribution, got 3 recurrent classes"),
        (lambda: MarkovChain(BIASED).autocorrelation([1, -1]), "lags must be at least 0, got -1"),
        (lambda: MarkovChain(BIASED).autocorrelation(1, [1.0, 2.0]), "observable must be 3 finite numbers"),
        (lambda: MarkovChain(BIASED).autocorrelation(1, [2.0, 2.0, 2.0]), "observable must vary"),
        (lambda: MarkovChain(BIASED).eigenspaces(-1), "tolerance must be finite and at least 0, got -1"),
        (lambda: MarkovChain(BIASED).mutual_information(0), "lag must be at least 1, got 0"),
    ],
)
def test_bad_values_are_refused_in_one_sentence(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: MarkovChain.from_correlation_length("7"),
            "xi must be a number, positive and finite, got '7'",
        ),
        (
            lambda: MarkovChain.from_correlation_length(True),
            "xi must be a number, positive and finite, got True",
        ),
        (lambda: MarkovChain.from_correlation_length(7, 16.0), "states must be a whole number, got 16.0"),
        (lambda: MarkovChain.from_label(3, 7), "label must be a string such as 'two-scale:r=30', got 3"),
        (lambda: MarkovChain([["a", "b"], ["c", "d"]]), "transition must hold real numbers"),
        (lambda: MarkovChain(torch.eye(2).half()), "transition must hold real numbers .* got dtype float16"),
        (lambda: MarkovChain(torch.eye(2).bfloat16()), "transition must hold real numbers .* bfloat16"),
        (lambda: MarkovChain(BIASED).autocorrelation([0.5]), "lags must be integers"),
    ],
)
def test_bad_types_are_refused_in_one_sentence(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        call()


def test_from_npy(tmp_path: Path) -> None:
    path = tmp_path / "chain.npy"
    np.save(path, np.array(BIASED))
    np.testing.assert_array_equal(MarkovChain.from_npy(path).transition.numpy(), BIASED)
    np.save(path, np.array([[0.5, 0.2], [0.5, 0.5]]))
    with pytest.raises(ValueError, match=r"rows that sum to 1, got 0\.7 in row 0 \(from .*chain\.npy"):
        MarkovChain.from_npy(path)
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"path must be a \.npy file with a matrix of numbers"):
        MarkovChain.from_npy(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"path must be a \.npy file with a matrix of numbers"):
        MarkovChain.from_npy(path)
    np.savez(tmp_path / "chain.npz", p=np.array(BIASED))
    with pytest.raises(ValueError, match=r"path must be a \.npy file with one array"):
        MarkovChain.from_npy(tmp_path / "chain.npz")
    with pytest.raises(FileNotFoundError):
        MarkovChain.from_npy(tmp_path / "none.npy")


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("xi", [1, 7])
def test_eigenspaces_resolve_the_identity(label: str, xi: float) -> None:
    chain = MarkovChain.from_label(label, xi)
    check_eigenspaces(chain)
    spaces = chain.eigenspaces()
    torch.testing.assert_close(spaces[0].projector, chain.stationary.expand(16, 16), rtol=0, atol=1e-13)


def check_eigenspaces(chain: MarkovChain, tolerance: float = 1e-8) -> None:
    p, pi = chain.transition, chain.stationary
    eye = torch.eye(chain.states, dtype=torch.float64)
    spaces = chain.eigenspaces(tolerance)
    assert sum(s.multiplicity for s in spaces) == chain.states
    torch.testing.assert_close(sum(s.projector for s in spaces), eye, rtol=0, atol=1e-9)
    assert [s.modulus for s in spaces] == sorted((s.modulus for s in spaces), reverse=True)
    weight = pi if float(pi.min()) > 0 else torch.full_like(pi, 1 / chain.states)
    for s in spaces:
        torch.testing.assert_close(s.projector @ s.projector, s.projector, rtol=0, atol=1e-9)
        torch.testing.assert_close(s.projector @ p, p @ s.projector, rtol=0, atol=1e-9)
        assert float(s.projector.trace()) == pytest.approx(s.multiplicity, abs=1e-9)
        gram = s.basis.T @ (weight[:, None] * s.basis)
        torch.testing.assert_close(gram, torch.eye(s.multiplicity, dtype=torch.float64), rtol=0, atol=1e-9)
        torch.testing.assert_close(s.projector @ s.basis, s.basis, rtol=0, atol=1e-8)


def test_two_scale_eigenspaces_are_clusters_and_what_is_within_them() -> None:
    spaces = MarkovChain.from_correlation_length(7).eigenspaces()
    member = torch.arange(16) // 4
    c = (member[:, None] == member).double() / 4
    torch.testing.assert_close(spaces[1].projector, c - uniform(16), rtol=0, atol=1e-13)
    torch.testing.assert_close(spaces[2].projector, torch.eye(16).double() - c, rtol=0, atol=1e-13)


def test_eigenspaces_of_a_complex_pair_are_one_real_space() -> None:
    spaces = MarkovChain.from_correlation_length(7, 8, "cyclic").eigenspaces()
    assert [s.multiplicity for s in spaces] == [1, 2, 2, 2, 1]
    assert spaces[1].eigenvalue.imag > 0


def test_eigenspaces_where_eigenvectors_are_missing() -> None:
    # A chain with a nilpotent part: eigenvalue 0 has a Jordan block of size 2, and no basis of eigenvectors.
    p = [[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5], [0.25, 0.25, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25]]
    jordan = MarkovChain(p)
    check_eigenspaces(jordan, 1e-5)
    transient = MarkovChain([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5]])
    check_eigenspaces(transient, 1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**32 - 1))
def test_eigenspaces_of_any_matrix(states: int, seed: int) -> None:
    p = np.random.default_rng(seed).dirichlet(np.ones(states), states)
    check_eigenspaces(MarkovChain(p))


def test_a_slightly_irreversible_matrix_is_not_taken_for_a_reversible_one() -> None:
    p = np.full((3, 3), 1 / 3) + 1e-9 * (np.roll(np.eye(3), 1, 1) - np.roll(np.eye(3), -1, 1))
    assert not modes.is_reversible(p, np.full(3, 1 / 3))
    assert MarkovChain(p).eigenvalues.is_complex()
