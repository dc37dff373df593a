"""What a layer still says about something given: cross-validated linear R² from streamed cross moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rgfast.streaming import MomentAccumulator
from rgfast.threads import one_thread
from rgfast.validation import as_tensor

__all__ = ["Target", "TargetSpec", "linear_r2", "make_targets"]

TargetSpec = Tensor | NDArray[Any] | str | Callable[[Mapping[str, Any]], Any]

# Directions whose variance is below this fraction of the largest are rounding of fp32 activations.
_CUTOFF = 1e-12


class Target:
    """One target: an array over all sequences, the name of a batch entry, or a function of the entries.

    ``classes`` is the number of labels of one that has labels, known from the array or the first batch.
    """

    def __init__(self, name: str, source: TargetSpec) -> None:
        if isinstance(source, np.ndarray):
            source = torch.from_numpy(source)
        if not (isinstance(source, (str, Tensor)) or callable(source)):
            raise TypeError(
                f"targets[{name!r}] must be an array, the name of a batch entry or a callable, got "
                f"{type(source).__name__}"
            )
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

    def rows(self, entries: Mapping[str, Any], start: int, batch: int, length: int) -> Tensor:
        """``[B, T, m]`` fp64 for the sequences ``start`` … ``start + batch``; labels one-hot.

        Raises ValueError for a missing entry, a shape that does not fit, a new label and for NaN or infinity.
        """
        found = self._batch(entries, start, batch)
        if not found.is_floating_point():
            found = self._one_hot(found)
        elif found.dim() == 1:
            found = found[:, None]
        elif found.dim() == 2 and tuple(found.shape) == (batch, length) and length > 1:
            found = found[..., None]
        if found.dim() == 2:
            found = found[:, None].expand(-1, length, -1)
        if found.dim() != 3 or tuple(found.shape[:2]) != (batch, length):
            raise ValueError(
                f"targets[{self.name!r}] must be [{batch}, {length}, m], [{batch}, m] or labels "
                f"[{batch}, {length}] for this batch, got shape {tuple(found.shape)}"
            )
        if not bool(torch.isfinite(found).all()):
            raise ValueError(f"targets[{self.name!r}] must be finite, got NaN or infinity")
        return found.to(torch.float64)

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
            return as_tensor(entries[self._source])
        assert callable(self._source)
        return as_tensor(self._source(entries))

    def _one_hot(self, labels: Tensor) -> Tensor:
        labels = labels.to(torch.int64)
        low, high = (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)
        if self.classes is None:
            self.classes = high + 1
        if low < 0 or high >= self.classes:
            raise ValueError(
                f"targets[{self.name!r}] must have labels 0 to {self.classes - 1} (those of the whole array "
                f"or the first batch; give one-hot vectors otherwise), got {low if low < 0 else high}"
            )
        return torch.nn.functional.one_hot(labels, self.classes).to(torch.float64)


def make_targets(targets: Mapping[str, TargetSpec] | None) -> list[Target]:
    """The targets by name. Raises TypeError for anything but a mapping of them."""
    if targets is None:
        return []
    if not isinstance(targets, Mapping):
        raise TypeError(f"targets must be a mapping from names to arrays, got {type(targets).__name__}")
    return [Target(str(name), source) for name, source in targets.items()]


def linear_r2(
    folds: Sequence[MomentAccumulator], rest: Sequence[MomentAccumulator], layers: int, targets: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """R² ``[targets, layers, P]`` of least squares from each layer, and its standard error over folds.

    ``rest[g]`` are the moments of all but ``folds[g]``: the map and the mean come from there, the error is
    taken on the fold, R² = 1 − Σ_g SSE_g / Σ_g SST_g with SST about the training mean. Negative values stay;
    NaN where the target does not vary or a training set has fewer than two rows.
    """
    lead = rest[0].count.reshape(-1).shape[0]
    errors = np.zeros((2, len(folds), targets, layers, lead))
    # Bits of eigh and of products depend on the number of threads, and may on how operands lie: all are new.
    with one_thread():
        for g, (fold, train) in enumerate(zip(folds, rest, strict=True)):
            if fold.widths == () or train.widths == ():
                continue
            for layer in range(layers):
                inverse = _pseudo_inverse(_flat(train.scatter(layer)))
                for k in range(targets):
                    errors[:, g, k, layer] = _errors(fold, train, inverse, layer, layers + k)
    residual, total = errors
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.where(total.sum(0) > 0, 1 - residual.sum(0) / total.sum(0), np.nan)
        each = np.where(total > 0, 1 - residual / total, np.nan)
    used = np.isfinite(each).sum(0)
    centre = np.where(np.isfinite(each), each - np.nan_to_num(each).sum(0) / np.maximum(used, 1), 0.0)
    spread = np.sqrt((centre**2).sum(0) / np.maximum(used - 1, 1) / np.maximum(used, 1))
    return value, np.where(used >= 2, spread, np.nan)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:])


def _pseudo_inverse(scatter: Tensor) -> Tensor:
    value, vector = torch.linalg.eigh(scatter.nan_to_num(0.0))
    kept = value > _CUTOFF * value[:, -1:].clamp_min(0.0)
    inverse = torch.where(kept, 1.0 / torch.where(kept, value, 1.0), 0.0)
    product: Tensor = (vector * inverse[:, None]) @ vector.transpose(1, 2)
    return product


def _errors(
    fold: MomentAccumulator, train: MomentAccumulator, inverse: Tensor, layer: int, target: int
) -> NDArray[np.float64]:
    """Squared error of the map and of the training mean, on a fold ``[2, P]``."""
    count = fold.count.reshape(-1).to(torch.float64)
    trained = train.count.reshape(-1)
    weight = inverse @ _flat(train.cross(layer, target))  # [P, d, m]
    xx, xy = _flat(fold.scatter(layer)), _flat(fold.cross(layer, target))
    yy = fold.scatter(target)
    yy = _flat(yy).diagonal(dim1=1, dim2=2).sum(1)
    off_x, off_y = ((fold.mean(k) - train.mean(k)).reshape(len(count), -1) for k in (layer, target))
    missed = off_y - (off_x[:, None] @ weight)[:, 0]
    residual = yy - 2 * (weight * xy).sum((1, 2)) + (weight * (xx @ weight)).sum((1, 2))
    residual = residual.clamp_min(0.0) + count * missed.square().sum(1)
    total = yy + count * off_y.square().sum(1)
    both = torch.stack([residual, total])
    both = torch.where(count > 0, both, 0.0)
    both = torch.where(trained >= 2, both, torch.nan)
    return np.asarray(both.cpu().numpy(), dtype=np.float64)
