"""Spectra of rows at hand, centred and not, from one second moment; and their refinement from the rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rgfast.ops.spectrum import native
from rgfast.ops.spectrum.measures import Array
from rgfast.ops.spectrum.selection import SPECTRUM
from rgfast.ops.spectrum.solve import Solved, from_eigenvalues, refine

__all__ = ["refine_spectra", "spectra_of_rows", "spectra_without_groups", "without_each"]


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


def spectra_without_groups(
    x: Tensor, groups: int, *, uncentred: bool
) -> list[tuple[Solved, Solved | None]] | None:
    """`spectra_of_rows(x)` without samples g, g + groups, ... for every g; None for NaN or infinity."""
    b, n, d = x.shape
    options = {"centering": "mean", "dtype": torch.float64}
    if SPECTRUM.select("auto", x.device, x, **options).name == "native":
        raw = torch.empty(b * groups, d, dtype=torch.float64, device="cpu") if uncentred else None
        found = native.left_out_spectrum(x, groups, raw)
        if found is not None:
            return _of_variants(found, raw, n, groups)
    each = [spectra_of_rows(rest, uncentred=uncentred) for rest in without_each(x, groups)]
    return None if any(part is None for part in each) else [part for part in each if part is not None]


def _of_variants(
    found: tuple[Tensor, Tensor, Tensor, Tensor], raw: Tensor | None, n: int, groups: int
) -> list[tuple[Solved, Solved | None]] | None:
    values, trace, exponent, limit = _arrays(found)
    if not np.isfinite(trace).all():
        return None
    left = np.tile([n - len(range(g, n, groups)) for g in range(groups)], len(values) // groups)
    centred = from_eigenvalues(values, trace, exponent, limit, samples=left)
    whole = None
    if raw is not None:
        trace, limit = np.maximum(trace, raw.sum(-1).numpy()), np.minimum(limit + 1, raw.shape[1])
        whole = from_eigenvalues(raw, trace, exponent, limit, samples=left)
    each = [slice(g, None, groups) for g in range(groups)]
    return [(centred.take(at), None if whole is None else whole.take(at)) for at in each]


def without_each(x: Tensor, groups: int) -> Iterator[Tensor]:
    """`x[b, n, d]` without samples g, g + groups, ... for every g, as views of one copy.

    Group after group, and all but the last again: what follows a group, up to itself again, is the rest.
    """
    n = x.shape[1]
    order = torch.arange(n, dtype=torch.int64, device=x.device)
    order = order[(order % groups).argsort(stable=True)]
    sizes = [len(range(g, n, groups)) for g in range(groups)]
    twice = x.index_select(1, torch.cat([order, order[: n - sizes[-1]]]))
    end = 0
    for size in sizes:
        end += size
        yield twice[:, end : end + n - size]


def refine_spectra(x: Tensor, solved: Solved, at: NDArray[np.intp], *, centering: str) -> None:
    """Overwrite the spectra of matrices `at` by what is computed from their rows `x[len(at), n, d]`."""
    solved.put(at, refine(x, centering, 1e-6))


def _arrays(found: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Array, Array, Array]:
    values, *rest = found
    trace, exponent, limit = (t.cpu().numpy() for t in rest)
    return values, trace, exponent, limit
