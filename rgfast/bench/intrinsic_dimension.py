"""TwoNN, against all distances by cdist."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rgfast
from rgfast.bench.timing import Call, Checked, Contest, Size

__all__ = ["CASES", "Case", "check", "contests", "gate", "ours"]


@dataclass(frozen=True)
class Case:
    """Rows ``[n, d]`` in fp32 that fill few dimensions."""

    samples: int
    width: int

    def data(self, device: str = "cpu") -> Tensor:
        """A cloud of eight dimensions with noise in all."""
        generator = torch.Generator("cpu").manual_seed(0)
        drawn = [
            torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(device)
            for shape in ((self.samples, 8), (8, self.width), (self.samples, self.width))
        ]
        return drawn[0] @ drawn[1] + 0.1 * drawn[2]

    def __str__(self) -> str:
        return f"n={self.samples} d={self.width}"


CASES = {
    f"{samples}-{width}": Case(samples, width)
    for samples, width in ((512, 64), (1024, 768), (4096, 64), (4096, 768))
}


def gate(device: str) -> Iterator[Checked]:
    """A small cloud against the definition."""
    case = Case(65, 17)
    yield check(case, case.data(device))


def contests(device: str, size: Size) -> Iterator[Contest]:
    """All cases; quick ones have up to 1,024 samples."""
    for full in CASES.values():
        if size != "full" and full.samples > 1024:
            continue
        case = replace(full, samples=30, width=8) if size == "tiny" else full
        yield Contest(
            str(case),
            partial(case.data, device),
            partial(ours, case),
            partial(check, case),
            {"cdist + topk": cdist_topk, "cdist by products + topk": partial(cdist_topk, by_products=True)},
            "intrinsic_dimension",
        )


def ours(case: Case, x: Tensor, impl: Any = "auto") -> Call:
    """Our dimension."""
    return partial(rgfast.intrinsic_dimension, x, impl=impl)


def cdist_topk(x: Tensor, by_products: bool = False) -> Callable[[], Tensor]:
    """All distances at once in fp64, directly or by products, which lose the digits of close pairs."""
    wide = x.double()
    mode = "use_mm_for_euclid_dist" if by_products else "donot_use_mm_for_euclid_dist"

    def run() -> Tensor:
        near = torch.cdist(wide, wide, compute_mode=mode).topk(3, largest=False).values
        value: Tensor = (len(wide) - 1) / (near[:, 2] / near[:, 1]).log().sum()
        return value

    return run


def check(case: Case, x: Tensor, impl: Any = "auto") -> Checked:
    """The relative error, against all distances directly."""
    truth = cdist_topk(x)()
    found = rgfast.intrinsic_dimension(x, impl=impl)
    return Checked(f"intrinsic dimension at n={case.samples}", float((found / truth - 1.0).abs()), 1e-9)
