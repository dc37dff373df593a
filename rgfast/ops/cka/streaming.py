"""CKA and kernel drift of representations that come in batches, exact under any split and merge order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rgfast.ops.cka.api import cka_matrix, kernel_drift
from rgfast.ops.cka.rows import RowStore, as_rows
from rgfast.runtime.threads import one_thread
from rgfast.runtime.waiting import numbers, waits_for
from rgfast.streaming import KernelSums, MomentAccumulator, Together
from rgfast.validation import check_choice, check_positive_int

__all__ = ["CKAAccumulator", "CKAResult", "cka_from_moments", "cka_of_sums"]

Route = Literal["auto", "sample", "features"]
# ⟨K, K⟩ below this fraction of (tr K)²/n is rounding, not variance.
_NO_VARIANCE = 1e-13


@dataclass(frozen=True)
class CKAResult:
    """What a stream gave: values, how many samples they rest on, by which route, and why some are NaN.

    ``matrix[..., L, L]`` (NaN for pairs that were not kept), ``drift[..., L-1]`` = 1 − CKA of neighbours,
    both fp64; ``count[...]`` samples; ``route`` is ``"sample"`` or ``"features"``; ``constant[..., L]`` marks
    layers without variance and ``few[...]`` positions with too few samples: the two reasons for a NaN.
    """

    matrix: Tensor
    drift: Tensor
    count: Tensor
    route: str
    debiased: bool
    constant: Tensor
    few: Tensor

    def reason(self, layer: int, position: int | tuple[int, ...] = ()) -> str | None:
        """Why values of ``layer`` at ``position`` are NaN: ``"constant"``, ``"too few samples"``, or None."""
        at = (position,) if isinstance(position, int) else position
        if bool(self.few[at]):
            return "too few samples"
        return "constant" if bool(self.constant[at][layer]) else None


class CKAAccumulator:
    """Streaming linear CKA of L layers at every position: ``update``, ``merge``, ``finalize``.

    ``pairs`` is ``"all"`` or ``"adjacent"``. ``route="auto"`` keeps rows while no position has more than
    ``sample_limit`` of them (exact sample route), and from then on fp64 moments of the features (exact too,
    in memory that does not grow with n). ``"sample"`` and ``"features"`` force one. For two models, stream
    the layers of both and read the block. For the minibatch form see :class:`MinibatchCKAAccumulator`.

    Raises TypeError or ValueError for wrong kinds, shapes or options, and for NaN or Inf in a row that
    counts; nothing of that batch has been added then.

    >>> import rgfast, torch
    >>> layers = torch.randn(3, 100, 8, generator=torch.Generator().manual_seed(0))
    >>> stream = rgfast.CKAAccumulator(pairs="all")
    >>> for batch in layers.split(32, dim=1):
    ...     _ = stream.update(batch)
    >>> result = stream.finalize()
    >>> result.route, torch.allclose(result.matrix, rgfast.cka_matrix(layers))
    ('sample', True)
    """

    def __init__(
        self,
        *,
        pairs: Literal["all", "adjacent"] = "all",
        route: Route = "auto",
        sample_limit: int = 4096,
    ) -> None:
        check_choice(pairs, "pairs", ("all", "adjacent"))
        check_choice(route, "route", ("auto", "sample", "features"))
        check_positive_int(sample_limit, "sample_limit")
        self.pairs, self.sample_limit = pairs, sample_limit
        self._asked: Route = route
        self._rows: RowStore | None = None
        self._moments: MomentAccumulator | None = None

    @property
    def route(self) -> str:
        """The route that the samples seen so far are on."""
        if self._asked != "auto":
            return self._asked
        return "sample" if self._moments is None else "features"

    @property
    def nbytes(self) -> int:
        """Bytes that rows and moments take now."""
        rows = 0 if self._rows is None else self._rows.nbytes
        return rows + (0 if self._moments is None else self._moments.nbytes)

    def update(self, layers: Any, mask: Tensor | None = None) -> CKAAccumulator:
        """Itself, with a batch ``layers[L, ..., rows, d]`` (or a sequence of ``[..., rows, d_l]``) added.

        ``mask[..., rows]`` (bool) keeps the rows where it is True; the others may hold anything.
        """
        lead, flat, keep = as_rows(layers, mask)
        if self._rows is None:
            self._rows = RowStore(lead, [x.shape[-1] for x in flat], flat[0].device)
        self._rows.check_like(lead, flat)
        self._add(flat, keep)
        return self

    def merge(self, other: CKAAccumulator) -> CKAAccumulator:
        """Itself, with all that ``other`` has seen added; ``other`` may not be used afterwards.

        Raises ValueError unless both were made with the same options and saw the same layers.
        """
        options = [(a.pairs, a._asked, a.sample_limit) for a in (self, other)]
        if options[0] != options[1]:
            raise ValueError(f"other must have the options {options[0]}, got {options[1]}")
        if other._rows is None:
            return self
        if self._rows is None:
            self._rows, self._moments = other._rows, other._moments
            return self
        mine, theirs = ((r.lead, r.widths) for r in (self._rows, other._rows))
        if mine != theirs:
            raise ValueError(f"other must have leading shape and widths {mine}, got {theirs}")
        if other._moments is not None:
            self._to_moments()
            assert self._moments is not None
            self._moments.merge(other._moments)
        if other._rows.most:
            self._add(*other._rows.contents())
        return self

    def finalize(self, *, debiased: bool = True) -> CKAResult:
        """Everything that was seen, as a :class:`CKAResult`; the stream may go on afterwards.

        Positions with too few samples (4 if ``debiased``) are NaN. Raises ValueError where all have too few.
        """
        least = 4 if debiased else 1
        if self._rows is None:
            raise ValueError(f"the stream must hold at least {least} samples, got 0")
        count = self._rows.filled
        if self._moments is not None:
            count = count + self._moments.count.reshape(-1)
        if count.numel() and int(count.max()) < least:
            raise ValueError(f"the stream must hold at least {least} samples, got {int(count.max())}")
        if self._moments is not None or self._asked == "features":
            self._to_moments()
            assert self._moments is not None
            # Sums over whole matrices are cut by the number of threads.
            with one_thread():
                values, constant = cka_from_moments(self._moments, debiased=debiased)
            drift = 1.0 - values.diagonal(1, -2, -1)
            drift = drift if debiased else drift.clamp(min=0.0)
        else:
            values, drift, constant = self._finalize_rows(debiased)
        lead = self._rows.lead
        few = count < least
        return CKAResult(
            matrix=values.reshape(*lead, *values.shape[1:]),
            drift=drift.reshape(*lead, drift.shape[-1]),
            count=count.reshape(lead),
            route=self.route,
            debiased=debiased,
            constant=(constant & ~few[:, None]).reshape(*lead, constant.shape[-1]),
            few=few.reshape(lead),
        )

    def _add(self, flat: list[Tensor], keep: Tensor | None) -> None:
        assert self._rows is not None
        if self._moments is not None or self._asked == "features":
            self._to_moments()
            assert self._moments is not None
            self._moments.update(flat, keep, finite=True)
            return
        rows = flat[0].shape[1]
        new = self._rows.filled + (rows if keep is None else keep.sum(1))
        if self._asked == "auto" and new.numel() and int(new.max()) > self.sample_limit:
            self._to_moments()
            self._add(flat, keep)
            return
        self._rows.add(flat, keep)

    def _to_moments(self) -> None:
        assert self._rows is not None
        if self._moments is None:
            self._moments = MomentAccumulator(pairs=self.pairs)
        if self._rows.most:
            rows, keep = self._rows.contents()
            device = self._rows.filled.device
            self._rows = RowStore(self._rows.lead, self._rows.widths, device)
            self._moments.update(rows, keep, finite=True)

    def _finalize_rows(self, debiased: bool) -> tuple[Tensor, Tensor, Tensor]:
        assert self._rows is not None
        filled = self._rows.filled
        size, layers = len(filled), len(self._rows.widths)
        matrix = torch.full((size, layers, layers), torch.nan, dtype=torch.float64, device=filled.device)
        drift = matrix.new_full((size, max(layers - 1, 0)), torch.nan)
        constant = torch.zeros(size, layers, dtype=torch.bool, device=filled.device)
        # Positions with equally many samples are computed together.
        for n in sorted(set(filled.tolist())):
            if n < (4 if debiased else 1):
                continue
            at = (filled == n).nonzero()[:, 0]
            rows = self._rows.take(at, n)
            constant[at] = torch.stack([(x == x[:, :1]).all(-1).all(-1) for x in rows], -1)
            drift[at] = kernel_drift(rows, debiased=debiased, precision="double")
            if self.pairs == "all":
                limit = max(self.sample_limit, n)
                matrix[at] = cka_matrix(rows, debiased=debiased, sample_limit=limit, precision="double")
            else:
                part = matrix[at]
                part.diagonal(0, -2, -1).copy_(torch.where(constant[at], torch.nan, 1.0))
                for side in (-1, 1):
                    part.diagonal(side, -2, -1).copy_(1.0 - drift[at])
                matrix[at] = part
        return matrix, drift, constant


def cka_from_moments(moments: MomentAccumulator, *, debiased: bool) -> tuple[Tensor, Tensor]:
    """CKA ``[P, L, L]`` of every kept pair, and which layers lack variance ``[P, L]``; P flattened positions.

    NaN for pairs that are not kept, beside a layer without variance, and for too few samples (1, or 3 if
    ``debiased``).
    """
    values, constant = cka_of_sums(Together([moments]).kernels(products=debiased), [debiased])
    return values[0].permute(2, 0, 1).contiguous(), constant[0].T.contiguous()


def cka_of_sums(sums: KernelSums, debiased: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """CKA ``[kinds, L, L, P]``, each kind ``debiased`` or not, of every kept pair, and layers without
    variance ``[kinds, L, P]``, as :func:`cka_from_moments`; a debiased kind needs the sums' products."""
    assert sums.products is not None or not any(debiased)
    n, device = sums.count.to(torch.float64), sums.count.device
    given = n, sums.traces, sums.norms, n if sums.products is None else sums.products
    sides = [[pair[side] for pair in sums.pairs] for side in (0, 1)]
    if not sums.read and waits_for(device):
        found: tuple[Tensor, Tensor] = _cka(torch, given, [numbers(side, device) for side in sides], debiased)
        return found
    # NumPy does the same to every number, and takes less time for few.
    with np.errstate(all="ignore"):
        values, lacking = _cka(np, [x.numpy() for x in given], [np.array(side) for side in sides], debiased)
    return torch.from_numpy(values), torch.from_numpy(lacking)


def _cka(xp: Any, given: Sequence[Any], sides: Sequence[Any], debiased: Sequence[bool]) -> tuple[Any, Any]:
    """Of counts, traces, norms and products, and the layers of pairs: arrays of the library ``xp``."""
    (n, trace, norms, products), (left, right) = given, sides
    less = trace[left] * trace[right] / ((n - 1) * (n - 2)) if any(debiased) else None
    kinds = [norms - n / (n - 2) * products + less if kind else norms for kind in debiased]
    enough = xp.stack([n >= (4 if kind else 1) for kind in debiased])[:, None]
    found = xp.stack(kinds)  # [kinds, K, P]
    own = found[:, : len(trace)]
    varies = (own > _NO_VARIANCE * xp.square(trace) / n) & enough
    own = xp.where(varies, own, 1.0)
    # The root of the product, not the product of roots: identical layers then have a CKA of exactly 1.
    ratio = found / xp.sqrt(own[:, left] * own[:, right])
    values = _nothing(xp, (len(kinds), len(trace), len(trace), len(n)), n)
    values[:, left, right] = values[:, right, left] = xp.where(
        varies[:, left] & varies[:, right], ratio, xp.nan
    )
    return values, ~varies


def _nothing(xp: Any, shape: tuple[int, ...], like: Any) -> Any:
    """NaN, fp64."""
    return np.full(shape, np.nan) if xp is np else like.new_full(shape, torch.nan)
