"""Spectra of rows at hand, centred and not, from one second moment; and their refinement from the rows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from rgfast.dispatch import HandOff, Impl, Op
from rgfast.ops.spectrum.call import Again, Doubtful, Groups, Rows
from rgfast.ops.spectrum.impl import native
from rgfast.ops.spectrum.measures import UNIT_ROUNDOFF, Array
from rgfast.ops.spectrum.refine import SMALL, Stage, refined
from rgfast.ops.spectrum.selection import SPECTRUM
from rgfast.ops.spectrum.solve import PATHS, REFINE, Solved, all_finite, from_eigenvalues
from rgfast.ops.spectrum.trailing import few_small, with_trailing
from rgfast.runtime.waiting import sent

__all__ = [
    "refine_spectra",
    "refined_spectra_of_rows",
    "spectra_of_rows",
    "spectra_without_groups",
    "without_each",
]

_ENOUGH = 1e-6  # relative error of an effective rank that a refined spectrum may have, as far as is known


def spectra_of_rows(
    x: Tensor, *, uncentred: bool, matrix: Tensor | None = None, means: Tensor | None = None
) -> tuple[Solved, Solved | None] | None:
    """Spectra of centred `x[b, n, d]` and, if `uncentred`, of x itself; None where NaN or infinity is met.

    From second moments in fp64: what these lose is to be had from `refine_spectra`. `matrix[b, m, m]` and
    `means[b, d]` get the centred moments and the column means, in units of the results' exponents.
    """
    n, d = x.shape[1:]
    lifted = torch.empty(len(x), d, dtype=torch.float64, device=x.device) if uncentred and n >= d else None
    values, trace, exponent, limit = SPECTRUM("auto", Rows(x, raw=lifted, means=means, matrix=matrix))
    if not all_finite(values, trace):
        return None
    centred = from_eigenvalues(values, trace, exponent, limit, samples=max(n, d))
    if not uncentred:
        return centred, None
    if lifted is None:
        values, *rest = SPECTRUM("auto", Rows(x, "none"))
        return centred, from_eigenvalues(values, *rest, samples=max(n, d))
    whole = trace.maximum(lifted.sum(-1))
    return centred, from_eigenvalues(lifted, whole, exponent, (limit + 1).clamp_max(d), samples=n)


def refined_spectra_of_rows(
    x: Tensor, *, uncentred: bool, doubt: float
) -> tuple[Solved, Solved | None] | None:
    """`spectra_of_rows(x)`, refined where effective ranks may be off by more than `doubt`, if that is cheap.

    A second stage follows while rows are in the cache; `path` says where it was enough for a bound of 1e-6.
    """
    found: tuple[Solved, Solved | None] | None = WITH_SECOND_STAGE("auto", Doubtful(x, uncentred, doubt))
    return found


def _in_one_pass(call: Doubtful) -> tuple[Solved, Solved | None] | None:
    b, n, d = call.x.shape
    found = native.refined_spectrum(call.x, call.doubt, SMALL, uncentred=call.uncentred)
    if found is None:
        raise HandOff(f"{b} matrices of {min(n, d)} rows are not solved in its lanes", lambda run: run(call))
    (values, raw, trace, exponent, limit), second = found
    if not bool(torch.isfinite(trace).all()):
        return None
    centred = from_eigenvalues(values, trace, exponent, limit, samples=max(n, d))
    _accept(centred, values, trace, max(n, d), second[0])
    if raw is None:
        return centred, None
    most = trace.maximum(raw.sum(-1))
    whole = from_eigenvalues(raw, most, exponent, (limit + 1).clamp_max(d), samples=n)
    # The vectors of rows as they are go by their mean, a sum of so many terms.
    _accept(whole, raw, most, n, second[1], n * UNIT_ROUNDOFF[torch.float64] * (trace * most).sqrt().numpy())
    return centred, whole


def _accept(
    solved: Solved,
    values: Tensor,
    trace: Tensor,
    terms: int,
    second: tuple[Array, ...],
    off: Array | float = 0.0,
) -> None:
    """Overwrite spectra by those that a second stage has refined, if it was enough.

    `values` and `trace` are those of the first, and `off` is the norm of what its moments err by besides.
    """
    eigenvalues, leading, residual, left = second
    at = np.flatnonzero(leading)
    if not len(at):
        return

    def last(live: Array, stage: int) -> Stage:
        return Stage(eigenvalues[at[live]], left[at[live]], np.zeros_like(live), residual[at[live]])

    index = torch.from_numpy(at)
    first = Stage(values.numpy()[at], trace.numpy()[at], leading[at], (residual + off)[at])
    limit = solved.rank_limit[index]
    found = refined(last, terms, first.trace, limit.numpy(), math.inf, first)
    sigma, error = (torch.from_numpy(value) for value in found)
    path = torch.full_like(solved.path[index], PATHS.index("refined"))
    new = Solved(sigma, error, solved.exponent[index], limit, path)
    good = new.bound() <= _ENOUGH
    solved.put(index[good], new.of(good))


WITH_SECOND_STAGE = Op(
    "spectra with a second stage",
    [
        native.with_second_stage(_in_one_pass),
        Impl(
            "moments",
            lambda call: spectra_of_rows(call.x, uncentred=call.uncentred),
            cost=lambda call: 1.0,
            route=True,
        ),
    ],
    part_of="spectrum",
)


def spectra_without_groups(
    x: Tensor, groups: int, *, uncentred: bool
) -> list[tuple[Solved, Solved | None]] | None:
    """`spectra_of_rows(x)` without samples g, g + groups, ... for every g; None for NaN or infinity."""
    found: list[tuple[Solved, Solved | None]] | None = WITHOUT_GROUPS("auto", Groups(x, groups, uncentred))
    return found


def _from_one_moment(call: Groups) -> list[tuple[Solved, Solved | None]] | None:
    b, n, d = call.x.shape
    raw = torch.empty(b * call.groups, d, dtype=torch.float64, device="cpu") if call.uncentred else None
    found = native.left_out_spectrum(call.x, call.groups, raw)
    if found is None:
        raise HandOff(f"matrices of {d} rows are too large for its lanes", lambda run: run(call))
    return _of_variants(found, raw, n, call.groups)


def _one_by_one(call: Groups) -> list[tuple[Solved, Solved | None]] | None:
    each = [spectra_of_rows(rest, uncentred=call.uncentred) for rest in without_each(call.x, call.groups)]
    return None if any(part is None for part in each) else [part for part in each if part is not None]


# The one gain is the moment, paid once and not for every group: that needs no model of the time.
WITHOUT_GROUPS = Op(
    "spectra without groups",
    [
        native.without_groups(_from_one_moment),
        Impl("each group", _one_by_one, cost=lambda call: 1.0, route=True),
    ],
    part_of="spectrum",
)


def _of_variants(
    found: tuple[Tensor, Tensor, Tensor, Tensor], raw: Tensor | None, n: int, groups: int
) -> list[tuple[Solved, Solved | None]] | None:
    values, trace, exponent, limit = found
    if not bool(torch.isfinite(trace).all()):
        return None
    left = torch.tensor(
        [n - len(range(g, n, groups)) for g in range(groups)], dtype=torch.int64, device=values.device
    ).repeat(len(values) // groups)
    centred = from_eigenvalues(values, trace, exponent, limit, samples=left)
    whole = None
    if raw is not None:
        trace, limit = trace.maximum(raw.sum(-1)), (limit + 1).clamp_max(raw.shape[1])
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


def refine_spectra(
    x: Tensor,
    solved: Solved,
    at: Tensor,
    *,
    centering: str,
    kept: Tensor | None = None,
    moments: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Overwrite the spectra of matrices `at` of `x[b, n, d]` by what is computed from their rows.

    From rows `kept[n]` alone, if given. `moments`, if they are at hand and no rows are left out, are what
    `spectra_of_rows` has put into its `matrix` and `means`.
    """
    here = at
    if kept is not None:
        x = x[at][:, kept]
        here = torch.arange(len(x), dtype=torch.int64, device=x.device)
    # What is decided by, a number for each matrix, is brought to the host.
    few = few_small(x, solved.of(at)).cpu()
    left = torch.ones_like(few, dtype=torch.bool)
    for small in sorted({*few.tolist()} - {0}):
        chosen = (few == small).nonzero()[:, 0]
        some = sent(chosen, x.device)
        found = with_trailing(x, here[some], solved.of(at[some]), small, centering, moments)
        good = (found.bound() <= _ENOUGH).cpu()
        enough = sent(good.nonzero()[:, 0], x.device)
        solved.put(at[some[enough]], found.of(enough))
        left[chosen[good]] = False
    if bool(left.any()):
        rest = sent(left.nonzero()[:, 0], x.device)
        solved.put(at[rest], REFINE("auto", Again(x, here[rest], centering)))
