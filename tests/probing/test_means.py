"""Means of sequences over the positions that count."""

import math

import pytest
import torch

from rgfast.probing.estimators.means import means_of
from rgfast.runtime import waiting

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means_of_the_rows_that_count_are_taken_in_fp64(dtype, elsewhere, monkeypatch):
    monkeypatch.setattr(waiting, "_EVERYWHERE", elsewhere)
    draw = torch.Generator().manual_seed(0)
    x = (100 + torch.randn(9, 40, 5, generator=draw, dtype=torch.float64)).to(dtype)
    keep = torch.rand(9, 40, generator=draw) < 0.6
    keep[3] = False
    want = [x[k, kept].double().mean(0) for k, kept in enumerate(keep)]
    hidden = x.masked_fill(~keep[..., None], math.nan)
    (found, whole), some = means_of([hidden, x], [keep, None])
    assert found.dtype == whole.dtype == torch.float64
    assert some.tolist() == [k != 3 for k in range(9)]
    assert bool((found[3] == 0).all())
    for k in (0, 1, 2, *range(4, 9)):
        torch.testing.assert_close(found[k], want[k], rtol=1e-14, atol=0.0)
    torch.testing.assert_close(whole, x.double().mean(1), rtol=1e-14, atol=0.0)
