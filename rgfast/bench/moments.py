"""Products added to moments, against widening in plain torch and the library's batched product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rgfast.bench.timing import Call, Checked, Contest, Size
from rgfast.ops.moments import add_products

__all__ = ["CASES", "Case", "check", "contests", "gate", "ours"]

Sums = dict[tuple[int, int], Tensor]
Data = tuple[list[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """Layers ``[P, b, d]`` in fp32; one with itself, one pair, neighbours or all pairs."""

    layers: int
    positions: int
    rows: int
    width: int
    pairs: str

    def data(self, device: str = "cpu") -> Data:
        """Rows, and the shifts that are taken off them: their means."""
        generator = torch.Generator("cpu").manual_seed(0)
        shape = (self.positions, self.rows, self.width)
        layers = [
            torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device) + 3.0
            for _ in range(self.layers)
        ]
        return layers, [x.double().mean(1) for x in layers]

    def sums(self, device: str | torch.device = "cpu") -> Sums:
        """Zeros for every pair of the case."""
        count = range(self.layers)
        keys = {
            "self": [(0, 0)],
            "cross": [(0, 1)],
            "adjacent": [(i, j) for i in count for j in count if i <= j <= i + 1],
            "all": [(i, j) for i in count for j in count if i <= j],
        }[self.pairs]
        shape = (self.positions, self.width + 2, self.width + 2)
        return {key: torch.zeros(shape, dtype=torch.float64, device=device) for key in keys}

    def __str__(self) -> str:
        return f"L={self.layers} P={self.positions} b={self.rows} d={self.width}, {self.pairs}"


CASES = {
    f"{name}-{width}": Case(layers, positions, 128, width, name)
    for positions, width in ((64, 64), (32, 128), (16, 256))
    for name, layers in (("self", 1), ("cross", 2), ("adjacent", 7), ("all", 7))
}


def gate(device: str) -> Iterator[Checked]:
    """Three layers of odd sizes, with every pair."""
    case = Case(3, 3, 65, 17, "all")
    yield check(case, case.data(device))


def contests(device: str, size: Size) -> Iterator[Contest]:
    """All cases; quick ones are those of neighbours."""
    for full in CASES.values():
        if size == "quick" and full.pairs != "adjacent":
            continue
        case = replace(full, positions=2, rows=20, width=full.width // 8) if size == "tiny" else full
        yield Contest(
            str(case),
            partial(case.data, device),
            partial(ours, case),
            partial(check, case),
            {
                "widening + baddbmm": partial(widening_and_products, case),
                "baddbmm of widened rows": partial(products_alone, case),
            },
            "moments",
        )


def ours(case: Case, data: Data, impl: Any = "auto") -> Call:
    """Our sums, as the rivals form them."""
    return partial(add_products, case.sums(data[0][0].device), *data, impl=impl)


def widening_and_products(case: Case, data: Data) -> Call:
    """What one writes first: z in fp64 for every layer, then a batched product for every pair."""
    return partial(torch_products, case.sums(data[0][0].device), *data)


def products_alone(case: Case, data: Data) -> Call:
    """A part of the work: the batched products of rows that are widened already."""
    wide = [torch.nn.functional.pad(x.double(), (0, 2)) for x in data[0]]
    return partial(_multiply, case.sums(wide[0].device), wide)


def torch_products(sums: Sums, layers: list[Tensor], shifts: list[Tensor]) -> None:
    """The same in PyTorch, an operation at a time."""
    wide = []
    for x, shift in zip(layers, shifts, strict=True):
        d = x.shape[2]
        z = torch.empty(*x.shape[:2], d + 2, dtype=torch.float64, device=x.device)
        body = z[..., :d]
        body.copy_(x).sub_(shift[:, None])
        torch.sum(body.square(), -1, out=z[..., d])
        z[..., d + 1] = 1.0
        wide.append(z)
    _multiply(sums, wide)


def _multiply(sums: Sums, wide: list[Tensor]) -> None:
    for (i, j), total in sums.items():
        total.baddbmm_(wide[i].mT, wide[j])


def check(case: Case, data: Data, impl: Any = "auto") -> Checked:
    """The largest error as a share of √(Σ|z_i|² Σ|z_j|²), against products of one position at a time."""
    layers, shifts = data
    sums = case.sums(layers[0].device)
    add_products(sums, layers, shifts, impl=impl)
    error = 0.0
    for p in range(case.positions):
        z = []
        for x, shift in zip(layers, shifts, strict=True):
            y = x[p].double() - shift[p]
            z.append(torch.cat([y, y.square().sum(1, keepdim=True), torch.ones_like(y[:, :1])], 1))
        for (i, j), total in sums.items():
            size = z[i].norm(dim=0)[:, None] * z[j].norm(dim=0)
            error = max(error, float(((total[p] - z[i].mT @ z[j]).abs() / size).max()))
    return Checked(f"moments at d={case.width}", error, 1e-13)
