"""Every rank measure of the eigenvalues of streamed moments: in one launch, where there is a kernel."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from torch.nn import functional

from rgfast.ops.spectrum.call import Ranks, Values
from rgfast.ops.spectrum.measures import (
    effective_rank_of,
    numerical_rank_of,
    numpy_on_cpu,
    participation_ratio_of,
    stable_rank_of,
)
from rgfast.ops.spectrum.rank_kernel import BOUNDED, MEASURED
from rgfast.ops.spectrum.solve import Solved, from_eigenvalues

__all__ = ["BOUNDED", "MEASURED", "by_kind", "check", "solved", "together"]


def solved(call: Values) -> Solved:
    """Singular values of both kinds below each other, of which no more are not zero than there are degrees of
    freedom and features that vary."""
    values, n, d = call.values, call.samples, call.variance.shape[-1]
    if call.by_features:
        values = functional.pad(values, (d - values.shape[-1], 0))
    trace: Tensor = _sum(call.variance)
    torch.maximum(trace[: len(n)], call.accumulated, out=trace[: len(n)])
    freedom = torch.cat([n - 1, n][: call.kinds])
    limit = freedom.clamp_min(0).minimum((call.variance > 0).sum(-1))
    terms = torch.full_like(n, d) if call.by_features else n
    return from_eigenvalues(values, trace, torch.zeros_like(freedom), limit, samples=terms.repeat(call.kinds))


def check(finite: Tensor) -> None:
    """Raise `torch.linalg.LinAlgError` unless the values of every matrix `finite[b]`, on the host, were
    numbers."""
    bad = np.flatnonzero(finite.numpy() == 0)
    if len(bad):
        raise LinAlgError(f"eigvalsh gave NaN or infinity for matrix {int(bad[0])} of the batch")


def by_kind(call: Values) -> Ranks:
    """The measures of one spectrum after the other."""
    both, b = solved(call), len(call.samples)
    centered, raw = both.of(slice(b)), both.of(slice(b, None))
    nothing = torch.full_like(call.accumulated, torch.nan)
    found = [
        effective_rank_of(centered.sigma),
        effective_rank_of(centered.sigma, spectrum="variance"),
        participation_ratio_of(centered.sigma),
        stable_rank_of(centered.sigma),
        numerical_rank_of(centered.sigma, call.tol),
        *[nothing] * 2,
        centered.bound(),
        nothing,
    ]
    if call.kinds == 2:
        constant = (centered.sigma[:, 0] == 0) & (raw.sigma[:, 0] > 0)
        found[8] = raw.bound().masked_fill(constant, 0.0)
        sigma = _of_rank_one(raw.sigma.clone(), constant)
        found[5], found[6] = effective_rank_of(sigma), effective_rank_of(sigma, spectrum="variance")
    return _table(call, centered.sigma, found)


def together(call: Values) -> Ranks:
    """The same of both spectra at once, in few launches."""
    if call.kinds == 1:
        return by_kind(call)
    both, b = solved(call), len(call.samples)
    sigma, bound = both.sigma, both.bound()
    constant = (sigma[:b, 0] == 0) & (sigma[b:, 0] > 0)
    _of_rank_one(sigma[b:], constant)
    ranks, variances = effective_rank_of(sigma), effective_rank_of(sigma, spectrum="variance")
    centered = sigma[:b]
    found = [
        ranks[:b],
        variances[:b],
        participation_ratio_of(centered),
        stable_rank_of(centered),
        numerical_rank_of(centered, call.tol),
        ranks[b:],
        variances[b:],
        bound[:b],
        bound[b:].masked_fill(constant, 0.0),
    ]
    return _table(call, centered, found)


def _of_rank_one(sigma: Tensor, constant: Tensor) -> Tensor:
    """n μ μᵀ has rank one, which eigenvalues would only say to rounding; in place."""
    sigma[:, 1:].masked_fill_(constant[:, None], 0.0)
    return sigma


def _table(call: Values, sigma: Tensor, found: list[Tensor]) -> Ranks:
    few = call.samples < 2
    largest = call.values.abs().view(call.kinds, *call.values[: len(few)].shape).amax((0, 2))  # NaN if one is
    table = torch.stack(found).masked_fill_(few, torch.nan)
    finite = (largest < torch.inf)[None]
    return Ranks(sigma.masked_fill(few[:, None], torch.nan), torch.cat([table, finite]))


@numpy_on_cpu
def _sum(x: Tensor) -> Tensor:
    return x.sum(-1)
