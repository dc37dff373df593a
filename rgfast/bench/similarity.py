"""Calibrated measures, against the measure in plain torch under every permutation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rgfast
from rgfast.bench.timing import Call, Checked, Contest, Size

__all__ = ["CASES", "Case", "check", "contests", "gate", "ours", "recomputed"]

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """Two related representations ``[n, d]`` in fp32, and how often the samples of one are permuted."""

    measure: str
    samples: int
    width: int
    null: int

    def data(self, device: str = "cpu") -> Data:
        """A cloud, and the same with as much noise again."""
        generator = torch.Generator("cpu").manual_seed(0)
        shape = (2, self.samples, self.width)
        x, noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)
        return x, x + noise

    def __str__(self) -> str:
        return f"{self.measure} n={self.samples} d={self.width}, {self.null} permutations"


CASES = {
    f"{measure}-{samples}": Case(measure, samples, width, 20)
    for samples, width in ((512, 256), (2048, 768))
    for measure in ("cka", "mutual_knn", "procrustes", "rsa")
    if (measure, samples) != ("procrustes", 2048)
}


def gate(device: str) -> Iterator[Checked]:
    """Every measure on a small cloud, against the definition."""
    for measure in ("cka", "mutual_knn", "procrustes", "rsa"):
        case = Case(measure, 40, 7, 3)
        yield check(case, case.data(device))


def contests(device: str, size: Size) -> Iterator[Contest]:
    """All cases; quick ones are those of 512 samples."""
    for full in CASES.values():
        if size != "full" and full.samples > 512:
            continue
        case = replace(full, samples=30, width=8, null=2) if size == "tiny" else full
        yield Contest(
            str(case),
            partial(case.data, device),
            partial(ours, case),
            partial(check, case),
            {"torch, every permutation anew": partial(recomputed, case)},
            "similarity",
        )


def ours(case: Case, data: Data, impl: Any = "auto") -> Call:
    """Our value and nulls."""
    return partial(rgfast.calibrate, case.measure, *data, null=case.null, impl=impl)


def recomputed(case: Case, data: Data) -> Call:
    """What one writes first: the measure, and again for every permutation."""
    x, y = (z.double() for z in data)
    measure = _MEASURES[case.measure]

    def run() -> list[Tensor]:
        rng = np.random.default_rng(0)
        orders = [torch.from_numpy(rng.permutation(len(y))).to(y.device) for _ in range(case.null)]
        return [measure(x, y), *(measure(x, y[order]) for order in orders)]

    return run


def check(case: Case, data: Data, impl: Any = "auto") -> Checked:
    """The error of the value and of the mean null, against plain torch under the same permutations."""
    found = rgfast.calibrate(case.measure, *data, null=case.null, impl=impl)
    x, y = (z.double() for z in data)
    measure = _MEASURES[case.measure]
    truth = rgfast.calibrate(lambda a, b: measure(a, b), x, y, null=2)
    # The first permutations are the same, however many there are.
    error = float((found.value - truth.value).abs() + (found.null[:2] - truth.null).abs().max())
    return Checked(f"{case.measure} at n={case.samples}", error, 1e-10)


def _cka(x: Tensor, y: Tensor) -> Tensor:
    """Debiased linear CKA of U-centered Grams (Székely and Rizzo 2014)."""
    n = len(x)
    grams = []
    for z in (x, y):
        z = z - z.mean(0)
        k = (z @ z.mT).fill_diagonal_(0.0)
        rows = k.sum(1)
        k = k - rows / (n - 2) - rows[:, None] / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
        grams.append(k.fill_diagonal_(0.0))
    k, m = grams
    value: Tensor = (k * m).sum() / (k.norm() * m.norm())
    return value


def _mutual_knn(x: Tensor, y: Tensor) -> Tensor:
    masks = []
    for z in (x, y):
        z = torch.nn.functional.normalize(z, dim=1)
        near = (z @ z.mT).fill_diagonal_(-torch.inf).topk(10, dim=1).indices
        masks.append(torch.zeros(len(z), len(z), dtype=torch.bool, device=z.device).scatter_(1, near, True))
    return (masks[0] & masks[1]).sum(dtype=torch.float64) / (10.0 * len(x))


def _procrustes(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(0), y - y.mean(0)
    value: Tensor = torch.linalg.svdvals(x.mT @ y).sum() / (x.norm() * y.norm())
    return value


def _rsa(x: Tensor, y: Tensor) -> Tensor:
    ranks = [torch.pdist(z).argsort().argsort().double() for z in (x, y)]
    a, b = (r - r.mean() for r in ranks)
    value: Tensor = (a * b).sum() / (a.norm() * b.norm())
    return value


_MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cka": _cka,
    "mutual_knn": _mutual_knn,
    "procrustes": _procrustes,
    "rsa": _rsa,
}
