"""The rows of one batch, from the capture to the estimators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

__all__ = ["Part", "RowBatch"]


@dataclass(frozen=True)
class Part:
    """Which sequences of a batch that ``ranks`` divide are here: those from ``first`` on, of ``size``."""

    first: int
    size: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class RowBatch:
    """The rows of one batch: ``layers[l]`` ``[B, T_l, d_l]``, None if the layer did not run, and what goes
    with them.

    ``keeps[l]`` ``[B, T_l]`` bool says which rows of a layer count (None: all do), ``masked`` ``[B, T]``
    which tokens were hidden (None: there is no mask), ``targets[k]`` is ``[B, T, m_k]``. ``chosen[k]``
    ``[B, T]`` bool says which rows a view of ``rows=`` has, or is "first" or "last": that of each sequence
    which counts. ``places[l]`` numbers the places that a layer has its rows at. Layers may be on several
    devices; what goes with them is on that of the first. ``padded`` says that some entry tells the padding,
    and ``notes`` what the result has to say of how entries were read. ``reused`` says that the layers' memory
    is about to be overwritten, ``owned`` that nobody else has it. ``part`` says which of a batch of several
    ranks these sequences are, None for a batch of this one. ``means[l]`` ``[B, d_l]`` are sequences' means
    over the rows that count, of the layers of which they are known.
    """

    layers: Sequence[Tensor | None]
    keeps: Sequence[Tensor | None]
    masked: Tensor | None = None
    targets: Sequence[Tensor] = ()
    chosen: Sequence[Tensor | str] = ()
    places: Sequence[int] = ()
    padded: bool = False
    notes: tuple[str, ...] = ()
    reused: bool = False
    owned: bool = False
    part: Part | None = None
    means: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def first(self) -> Tensor:
        """The rows of the first layer that ran."""
        return next(x for x in self.layers if x is not None)

    @property
    def present(self) -> list[Tensor]:
        """The rows of the layers that ran."""
        return [x for x in self.layers if x is not None]

    @property
    def sequences(self) -> int:
        """B."""
        return self.first.shape[0]

    @property
    def numbers(self) -> int:
        """How many sequences the batch has on all ranks that divide it."""
        return self.sequences if self.part is None else self.part.size

    @property
    def offset(self) -> int:
        """The number of the first sequence here among those."""
        return 0 if self.part is None else self.part.first

    @property
    def missing(self) -> list[int]:
        """The layers that did not run."""
        return [layer for layer, x in enumerate(self.layers) if x is None]

    def some(self, part: slice) -> RowBatch:
        """Some of the sequences."""

        def of(xs: Sequence[Tensor | None]) -> list[Tensor | None]:
            return [None if x is None else x[part] for x in xs]

        masked = None if self.masked is None else self.masked[part]
        return replace(
            self,
            layers=of(self.layers),
            keeps=of(self.keeps),
            masked=masked,
            targets=[target[part] for target in self.targets],
            chosen=[x if isinstance(x, str) else x[part] for x in self.chosen],
            means={layer: mean[part] for layer, mean in self.means.items()},
        )

    def of_layers(self, layers: Sequence[int]) -> RowBatch:
        """Some of the layers, numbered in the order given."""
        return replace(
            self,
            layers=[self.layers[layer] for layer in layers],
            keeps=[self.keeps[layer] for layer in layers],
            places=[self.places[layer] for layer in layers] if self.places else (),
            means={k: self.means[layer] for k, layer in enumerate(layers) if layer in self.means},
        )

    def chosen_of(self, number: int, layer: int) -> Tensor:
        """Which rows of a layer count in a view of ``rows=`` ``[B, T_l]``, bool."""
        chosen, keep = self.chosen[number], self.keeps[layer]
        if not isinstance(chosen, str):
            return chosen if keep is None else chosen & keep
        x = self.layers[layer]
        assert x is not None
        length, device = x.shape[1], self.first.device if keep is None else keep.device
        every = torch.arange(length, dtype=torch.int64, device=device)
        if keep is None:
            return (every == (0 if chosen == "first" else length - 1)).expand(len(x), -1)
        if chosen == "first":
            return every == torch.where(keep, every, length).amin(1, keepdim=True)
        return every == torch.where(keep, every, -1).amax(1, keepdim=True)
