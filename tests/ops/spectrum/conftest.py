"""Data with a known difficulty, and truths that share no code with the package."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

Spectra = dict[str, Callable[[int], np.ndarray]]

SPECTRA: Spectra = {
    "flat": lambda m: np.ones(m),
    "1/i": lambda m: 1.0 / np.arange(1, m + 1),
    "1/i^2": lambda m: 1.0 / np.arange(1, m + 1) ** 2,
    "1/i^4": lambda m: 1.0 / np.arange(1, m + 1) ** 4.0,
    "condition 1e8": lambda m: np.logspace(0, -8, m),
    "condition 1e12": lambda m: np.logspace(0, -12, m),
    "low rank + 1e-7": lambda m: np.where(np.arange(m) < min(4, m), 1.0, 1e-7),
    "rank 1 + 1e-5": lambda m: np.where(np.arange(m) < 1, 1.0, 1e-5),
    "rank 1 + 1e-9": lambda m: np.where(np.arange(m) < 1, 1.0, 1e-9),
}


def with_spectrum(sigma: np.ndarray, n: int, d: int, seed: int) -> np.ndarray:
    """`[n, d]` fp64 with singular values `sigma` and no mean (where n leaves room for that)."""
    draw = np.random.default_rng(seed)
    m = len(sigma)
    left = draw.standard_normal((n, m))
    if m < n:
        left -= left.mean(0)
    u, _ = np.linalg.qr(left)
    v, _ = np.linalg.qr(draw.standard_normal((d, m)))
    return (u * sigma) @ v.T


def truth(x: torch.Tensor, centering: str = "mean") -> np.ndarray:
    """Singular values by LAPACK in fp64 of one matrix, centred in two passes in fp64."""
    y = x.detach().to(torch.float64).numpy()
    if centering == "mean":
        y = y - y.mean(0)
        y = y - y.mean(0)
    return np.linalg.svd(y, compute_uv=False)


def rank_of(sigma: np.ndarray, spectrum: str = "singular") -> float:
    weight = sigma if spectrum == "singular" else sigma**2
    p = weight[weight > 0] / weight.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def ratio_of(sigma: np.ndarray) -> float:
    return float((sigma**2).sum() ** 2 / (sigma**4).sum())


class Helpers:
    spectra = SPECTRA
    with_spectrum = staticmethod(with_spectrum)
    truth = staticmethod(truth)
    rank_of = staticmethod(rank_of)
    ratio_of = staticmethod(ratio_of)


@pytest.fixture(scope="session")
def known() -> type[Helpers]:
    return Helpers
