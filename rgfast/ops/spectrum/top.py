"""The largest eigenvalue of many second moments without their spectra."""

from __future__ import annotations

import torch
from torch import Tensor

from rgfast.runtime.threads import one_thread
from rgfast.runtime.waiting import sent

__all__ = ["top_eigenpair"]

_RESIDUAL = 1e-10
_CHUNK = 1 << 22  # elements of Krylov basis held at once
_SQUARINGS = 48  # a gap g is resolved, or costs less than 2^-48, whatever g is


def top_eigenpair(a: Tensor) -> tuple[Tensor, Tensor]:
    """Largest eigenvalue `[b]` and a unit eigenvector `[b, m]` of positive semidefinite fp64 `a[b, m, m]`.

    Lanczos with full reorthogonalisation until the residual is under 1e-10 of the value (whose own error is
    then at most that, and of second order beside a gap), or until the Krylov space is the whole space.
    """
    b, m, _ = a.shape
    value = torch.zeros(b, dtype=torch.float64, device=a.device)
    vector = torch.zeros((b, m), dtype=torch.float64, device=a.device)
    todo = torch.arange(b, dtype=torch.int64, device=a.device)
    with one_thread():
        steps = min(m, 16)
        while len(todo):
            left = []
            for part in torch.split(todo, max(1, _CHUNK // (steps * m))):
                theta, v, residual = _lanczos(a[part], steps)
                value[part], vector[part] = theta, v
                left.append(residual > _RESIDUAL * theta)
            if steps == m:
                break
            todo, steps = todo[torch.cat(left)], min(m, 2 * steps)  # a GPU is read here alone
    return value, vector


def _lanczos(a: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    b, m, _ = a.shape
    drawn = torch.Generator().manual_seed(1950)
    start = sent(torch.randn(m, generator=drawn, dtype=torch.float64, device="cpu"), a.device)
    basis = torch.zeros((b, steps, m), dtype=torch.float64, device=a.device)
    small = torch.zeros((b, steps, steps), dtype=torch.float64, device=a.device)
    floor = 1e-15 * a.square().sum((-2, -1)).sqrt()
    q = (start / start.norm()).expand(b, m)
    beta = torch.zeros(b, dtype=torch.float64, device=a.device)
    for k in range(steps):
        basis[:, k] = q
        w = (a @ q[:, :, None])[:, :, 0]
        small[:, k, k] = (w * q).sum(-1)
        seen = basis[:, : k + 1]
        for _ in range(2):  # twice is enough (Kahan)
            w = w - (seen.mT @ (seen @ w[:, :, None]))[:, :, 0]
        beta = w.square().sum(-1).sqrt()
        # An exhausted space goes on with zero vectors: they add zeros to the spectrum, which is not negative.
        beta = torch.where(beta > floor, beta, 0.0)
        q = w / torch.where(beta > 0, beta, 1.0)[:, None] * (beta > 0)[:, None]
        if k + 1 < steps:
            small[:, k, k + 1] = small[:, k + 1, k] = beta
    theta, s = _top_of_small(small)
    vector = (basis.mT @ s[:, :, None])[:, :, 0]
    return theta, vector, beta * s[:, -1].abs()


def _top_of_small(t: Tensor) -> tuple[Tensor, Tensor]:
    """Largest eigenvalue and eigenvector by repeated squaring, which needs no gap to converge in value."""
    power = t
    for _ in range(_SQUARINGS):
        norm = power.square().sum((-2, -1), keepdim=True).sqrt()
        power = power / torch.where(norm > 0, norm, 1.0)
        power = power @ power
    column = power.diagonal(dim1=-2, dim2=-1).argmax(-1)
    s = power[torch.arange(len(t), dtype=torch.int64, device=t.device), :, column]
    norm = s.square().sum(-1, keepdim=True).sqrt()
    s = s / torch.where(norm > 0, norm, 1.0)
    return (s * (t @ s[:, :, None])[:, :, 0]).sum(-1), s
