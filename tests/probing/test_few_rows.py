"""On a device spectra of few wide rows come from products of samples, which are smaller."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from test_on_devices import SECOND, devices
from there import There
from torch import nn
from waits import Launches

import rgfast
from rgfast.ops.spectrum.selection import EIGVALSH
from rgfast.runtime import waiting
from rgfast.streaming import MomentAccumulator, Together

LENGTH, WIDTH, LAYERS = 3, 24, 3
RANKS = ["effective_rank", "participation_ratio", "stable_rank", "effective_rank_variance"]
UNCENTRED = ["effective_rank_uncentred", "effective_rank_variance_uncentred"]


class Block(nn.Module):
    def __init__(self, dtype, scale):
        super().__init__()
        self.linear, self.scale = nn.Linear(WIDTH, WIDTH, dtype=dtype), scale

    def forward(self, x):
        return self.scale * torch.tanh(self.linear(x / self.scale))


class Wide(nn.Module):
    def __init__(self, dtype, scale=1.0):
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(Block(dtype, scale) for _ in range(LAYERS))

    def forward(self, x, attention_mask=None):
        for block in self.blocks:
            x = block(x)
        return x


def batch(seed, n, dtype, scale=1.0, padded=False):
    made = torch.Generator().manual_seed(seed)
    x = (scale * (2 + torch.randn(n, LENGTH, WIDTH, generator=made, dtype=torch.float64))).to(dtype)
    if not padded:
        return {"x": x}
    keep = torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (n, 1), generator=made)
    keep[:2] = True
    return {"x": x, "attention_mask": keep.long()}


@pytest.fixture
def solved(monkeypatch):
    """The sizes of the matrices that were solved."""
    sizes, was = [], EIGVALSH.run

    def counted(chosen, call, **options):
        sizes.append((call.matrices, call.side))
        return was(chosen, call, **options)

    monkeypatch.setattr(EIGVALSH, "run", counted)
    return sizes


def probed(sizes, dtype=torch.float64, scale=1.0, padded=False, **options):
    options = {"views": ["position", "pooled", "mean_pooled"], "refine": False} | options
    layers = [f"blocks.{k}" for k in range(LAYERS)]
    with rgfast.Probe(Wide(dtype, scale), layers=layers, route="moments", progress=False, **options) as probe:
        for k, n in enumerate(sizes):
            probe.run(batch(k, n, dtype, scale, padded))
    return probe.result()


def alike(there, here):
    """Within the sum of their bounds, and to rounding where there is none."""
    assert set(there.dataset.data_vars) == set(here.dataset.data_vars)
    for name in here.dataset.data_vars:
        if name.endswith("_bound"):
            continue
        got, want = (each.dataset[name].values.astype(float) for each in (there, here))
        allowed = np.full(want.shape, 1e-8)
        if f"{name}_bound" in here.dataset:
            bounds = (each.dataset[f"{name}_bound"].values for each in (there, here))
            allowed = sum(bounds) * np.abs(want) + 1e-13
        if name == "singular_values":  # the root of what a moment cannot tell from zero
            allowed = allowed + 1e-7 * np.nan_to_num(want).max(-1, keepdims=True)
        assert np.array_equal(np.isnan(got), np.isnan(want)), name
        assert (np.abs(got - want)[~np.isnan(want)] <= allowed[~np.isnan(want)]).all(), name


CASES = {
    "one batch": ([10], {}),
    "several": ([4, 5, 3], {}),
    "padded": ([6, 5], {"padded": True}),
    "float32": ([10], {"dtype": torch.float32}),
    "bfloat16": ([10], {"dtype": torch.bfloat16}),
    "bfloat16 and padding": ([10], {"dtype": torch.bfloat16, "padded": True}),
    "tiny": ([10], {"scale": 1e-150}),
    "huge": ([10], {"scale": 1e140}),
    "two sequences": ([2], {}),
    "all pairs": ([9], {"pairs": "all"}),
    "without uncentred": ([9], {"measures": ["effective_rank", "cka"]}),
    "position alone": ([9], {"views": ["position"]}),
}


@pytest.mark.parametrize("name", CASES)
def test_values_are_the_cpus(name, solved, monkeypatch):
    sizes, options = CASES[name]
    here = probed(sizes, **options)
    assert {side for _, side in solved} == {WIDTH}
    solved.clear()
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    there = probed(sizes, **options)
    alike(there, here)
    kinds = 1 if name == "without uncentred" else 2
    few = [(kinds * LAYERS * (LENGTH + (name != "position alone")), sum(sizes))]
    if name in ("tiny", "huge"):  # means over positions have a unit of their own
        few = [(kinds * LAYERS * places, sum(sizes)) for places in (LENGTH, 1)]
    pooled = [] if name == "position alone" else [(kinds * LAYERS, WIDTH)]
    assert sorted(solved) == sorted([*few, *pooled])


def test_layers_of_few_rows_are_read_together(monkeypatch):
    """As many operators for any number of layers, masked and in two blocks of one view's rows."""
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    counts = []
    for layers in (2, LAYERS):
        made = torch.Generator().manual_seed(2)
        rows = [torch.randn(LENGTH, 6, WIDTH, generator=made) for _ in range(layers)]
        keep = torch.rand(LENGTH, 6, generator=made) < 0.8
        parts = [MomentAccumulator().update(rows, keep), MomentAccumulator().update(rows)]
        whole, found = Together(parts), Launches(here=True)
        assert whole.of_few
        with found:
            kernels, variances, summed = whole.kernels_of_few(range(layers), raw=True)
        counts.append(found.found.total())
        assert kernels.shape == (2, layers * 2 * LENGTH, 6, 6)
        for layer, x in enumerate(rows):
            for part, z in enumerate((x.double() * keep[..., None], x.double())):
                at = (2 * layer + part) * LENGTH
                torch.testing.assert_close(kernels[1, at : at + LENGTH], z @ z.mT, rtol=1e-10, atol=1e-10)
                square = z.square().sum(1)
                torch.testing.assert_close(variances[1, at : at + LENGTH], square, rtol=1e-10, atol=1e-10)
        assert torch.equal(summed, whole.accumulated(range(layers)))
    assert counts[0] == counts[1]


NOT_FEW = {
    "more rows": ([13], {}),
    "groups": ([5, 5], {"groups": 2}),
    "factors": ([10], {"refine": True}),
}


@pytest.mark.parametrize("name", NOT_FEW)
def test_others_come_from_moments(name, solved, monkeypatch):
    sizes, options = NOT_FEW[name]
    here = probed(sizes, **options | {"refine": False})
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    solved.clear()
    there = probed(sizes, **options)
    sides = {side for _, side in solved}
    assert sides == ({WIDTH, 5} if name == "groups" else {WIDTH})  # without one of two groups few are left
    if name != "factors":
        alike(there, here)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_ranks_against_singular_values_of_the_rows(dtype, monkeypatch):
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    found = probed([10], dtype).dataset.sel(view="position", position=range(LENGTH))
    model, x = Wide(dtype), batch(0, 10, dtype)["x"]
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            x = block(x)
            rows = x.double().transpose(0, 1)
            for name, centering in (("effective_rank", "mean"), ("effective_rank_uncentred", "none")):
                want = rgfast.effective_rank(rows, centering=centering, method="svd", impl="reference")
                got = torch.from_numpy(found[name].values[layer])
                torch.testing.assert_close(got, want, rtol=1e-9, atol=0, msg=f"{name} {layer}")


def test_constant_layers_have_rank_zero(monkeypatch):
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, dtype=torch.float64), nn.Identity())
    with torch.no_grad():
        model[0].weight.zero_()
    x = batch(0, 8, torch.float64)["x"]
    found = rgfast.probe(
        model, x, layers=["0", "1"], views=["position"], route="moments", progress=False, refine=False
    ).dataset
    assert (found.effective_rank.values == 0).all()
    assert (found.effective_rank_uncentred.values == 1).all()


def test_rows_that_follow_are_not_left_out(solved, monkeypatch):
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    options = {"layers": ["blocks.0"], "views": ["position"], "route": "moments", "progress": False}
    with rgfast.Probe(Wide(torch.float64), refine=False, **options) as probe:
        probe.run(batch(0, 6, torch.float64))
        probe.result()
        probe.run(batch(1, 6, torch.float64))
        second = probe.result()
    assert [side for _, side in solved] == [6, WIDTH]
    with rgfast.Probe(Wide(torch.float64), refine=False, **options) as probe:
        for k in range(2):
            probe.run(batch(k, 6, torch.float64))
    alike(second, probe.result())


def test_a_full_block_is_not_overwritten_unseen():
    """A block that fills and is begun again holds other rows than those that were summed."""
    with devices():
        x = There(torch.randn(1, 1024, 3000), SECOND)
        assert MomentAccumulator(pairs=()).update([x[..., :1000]]).few is None  # summed as it came
        parts = MomentAccumulator(pairs=()).update([x[:, :600]]).update([x[:, 600:]])
        assert parts.few is not None
        assert not Together.few(MomentAccumulator(pairs=()).update([x[:, :600, :1000]]))
        parts = (
            MomentAccumulator(pairs=()).update([x[:, :600]]).update([torch.cat([x[:, 600:], x[:, :5]], 1)])
        )
        assert parts.few is None


def test_a_whole_block_is_held_while_it_is_all_there_is():
    with devices():
        x = There(torch.randn(3, 16, 20, dtype=torch.float64), SECOND)
        given = MomentAccumulator(pending_bytes=1)
        assert given.update([x[:, :8], x[:, :8]]).rows_at_once == 8
        assert Together.few(given)
        assert torch.equal(given.few[0][0].held, x.held[:, :8])
        given.update([x[:, 8:], x[:, 8:]])
        assert given.few is None
        at_once = MomentAccumulator(pending_bytes=1).update([x, x])
        assert torch.equal(given.scatter(0).held, at_once.scatter(0).held)
        assert MomentAccumulator(pending_bytes=1).update([x[:, :8, :15]]).few is None  # too narrow


def test_a_loaded_state_has_no_rows():
    with devices():
        x = There(torch.randn(2, 5, 20, dtype=torch.float64), SECOND)
        given = MomentAccumulator().update([x, x])
        assert Together.few(given)
        assert Together.few(given.only([1]))
        again = MomentAccumulator()
        again.load_state_dict(given.state_dict(), SECOND)
        assert again.few is None
        assert given.merge(again).few is None


@pytest.mark.parametrize("widths", [(8, 520, 8), (520, 8, 8), (8, 520, 520)])
def test_only_layers_with_factors_are_refined(widths):
    """Up to 512 wide layers have factors by default, and these have a column twice."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(d, e) for d, e in pairwise((6, *widths))))
    for layer in model:
        with torch.no_grad():
            layer.weight[1], layer.bias[1] = layer.weight[0], layer.bias[0]
    batches = torch.randn(1200, 6).split(400)
    found = rgfast.probe(model, batches, layers=["0", "1", "2"], route="moments", progress=False)
    assert found.dataset.refined.values.reshape(-1).tolist() == [width == 8 for width in widths]
