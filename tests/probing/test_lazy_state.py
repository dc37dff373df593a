"""A result's moments stay where they were summed up until they are asked for, as they were then."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from test_on_devices import PLACES, devices, opened
from test_waiting import batch_of
from waits import Waits

import rgfast
from rgfast.probing import later
from rgfast.probing.estimators.moments import Moments

VIEWS = {"views": ["position", "pooled"]}
COPIES = {"_to_copy from meta to cpu", "copy_ from meta to cpu"}


def forwards(probe, *seeds):
    for seed in seeds:
        probe.run(batch_of(seed, {"dtype": torch.float32}))


def alike(a, b):
    assert list(a) == list(b)
    for name, value in a.items():
        assert value.dtype == b[name].dtype
        assert np.array_equal(value, b[name]), name


@pytest.fixture(params=["cpu", "device"])
def places(request):
    return ["cpu"] * 3 if request.param == "cpu" else PLACES["two"]


def measured(places, *seeds, **options):
    """A result and the state that it was made from, as it is read at once."""
    with devices():
        with opened(places, **VIEWS, **options) as probe:
            forwards(probe, *seeds)
        result = probe.result()
        return result, probe._tally._moments.state(), probe


def test_nothing_is_copied_before_it_is_asked_for(monkeypatch):
    read = []
    was = Moments.state
    monkeypatch.setattr(Moments, "state", lambda self: read.append(1) or was(self))
    with devices():
        with opened(PLACES["two"], **VIEWS) as probe:
            forwards(probe, 0, 1)
        watch = Waits()
        with watch:
            result = probe.result()
    assert read == []
    before = len([name for name in watch.found if name in COPIES])
    watch.found.clear()
    with watch:
        assert result.moments is result.moments
    assert read == [1]
    assert before < len([name for name in watch.found if name in COPIES])


WAYS = {
    "asked for": lambda result, path: result.moments,
    "cpu": lambda result, path: result.cpu()._moments,
    "saved": lambda result, path: (result.save(path), rgfast.ProbeResult.load(path).moments)[1],
    "pickled": lambda result, path: pickle.loads(pickle.dumps(result)).moments,
    "copied": lambda result, path: copy.copy(result).moments,
    "copied whole": lambda result, path: copy.deepcopy(result).moments,
}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_the_state_that_was(way, places, tmp_path):
    result, want, _ = measured(places, 0, 1, 2)
    alike(WAYS[way](result, tmp_path / "result.nc"), want)


@pytest.mark.parametrize("groups", [1, 2])
def test_forwards_that_follow_change_nothing(places, groups):
    result, want, probe = measured(places, 0, groups=groups)
    with devices():
        with probe:
            forwards(probe, 1, 2)
        second = probe.result()
        later_state = probe._tally._moments.state()
    alike(result.moments, want)
    alike(second.moments, later_state)
    assert int(want["sequences"]) < int(later_state["sequences"])


def test_two_results_of_one_state(places):
    first, want, probe = measured(places, 0)
    with devices():
        second = probe.result()
        with probe:
            forwards(probe, 1)
    alike(first.moments, want)
    alike(second.moments, want)


def test_a_merge_changes_nothing_that_was_given(places):
    result, want, _ = measured(places, 0)
    other = measured(places, 1)[0]
    mine, theirs = result.moments, other.moments
    merged = result.merge(other)
    alike(result.moments, want)
    assert merged.dataset.attrs["sequences"] == 2 * result.dataset.attrs["sequences"]
    again = rgfast.ProbeResult(result.dataset, mine).merge(rgfast.ProbeResult(other.dataset, theirs))
    alike(merged.moments, again.moments)


def test_the_next_probe_frees_the_device():
    result, want, probe = measured(PLACES["two"], 0)
    held = weakref.ref(probe._tally._moments)
    del probe
    gc.collect()
    assert held() is not None
    with devices(), opened(PLACES["two"], **VIEWS):
        gc.collect()
        assert held() is None
    alike(result.moments, want)


@pytest.mark.parametrize("way", ["cpu", "asked for", "dropped"])
def test_what_frees_the_device(way, places):
    result, _, probe = measured(places, 0)
    held = weakref.ref(probe._tally._moments)
    del probe
    if way == "dropped":
        del result
    else:
        WAYS[way](result, None)
    gc.collect()
    assert held() is None


def test_on_the_cpu_the_next_probe_copies_nothing():
    result, _, _ = measured(["cpu"] * 3, 0)
    with opened(["cpu"] * 3, **VIEWS):
        assert callable(result._moments)
        assert result._moments not in later._WAITING


def test_what_is_not_finite_later_is_not_the_first_results(places):
    result, want, probe = measured(places, 0)
    bad = batch_of(1, {"dtype": torch.float32})
    bad["x"][3] = torch.nan
    finite = pytest.raises(ValueError, match="activations must be finite")
    with devices(), finite, probe:
        probe.run(bad)
        probe.result()
    alike(result.moments, want)


@pytest.mark.parametrize("route", ["moments", "samples"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_dataset_that_is_made_later_has_the_values_of_then(places, route, groups):
    options = {"route": route, "groups": groups, "views": ["position", "pooled", "mean_pooled", "flattened"]}
    with devices(), opened(["cpu"] * 3 if route == "samples" else places, **options) as probe:
        forwards(probe, 0, 1)
        first, later = probe.result(), probe.result()
        want = first.dataset
        forwards(probe, 2)
        assert probe.result().dataset.sequences > want.sequences
    assert later.dataset.identical(want)
