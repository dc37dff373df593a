"""What a layer still says about something given: cross-validated linear R² from streamed cross moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rgfast.ops.spectrum.measures import numpy_on_cpu
from rgfast.probing.unread import Unread
from rgfast.runtime.threads import one_thread
from rgfast.streaming import MomentAccumulator
from rgfast.validation import as_tensor, kind_and_way

__all__ = ["Target", "TargetSpec", "linear_r2", "make_targets", "over_folds", "pseudo_inverse"]

TargetSpec = Tensor | NDArray[Any] | str | Callable[[Mapping[str, Any]], Any]

# Directions whose variance is below this fraction of the largest are rounding of fp32 activations.
_CUTOFF = 1e-12
# Up to this condition number a Cholesky factor loses no more than an eigendecomposition.
_REGULAR = 1e10


class Target:
    """One target: an array over all sequences, the name of a batch entry, or a function of the entries.

    ``classes`` is the number of labels of one that has labels, known from the array or the first batch.
    """

    def __init__(self, name: str, source: TargetSpec) -> None:
        if isinstance(source, (np.ndarray, list)):
            source = as_tensor(source, f"targets[{name!r}]")
        if not (isinstance(source, (str, Tensor)) or callable(source)):
            raise TypeError(
                f"targets[{name!r}] must be an array, the name of a batch entry or a callable, got "
                f"{kind_and_way(source)}"
            )
        if isinstance(source, Tensor):
            _check_kind(source, name)
        self.name, self._source = name, source
        self.classes: int | None = None
        if isinstance(source, Tensor) and not source.is_floating_point():
            self.classes = int(source.max()) + 1 if source.numel() else 0

    @property
    def in_order(self) -> bool:
        """Whether it is an array over all sequences, in the order in which batches bring them."""
        return isinstance(self._source, Tensor)

    @property
    def entry(self) -> str | None:
        """The batch entry that it is read from, if it is one."""
        return self._source if isinstance(self._source, str) else None

    def width(self, length: int) -> int | None:
        """Numbers per row, of sequences of ``length`` rows; None if that is known from batches alone."""
        if not isinstance(self._source, Tensor):
            return None
        if self.classes is not None:
            return self.classes
        shape = self._source.shape
        single = len(shape) == 1 or (len(shape) == 2 and shape[1] == length > 1)
        return 1 if single else shape[-1]

    def rows(
        self,
        entries: Mapping[str, Any],
        given: Mapping[str, Any],
        start: int,
        batch: int,
        length: int,
        unread: Unread,
    ) -> Tensor:
        """``[B, T, m]`` fp64 for the sequences ``start`` … ``start + batch``; labels one-hot.

        A function gets ``entries``; others are taken from what was ``given`` for them. Raises ValueError for
        a missing entry, a shape that does not fit, a new label and for NaN or infinity: ``unread`` says when.
        """
        found = self._batch(entries if callable(self._source) else given, start, batch)
        if not found.is_floating_point():
            found = self._one_hot(found, unread)
        elif found.dim() == 1:
            found = found[:, None]
        elif found.dim() == 2 and tuple(found.shape) == (batch, length) and length > 1:
            found = found[..., None]
        found = found.to(torch.float64)  # first, since it would write out what is expanded
        if found.dim() == 2:
            found = found[:, None].expand(-1, length, -1)
        if found.dim() != 3 or tuple(found.shape[:2]) != (batch, length):
            raise ValueError(
                f"targets[{self.name!r}] must be [{batch}, {length}, m], [{batch}, m] or labels "
                f"[{batch}, {length}] for this batch, got shape {tuple(found.shape)}"
            )
        said = f"targets[{self.name!r}] must be finite, got NaN or infinity"
        unread.check((~torch.isfinite(found)).any(), lambda bad: said if bool(bad) else "")
        return found

    def _batch(self, entries: Mapping[str, Any], start: int, batch: int) -> Tensor:
        if isinstance(self._source, Tensor):
            if start + batch > len(self._source):
                raise ValueError(
                    f"targets[{self.name!r}] must have a row for every sequence, got {len(self._source)} "
                    f"rows and sequence number {start + batch - 1}"
                )
            return self._source[start : start + batch]
        if isinstance(self._source, str):
            if self._source not in entries:
                raise ValueError(
                    f"targets[{self.name!r}]: there is no entry {self._source!r} in the batch "
                    f"({', '.join(entries)})"
                )
            found = entries[self._source]
        else:
            assert callable(self._source)
            found = self._source(entries)
        found = as_tensor(found, f"targets[{self.name!r}]")
        _check_kind(found, self.name)
        return found

    def _one_hot(self, labels: Tensor, unread: Unread) -> Tensor:
        labels = labels.to(torch.int64)
        if self.classes is None:  # which decides the width of all that follows, wherever the labels are
            self.classes = int(labels.max()) + 1 if labels.numel() else 1
        classes = self.classes

        def said(ends: Tensor) -> str:
            low, high = ends.tolist()
            if low >= 0 and high < classes:
                return ""
            return (
                f"targets[{self.name!r}] must have labels 0 to {classes - 1} (those of the whole array "
                f"or the first batch; give one-hot vectors otherwise), got {low if low < 0 else high}"
            )

        if labels.numel():
            unread.check(torch.stack(torch.aminmax(labels)), said)
        every = torch.arange(classes, dtype=torch.int64, device=labels.device)
        return (labels[..., None] == every).to(torch.float64)


def _check_kind(target: Tensor, name: str) -> None:
    if target.is_complex() or target.layout != torch.strided:
        what = target.layout if target.layout != torch.strided else target.dtype
        raise TypeError(f"targets[{name!r}] must be dense and of real numbers or labels, got {what}")
    if target.dim() == 0:
        raise ValueError(f"targets[{name!r}] must have a row for every sequence, got a single number")


def make_targets(targets: Mapping[str, TargetSpec] | None) -> list[Target]:
    """The targets by name. Raises TypeError for anything but a mapping of them."""
    if targets is None:
        return []
    if not isinstance(targets, Mapping):
        raise TypeError(f"targets must be a mapping from names to arrays, got {type(targets).__name__}")
    return [Target(str(name), source) for name, source in targets.items()]


def linear_r2(
    folds: Sequence[MomentAccumulator], rest: Sequence[MomentAccumulator], layers: int, targets: int
) -> tuple[Tensor, Tensor]:
    """R² ``[targets, layers, P]`` of least squares from each layer, and its standard error over folds.

    ``rest[g]`` are the moments of all but ``folds[g]``: the map and the mean come from there, the error is
    taken on the fold, R² = 1 − Σ_g SSE_g / Σ_g SST_g with SST about the training mean. Negative values stay;
    NaN where the target does not vary or a training set has fewer than two rows.
    """
    lead = rest[0].count.reshape(-1).shape[0]
    errors = torch.zeros(
        2, len(folds), targets, layers, lead, dtype=torch.float64, device=rest[0].count.device
    )
    # Bits of eigh and of products depend on the number of threads, and may on how operands lie: all are new.
    with one_thread():
        for g, (fold, train) in enumerate(zip(folds, rest, strict=True)):
            if fold.widths == () or train.widths == ():
                continue
            for layer in range(layers):
                inverse = pseudo_inverse(_flat(train.scatter(layer)))
                for k in range(targets):
                    errors[:, g, k, layer] = _errors(fold, train, inverse, layer, layers + k)
    found: tuple[Tensor, Tensor] = over_folds(errors)
    return found


@numpy_on_cpu
def over_folds(errors: Any) -> Any:
    """R² of all folds and its standard error, of ``errors[2, G, ...]``."""
    library: Any = torch if isinstance(errors, Tensor) else np
    residual, total = errors
    with np.errstate(divide="ignore", invalid="ignore"):
        value = library.where(total.sum(0) > 0, 1 - residual.sum(0) / total.sum(0), math.nan)
        each = library.where(total > 0, 1 - residual / total, math.nan)
    used = library.isfinite(each).sum(0)
    off = each - library.nan_to_num(each).sum(0) / used.clip(1)
    centre = library.where(library.isfinite(each), off, 0.0)
    spread = library.sqrt((centre**2).sum(0) / (used - 1).clip(1) / used.clip(1))
    return value, library.where(used >= 2, spread, math.nan)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:])


def pseudo_inverse(scatter: Tensor) -> Tensor:
    """The inverse of positive semidefinite ``scatter[P, d, d]`` on directions that are more than rounding.

    An eigendecomposition costs some twenty times a Cholesky factorization, and is taken where that cannot
    show that every direction counts: the traces of a matrix and its inverse bound its condition number.
    """
    scatter = scatter.nan_to_num(0.0)
    lower, failed = torch.linalg.cholesky_ex(scatter)
    inverse = torch.zeros_like(scatter)
    factored = (failed == 0).nonzero()[:, 0]
    if len(factored):
        inverse[factored] = torch.cholesky_inverse(lower[factored])
    condition = _trace(scatter) * _trace(inverse)
    singular = (~((condition > 0) & (condition < _REGULAR))).nonzero()[:, 0]
    if len(singular):
        inverse[singular] = _by_eigenvectors(scatter[singular])
    return inverse


def _trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=1, dim2=2).sum(1)


def _by_eigenvectors(scatter: Tensor) -> Tensor:
    value, vector = torch.linalg.eigh(scatter)
    kept = value > _CUTOFF * value[:, -1:].clamp_min(0.0)
    inverse = torch.where(kept, 1.0 / torch.where(kept, value, 1.0), 0.0)
    product: Tensor = (vector * inverse[:, None]) @ vector.transpose(1, 2)
    return product


def _errors(
    fold: MomentAccumulator, train: MomentAccumulator, inverse: Tensor, layer: int, target: int
) -> Tensor:
    """Squared error of the map and of the training mean, on a fold ``[2, P]``."""
    count = fold.count.reshape(-1).to(torch.float64)
    trained = train.count.reshape(-1)
    weight = inverse @ _flat(train.cross(layer, target))  # [P, d, m]
    xx, xy = _flat(fold.scatter(layer)), _flat(fold.cross(layer, target))
    yy = fold.scatter(target)
    yy = _trace(_flat(yy))
    off_x, off_y = ((fold.mean(k) - train.mean(k)).reshape(len(count), -1) for k in (layer, target))
    missed = off_y - (off_x[:, None] @ weight)[:, 0]
    residual = yy - 2 * (weight * xy).sum((1, 2)) + (weight * (xx @ weight)).sum((1, 2))
    residual = residual.clamp_min(0.0) + count * missed.square().sum(1)
    total = yy + count * off_y.square().sum(1)
    both = torch.stack([residual, total])
    both = torch.where(count > 0, both, 0.0)
    return torch.where(trained >= 2, both, torch.nan)
