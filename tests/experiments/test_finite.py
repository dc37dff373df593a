from dataclasses import replace

import numpy as np
import pytest
import torch

import rgfast
from rgfast.experiments.config import ReproduceConfig
from rgfast.experiments.finite import FiniteSample, finite_sample
from rgfast.masking import balanced_counts, balanced_mask


@pytest.mark.parametrize(
    ("n", "length", "rate"), [(2048, 12, 0.2), (4096, 4, 0.2), (10, 4, 0.1), (7, 3, 0.05), (9, 2, 0.5)]
)
def test_counts_are_those_of_the_mask(n, length, rate):
    each, extra = balanced_counts(n, length, rate)
    hidden = balanced_mask(n, length, rate, torch.Generator().manual_seed(3)).sum(0)
    assert sorted(hidden.tolist()) == [each] * (length - extra) + [each + 1] * extra


def test_rows_are_those_that_the_probe_counts():
    config = replace(ReproduceConfig.preset("quick"), probe_sequences=1500, length=6, width=8, hidden=16)
    found = finite_sample(config)
    mask = balanced_mask(1500, 6, 0.2, torch.Generator().manual_seed(0))
    x = torch.randn(1500, 6, 8, generator=torch.Generator().manual_seed(1))
    views = tuple(found)
    result = rgfast.probe(
        torch.nn.Sequential(torch.nn.Identity()),
        {"input": x, "mask": mask},
        mask="mask",
        views=views,
        layers=["0"],
        pairs=(),
        progress=False,
    )
    for view in views:
        data = result.dataset.sel(view=view)
        rows = data.n.values[data.n.values > 0]
        assert set(rows.tolist()) == {found[view].rows}
        baseline = data.effective_rank_baseline.values
        np.testing.assert_allclose(baseline[np.isfinite(baseline)], found[view].isotropic_rank)
        assert bool(data.sample_limited.any()) is found[view].limited


def test_few_rows_are_told():
    assert FiniteSample(255, 16).limited
    assert not FiniteSample(256, 16).limited
    assert 14 < FiniteSample(256, 16).isotropic_rank < 16
