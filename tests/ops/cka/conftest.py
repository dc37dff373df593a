"""The truth of this room: fp64 (or longer) brute force with explicit kernels and explicit centring."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch


def _kernel(x, debiased, dtype=np.float64):
    x = np.asarray(x.detach().to(torch.float64)).astype(dtype)
    # Equal rows are taken off first: the kernel is translation-invariant, its digits are not.
    x = x - x[:1]
    x = x - x.mean(0)
    top = np.abs(x).max()
    x = x / top if top > 0 else x
    k = x @ x.T
    n = len(k)
    if not debiased:
        h = np.eye(n, dtype=dtype) - np.ones((n, n), dtype=dtype) / n
        return h @ k @ h
    k = k - np.diag(np.diag(k))
    rows = k.sum(1)
    u = k - rows[:, None] / (n - 2) - rows[None] / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    return u - np.diag(np.diag(u))


def _cka(x, y, debiased=True, dtype=np.float64):
    k, m = _kernel(x, debiased, dtype), _kernel(y, debiased, dtype)
    return float((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))


def _drift(x, y, debiased=False, dtype=np.longdouble):
    k, m = _kernel(x, debiased, dtype), _kernel(y, debiased, dtype)
    k, m = k / np.sqrt((k * k).sum()), m / np.sqrt((m * m).sum())
    return float(((k - m) ** 2).sum() / 2)


def _matrix(layers, other=None, debiased=True):
    other = layers if other is None else other
    return torch.tensor([[_cka(x, y, debiased) for y in other] for x in layers], dtype=torch.float64)


def _worst(found, layers, *, debiased):
    """The largest error of ``found[P, L, L]``, all of which must be numbers."""
    wanted = torch.stack([_matrix([x[p] for x in layers], debiased=debiased) for p in range(len(found))])
    return float((found - wanted).abs().max())


@pytest.fixture
def truth():
    """Brute force of one position: ``cka(x, y)``, ``drift(x, y)`` and ``matrix(layers)``, ``kernel(x)``; of
    all positions ``worst(found, layers)``."""
    return SimpleNamespace(cka=_cka, drift=_drift, matrix=_matrix, kernel=_kernel, worst=_worst)


@pytest.fixture
def make():
    """``make(*shape, seed, dtype)``: Gaussian data with a decaying spectrum and correlated layers."""

    def layers(count, *shape, seed=0, dtype=torch.float64, step=0.7):
        generator = torch.Generator().manual_seed(seed)
        decay = torch.arange(1, shape[-1] + 1, dtype=torch.float64) ** -0.5
        out = [torch.randn(shape, generator=generator, dtype=torch.float64) * decay]
        for _ in range(count - 1):
            out.append(out[-1] + step * torch.randn(shape, generator=generator, dtype=torch.float64) * decay)
        return torch.stack(out).to(dtype)

    return layers
