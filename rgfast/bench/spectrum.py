"""Eigenvalues and effective ranks, against PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import rgfast
from rgfast.bench.timing import Checked, Contest, Size

__all__ = ["batch_of", "check_eigenvalues", "check_ranks", "contests", "gate", "svd_rank"]

_SIZES: dict[Size, tuple[int, ...]] = {
    "tiny": (8,),
    "quick": (16, 64, 128),
    "full": (8, 16, 17, 32, 33, 48, 64, 128, 256, 512, 1024),
}


_ON_A_GPU = (16, 64, 128, 256, 768, 1024)
_FEW = {768: 13, 1024: 33}
# Matrices that are held against LAPACK, which has its time.
_CHECKED = 8


def gate(device: str) -> Iterator[Checked]:
    """Every function of the room on small inputs against LAPACK in fp64."""
    for dtype in (torch.float64, torch.float32):
        yield check_eigenvalues(symmetric(8, 33, dtype, device))
    x = _rows(5, 97, 17, device)
    yield check_ranks(x)
    sigma = torch.linalg.svdvals(_centred(x.double().cpu()))
    energy = sigma.square().sum(-1)
    truths = {
        "singular_values": sigma,
        "participation_ratio": energy.square() / sigma.pow(4).sum(-1),
        "stable_rank": energy / sigma[..., 0].square(),
    }
    for name, truth in truths.items():
        found: Tensor = getattr(rgfast, name)(x)
        yield Checked(name, _relative(found.cpu(), truth), 1e-6)
    centred = _centred(x.double())
    found = rgfast.rank_measures_from_moment(centred.mT @ centred, 97).effective_rank
    yield Checked("rank_measures_from_moment", _relative(found.cpu(), svd_rank(x.double().cpu())), 1e-6)


def contests(device: str, size: Size) -> Iterator[Contest]:
    """Symmetric matrices in both precisions, in batches and alone; effective ranks of fp32 data, n = 4d.

    A GPU gets larger batches, and few large matrices such as a model's layers have.
    """
    one_thread = device == "cpu"
    sizes = _SIZES[size] if one_thread or size == "tiny" else _ON_A_GPU
    for d in sizes:
        for dtype in (torch.float64, torch.float32):
            for batch in (batch_of(d, device), 1)[: 1 if size == "quick" else None]:
                yield Contest(
                    f"eigvalsh {str(dtype).removeprefix('torch.')}, {batch} of d={d}",
                    partial(symmetric, batch, d, dtype, device),
                    lambda a, impl: partial(rgfast.eigvalsh, a, impl=impl),
                    check_eigenvalues,
                    {"torch.linalg.eigvalsh": lambda a: partial(torch.linalg.eigvalsh, a)},
                    "eigvalsh",
                    one_thread,
                    d,
                )
    for d in sizes[: -1 if size == "quick" else None]:
        yield Contest(
            f"effective_rank, {batch_of(d, device)} of n={4 * d} d={d}",
            partial(_rows, batch_of(d, device), 4 * d, d, device),
            lambda x, impl: partial(rgfast.effective_rank, x, impl=impl),
            check_ranks,
            {"torch SVD": lambda x: partial(svd_rank, x)},
            "spectrum",
            one_thread,
            d,
        )


def batch_of(d: int, device: str = "cpu") -> int:
    """How many matrices of a size are taken at once."""
    if device != "cpu":
        return _FEW.get(d, 400)
    return 64 if d < 512 else 8


def symmetric(batch: int, d: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Random symmetric matrices ``[batch, d, d]``."""
    a = torch.randn(
        batch, d, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64, device="cpu"
    )
    return (a + a.mT).to(device, dtype)


def svd_rank(x: Tensor) -> Tensor:
    """The effective rank as one writes it first."""
    sigma = torch.linalg.svdvals(_centred(x))
    p = sigma / sigma.sum(-1, keepdim=True)
    rank: Tensor = torch.special.entr(p).sum(-1).exp()
    return rank


def check_eigenvalues(a: Tensor, impl: str = "auto") -> Checked:
    """The largest error of our eigenvalues, relative to the norm."""
    values = rgfast.eigvalsh(a, impl=impl)
    values, a = (t if t.device.type == "cpu" else t[:_CHECKED].cpu() for t in (values, a))
    want = torch.linalg.eigvalsh(a.double())
    # The comparison value errs too when it is of the same precision.
    allowed = max(50, a.shape[-1] / 2) * torch.finfo(a.dtype).eps / 2 * (2 if a.dtype == torch.float64 else 1)
    worst = float(((values.double() - want).abs().amax(-1) / want.abs().amax(-1)).max())
    return Checked(f"eigvalsh {str(a.dtype).removeprefix('torch.')} at d={a.shape[-1]}", worst, allowed)


def check_ranks(x: Tensor, impl: str = "auto") -> Checked:
    """The largest relative error of our effective ranks."""
    found = rgfast.effective_rank(x, impl=impl)
    found, x = (t if t.device.type == "cpu" else t[:_CHECKED].cpu() for t in (found, x))
    return Checked(f"effective_rank at d={x.shape[-1]}", _relative(found, svd_rank(x.double())), 1e-6)


def _rows(batch: int, n: int, d: int, device: str) -> Tensor:
    return torch.randn(
        batch, n, d, generator=torch.Generator().manual_seed(d), dtype=torch.float32, device="cpu"
    ).to(device)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-2, keepdim=True)


def _relative(found: Tensor, truth: Tensor) -> float:
    return float(((found - truth).abs() / truth.abs()).max())
