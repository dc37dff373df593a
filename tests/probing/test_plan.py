"""What `rgfast.plan` foresees, beside what a probe then does."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rgfast
from rgfast.ops.fast import why_slow
from rgfast.probing import forecast, predict
from rgfast.probing.plan import make_plan

needs_native = pytest.mark.skipif(why_slow() is not None, reason="the native module is not built")


def data(n=40, length=3, width=6, seed=0):
    return torch.randn(n, length, width, generator=torch.Generator().manual_seed(seed))


def plain(width=6, depth=3):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)))


def stack():
    return rgfast.ResidualStack(width=6, depth=2, mixing="none")


ROWS = {"views": ["position"], "route": "samples"}
CASES = {
    "tiles": (stack, ROWS, "a stack without mixing"),
    "rows": (plain, ROWS, "fit memory="),
    "moments": (plain, {"route": "moments"}, "moments were asked for"),
}


@needs_native
@pytest.mark.parametrize("estimator", CASES)
def test_the_estimator_is_the_one_that_the_probe_takes(estimator):
    make, options, why = CASES[estimator]
    model, x = make(), data()
    found = rgfast.plan(model, x, **options)
    assert found.estimator == estimator
    assert why in found.why
    result = rgfast.probe(model, x, progress=False, **options)
    assert result.dataset.attrs["route"] == found.route
    assert found.sequences == 40
    assert found.seconds > found.forward_seconds > 0
    assert found.share == found.seconds / found.forward_seconds


@needs_native
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"sequences": 5000}, "more than 4096 sequences"),
        ({"sequences": 4000, "memory": 100_000, "groups": 1}, "do not fit memory="),
        ({"sequences": 3}, "too few sequences"),
        ({"route": "auto"}, "a moment either way"),
    ],
)
def test_why_rows_are_summed_up(changes, why):
    found = rgfast.plan(plain(), data(), **{**ROWS, "route": "auto", **changes})
    assert (found.estimator, found.route) == ("moments", "moments")
    assert why in found.why


def test_the_state_of_moments_is_that_of_the_plan():
    model, x = plain(), data()
    found = rgfast.plan(model, x, route="moments")
    with rgfast.Probe(model, route="moments", progress=False) as p:
        model(x)
    assert found.state_bytes == p.plan.state_bytes
    assert found.what == p.plan.what


def test_it_is_said_in_words_and_frozen():
    found = rgfast.plan(plain(), data(), route="moments")
    text = str(found)
    for word in ("4 layers", "40 sequences", "by moments", "of state", "times the bare forward"):
        assert word in text
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.sequences = 3
    unknown = dataclasses.replace(found, seconds=None)
    assert unknown.share is None
    assert "not predicted" in str(unknown)


def test_nothing_is_printed_kept_or_changed(capsys):
    model = plain().train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    rgfast.plan(model, data())
    assert capsys.readouterr().out == ""
    assert [module.training for module in model.modules()] == before
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "batches",
    [
        data(),
        data().numpy(),
        {"input": data()},
        [data(25), data(15)],
        [(data(25),), (data(15),)],
        DataLoader(TensorDataset(data()), batch_size=16),
    ],
    ids=["tensor", "array", "mapping", "list", "tuples", "loader"],
)
def test_batches_of_every_form_are_counted(batches):
    assert rgfast.plan(plain(), batches).sequences == 40


class Endless:
    def __iter__(self):
        while True:
            yield data(5)


def test_what_does_not_tell_how_many_it_holds_needs_sequences():
    with pytest.raises(ValueError, match="sequences must say how many there are, since Endless does not"):
        rgfast.plan(plain(), Endless())
    assert rgfast.plan(plain(), Endless(), sequences=70).sequences == 70
    with pytest.raises(ValueError, match="sequences"):
        rgfast.plan(plain(), Endless(), sequences=0)


def test_iterators_and_empty_batches_are_refused():
    with pytest.raises(TypeError, match=r"batches must be what can be read again .* got generator"):
        rgfast.plan(plain(), (data() for _ in range(2)))
    with pytest.raises(ValueError, match="batches must hold at least one sequence"):
        rgfast.plan(plain(), [data()[:0]], sequences=4)
    with pytest.raises(ValueError, match="route"):
        rgfast.plan(plain(), data(), route="fast")


def planned(**changes):
    options = {
        "positions": "auto",
        "views": None,
        "pairs": "adjacent",
        "groups": 1,
        "memory": 1 << 32,
        "masked": False,
    }
    return make_plan(["a", "b", "c"], [8, 8, 8], 5, **{**options, **changes})


def test_multiplications_are_counted():
    # Three kernels beside themselves and three pairs; half of each by symmetry.
    assert predict.products(10, (8, 8, 8), "all") == 10 * min(10 * (24 + 12), 64 * 9) / 2
    assert predict.products(1000, (8, 8, 8), "all") == 1000 * 64 * 9 / 2
    work = predict.work_of("rows", planned(views=["position"], groups=4), 100, uncentred=True)
    assert work.moments == 3 * 5 * 100 * 8 * 8
    assert work.eigenvalues == ((5 * 5, 8),) * 3
    assert work.kernels == 5 * predict.products(100, (8, 8, 8), "adjacent")


def test_seconds_are_what_is_counted_at_the_rates_that_were_measured(monkeypatch):
    for name in ("_moment", "_eigenvalue", "_kernel", "_byte"):
        monkeypatch.setattr(predict, name, lambda *_: 1e-6)
    plan = planned(views=["position"])
    work, factors = predict.work_of("rows", plan, 100, uncentred=False), predict.ESTIMATORS["rows"]
    counted = (
        factors.moments * work.moments
        + factors.eigenvalues * sum(count for count, _ in work.eigenvalues)
        + factors.kernels * work.kernels
        + factors.copies * work.bytes
    )
    seconds = predict.added_seconds("rows", plan, 100, uncentred=False)
    assert seconds == pytest.approx(1e-6 * counted + factors.fixed)
    # Moments grow with the sequences, and what is read at the end does not.
    few, many, more = (predict.added_seconds("moments", plan, n, uncentred=False) for n in (100, 200, 300))
    assert many - few == pytest.approx(more - many)
    # Fewer rows than features keep their triangular factors.
    assert predict.work_of("moments", plan, 7, uncentred=False).factors > 0
    assert predict.work_of("moments", plan, 100, uncentred=False).factors == 0


@needs_native
@pytest.mark.parametrize("n", [40, 3])
def test_layers_that_lose_small_values_are_recognized(n, monkeypatch):
    """A LayerNorm leaves one direction of rounding, and one more about zero if it has no bias."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(12, 12), nn.LayerNorm(12, bias=False), nn.Linear(12, 12), nn.LayerNorm(12)
    )
    nn.init.normal_(model[3].bias)
    seen = []

    def added(*args, deficient, **options):
        seen.append(deficient)
        return 1.0

    monkeypatch.setattr(forecast, "added_seconds", added)
    rgfast.plan(model, data(n, 3, 12), layers=["0", "1", "2", "3"], route="samples" if n > 3 else "auto")
    # The linear map keeps the direction; fewer rows than features do not tell.
    assert seen == [(0, 2, 1, 1) if n > 3 else ()]


def test_refinements_and_maps_are_counted():
    plan = planned(groups=4, targets=[("y", 2)], views=["position", "pooled"])
    deficient = (0, 2, 1)
    work = predict.work_of("rows", plan, 100, uncentred=True, deficient=deficient)
    # Jackknife parts of positions are refined too, those of the pooled moments are not.
    assert work.refined == ((2 * 25, 100, 8), (25, 100, 8), (2, 500, 8), (1, 500, 8))
    # Fewer rows than features have no value that a moment loses.
    assert not predict.work_of("rows", plan, 1, uncentred=True, deficient=deficient).refined
    bare = predict.work_of("rows", planned(groups=4, views=["position", "pooled"]), 100, uncentred=True)
    data_matrices = ((5, 100), (1, 500))
    maps = sum(count * (4 * 8**3 * (1 + 20 + 20) + 3 * 2 * rows * 8 * 8) for count, rows in data_matrices)
    assert work.moments == bare.moments + maps
    summed = [predict.work_of("moments", plan, 100, uncentred=True, deficient=d) for d in (deficient, ())]
    assert summed[0].factors > summed[1].factors == 0
