"""Every view from rows: the values of the moments and of brute force, on shapes and data that are awkward."""

import itertools

import numpy as np
import pytest
import torch

import rgfast
from rgfast.probing.estimators import samples

PAIRWISE = ("cka", "cka_biased", "kernel_drift", "kernel_drift_debiased", "kernel_change")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(torch.nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, out))

    def forward(self, x):
        y = self.inner(x)
        return x + y if y.shape == x.shape else y


class Model(torch.nn.Module):
    """Blocks of these widths; the padding mask only says which tokens count."""

    def __init__(self, *widths):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.layers = torch.nn.ModuleList(Block(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x, attention_mask=None, hidden=None):
        for layer in self.layers:
            x = layer(x)
        return x


def names(model):
    return ["layers.0:input", *(f"layers.{k}" for k in range(len(model.layers)))]


def both(model, batches, **options):
    found = []
    for route in ("samples", "moments"):
        given = {"layers": names(model), "progress": False, "route": route, **options}
        found.append(rgfast.probe(model, list(batches), **given).dataset)
    assert [one.attrs["route"] for one in found] == ["samples", "moments"]
    return found


def assert_close(here, there, ranks=1e-9, pairs=1e-6):
    assert set(here.data_vars) == set(there.data_vars)
    assert list(here.view.values) == list(there.view.values)
    for name in there.data_vars:
        a, b = here[name], there[name]
        assert a.dims == b.dims, name
        if name == "refined" or name.endswith("_bound"):
            continue
        tol = pairs if name.removesuffix("_se") in PAIRWISE else ranks
        scale = np.maximum(1.0, np.abs(b.values))
        np.testing.assert_allclose(a.values / scale, b.values / scale, rtol=0, atol=tol, err_msg=name)


def padded(x, batch, shortest=1, seed=0):
    lengths = torch.randint(
        shortest, x.shape[1] + 1, (len(x),), generator=torch.Generator().manual_seed(seed)
    )
    keep = torch.arange(x.shape[1])[None] < lengths[:, None]
    x = torch.where(keep[..., None], x, torch.nan)
    return [
        {"x": a, "attention_mask": b.to(torch.int64)}
        for a, b in zip(x.split(batch), keep.split(batch), strict=True)
    ]


def whole(x, batch):
    return [{"x": part} for part in x.split(batch)]


CASES = {
    "more rows than features": (Model(12, 12, 12), whole(normal(100, 5, 12), 30)),
    "more features than rows": (Model(40, 40, 40), whole(normal(9, 7, 40), 4)),
    "fewer pooled rows than features": (Model(40, 40, 40), whole(normal(6, 4, 40), 6)),
    "four sequences": (Model(6, 6), whole(normal(4, 3, 6), 4)),
    "one position": (Model(10, 10, 10), whole(normal(50, 1, 10), 20)),
    "widths": (Model(12, 20, 7, 7), whole(normal(60, 4, 12), 25)),
    "offset": (Model(12, 12), whole(normal(80, 4, 12) + 1e4, 40)),
    "large": (Model(12, 12), whole(normal(80, 4, 12) * 1e18, 40)),
    "small": (Model(12, 12), whole(normal(80, 4, 12) * 1e-18, 40)),
    "constant columns": (Model(12, 12), whole(normal(80, 4, 12) * (torch.arange(12) > 4), 40)),
    "rank one": (Model(12, 12), whole(normal(80, 1, 1) * normal(4, 12, seed=1), 40)),
    "means apart": (Model(12, 12), whole(normal(80, 4, 12) + 100 * normal(4, 12, seed=1), 40)),
    "padding": (Model(12, 12, 12), padded(normal(90, 6, 12), 25)),
    "padding, wide": (Model(40, 40, 40), padded(normal(24, 9, 40), 10)),
    "padding, four": (Model(12, 12), padded(normal(4, 6, 12), 4)),
    "lengths differ": (
        Model(12, 12),
        [
            {"x": normal(20, t, 12, seed=t), "attention_mask": torch.ones(20, t, dtype=torch.long)}
            for t in (5, 7, 5, 3)
        ],
    ),
}


@pytest.mark.parametrize("pairs", ["adjacent", "all"])
@pytest.mark.parametrize("name", CASES)
def test_all_views_are_those_of_the_moments(name, pairs):
    model, batches = CASES[name]
    here, there = both(model, batches, pairs=pairs)
    assert_close(here, there, ranks=1e-6 if name == "rank one" else 1e-9)


@pytest.mark.parametrize("name", ["more rows than features", "more features than rows", "widths", "padding"])
def test_error_bars_are_those_of_the_moments(name):
    model, batches = CASES[name]
    here, there = both(model, batches, groups=3)
    # What is left out of moments is not refined.
    assert_close(here, there, ranks=1e-6)


@pytest.mark.parametrize("views", [["pooled"], ["mean_pooled"], ["flattened"], ["position"], None])
def test_views_that_were_asked_for(views):
    model, batches = CASES["more rows than features"]
    here, there = both(model, batches, views=views)
    assert_close(here, there)


def test_chosen_positions_leave_the_others_to_the_pooled_view():
    model, batches = CASES["padding"]
    here, there = both(model, batches, positions=[1, 4])
    assert list(here.position.values) == [-1, 1, 4]
    assert_close(here, there)


def test_measures_without_pairs():
    model, batches = CASES["more rows than features"]
    here, there = both(model, batches, measures=["effective_rank", "stable_rank"])
    assert_close(here, there)


@pytest.mark.parametrize("groups", [1, 3])
def test_hidden_tokens_make_two_views(groups):
    model, batches = CASES["padding"]
    generator = torch.Generator().manual_seed(8)
    batches = [{**b, "hidden": torch.rand(b["x"].shape[:2], generator=generator) < 0.3} for b in batches]
    here, there = both(model, batches, mask="hidden", groups=groups)
    assert list(here.view.values) == ["visible", "masked", "position", "pooled", "mean_pooled", "flattened"]
    assert_close(here, there, ranks=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    model, batches = Model(24, 24, 24).to(dtype), whole(normal(90, 4, 24).to(dtype), 40)
    here, there = both(model, batches)
    assert_close(here, there)


@pytest.mark.parametrize("shape", [(700, 6, 32), (11, 9, 48), (50, 1, 16)])
def test_brute_force_in_fp64(shape):
    model, x = Model(shape[2], shape[2], shape[2]), normal(*shape)
    options = {"layers": names(model), "pairs": "all", "route": "samples", "progress": False}
    found = rgfast.probe(model, x, views=["position", "pooled", "mean_pooled"], **options).dataset
    stream = [x]
    with torch.no_grad():
        for layer in model.layers:
            stream.append(layer(stream[-1]))
    stream = [y.double() for y in stream]
    data_matrices = {
        ("pooled", -1): [y.flatten(0, 1) for y in stream],
        ("mean_pooled", -1): [y.mean(1) for y in stream],
    }
    data_matrices |= {("position", t): [y[:, t] for y in stream] for t in range(shape[1])}
    for (view, position), layers in data_matrices.items():
        at = found.sel(view=view, position=position)
        for layer, y in enumerate(layers):
            assert int(at.n) == len(y)
            for centred, name in ((y - y.mean(0), "effective_rank"), (y, "effective_rank_uncentred")):
                sigma = torch.linalg.svdvals(centred)
                want = float(torch.special.entr(sigma / sigma.sum()).sum().exp())
                assert float(at[name][layer]) == pytest.approx(want, rel=1e-7)
        for i, a in enumerate(layers):
            for j, b in enumerate(layers):
                for debiased, name in ((True, "cka"), (False, "cka_biased")):
                    want = float(rgfast.cka(a, b, debiased=debiased, impl="reference"))
                    assert abs(float(at[name][i, j]) - want) < 1e-6, (view, name, i, j)


@pytest.mark.parametrize("views", [["pooled"], ["mean_pooled"], ["position"], ["flattened"], None])
def test_nan_is_named_with_layer_position_and_count(views):
    model, x = Model(12, 12), normal(60, 5, 12)
    x[40, 3, 2] = torch.nan
    options = {"layers": names(model), "views": views, "route": "samples", "progress": False}
    match = r"1 NaN or infinite values in layer 0 at position 3 \(layers.0:input, sequences 30 to 59\)"
    with pytest.raises(ValueError, match=match):
        rgfast.probe(model, list(x.split(30)), **options)


def split_probes(name, at, **options):
    """A case's result, and those of its first batches and of the others."""
    model, batches = CASES[name]
    given = {
        "layers": names(model),
        "progress": False,
        "views": ["position", "pooled", "mean_pooled"],
        **options,
    }
    return [
        lambda route, part=part: rgfast.probe(model, part, route=route, **given)
        for part in (batches, batches[:at], batches[at:])
    ]


@pytest.mark.parametrize("routes", [("samples", "samples"), ("samples", "moments"), ("moments", "samples")])
@pytest.mark.parametrize("name", ["more rows than features", "padding, wide", "lengths differ"])
@pytest.mark.parametrize("groups", [1, 2])
def test_results_merge_whatever_their_routes(routes, name, groups, tmp_path):
    whole, first, second = split_probes(name, 2 if name == "lengths differ" else 1, groups=groups)
    want = whole("moments").dataset
    parts = [first(routes[0]), second(routes[1])]
    for k, part in enumerate(parts):
        part.save(tmp_path / f"{k}.nc")
    again = [rgfast.ProbeResult.load(tmp_path / f"{k}.nc") for k in range(2)]
    for a, b in (parts, again):
        merged = a.merge(b)
        assert merged.dataset.attrs["route"] == ("samples" if routes == ("samples",) * 2 else "moments")
        assert_close(merged.dataset, want, ranks=1e-6)
    # What was merged merges again.
    assert merged.merge(again[0]).dataset.attrs["sequences"] > want.attrs["sequences"]


def test_rows_beyond_the_limit_merge_to_moments(monkeypatch):
    whole, first, second = split_probes("more rows than features", 1)
    want = whole("moments").dataset
    parts = [first("samples"), second("samples")]
    monkeypatch.setattr(samples, "LIMIT", 80)
    merged = parts[0].merge(parts[1])
    assert merged.dataset.attrs["route"] == "moments"
    assert_close(merged.dataset, want)


def test_a_saved_result_without_rows_is_small_and_cannot_be_merged(tmp_path):
    _, first, _ = split_probes("more rows than features", 1)
    result = first("samples")
    result.save(tmp_path / "a.nc", moments=False)
    with pytest.raises(ValueError, match="saved with moments=False"):
        rgfast.ProbeResult.load(tmp_path / "a.nc").merge(result)
