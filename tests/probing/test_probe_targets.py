"""Mode survival: streamed cross-validated linear R² against least squares on stored activations."""

import numpy as np
import pytest
import torch

import rgfast


def brute_r2(x, y, folds, groups):
    """Held-out R² of lstsq with intercept, folds by sequence."""
    x, y = x.to(torch.float64), y.to(torch.float64)
    residual = total = 0.0
    for g in range(groups):
        test, train = folds == g, folds != g
        mean_x, mean_y = x[train].mean(0), y[train].mean(0)
        w = torch.linalg.lstsq(x[train] - mean_x, y[train] - mean_y, driver="gelsd").solution
        error = y[test] - mean_y - (x[test] - mean_x) @ w
        residual += float((error**2).sum())
        total += float(((y[test] - mean_y) ** 2).sum())
    return 1 - residual / total


@pytest.fixture
def vectors():
    return torch.randn(300, 6, 3, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("groups", [2, 5])
def test_equals_least_squares(kit, token_model, token_data, vectors, groups):
    layers = kit.stream_of(token_model, token_data["tokens"], 64)
    mixed = layers[1][..., :3] + 0.5 * vectors
    result = rgfast.probe(
        token_model, token_data, mask="mask", targets={"mixed": mixed, "noise": vectors}, groups=groups,
        batch_size=64, progress=False,
    )  # fmt: skip
    folds = torch.arange(300) % groups
    r2 = result.dataset.target_r2
    hidden = token_data["mask"]
    for name, y in (("mixed", mixed), ("noise", vectors)):
        for layer in range(4):
            at = r2.sel(target=name).isel(layer=layer)
            for t in (0, 4):
                want = brute_r2(layers[layer][:, t], y[:, t], folds, groups)
                assert float(at.sel(view="position", position=t)) == pytest.approx(want, abs=1e-8)
                if layer:
                    keep = hidden[:, t]
                    want = brute_r2(layers[layer][:, t][keep], y[:, t][keep], folds[keep], groups)
                    assert float(at.sel(view="masked", position=t)) == pytest.approx(want, abs=1e-8)
            want = brute_r2(layers[layer].flatten(0, 1), y.flatten(0, 1), folds.repeat_interleave(6), groups)
            assert float(at.sel(view="pooled", position=-1)) == pytest.approx(want, abs=1e-8)
            want = brute_r2(layers[layer].double().mean(1), y.double().mean(1), folds, groups)
            assert float(at.sel(view="mean_pooled", position=-1)) == pytest.approx(want, abs=1e-8)
    assert r2.sel(view="flattened").isnull().all()
    survival = result.target_r2("mixed", "position")
    assert survival.dims == ("layer",)
    assert 0.5 < float(survival[1]) < 1
    assert float(result.target_r2("noise", "position")[1]) < 0.1
    assert (result.dataset.target_r2_se.sel(view="position", target="mixed", position=[0, 1]) > 0).all()


def test_every_way_to_give_labels_is_the_same(token_model, token_data):
    labels = token_data["tokens"] % 3
    data = {**token_data, "labels": labels}
    ways = [
        labels,
        labels.numpy(),
        "labels",
        lambda entries: entries["tokens"] % 3,
        torch.nn.functional.one_hot(labels, 3).float(),
    ]
    found = [
        rgfast.probe(token_model, data, targets={"t": way}, progress=False).dataset.target_r2.values
        for way in ways
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)
    assert np.nanmax(found[0]) > 0.3  # seven features cannot tell twelve tokens apart linearly, but some


def test_default_folds_and_sequence_labels(token_model, token_data):
    data = {**token_data, "kind": token_data["tokens"][:, 2] % 2}
    result = rgfast.probe(token_model, data, targets={"kind": "kind"}, progress=False)
    assert result.dataset.attrs["groups"] == 5
    at = result.dataset.target_r2.sel(target="kind", layer=0, view="position")
    assert float(at.sel(position=2)) > 0.5
    assert float(at.sel(position=0)) < 0.2


def test_targets_do_not_change_the_measures(token_model, token_data, vectors):
    bare = rgfast.probe(token_model, token_data, mask="mask", groups=5, progress=False)
    with_targets = rgfast.probe(
        token_model, token_data, mask="mask", groups=5, targets={"v": vectors}, progress=False
    )
    for name in bare.measures:
        np.testing.assert_array_equal(bare.dataset[name], with_targets.dataset[name])


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (3.0, TypeError, "must be an array, the name of a batch entry or a callable"),
        (torch.zeros(10, 6, 2), ValueError, "a row for every sequence, got 10"),
        (torch.zeros(300, 5, 2), ValueError, r"must be \[256, 6, m\]"),
        (torch.full((300, 6, 2), float("nan")), ValueError, "must be finite"),
        ("nothing", ValueError, "no entry 'nothing'"),
        (lambda entries: entries["tokens"] - 20, ValueError, "must have labels 0 to"),
    ],
)
def test_bad_targets_are_refused(token_model, token_data, target, error, message):
    with pytest.raises(error, match=message):
        rgfast.probe(token_model, token_data, targets={"t": target}, progress=False)


def test_not_a_mapping(token_model, token_data):
    with pytest.raises(TypeError, match="targets must be a mapping"):
        rgfast.probe(token_model, token_data, targets=["tokens"], progress=False)
