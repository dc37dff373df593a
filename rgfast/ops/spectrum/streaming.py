"""Second moments of every (layer, position) from a stream, and the spectra in them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgfast.ops.spectrum.moments import Centering, rank_measures_from_moment
from rgfast.ops.spectrum.results import RankMeasures
from rgfast.streaming import MomentAccumulator
from rgfast.validation import check_choice, check_integer

__all__ = ["SecondMoments"]


class SecondMoments:
    """Streaming second moments of L layers `[*, rows, d_l]`, apart for every leading index, in fp64.

    The rows are shifted by the mean of the first of them before they are squared, and data far from 1 are
    scaled by a power of two. Any split of the samples, and accumulators merged in any order, give the
    moments of all samples to 1e-12 of their trace. Rows wait until a block of 128 per position (fewer where
    `pending_bytes` does not hold that many) is full, and blocks begin at fixed sample indices: the bits
    depend neither on how the samples were cut into batches nor on the number of threads. This is
    `rgfast.streaming.MomentAccumulator` without cross moments. Reading raises ValueError before the first
    `update`, and for a layer that there is not.

    >>> import rgfast, torch
    >>> x = torch.randn(2, 5, 300, 8)  # layers, positions, samples, features
    >>> stream = rgfast.SecondMoments()
    >>> for rows in x.split(50, dim=-2):
    ...     _ = stream.update(rows)
    >>> m = stream.rank_measures(0)
    >>> torch.allclose(m.effective_rank, rgfast.effective_rank(x[0]))
    True
    """

    def __init__(self, *, pending_bytes: int = 256 << 20) -> None:
        self._moments = MomentAccumulator(pairs=[], pending_bytes=pending_bytes)

    def update(self, layers: Sequence[Tensor] | Tensor, mask: Tensor | None = None) -> SecondMoments:
        """Itself, with the rows of one batch added: `layers[l]` is `[*, rows, d_l]` of any float dtype.

        `mask[*, rows]` (bool) keeps the rows where it is True; the others may hold anything. Raises
        TypeError or ValueError for wrong kinds or shapes, and ValueError naming layer, position and count
        for NaN or infinity in a row that counts; nothing of the batch has been added then.
        """
        self._moments.update(layers, mask)
        return self

    def merge(self, other: SecondMoments) -> SecondMoments:
        """Itself, with all that `other` has seen added. Raises TypeError for another kind, ValueError where
        their shapes differ."""
        if not isinstance(other, SecondMoments):
            raise TypeError(f"other must be a SecondMoments, got {type(other).__name__}")
        self._moments.merge(other._moments)
        return self

    @property
    def count(self) -> Tensor:
        """Rows that counted `[*]`, int64."""
        self._check_begun()
        return self._moments.count

    def mean(self, layer: int) -> Tensor:
        """Mean `[*, d]` of a layer, fp64; NaN where nothing was counted."""
        self._check_layer(layer)
        return self._moments.mean(layer)

    def scatter(self, layer: int, *, centering: Centering = "mean") -> Tensor:
        """Sum of (x - mean)(x - mean)^T `[*, d, d]` of a layer, fp64 (of x x^T with `centering="none"`)."""
        self._check_layer(layer)
        return self._moments.scatter(layer, centering=centering)

    def singular_values(self, layer: int, *, centering: Centering = "mean", impl: str = "auto") -> Tensor:
        """Singular values `[*, d]` of all rows of a layer, fp64, descending; NaN where none counted."""
        return self.rank_measures(layer, centering=centering, impl=impl).singular_values

    def rank_measures(
        self, layer: int, *, centering: Centering = "mean", tol: float = 1e-7, impl: str = "auto"
    ) -> RankMeasures:
        """Every rank measure `[*]` of a layer, as `rank_measures_from_moment` gives them, with its bound.

        Measures are NaN where nothing was counted.
        """
        check_choice(centering, "centering", ("mean", "none"))
        self._check_layer(layer)
        pair, count = self._moments.pair(layer, layer), self._moments.count
        # In units of the exponent: the moment of data at 1e150 is no fp64 number.
        scatter, unit = pair.cross, math.ldexp(1.0, -pair.exponent_i)
        if centering == "none":
            mean = self._moments.mean(layer) * unit
            scatter = scatter + count[..., None, None] * mean[..., :, None] * mean[..., None, :]
        scatter = torch.where(count[..., None, None] > 0, scatter, 0.0)
        found = rank_measures_from_moment(scatter, count, centering=centering, tol=tol, impl=impl)
        sigma = torch.where(count[..., None] > 0, found.singular_values, torch.nan)
        return dataclasses.replace(found, singular_values=sigma / unit)

    def state_dict(self) -> dict[str, np.ndarray[Any, Any]]:
        """Everything as named arrays; restoring them continues with equal bits."""
        return self._moments.state_dict()

    def load_state_dict(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Replace everything by what `state_dict` returned."""
        self._moments.load_state_dict(arrays)

    def _check_begun(self) -> None:
        if not self._moments.widths:
            raise ValueError("the stream must have had at least one update, got none")

    def _check_layer(self, layer: int) -> None:
        self._check_begun()
        check_integer(layer, "layer", least=0, most=len(self._moments.widths) - 1)
