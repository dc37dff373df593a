"""Eigenvalues and effective ranks, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import rgfast
from rgfast.bench.timing import Call, Checked, Contest, threads

__all__ = ["batch_of", "check_eigenvalues", "check_ranks", "contests", "gate", "on_threads", "svd_rank"]

_QUICK, _FULL = (16, 64, 128), (8, 16, 32, 64, 128, 256, 512)


def gate(device: str) -> Iterator[Checked]:
    """Every function of the room on small inputs against LAPACK in fp64."""
    for dtype in (torch.float64, torch.float32):
        yield check_eigenvalues(symmetric(8, 33, dtype, device))
    x = _rows(5, 97, 17, device)
    yield check_ranks(x)
    sigma = torch.linalg.svdvals(_centred(x.double()))
    energy = sigma.square().sum(-1)
    truths = {
        "singular_values": sigma,
        "participation_ratio": energy.square() / sigma.pow(4).sum(-1),
        "stable_rank": energy / sigma[..., 0].square(),
    }
    for name, truth in truths.items():
        found: Tensor = getattr(rgfast, name)(x)
        yield Checked(name, _relative(found, truth), 1e-6)
    centred = _centred(x.double())
    found = rgfast.rank_measures_from_moment(centred.mT @ centred, 97).effective_rank
    yield Checked("rank_measures_from_moment", _relative(found, svd_rank(x.double())), 1e-6)


def contests(device: str, quick: bool) -> Iterator[Contest]:
    """Batches of symmetric matrices in both precisions, and effective ranks of fp32 data with n = 4d."""
    sizes = _QUICK if quick else _FULL
    for d in sizes:
        for dtype in (torch.float64, torch.float32):
            a = symmetric(batch_of(d), d, dtype, device)
            name = f"eigvalsh {str(dtype).removeprefix('torch.')}, {len(a)} of d={d}"
            rivals = {"torch.linalg.eigvalsh": on_threads(partial(torch.linalg.eigvalsh, a), device)}
            checks = (partial(check_eigenvalues, a),)
            yield Contest(name, partial(rgfast.eigvalsh, a), rivals, checks)
    for d in sizes[: -1 if quick else None]:
        x = _rows(batch_of(d), 4 * d, d, device)
        name = f"effective_rank, {len(x)} of n={4 * d} d={d}"
        rivals = {"torch SVD": on_threads(partial(svd_rank, x), device)}
        yield Contest(name, partial(rgfast.effective_rank, x), rivals, (partial(check_ranks, x),))


def batch_of(d: int) -> int:
    """How many matrices of a size are taken at once."""
    return 64 if d < 512 else 8


def symmetric(batch: int, d: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Random symmetric matrices ``[batch, d, d]``."""
    a = torch.randn(batch, d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
    return (a + a.mT).to(device, dtype)


def svd_rank(x: Tensor) -> Tensor:
    """The effective rank as one writes it first."""
    sigma = torch.linalg.svdvals(_centred(x))
    p = sigma / sigma.sum(-1, keepdim=True)
    rank: Tensor = torch.special.entr(p).sum(-1).exp()
    return rank


def check_eigenvalues(a: Tensor, values: Tensor | None = None) -> Checked:
    """The largest error of our eigenvalues, relative to the norm."""
    values = rgfast.eigvalsh(a) if values is None else values
    want = torch.linalg.eigvalsh(a.double())
    # The comparison value errs too when it is of the same precision.
    allowed = max(50, a.shape[-1] / 2) * torch.finfo(a.dtype).eps / 2 * (2 if a.dtype == torch.float64 else 1)
    worst = float(((values.double() - want).abs().amax(-1) / want.abs().amax(-1)).max())
    return Checked(f"eigvalsh {str(a.dtype).removeprefix('torch.')} at d={a.shape[-1]}", worst, allowed)


def check_ranks(x: Tensor) -> Checked:
    """The largest relative error of our effective ranks."""
    found = rgfast.effective_rank(x)
    return Checked(f"effective_rank at d={x.shape[-1]}", _relative(found, svd_rank(x.double())), 1e-6)


def on_threads(call: Callable[[], Tensor], device: str) -> tuple[Call, ...]:
    """The call on one thread and on all: batched LAPACK is often faster on one."""

    def on(count: int) -> Call:
        def run() -> Tensor:
            with threads(count):
                return call()

        return run

    if device != "cpu":
        return (call,)
    return tuple(on(count) for count in sorted({1, torch.get_num_threads()}))


def _rows(batch: int, n: int, d: int, device: str) -> Tensor:
    return torch.randn(batch, n, d, generator=torch.Generator().manual_seed(d)).to(device)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-2, keepdim=True)


def _relative(found: Tensor, truth: Tensor) -> float:
    return float(((found - truth).abs() / truth.abs()).max())
