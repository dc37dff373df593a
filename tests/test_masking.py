"""Masks and corruption: frequencies, exact counts, reproducibility, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from rgfast.masking import balanced_mask, corrupt, exact_mask, iid_mask


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_iid_mask_frequencies_and_independence() -> None:
    mask = iid_mask(200_000, 6, 0.2, seeded(0), at_least_one=False)
    assert mask.dtype == torch.bool
    code = (mask.long() * 2 ** torch.arange(6)).sum(1).bincount(minlength=64)
    hidden = torch.tensor([bin(i).count("1") for i in range(64)])
    expected = 200_000 * 0.2**hidden * 0.8 ** (6 - hidden)
    assert stats.chisquare(code.numpy(), expected.double().numpy(), sum_check=False).pvalue > 1e-3


def test_iid_mask_gives_an_empty_sequence_one_uniform_position() -> None:
    free, forced = (iid_mask(100_000, 12, 0.1, seeded(0), at_least_one=one) for one in (False, True))
    empty = ~free.any(1)
    assert 0.2 < float(empty.double().mean()) < 0.4
    assert torch.equal(forced[~empty], free[~empty])
    assert bool((forced[empty].sum(1) == 1).all())
    assert stats.chisquare(forced[empty].sum(0).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("rate", [0, 1, 0.0, 1.0])
def test_iid_mask_at_the_ends(rate: float) -> None:
    assert bool((iid_mask(50, 7, rate, seeded(0), at_least_one=False) == bool(rate)).all())
    assert bool(iid_mask(50, 7, rate, seeded(0)).any(1).all())


@pytest.mark.parametrize("n", [2048, 1000, 100, 37])
@pytest.mark.parametrize("length", [12, 16, 64])
@pytest.mark.parametrize("rate", [0.1, 0.15, 0.2, 0.5, 1.0])
def test_balanced_mask_is_balanced(n: int, length: int, rate: float) -> None:
    mask = balanced_mask(n, length, rate, seeded(0))
    counts = mask.sum(0)
    assert bool(mask.any(1).all())
    assert int(counts.min()) == int(counts.max()) == math.floor(rate * n + 0.5)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.floats(1e-6, 1), st.integers(0, 2**31))
def test_balanced_mask_of_any_shape(n: int, length: int, rate: float, seed: int) -> None:
    mask = balanced_mask(n, length, rate, seeded(seed))
    counts = mask.sum(0)
    assert mask.shape == (n, length)
    assert bool(mask.any(1).all())
    assert int(counts.max() - counts.min()) <= 1
    wanted = max(n, rate * n * length)
    assert abs(int(mask.sum()) - wanted) <= length / 2 + 1


def test_balanced_mask_is_otherwise_random() -> None:
    mask = balanced_mask(100_000, 12, 0.2, seeded(0)).double()
    # Row totals spread like those of independent positions, but for the empty rows and their donors.
    share = torch.bincount(mask.sum(1).long(), minlength=13) / 100_000
    free = torch.tensor(stats.binom(12, 0.2).pmf(range(13)))
    assert float(share[0]) == 0
    assert torch.allclose(share[3:].double(), free[3:], atol=0.04)
    assert float((share.double() - free).abs().sum()) < 4 * float(free[0]) + 0.01
    # No pair of positions is tied to another: all correlations agree, and rows do not drift along the batch.
    between = torch.corrcoef(mask.T)[~torch.eye(12, dtype=torch.bool)]
    assert float(between.std()) < 1.2 / 100_000**0.5
    halves = mask[:50_000].sum(0) - mask[50_000:].sum(0)
    assert float(halves.abs().max()) < 5 * (100_000 * 0.2 * 0.8) ** 0.5


def test_balanced_mask_of_one_sequence() -> None:
    totals = torch.stack([balanced_mask(1, 12, 0.2, seeded(i)) for i in range(3000)]).sum(0)[0]
    assert int(totals.sum()) == 2 * 3000
    assert stats.chisquare(totals.numpy()).pvalue > 1e-3


def test_exact_mask_is_uniform_over_its_choices() -> None:
    mask = exact_mask(60_000, 5, 2, seeded(0))
    assert bool((mask.sum(1) == 2).all())
    code = (mask.long() * 2 ** torch.arange(5)).sum(1).bincount(minlength=32)
    seen = code[code > 0]
    assert len(seen) == math.comb(5, 2)
    assert stats.chisquare(seen.numpy()).pvalue > 1e-3
    assert not bool(exact_mask(4, 5, 0, seeded(0)).any())
    assert bool(exact_mask(4, 5, 5, seeded(0)).all())


@pytest.mark.parametrize(
    "draw",
    [
        lambda g: iid_mask(5000, 12, 0.2, g),
        lambda g: balanced_mask(5000, 12, 0.2, g),
        lambda g: exact_mask(5000, 12, 3, g),
        lambda g: corrupt(
            torch.arange(60_000).view(5000, 12) % 16,
            torch.ones(5000, 12, dtype=torch.bool),
            16,
            16,
            "bert",
            g,
        ),
    ],
)
def test_same_seed_same_bits_for_any_thread_count(draw: Callable[[torch.Generator | None], Tensor]) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = draw(seeded(7))
        torch.set_num_threads(3)
        assert torch.equal(draw(seeded(7)), one)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(draw(seeded(8)), one)
    torch.manual_seed(7)
    assert torch.equal(draw(None), one)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_corrupt_by_the_mask_token(dtype: torch.dtype) -> None:
    tokens = torch.randint(16, (300, 12), generator=seeded(0)).to(dtype)
    before = tokens.clone()
    mask = iid_mask(300, 12, 0.3, seeded(1))
    out = corrupt(tokens, mask, 16, 16)
    assert out.dtype == dtype
    assert torch.equal(tokens, before)
    assert bool((out[mask] == 16).all())
    assert torch.equal(out[~mask], tokens[~mask])


def test_corrupt_as_bert_does() -> None:
    states = 5
    tokens = torch.randint(states, (200_000, 3), generator=seeded(0))
    mask = iid_mask(200_000, 3, 0.5, seeded(1))
    out = corrupt(tokens, mask, 9, states, "bert", seeded(2))
    assert torch.equal(out[~mask], tokens[~mask])
    now, then = out[mask], tokens[mask]
    kept, masked = int((now == then).sum()), int((now == 9).sum())
    other = torch.bincount((now - then)[(now != then) & (now != 9)] % states, minlength=states)[1:]
    count = len(now)
    assert kept + masked + int(other.sum()) == count
    expected = [count * 0.8, count * (0.1 + 0.1 / states)] + [count * 0.1 / states] * (states - 1)
    assert stats.chisquare([masked, kept, *other.tolist()], expected).pvalue > 1e-3


TOKENS, MASK = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: iid_mask(0, 5, 0.2), ValueError, "n must be at least 1, got 0"),
        (lambda: iid_mask(5, 0, 0.2), ValueError, "length must be at least 1, got 0"),
        (lambda: iid_mask(5, 5, 1.5), ValueError, "rate must be at least 0 and at most 1, got 1.5"),
        (lambda: iid_mask(5, 5, -0.1), ValueError, "rate must be at least 0 and at most 1, got -0.1"),
        (lambda: iid_mask(5, 5, math.nan), ValueError, "rate must be at least 0 and at most 1, got nan"),
        (lambda: iid_mask(5, 5, "0.2"), TypeError, "rate must be a number, got '0.2'"),
        (lambda: iid_mask(5, 5, 0.2, 3), TypeError, r"generator must be a torch\.Generator or None, got int"),
        (lambda: balanced_mask(5, 5, 0), ValueError, "rate must be above 0 and at most 1, got 0"),
        (lambda: balanced_mask(5, 5, math.nan), ValueError, "rate must be above 0 and at most 1, got nan"),
        (lambda: exact_mask(5, 5, 6), ValueError, "k must be at most 5, the length, got 6"),
        (lambda: exact_mask(5, 5, -1), ValueError, "k must be at least 0, got -1"),
        (lambda: exact_mask(5, 5, 2.0), TypeError, "k must be a whole number, got 2.0"),
        (
            lambda: corrupt(TOKENS, MASK[:1], 16, 16),
            ValueError,
            r"mask must have the shape of tokens, \(2, 3\)",
        ),
        (
            lambda: corrupt(TOKENS, MASK, 16, 16, "roberta"),
            ValueError,
            "scheme must be one of 'mask', 'bert'",
        ),
        (lambda: corrupt(TOKENS, MASK, -1, 16), ValueError, "mask_token must be at least 0, got -1"),
        (lambda: corrupt(TOKENS, MASK, 16, 0), ValueError, "states must be at least 1, got 0"),
        (lambda: corrupt(TOKENS.double(), MASK, 16, 16), TypeError, "tokens must be an integer"),
        (lambda: corrupt(TOKENS, MASK.long(), 16, 16), TypeError, "mask must be a bool"),
    ],
)
def test_refusals(call: Callable[[], Tensor], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()
