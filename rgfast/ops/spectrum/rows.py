"""Spectra of rows at hand, centred and not, from one second moment; and their refinement from the rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rgfast.ops.spectrum.measures import Array
from rgfast.ops.spectrum.selection import SPECTRUM
from rgfast.ops.spectrum.solve import Solved, from_eigenvalues, refine

__all__ = ["refine_spectra", "spectra_of_rows"]


def spectra_of_rows(x: Tensor, *, uncentred: bool) -> tuple[Solved, Solved | None] | None:
    """Spectra of centred `x[b, n, d]` and, if `uncentred`, of x itself; None where NaN or infinity is met.

    From second moments in fp64: what these lose is to be had from `refine_spectra`.
    """
    n, d = x.shape[1:]
    options = {"centering": "mean", "dtype": torch.float64}
    chosen = SPECTRUM.select("auto", x.device, x, **options)
    lifted = torch.empty(len(x), d, dtype=torch.float64, device=x.device) if uncentred and n >= d else None
    values, trace, exponent, limit = _arrays(chosen.run(x, raw=lifted, **options))
    if not np.isfinite(trace).all():
        return None
    centred = from_eigenvalues(values, trace, exponent, limit, samples=max(n, d))
    if not uncentred:
        return centred, None
    if lifted is None:
        options["centering"] = "none"
        values, *rest = _arrays(chosen.run(x, **options))
        return centred, from_eigenvalues(values, *rest, samples=max(n, d))
    whole = np.maximum(trace, lifted.sum(-1).cpu().numpy())
    return centred, from_eigenvalues(lifted, whole, exponent, np.minimum(limit + 1, d), samples=n)


def refine_spectra(x: Tensor, solved: Solved, at: Array, *, centering: str) -> None:
    """Overwrite the spectra of the matrices `at` of `x[b, n, d]` by what is computed from their rows."""
    if len(at):
        solved.put(at, refine(x[torch.from_numpy(at).to(x.device)], centering, 1e-6))


def _arrays(found: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Array, Array, Array]:
    values, *rest = found
    trace, exponent, limit = (t.cpu().numpy() for t in rest)
    return values, trace, exponent, limit
