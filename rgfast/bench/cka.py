"""CKA between layers, against Gram + einsum in plain torch, pytorch-cka and the loop over pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rgfast
from rgfast.bench.timing import Absent, Call, Checked, Contest, Size
from rgfast.ops.cka.api import Precision

__all__ = ["CASES", "Case", "check", "contests", "gate", "gram_einsum", "ours", "pair_loop"]

Compare = Callable[[Tensor, bool], Tensor]


@dataclass(frozen=True)
class Case:
    """Layers ``[L, T, n, d]``; all pairs, or neighbours only."""

    layers: int
    positions: int
    samples: int
    width: int
    adjacent: bool

    def data(self, device: str = "cpu") -> Tensor:
        """A residual stream: every layer adds to the one before, on top of an offset."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.positions, self.samples, self.width)
        out = torch.empty(self.layers, *shape, dtype=torch.float32, device="cpu")
        out[0] = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") + 3.0
        for layer in range(1, self.layers):
            out[layer].normal_(generator=generator)
            out[layer].mul_(0.5).add_(out[layer - 1])
        return out.to(device)

    def __str__(self) -> str:
        pairs = "neighbours" if self.adjacent else "all pairs"
        return f"L={self.layers} T={self.positions} n={self.samples} d={self.width}, {pairs}"


_CHECKED = 1  # positions that are compared with the truth
_PRODUCTS: tuple[Precision | None, ...] = (None, "single", "double")

CASES = {
    "deep": Case(24, 1, 256, 512, False),
    "positions": Case(7, 64, 1024, 64, False),
    "adjacent": Case(49, 16, 1024, 256, True),
}


def gate(device: str) -> Iterator[Checked]:
    """All pairs and neighbours of a small stream, debiased and not, against the definition in fp64."""
    layers = Case(5, 3, 40, 12, False).data(device)
    for adjacent in (False, True):
        yield check(adjacent, None, layers)
        yield check(adjacent, "double", layers)
    x, y = layers[0].double(), layers[1].double()
    found = rgfast.cka(x, y, debiased=True)
    yield Checked("cka, debiased", float((found - _debiased(x, y)).abs().max()), 1e-10)


def contests(device: str, size: Size) -> Iterator[Contest]:
    """The three cases with each kind of product; quick ones have fewer layers and positions."""
    for name, full in CASES.items():
        case = full
        if size != "full":
            case = replace(full, positions=min(full.positions, 2), layers=min(full.layers, 12))
        if size == "tiny":
            case = replace(case, layers=3, samples=full.samples // 16, width=full.width // 16)
        plain: dict[str, Compare] = {"Gram + einsum": gram_einsum}
        if name != "deep" or size != "quick":
            plain["loop over pairs"] = pair_loop
        for precision in _PRODUCTS[: 1 if size == "quick" else None]:
            yield Contest(
                f"{case}, {precision}" if precision else str(case),
                partial(case.data, device),
                partial(partial, ours, case.adjacent, precision),
                partial(check, case.adjacent, precision),
                {rival: partial(_given, call, case.adjacent) for rival, call in plain.items()}
                | {"pytorch-cka": peer},
                "cka",
            )


def _given(call: Compare, adjacent: bool, layers: Tensor) -> Call:
    return partial(call, layers, adjacent)


def gram_einsum(layers: Tensor, adjacent: bool) -> Tensor:
    """All Grams of a position, centred, then vec(K)·vec(K)ᵀ: what one writes first."""
    out = []
    for x in layers.unbind(1):
        k = x @ x.mT
        k = k - k.mean(-1, keepdim=True) - k.mean(-2, keepdim=True) + k.mean((-2, -1), keepdim=True)
        if adjacent:
            norm = torch.einsum("aij,aij->a", k, k).sqrt()
            out.append(torch.einsum("aij,aij->a", k[1:], k[:-1]) / (norm[1:] * norm[:-1]))
        else:
            cross = torch.einsum("aij,bij->ab", k, k)
            norm = cross.diagonal().sqrt()
            out.append(cross / (norm[:, None] * norm))
    return torch.stack(out)


def pair_loop(layers: Tensor, adjacent: bool) -> Tensor:
    """Every pair on its own, as ‖xᵀy‖²/(‖xᵀx‖‖yᵀy‖)."""
    count = len(layers)
    pairs = [(i, i + 1) for i in range(count - 1)]
    if not adjacent:
        pairs = [(i, j) for i in range(count) for j in range(count)]
    out = []
    for x in layers.unbind(1):
        x = x - x.mean(-2, keepdim=True)
        row = []
        for i, j in pairs:
            cross = (x[i].mT @ x[j]).square().sum()
            row.append(cross / ((x[i].mT @ x[i]).norm() * (x[j].mT @ x[j]).norm()))
        out.append(torch.stack(row))
    return torch.stack(out)


def peer(layers: Tensor) -> Call:
    """pytorch-cka at every position; it knows all pairs only. Raises Absent if it is not installed."""
    try:
        from cka.cka import cka_from_features
    except ImportError:
        raise Absent("is not installed (pip install 'rgfast[bench]')") from None
    return lambda: torch.stack([cka_from_features(x, x) for x in layers.unbind(1)])


def ours(adjacent: bool, precision: Precision | None, layers: Tensor, impl: Any = "auto") -> Tensor:
    """Our biased CKA, as the rivals compute it."""
    if adjacent:
        return 1.0 - rgfast.kernel_drift(layers, precision=precision, impl=impl)
    return rgfast.cka_matrix(layers, debiased=False, precision=precision, impl=impl)


def check(adjacent: bool, precision: Precision | None, layers: Tensor, impl: str = "auto") -> Checked:
    """The largest error of ours at the first positions, against the definition in fp64."""
    layers = layers[:, :_CHECKED]
    found = ours(adjacent, precision, layers, impl).flatten(1)
    by_samples = layers.shape[-2] < layers.shape[-1]
    truth = (gram_einsum if by_samples else pair_loop)(layers.double(), adjacent).flatten(1)
    name = "kernel_drift" if adjacent else "cka_matrix"
    allowed = 1e-10 if precision == "double" else 1e-6
    return Checked(f"{name} at d={layers.shape[-1]}", float((found - truth).abs().max()), allowed)


def _debiased(x: Tensor, y: Tensor) -> Tensor:
    """CKA of the unbiased HSIC estimator of Song et al. 2012, eq. 5 (as in Nguyen et al. 2021), ``[T]``."""

    def hsic(k: Tensor, m: Tensor) -> Tensor:
        n = k.shape[-1]
        k, m = (g - torch.diag_embed(g.diagonal(dim1=-2, dim2=-1)) for g in (k, m))
        first = (k * m).sum((-2, -1))
        second = k.sum((-2, -1)) * m.sum((-2, -1)) / ((n - 1) * (n - 2))
        third = 2 * (k.sum(-1) * m.sum(-1)).sum(-1) / (n - 2)
        return (first + second - third) / (n * (n - 3))

    k, m = x @ x.mT, y @ y.mT
    return hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()
