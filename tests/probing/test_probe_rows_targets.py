"""R² of targets from rows: the values of the moments and of least squares, few rows of many features too."""

import numpy as np
import pytest
import torch
from test_probe_rows import CASES, Model, assert_close, both, names, normal, padded, whole

import rgfast
from rgfast.probing.estimators import samples
from rgfast.probing.targets import pseudo_inverse


def targets_of(batches):
    """Vectors at every position that the first layer tells in part, labels and vectors of sequences."""
    n = sum(len(batch["x"]) for batch in batches)

    def mixed(entries):
        x = entries["x"].nan_to_num(0.0)[..., -2:]
        return x / x.abs().max() + 0.3 * torch.sin(1.7 * torch.arange(x.numel()).reshape(x.shape))

    return {"mixed": mixed, "label": torch.arange(n) % 3, "sequence": normal(n, 2, seed=7)}


MANY = [name for name, (_, batches) in CASES.items() if sum(len(batch["x"]) for batch in batches) > 6]


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("name", MANY)
def test_they_are_those_of_the_moments(name, groups):
    model, batches = CASES[name]
    here, there = both(model, batches, groups=groups, targets=targets_of(batches))
    for name_ in ("target_r2", "target_r2_se"):
        a, b = here[name_].values, there[name_].values
        scale = np.maximum(1.0, np.abs(b))
        atol = 1e-6 if name == "rank one" else 1e-9
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=atol, err_msg=name_)
    finite = here.target_r2.dropna("view", how="all")
    assert list(finite.view.values) == [view for view in here.view.values if view != "flattened"]


def test_hidden_tokens_have_their_own():
    model, batches = CASES["padding"]
    generator = torch.Generator().manual_seed(8)
    batches = [{**b, "hidden": torch.rand(b["x"].shape[:2], generator=generator) < 0.3} for b in batches]
    here, there = both(model, batches, mask="hidden", groups=3, targets=targets_of(batches))
    assert_close(here, there, ranks=1e-6)
    assert here.target_r2.sel(view="masked", target="mixed").notnull().any()


@pytest.mark.parametrize("shape", [(60, 3, 12), (20, 3, 48)])
def test_least_squares_on_what_was_left_out(shape):
    n, length, width = shape
    model, x, noise = Model(width, width, width), normal(*shape), normal(n, length, 2, seed=4)
    y = x[..., :2] + 0.3 * noise
    groups, options = 4, {"layers": names(model), "route": "samples", "progress": False}
    found = rgfast.probe(model, x, targets={"y": y}, groups=groups, **options).dataset.target_r2[:, 0]
    stream = [x.double()]
    with torch.no_grad():
        for layer in model.layers:
            stream.append(layer(stream[-1].float()).double())
    fold = torch.arange(n) % groups
    for layer, z in enumerate(stream):
        data_matrices = {
            ("pooled", -1): (z.flatten(0, 1), y.flatten(0, 1), fold.repeat_interleave(length)),
            ("mean_pooled", -1): (z.mean(1), y.double().mean(1), fold),
            **{("position", t): (z[:, t], y[:, t], fold) for t in range(length)},
        }
        for (view, position), (rows, asked, group) in data_matrices.items():
            asked, errors = asked.double(), np.zeros(2)
            for g in range(groups):
                train, test = group != g, group == g
                mean, mean_y = rows[train].mean(0), asked[train].mean(0)
                weight = torch.linalg.lstsq(
                    rows[train] - mean, asked[train] - mean_y, driver="gelsd"
                ).solution
                off = asked[test] - mean_y
                missed = off - (rows[test] - mean) @ weight
                errors += [float(missed.square().sum()), float(off.square().sum())]
            got = float(found.sel(view=view, position=position)[layer])
            assert got == pytest.approx(1 - errors[0] / errors[1], abs=1e-8), (view, position, layer)


def test_rows_that_outgrow_the_limit_are_summed_up_with_their_targets(monkeypatch):
    model, batches = CASES["padding"]
    options = {"layers": names(model), "targets": targets_of(batches), "groups": 3, "progress": False}
    want = rgfast.probe(model, batches, route="moments", **options).dataset
    monkeypatch.setattr(samples, "LIMIT", 60)
    got = rgfast.probe(model, batches, **options).dataset
    assert got.attrs["route"] == "moments"
    for name in want.data_vars:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_targets_count_for_what_is_held():
    model, x = Model(6, 6), normal(40, 2, 6)
    rows = 4 * x.numel() * len(names(model))
    options = {
        "layers": names(model), "views": ["position"], "positions": [0], "groups": 2, "route": "samples",
        "progress": False,
    }  # fmt: skip
    y = normal(40, 2, 60)
    with pytest.raises(ValueError, match="rows of all layers do not fit memory="):
        rgfast.probe(model, x, targets={"y": y}, memory=rows + y.numel() * 8 - 1, **options)
    # A target of whole sequences is there once.
    fits = rows + y[:, 0].numel() * 8
    result = rgfast.probe(model, x, targets={"y": y[:, 0]}, memory=fits, **options)
    assert result.dataset.attrs["route"] == "samples"


def test_what_was_given_may_be_overwritten():
    model, x, y = Model(6, 6), normal(80, 2, 6), normal(80, 2, 3).double()
    given = {"layers": names(model), "targets": {"y": "y"}, "route": "samples", "progress": False}
    want = rgfast.probe(model, {"x": x, "y": y}, batch_size=20, **given).dataset
    buffer = torch.empty(20, 2, 3, dtype=torch.float64)

    def reusing():
        for part, asked in zip(x.split(20), y.split(20), strict=True):
            yield {"x": part, "y": buffer.copy_(asked)}

    got = rgfast.probe(model, reusing(), **given).dataset
    np.testing.assert_array_equal(got.target_r2, want.target_r2)


@pytest.mark.parametrize("routes", [("samples", "samples"), ("samples", "moments"), ("moments", "samples")])
def test_results_merge_with_their_targets(routes, tmp_path):
    model, x = Model(12, 12), normal(90, 4, 12)
    label, vector = torch.arange(90) % 3, normal(90, 4, 2, seed=1) + x[..., :2]

    def part(at, route):
        data = {"x": x[at], "label": label[at], "vector": vector[at]}
        targets = {"label": "label", "vector": "vector"}
        return rgfast.probe(
            model, data, layers=names(model), targets=targets, groups=3, route=route, progress=False
        )

    want = part(slice(None), "moments").dataset
    both = [part(slice(30), routes[0]), part(slice(30, None), routes[1])]
    for k, one in enumerate(both):
        one.save(tmp_path / f"{k}.nc")
    again = [rgfast.ProbeResult.load(tmp_path / f"{k}.nc") for k in range(2)]
    for a, b in (both, again):
        merged = a.merge(b).dataset
        assert merged.attrs["route"] == ("samples" if routes == ("samples",) * 2 else "moments")
        np.testing.assert_allclose(merged.target_r2, want.target_r2, rtol=0, atol=1e-9)


class Rolled(torch.nn.Module):
    """No product of matrices: torch lets a row's bits depend on the rows beside it there."""

    def __init__(self):
        super().__init__()
        self.before, self.after = torch.nn.Identity(), torch.nn.Identity()

    def forward(self, x):
        return self.after(self.before(x) + 0.3 * x.roll(1, -1))


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_depend_on_neither_batches_nor_threads(threads):
    model, x = Rolled(), normal(50, 5, 24)
    given = {
        "layers": ["before", "after"],
        "targets": {"y": x[..., :3].cos()},
        "route": "samples",
        "progress": False,
    }
    want = rgfast.probe(model, x, **given).dataset.target_r2
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = rgfast.probe(model, whole(x, 7), **given).dataset.target_r2
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(got, want)


def test_few_sequences_of_a_wide_model_go_by_rows():
    model, batches = Model(96, 96), whole(normal(12, 1, 96), 6)
    options = {"layers": names(model), "views": ["position"], "progress": False}
    assert rgfast.probe(model, batches, **options).dataset.attrs["route"] == "moments"
    model, batches = Model(400, 400), whole(normal(12, 1, 400), 6)
    assert rgfast.probe(model, batches, **options).dataset.attrs["route"] == "moments"
    found = rgfast.probe(model, batches, targets={"y": torch.arange(12) % 2}, **options)
    assert found.dataset.attrs["route"] == "samples"


def test_an_inverse_leaves_out_what_is_rounding():
    x = normal(3, 30, 6).double()
    x[1, :, 5] = x[1, :, 4]  # one direction without variance
    x[2] = 0.0
    scatter = x.mT @ x
    found = pseudo_inverse(scatter)
    torch.testing.assert_close(found[0], torch.linalg.inv(scatter[0]), rtol=1e-9, atol=0)
    torch.testing.assert_close(found[1], torch.linalg.pinv(scatter[1], rcond=1e-12), rtol=1e-9, atol=1e-12)
    assert not found[2].any()
    # A direction below a relative variance of 1e-12 does not count, though it can be inverted.
    weak = torch.diag(torch.tensor([1.0, 1e-11, 1e-13], dtype=torch.float64))[None]
    torch.testing.assert_close(pseudo_inverse(weak)[0].diagonal(), torch.tensor([1.0, 1e11, 0.0]).double())


def test_padding_that_leaves_a_group_without_rows():
    model, batches = Model(8, 8), padded(normal(30, 6, 8), 10, seed=3)
    here, there = both(model, batches, groups=10, targets=targets_of(batches), views=["position"])
    np.testing.assert_array_equal(here.target_r2.isnull(), there.target_r2.isnull())
    np.testing.assert_allclose(here.target_r2, there.target_r2, rtol=1e-9, atol=1e-9)
