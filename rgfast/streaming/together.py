"""Several accumulators read as one that has the positions of all, and many of their layers at once.

On a device a launch takes longer than most of what is read there, so that sums of one shape are joined first.
On the CPU every layer and pair is read by itself, on which the bits of a result depend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rgfast.runtime.threads import one_thread
from rgfast.runtime.waiting import sent, waits_for
from rgfast.streaming.accumulator import MomentAccumulator
from rgfast.streaming.algebra import in_order
from rgfast.streaming.sizes import alike, at_once
from rgfast.streaming.sums import Centered, centered

__all__ = ["KernelSums", "Together"]


@dataclass(frozen=True)
class KernelSums:
    """What CKA is made of, of ``pairs`` (i, j), i ≤ j, of layers at P positions, fp64.

    ``norms[K, P]`` are ‖Σ x_c y_cᵀ‖² of every pair, ``products[K, P]`` Σ|x_c|²|y_c|² (None if not asked for)
    and ``traces[L, P]`` Σ|x_c|² of every layer, all in units of 2^``exponents[l]``; ``count[P]`` is int64.
    ``read`` says that they are in the host's memory, wherever they were summed.
    """

    pairs: tuple[tuple[int, int], ...]
    count: Tensor
    norms: Tensor
    products: Tensor | None
    traces: Tensor
    exponents: tuple[int, ...]
    read: bool = False


class Together:
    """Accumulators of the same layers and pairs, in the same units, read as one; see :meth:`fit`."""

    def __init__(self, parts: Sequence[MomentAccumulator]) -> None:
        self._sums = [part.settled() for part in parts]
        first = self._sums[0]
        self.widths = first.widths
        self.pairs = tuple(key for key in sorted(first.moment) if key[0] != key[1])
        self.exponents = tuple(first.exponent(layer) for layer in range(len(first.widths)))
        counts = [sums.count() for sums in self._sums]
        self.count = (counts[0] if len(counts) == 1 else torch.cat(counts)).to(torch.int64)
        self._apart = not waits_for(self.count.device)
        self._centered: dict[tuple[tuple[int, int], ...], Tensor] = {}  # sums [4, K, P] of pairs
        self._few = (
            [rows for part in parts if (rows := part.few) is not None]
            if all(self.few(part) for part in parts)
            else []
        )

    @staticmethod
    def few(part: MomentAccumulator) -> bool:
        """Whether its rows are at hand, and so few that products of samples are smaller than those of
        features."""
        rows = part.few
        return rows is not None and not part.factored and 2 * rows[0][0].shape[1] <= min(part.widths)

    @property
    def of_few(self) -> bool:
        """Whether all parts are of :meth:`few` rows."""
        return bool(self._few)

    @staticmethod
    def fit(parts: Sequence[MomentAccumulator]) -> bool:
        """Whether these can be read as one: where that is of use, if their layers, pairs and units agree and
        none keeps factors, which are read by themselves."""
        seen = set()
        for part in parts:
            sums = part.settled()
            units = tuple(sums.exponent(layer) for layer in range(len(sums.widths)))
            seen.add((sums.widths, tuple(sums.moment), units, sums.begun.device, sums.factors is None))
        widths, _, _, device, plain = next(iter(seen))
        return len(seen) == 1 and bool(widths) and plain and waits_for(device)

    def at_once(self, most: int) -> Iterator[list[int]]:
        """Layers of one width, up to ``most`` of them, whose moments fit the memory for joined ones."""
        for width in dict.fromkeys(self.widths):
            at = [layer for layer, one in enumerate(self.widths) if one == width]
            step = max(1, min(most, at_once(width, width, len(self.count))))
            for start in range(0, len(at), step):
                yield at[start : start + step]

    def scatters(self, layers: Sequence[int], *, centred: bool) -> Tensor:
        """Σ x_c x_cᵀ, or Σ x xᵀ, ``[K · P, d, d]`` of layers of one width, in their units; of one part."""
        (sums,) = self._sums
        found = [sums.product(layer, layer, centred=centred, scaled=True) for layer in layers]
        return found[0] if len(found) == 1 else torch.cat(found)

    def centered(self, layers: Sequence[int]) -> Centered:
        """The sums of layers of one width about their means, with matrices, in their units. What
        :meth:`kernels` needs of them and of their pairs is kept, as far as these fit the memory as well."""
        some, width = {*layers}, self.widths[layers[0]]
        keys = [(layer, layer) for layer in layers]
        pairs = [(i, j) for i, j in self.pairs if i in some and j in some]
        if len(keys) + len(pairs) <= at_once(width, width, len(self.count)):
            keys += pairs
        found = centered(self._sums, keys, layers)
        self._centered[tuple(keys)] = found.sums
        return found

    def kernels_of_few(self, layers: Sequence[int], *, raw: bool) -> tuple[Tensor, Tensor, Tensor]:
        """X_c X_cᵀ and, if asked for, X Xᵀ of :meth:`few` rows of layers of one width ``[2, K · P, b, b]``,
        Σ x_c² and Σ x² of every feature ``[2, K · P, d]``, and :meth:`accumulated`."""
        kernels, variances, traces = [], [], []
        most, device = max(rows[0].shape[1] for rows, _ in self._few), self.count.device
        units = self._units(layers)
        for sums, (rows, keep) in zip(self._sums, self._few, strict=True):
            dropped = None if keep is None else ~sent(keep, device)[..., None]
            moments = [sums.moment[layer, layer] for layer in layers]
            columns = torch.stack([moment[:, :-2, -1] for moment in moments])
            shift = torch.stack([sums.shift[layer] for layer in layers])
            x = torch.stack([sent(rows[layer], device) for layer in layers]).to(torch.float64)  # [K, P, b, d]
            if units is not None:
                shift, x = shift * units, x * units[..., None]
            x = x - shift[:, :, None]
            if dropped is not None:
                x = x.masked_fill(dropped, 0.0)
            off = (columns / sums.count()[:, None])[:, :, None]
            z = torch.stack([x - off, x + shift[:, :, None]]) if raw else (x - off)[None]
            if dropped is not None:
                z = z.masked_fill_(dropped, 0.0)
            lacking, flat = most - z.shape[3], z.flatten(0, 2)
            product = functional.pad(torch.bmm(flat, flat.mT), (0, lacking, 0, lacking))
            kernels.append(product.view(*z.shape[:3], most, most))
            variances.append(z.square().sum(3))
            traces.append(torch.stack([moment[:, -2, -1] for moment in moments]))
        return (
            torch.cat(kernels, 2).flatten(1, 2),
            torch.cat(variances, 2).flatten(1, 2),
            torch.cat(traces, 1).flatten(),
        )

    def accumulated(self, layers: Sequence[int]) -> Tensor:
        """Σ|x−shift|² ``[K · P]`` of layers, in their units."""
        found = [sums.accumulated(layer, scaled=True).reshape(-1) for layer in layers for sums in self._sums]
        return found[0] if len(found) == 1 else torch.cat(found)

    @one_thread()
    def kernels(self, *, products: bool) -> KernelSums:
        """The sums that CKA is made of, of all pairs that are kept and every layer with itself."""
        keys = [(layer, layer) for layer in range(len(self.widths))] + list(self.pairs)
        if self._apart:
            (sums,) = self._sums
            norms = torch.stack([sums.cross(*key).square().sum((-2, -1)) for key in keys])
            traces = torch.stack([sums.trace(layer) for layer in range(len(self.widths))])
            product = torch.stack([sums.norm_product(*key) for key in keys]) if products else None
        else:
            norms, found, traces, _ = self._of_pairs(keys)
            product, traces = found if products else None, traces[: len(self.widths)]
        return KernelSums(tuple(keys), self.count, norms, product, traces, self.exponents)

    def _of_pairs(self, keys: Sequence[tuple[int, int]]) -> Tensor:
        """Norms, products, traces (of layers with themselves) and what was accumulated ``[4, K, P]``."""
        numbered = {key: k for k, key in enumerate(keys)}
        known = {key for some in self._centered for key in some}
        for some in alike([key for key in keys if key not in known], self.widths, len(self.count)):
            self._centered[tuple(some)] = centered(self._sums, some).sums
        order = [numbered[key] for some in self._centered for key in some]
        return in_order(list(self._centered.values()), order, 1)

    def _units(self, layers: Sequence[int]) -> Tensor | None:
        """What brings layers into their units ``[K, 1, 1]``, None if that is nothing."""
        exponents = [self.exponents[layer] for layer in layers]
        if not any(exponents):
            return None
        powers = torch.from_numpy(np.exp2([-float(exponent) for exponent in exponents]))
        return sent(powers, self.count.device)[:, None, None]
