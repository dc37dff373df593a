"""How many operators a probe gives to a device, where each takes longer than what it does for few rows."""

import copy
import pickle

import pytest
import torch
import xarray as xr
from test_on_devices import SECOND, devices, opened
from test_waiting import BATCH, LENGTH, WIDTH, batch_of, drawn
from waits import Launches, Waits

import rgfast
from rgfast.ops.moments.impl import library
from rgfast.runtime import waiting
from rgfast.streaming import algebra

pytestmark = pytest.mark.filterwarnings("ignore::rgfast.FallbackWarning")

FULL = 1024 // BATCH  # forwards until rows are summed up
CASE = {"dtype": torch.float32}
VIEWS = ["position", "pooled", "mean_pooled"]


def launched(depth, forward=None):
    """What one forward, or reading the result, gives to the device."""
    places, found = [SECOND] * depth, Launches()
    layers = [f"blocks.{k}" for k in range(depth)]
    with devices():
        with opened(places, torch.float32, layers=layers, views=VIEWS) as probe:
            for k in range(FULL):
                with found if k == forward else devices():
                    probe.run(batch_of(k, CASE))
        if forward is None:
            with found:
                probe.result()
    return found.found


def of_model(depth):
    """A block is a product and an activation; the batch is sent."""
    return {"addmm": depth, "tanh": depth}


def test_reading_takes_as_many_launches_whatever_the_depth():
    shallow, deep = launched(3), launched(9)
    assert shallow == deep
    assert sum(shallow.values()) <= 260
    assert shallow["_linalg_eigh"] == 1


def test_reading_is_read_in_few_transfers():
    watch = Waits()
    with devices():
        with opened([SECOND] * 3, torch.float32, views=VIEWS) as probe:
            for k in range(FULL):
                probe.run(batch_of(k, CASE))
        with watch:
            probe.result()
    # What was wrong, units, and all that is made of sums and eigenvalues.
    assert watch.found == ["_to_copy from meta to cpu"] * 3


@pytest.mark.parametrize(
    ("forward", "small", "each"), [(5, True, 5), (FULL - 1, True, 5), (FULL - 1, False, 22)]
)
def test_a_forward_takes_few_launches_for_a_layer(forward, small, each, monkeypatch):
    """Of a layer's rows: a copy of them, NaN or not, the mean over positions, and in place of what tells a
    copy from a layer that is written to, which a GPU needs once, another copy. All means are held by one
    launch. Where they are summed up, by torch's products, all layers take as many launches as one while they
    are small. Others have their means and the sums of both views of one layer and two each by itself."""
    if not small:
        monkeypatch.setattr(library, "_TOGETHER", 0)
        monkeypatch.setattr(algebra, "_SMALL", 0)
    shallow, deep = launched(3, forward), launched(9, forward)
    more = {name: deep[name] - shallow[name] for name in deep}
    for name, count in of_model(6).items():
        assert more[name] == count
    assert sum(more.values()) == 6 * (each + 2)


def test_the_dataset_is_made_when_it_is_asked_for():
    with devices():
        with opened([SECOND] * 3, torch.float32, views=VIEWS) as probe:
            for k in range(2):
                probe.run(batch_of(k, CASE))
        result = probe.result()
    assert not isinstance(result._dataset, xr.Dataset)
    others = copy.copy(result), copy.deepcopy(result), pickle.loads(pickle.dumps(result))
    assert result.dataset is result.dataset
    for other in others:
        assert other.dataset.identical(result.dataset)
    assert result.dataset.sizes["layer"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mean_of_a_constant_column_is_its_value(dtype):
    rows = drawn(0, LENGTH, 999, WIDTH, dtype=dtype)
    rows[..., 0], rows[..., 1] = 0.1, torch.finfo(dtype).max
    mean = library.first_mean(rows)
    assert torch.equal(mean[:, :2], rows[:, 0, :2].double())
    torch.testing.assert_close(mean, rows.double().mean(1), rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize(("everywhere", "most"), [(False, 128), (True, 300)])
def test_a_stack_hands_over_larger_tiles_to_a_device(everywhere, most, monkeypatch):
    monkeypatch.setattr(waiting, "_EVERYWHERE", everywhere)
    stack, sizes, was = rgfast.ResidualStack(4, 2, mixing="none"), [], rgfast.Probe.tile

    def tile(self, first, states):
        sizes.append(states[0].shape[0])
        was(self, first, states)

    monkeypatch.setattr(rgfast.Probe, "tile", tile)
    with rgfast.Probe(stack, route="moments", views=["position"], progress=False) as probe:
        probe.run(drawn(0, 300, 3, 4, dtype=torch.float32))
    assert max(sizes) == most
