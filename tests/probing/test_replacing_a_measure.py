"""A rank measure that takes the place of a built-in one is the one that is measured, on a GPU as well."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

import rgfast
from rgfast.ops.spectrum.measures import participation_ratio_of
from rgfast.ops.spectrum.rank_kernel import KERNEL
from rgfast.ops.spectrum.selection import TABLE
from rgfast.probing import measures
from rgfast.probing.measures import MEASURES, are_built_in
from rgfast.runtime import measured, waiting

RATIO = MEASURES["participation_ratio"]


def result():
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6))
    made = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=made))
    x = torch.randn(50, 3, 5, generator=made)
    options = {"layers": ["0", "2"], "route": "moments", "views": ["position", "pooled"], "refine": False}
    return rgfast.probe(model, [x], progress=False, **options)


def found():
    return result().dataset


@pytest.fixture
def kernel(emulated_gpu, monkeypatch):
    """How often the kernel that makes a table of all rank measures was launched since that was last asked."""
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    monkeypatch.setattr(measured, "refusal", lambda op, impl, device, size=None: None)
    emulated_gpu.admit(TABLE)

    def launches():
        return sum(launch["kernel"] == KERNEL for launch in emulated_gpu.log("cuLaunchKernelEx"))

    return launches


def test_a_kernel_measures_what_is_built_in_alone(kernel, monkeypatch):
    assert are_built_in("rank")
    want = found()
    assert kernel() > 0
    monkeypatch.setitem(MEASURES, RATIO.name, replace(RATIO, of=lambda s: 2 * participation_ratio_of(s)))
    assert not are_built_in("rank")
    assert are_built_in("drift", "pair")
    got = found()
    assert kernel() == 0
    for name in want.data_vars:
        factor = 2 if name == RATIO.name else 1
        np.testing.assert_allclose(got[name].values, factor * want[name].values, rtol=1e-9, err_msg=name)


def test_a_bound_may_be_replaced_too(kernel, monkeypatch):
    rank = MEASURES["effective_rank"]
    monkeypatch.setitem(MEASURES, rank.name, replace(rank, bound=lambda solved: solved.bound() + 1.0))
    bounds = found()["effective_rank_bound"]
    assert (bounds.values[np.isfinite(bounds.values)] > 1.0).all()
    assert kernel() == 0


@pytest.mark.parametrize("there", [False, True])
def test_on_the_cpu_and_where_launches_count(there, monkeypatch):
    monkeypatch.setattr(waiting, "_EVERYWHERE", there)
    want = found()
    monkeypatch.setitem(MEASURES, RATIO.name, replace(RATIO, of=lambda s: 2 * participation_ratio_of(s)))
    np.testing.assert_array_equal(found()[RATIO.name].values, 2 * want[RATIO.name].values)


def test_fewer_or_other_measures_are_not_the_built_in_ones(monkeypatch):
    monkeypatch.setitem(MEASURES, RATIO.name, replace(RATIO))  # equal, and another one
    assert not are_built_in("rank")
    fewer = {name: measure for name, measure in MEASURES.items() if name != RATIO.name}
    monkeypatch.setattr(measures, "MEASURES", fewer)
    assert not are_built_in("rank")
    assert are_built_in("drift")


def test_a_dataset_that_is_made_later_has_the_measures_of_then(monkeypatch):
    want, later, pickled = found(), result(), result()
    rank = MEASURES["effective_rank"]
    monkeypatch.setitem(MEASURES, rank.name, replace(rank, label="another", baseline=None, bound=None))
    monkeypatch.setitem(MEASURES, "new", replace(rank, name="new"))
    for got in (later.dataset, pickle.loads(pickle.dumps(pickled)).dataset):
        assert got.drop_attrs(deep=False).identical(want.drop_attrs(deep=False))
