"""Eigenvalues of larger fp64 matrices on a GPU, csrc/cuda/spectrum_stages.cu: three launches for a batch.

A dense matrix is brought to half-width 16, then to tridiagonal form, whose eigenvalues are counted. What the
launches leave each other is in a workspace, of which a batch gets no more than 1 GB at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rgfast.runtime import cuda

__all__ = ["BANDS", "STAGES", "Stages", "at_once", "workspace_doubles"]

_HALF_WIDTH = 16
_WORK = 1 << 30
_COUNTED = 128  # eigenvalues by a block of `count`


class Band(NamedTuple):
    """A kernel from dense matrices to half-width 16: two of a panel's rows for each thread."""

    name: str
    rows: int  # of the largest matrix
    block: int
    shared: int  # bytes, without the panel


BANDS = (
    Band("band_narrow", 272, 128, 18432),
    Band("band", 512, 256, 34816),
    Band("band_wide", 1024, 512, 34816),
)
_ROWS_NEAR = BANDS[1].rows  # whose bands have room in shared memory


def _whole_panels(d: int) -> int:
    return -(-d // _HALF_WIDTH) * _HALF_WIDTH


def workspace_doubles(d: int) -> int:
    """Of a matrix of d rows; spectrum_workspace.cuh has the same."""
    rows = _whole_panels(d)
    return rows * (rows + 7 * _HALF_WIDTH + 2) + 4


def at_once(d: int) -> int:
    """Matrices of d rows that share a workspace."""
    return max(1, _WORK // (8 * workspace_doubles(d)))


class Stages(NamedTuple):
    """The kernels of spectrum_stages.cu, which take fp64 matrices of up to `rows` rows."""

    rows: int
    tried: int  # rows of the problem with a known answer
    per_block: int = 1

    def launches(self, d: int, dtype: torch.dtype, like: int | None = None) -> list[tuple[str, int, int]]:
        """Names, threads and bytes of shared memory, of the kernels for as many rows as `like`."""
        rows, like = _whole_panels(d), d if like is None else like
        band = next(each for each in BANDS if each.rows >= like)
        # d / 32 sweeps could go on at a time. Fewer warps take less time per step, and more blocks fit.
        threads = 32 * max(3, min(12, d // 56))
        far = like > _ROWS_NEAR
        chase = ("chase_far", threads, 4 * d) if far else ("chase", threads, 16 * _HALF_WIDTH * rows + 4 * d)
        panel = 8 * _HALF_WIDTH * (rows + 8)
        stages = [(band.name, band.block, band.shared + panel), chase, ("count", _COUNTED, 18496)]
        return [(f"rgfast_spectrum_{name}_f64", block, shared) for name, block, shared in stages]

    def launch(
        self, a: Tensor, means: Tensor | None = None, samples: float = 0.0, like: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Eigenvalues `[b, d]`, ascending, of `a[b, d, d]` and, if given means, of a + samples mean mean'."""
        (b, d), dtype = a.shape[:2], a.dtype
        most = min(b, at_once(d))
        values = torch.empty((b, d), dtype=torch.float64, device=a.device)
        raw = values if means is None else torch.empty_like(values)
        workspace = torch.empty(most * workspace_doubles(d), dtype=torch.float64, device=a.device)
        for begin in range(0, b, max(1, most)):
            part = slice(begin, min(begin + most, b))
            count = part.stop - begin
            matrices = a[part].double().contiguous()
            for stage, (name, block, shared) in enumerate(self.launches(d, dtype, like)):
                cuda.launch(
                    name,
                    (count, -(-d // _COUNTED) if stage == 2 else 1, 1),
                    block,
                    shared,
                    matrices,
                    0 if means is None else means[part].double().contiguous(),
                    d,
                    count,
                    float(samples),
                    values[part],
                    raw[part],
                    workspace,
                    device=a.device,
                )
        # Of values that are as close as rounding the order may be wrong.
        values = values.cummax(-1).values
        raw = values if means is None else raw.cummax(-1).values
        return values.to(dtype), raw.to(dtype)


STAGES = Stages(BANDS[-1].rows, 81)
