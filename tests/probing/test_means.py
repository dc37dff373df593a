"""Means of sequences over the positions that count."""

import math

import pytest
import torch

import rgfast
from rgfast.probing.estimators import finite
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


def test_means_that_are_known_are_not_taken_again():
    x, keep = torch.zeros(3, 2, 4), torch.tensor([[True, True], [False, False], [True, False]])
    known = torch.ones(3, 4, dtype=torch.float64)
    (found, other), some = means_of([x, x], [keep, None], {0: known})
    assert found is known
    assert some.tolist() == [True, False, True]
    assert not other.any()


@pytest.mark.parametrize("groups", [1, 2])
def test_on_a_device_rows_are_read_once_for_their_means_and_for_what_is_not_finite(groups, monkeypatch):
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    real, calls = finite.survey, []

    def survey(layers, keeps, *, means):
        found = real(layers, keeps, means=means)
        calls.append(means)
        return found._replace(means=[mean + 5 for mean in found.means])  # which shows where they go

    draw = torch.Generator().manual_seed(0)
    model, x = (
        torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()),
        torch.randn(8, 6, 3, generator=draw),
    )
    for views, wanted in ((["mean_pooled"], True), (["position"], False)):
        calls.clear()
        found = []
        for each in (real, survey):
            monkeypatch.setattr(finite, "survey", each)
            with rgfast.Probe(
                model, route="moments", views=views, groups=groups, layers=["0", "1"], progress=False
            ) as probe:
                probe.run(x)
            states = probe._tally._moments._groups
            found.append([a.mean(1) for state in states for a in state.values()])
        assert calls == [wanted]
        for before, after in zip(*found, strict=True):
            torch.testing.assert_close(after, before + 5 * wanted)
