"""On a device spectra that no measure needs are not computed, and those of one size are solved together."""

import numpy as np
import pytest
import torch
from test_waiting import assert_alike, batch_of, probed
from torch import nn

import rgfast
from rgfast.ops.spectrum import selection
from rgfast.runtime import waiting

VIEWS = {"views": ["position", "pooled", "mean_pooled"], "refine": False}
WITHOUT = ["effective_rank", "stable_rank", "kernel_drift", "cka"]
UNCENTRED = ["effective_rank_uncentred", "effective_rank_variance_uncentred"]


@pytest.fixture(params=["cpu", "device"])
def everywhere(request, monkeypatch):
    monkeypatch.setattr(waiting, "_EVERYWHERE", request.param == "device")
    return request.param == "device"


@pytest.fixture
def solved(monkeypatch):
    """How many matrices were solved in each call."""
    calls, op, was = [], selection.EIGVALSH, type(selection.EIGVALSH).__call__

    def counted(self, impl, call):
        if self is op:
            calls.append(call.matrices)
        return was(self, impl, call)

    monkeypatch.setattr(type(op), "__call__", counted)
    return calls


@pytest.mark.parametrize("groups", [1, 2])
def test_half_of_them_without_uncentred_measures(groups, everywhere, solved):
    case = VIEWS | {"groups": groups}
    whole = probed(case)
    every = sum(solved)
    solved.clear()
    part = probed(case | {"measures": WITHOUT})
    assert (2 if everywhere else 1) * sum(solved) == every
    for name in WITHOUT:
        assert np.array_equal(part.dataset[name].values, whole.dataset[name].values, equal_nan=True), name
    for name in ("singular_values", "effective_rank_bound"):
        assert np.array_equal(part.dataset[name].values, whole.dataset[name].values, equal_nan=True), name
    assert not set(UNCENTRED) & set(part.dataset)
    assert np.isnan(part.dataset.effective_rank_uncentred_bound.values).all() == everywhere


@pytest.mark.parametrize("measures", ["all", WITHOUT, UNCENTRED])
def test_one_call_for_all_views_on_a_device(measures, everywhere, solved):
    probed(VIEWS | {"measures": measures})
    layers, places = 3, 5 + 1 + 1
    kinds = 1 if measures == WITHOUT and everywhere else 2
    if everywhere:
        assert solved == [kinds * layers * places]
    else:
        assert len(solved) == kinds * layers * 3


@pytest.mark.parametrize("groups", [1, 4])
def test_groups_are_measured_together_on_a_device(groups, solved, monkeypatch):
    here = probed({"views": ["position", "pooled"], "groups": groups, "refine": False})
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    solved.clear()
    there = probed({"views": ["position", "pooled"], "groups": groups, "refine": False})
    assert len(solved) == (1 if groups == 1 else 3)
    assert_alike(there, here)


def test_a_merged_result_has_what_both_have(everywhere):
    whole, part = probed(VIEWS), probed(VIEWS | {"measures": WITHOUT})
    merged = whole.merge(part)
    assert merged.measures == part.measures
    twice = whole.merge(whole)
    for name in WITHOUT:
        assert np.array_equal(merged.dataset[name].values, twice.dataset[name].values, equal_nan=True)


def test_a_checkpoint_goes_on_with_the_measures_asked_for(tmp_path, solved):
    model = nn.Sequential(nn.Linear(6, 6, dtype=torch.float64), nn.Tanh())
    x = [batch_of(k, {})["x"] for k in range(3)]
    options = {"layers": ["0", "1"], "route": "moments", "progress": False, "measures": WITHOUT}
    options |= {"views": ["position"], "checkpoint": tmp_path / "c", "checkpoint_every": 1}
    rgfast.probe(model, x, **options)
    first = sum(solved)
    solved.clear()
    rgfast.probe(model, x, **options)
    assert sum(solved) == first == 2 * 2 * 5
