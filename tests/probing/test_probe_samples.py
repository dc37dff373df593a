"""The sample route of the probe: the values of the moments route and of brute force, and when it is taken."""

import pickle

import numpy as np
import pytest
import torch

import rgfast
from rgfast.probing import planning
from rgfast.probing.estimators import samples

OPTIONS = {"views": ["position"], "progress": False}


def stack_of(width, depth, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return rgfast.ResidualStack(width, depth, mixing="none", w2_scale=0.7, generator=generator, **options)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both(stack, x, **options):
    return [rgfast.probe(stack, x, route=route, **OPTIONS, **options) for route in ("samples", "moments")]


def collapsed(n, length, width, noise):
    return normal(n, length, 1) * normal(length, width, seed=1) + noise * normal(n, length, width, seed=2)


CASES = {
    "plain": (stack_of(24, 3), normal(300, 5, 24)),
    "wide rows": (stack_of(40, 2), normal(17, 3, 40)),
    "rank one and noise": (stack_of(24, 3), collapsed(300, 5, 24, 1e-5)),
    "rank one": (stack_of(24, 2), collapsed(100, 2, 24, 0.0)),
    "offset": (stack_of(16, 2, norm=None), normal(200, 3, 16) + 1e4),
    "nothing happens": (rgfast.ResidualStack(16, 3, mixing="none"), normal(100, 4, 16)),
    "odd": (stack_of(17, 4, hidden=5), normal(63, 1, 17)),
    "four rows": (stack_of(8, 2), normal(4, 3, 8)),
}


@pytest.mark.parametrize("pairs", ["all", "adjacent"])
@pytest.mark.parametrize("name", CASES)
def test_the_values_are_those_of_the_moments(name, pairs):
    stack, x = CASES[name]
    here, there = both(stack, x, pairs=pairs)
    assert [result.dataset.attrs["route"] for result in (here, there)] == ["samples", "moments"]
    assert set(here.dataset.data_vars) == set(there.dataset.data_vars)
    pairwise = ("cka", "cka_biased", "kernel_drift", "kernel_drift_debiased", "kernel_change")
    for name in here.dataset.data_vars:
        a, b = here.dataset[name], there.dataset[name]
        assert a.dims == b.dims
        if name in ("refined",) or name.endswith("_bound"):
            continue
        scale = np.maximum(1.0, np.abs(b.values))
        np.testing.assert_allclose(
            a.values / scale, b.values / scale, rtol=0, atol=1e-6 if name in pairwise else 1e-9
        )


@pytest.mark.parametrize("noise", [None, 1e-3, 1e-6])
def test_brute_force_on_what_hooks_store(noise):
    stack = stack_of(64, 3, seed=5)
    x = normal(700, 6, 64) if noise is None else collapsed(700, 6, 64, noise)
    result = rgfast.probe(stack, x, pairs="all", route="samples", **OPTIONS)
    stream = [x]
    with torch.no_grad():
        for block in stack.blocks:
            stream.append(block(stream[-1]))
    for t in range(6):
        layers = [y[:, t].double() for y in stream]
        for layer, y in enumerate(layers):
            sigma = torch.linalg.svdvals(y - y.mean(0))
            p = sigma / sigma.sum()
            want = float(torch.special.entr(p).sum().exp())
            got = float(result.dataset.effective_rank[0, layer, t])
            assert abs(got - want) <= 1e-9 * want
            np.testing.assert_allclose(
                result.dataset.singular_values[0, layer, t], sigma, rtol=1e-6, atol=1e-12 * float(sigma[0])
            )
        grams = []
        for y in layers:
            k = (y - y.mean(0)) @ (y - y.mean(0)).T
            k.fill_diagonal_(0.0)
            rows, n = k.sum(1), len(k)
            k = k - (rows[:, None] + rows) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
            grams.append(k.fill_diagonal_(0.0).reshape(-1))
        for i, a in enumerate(grams):
            for j, b in enumerate(grams):
                want = float(a @ b / (a.norm() * b.norm()))
                assert abs(float(result.dataset.cka[0, i, j, t]) - want) < 1e-6


@pytest.mark.parametrize("mixing", ["none", "mixer"])
@pytest.mark.parametrize("pairs", ["all", "adjacent"])
def test_error_bars_are_those_of_the_moments(pairs, mixing):
    x = normal(202, 5, 24)
    stack = rgfast.ResidualStack(24, 3, mixing=mixing, length=5, w2_scale=0.7)
    here, there = both(stack, x, pairs=pairs, groups=4)
    assert [result.dataset.attrs["route"] for result in (here, there)] == ["samples", "moments"]
    errors = [name for name in there.dataset.data_vars if str(name).endswith("_se")]
    assert len(errors) == 12
    for name in errors:
        a, b = here.dataset[name], there.dataset[name]
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6, err_msg=str(name))
        assert name == "numerical_rank_se" or np.nanmax(b.values) > 1e-6


def test_batches_are_what_they_are_joined_from_or_not():
    stack, x = stack_of(32, 3), normal(501, 4, 32)
    want = rgfast.probe(stack, x, route="samples", **OPTIONS).dataset
    ragged = [x[:200], x[200:200], x[200:203].clone(), x[203:].transpose(0, 1).contiguous().transpose(0, 1)]
    for batches in (ragged, iter(ragged), {"x": x}, x.numpy(), [{"x": part} for part in ragged]):
        got = rgfast.probe(stack, batches, route="samples", **OPTIONS).dataset
        for name in want.data_vars:
            np.testing.assert_array_equal(got[name], want[name])


def test_chosen_positions_and_measures():
    stack, x = stack_of(32, 3), normal(300, 9, 32)
    whole = rgfast.probe(stack, x, route="samples", **OPTIONS).dataset
    some = rgfast.probe(
        stack, x, route="samples", positions=[1, 7], measures=["effective_rank", "cka"], **OPTIONS
    ).dataset
    assert list(some.position.values) == [1, 7]
    assert "effective_rank_uncentred" not in some
    assert "kernel_drift" not in some
    np.testing.assert_allclose(some.effective_rank, whole.effective_rank.sel(position=[1, 7]), rtol=1e-12)
    np.testing.assert_allclose(some.cka, whole.cka.sel(position=[1, 7]), atol=1e-7)


def test_without_compiled_kernels_it_is_taken_where_asked_for_only(monkeypatch):
    monkeypatch.setattr(samples, "_LEAST_FLOPS", 0.0)
    monkeypatch.setattr(planning, "why_slow", lambda: "there is none")
    stack, x = stack_of(8, 2), normal(50, 3, 8)
    for asked, taken in (("auto", "moments"), ("samples", "samples")):
        assert rgfast.probe(stack, x, route=asked, **OPTIONS).dataset.attrs["route"] == taken


def test_when_it_is_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(planning, "why_slow", lambda: None)
    monkeypatch.setattr(samples, "LIMIT", 400)
    monkeypatch.setattr(samples, "_LEAST_FLOPS", 1e8)
    stack, x = stack_of(64, 3), normal(400, 20, 64)

    def route(model=stack, batches=x, **options):
        return rgfast.probe(model, batches, **{**OPTIONS, **options}).dataset.attrs["route"]

    assert route() == route(pairs="all") == "samples"
    assert route(batches=x[:20]) == "moments"  # little to do
    assert route(batches=[*x.split(100), x[:1]]) == "moments"
    assert route(route="moments") == "moments"
    assert route(views=["position", "pooled"]) == "samples"
    assert route(views=None) == "samples"
    assert route(views=None, refine=False) == "moments"
    assert route(groups=2) == "samples"
    assert route(targets={"first": normal(400, 1)}) == "samples"
    assert route(pairs=[(0, 3)]) == "moments"
    assert route(checkpoint=tmp_path / "run.checkpoint") == "samples"
    assert route(memory="1MB") == "samples"  # nothing is held
    assert route(layers=["blocks.0", "blocks.1"]) == "samples"
    assert route(layers=["blocks.0", "blocks.1"], memory="3MB") == "moments"
    assert route(rgfast.ResidualStack(64, 3, mixing="mixer", length=20)) == "samples"
    assert route(stack_of(64, 3).double(), x.double()) == "samples"
    seen = []
    handle = stack.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert route() == "samples"
    assert seen == [(256, 20, 64), (144, 20, 64)]  # batches, not positions
    handle.remove()
    hooked = stack.blocks[1].register_forward_hook(lambda module, args, output: output * 2)
    np.testing.assert_allclose(
        rgfast.probe(stack, x, route="samples", **OPTIONS).dataset.effective_rank,
        rgfast.probe(stack, x, route="moments", **OPTIONS).dataset.effective_rank,
        rtol=1e-9,
    )
    hooked.remove()


def test_a_stream_longer_than_the_limit_loses_nothing(monkeypatch):
    monkeypatch.setattr(samples, "LIMIT", 300)
    monkeypatch.setattr(samples, "_LEAST_FLOPS", 1e6)
    stack, x = stack_of(64, 2), normal(500, 8, 64)
    batches = iter(x.split(100))
    result = rgfast.probe(stack, batches, **OPTIONS)
    assert result.dataset.attrs["route"] == "moments"
    assert int(result.dataset.n[0, 0]) == 500


def test_refusals_name_the_reason():
    stack, x = stack_of(16, 2), normal(50, 3, 16)
    mixer = rgfast.ResidualStack(16, 2, mixing="mixer", length=3)

    def refused(match, model=stack, batches=x, **options):
        with pytest.raises(ValueError, match=match):
            rgfast.probe(model, batches, **{"route": "samples", **OPTIONS, **options})

    refused("route must be one of", route="fast")
    refused("cannot be taken, since refine= is about moments", refine=True)
    refused("cannot be taken, since it compares adjacent or all pairs", pairs=[(0, 1)])
    refused("too few sequences", batches=x[:3])
    refused("too few sequences", mixer, x[:3])
    refused("too few sequences", batches=x[:15], groups=8)
    refused("at least 2 sequences", batches=[])
    refused("x must end in width 16", batches=normal(9, 3, 4))
    refused("do not fit memory=", mixer, memory="20kB", positions=[1])
    refused("'flattened' needs sequences of one length", stack, [x, x[:, :2]], views=["flattened"])


@pytest.mark.parametrize("views", [None, ["position"]])
def test_results_of_tiles_are_saved_and_merge(views, tmp_path):
    stack, x = stack_of(16, 3), normal(60, 5, 16)
    options = {**OPTIONS, "views": views}
    whole = rgfast.probe(stack, x, route="moments", **options)
    own = x.clone()
    parts = [rgfast.probe(stack, piece, route="samples", **options) for piece in (own[:25], own[25:])]
    summed = rgfast.probe(stack, x[:25], route="moments", **options)
    own.zero_()  # what comes after the probe changes nothing
    parts[0].save(tmp_path / "part.nc")
    parts[1].save(tmp_path / "small.nc", moments=False)
    kept = {name: value.clone() for name, value in stack.state_dict().items()}
    with torch.no_grad():
        stack.blocks[0].mlp.w1.zero_()
    other = rgfast.probe(stack, x[25:], route="samples", **options)
    stack.load_state_dict(kept)
    loaded = rgfast.ProbeResult.load(tmp_path / "part.nc")
    for first in (parts[0], loaded, summed, pickle.loads(pickle.dumps(parts[0]))):
        found = first.merge(parts[1])
        assert found.dataset.attrs["sequences"] == 60
        for name in ("effective_rank", "kernel_drift", "cka", "effective_rank_uncentred"):
            np.testing.assert_allclose(found.dataset[name], whole.dataset[name], rtol=0, atol=3e-6)
    with pytest.raises(ValueError, match="the same weights"):
        parts[0].merge(other)
    with pytest.raises(ValueError, match="saved with moments=False"):
        parts[0].merge(rgfast.ProbeResult.load(tmp_path / "small.nc"))


@pytest.mark.parametrize("pairs", ["all", "adjacent"])
def test_nan_is_named_with_layer_and_position(pairs):
    stack, x = stack_of(16, 3), normal(60, 11, 16)
    mixer = rgfast.ResidualStack(16, 3, mixing="mixer", length=11)
    late = x.clone()
    late[40, 7, 2] = torch.nan
    with pytest.raises(ValueError, match=r"1 NaN .* in layer 0 at position 7 .*sequences 30 to 59"):
        rgfast.probe(mixer, late.split(30), route="samples", pairs=pairs, **OPTIONS)
    with torch.no_grad():
        stack.blocks[1].mlp.b2[3] = torch.nan
    bad = x.clone()
    with pytest.raises(ValueError, match=r"60 NaN or infinite values in layer 2 at position 0 \(blocks.1"):
        rgfast.probe(stack, bad, route="samples", pairs=pairs, **OPTIONS)
    stack, bad = stack_of(16, 3), x.clone()
    bad[5, 7, 2] = torch.inf
    with pytest.raises(
        ValueError, match=r"1 NaN or infinite values in layer 0 at position 7 \(blocks.0:input"
    ):
        rgfast.probe(stack, bad, route="samples", pairs=pairs, **OPTIONS)
    rgfast.probe(stack, x, route="samples", **OPTIONS)  # nothing is left behind


@pytest.mark.parametrize("views", [["position"], None])
@pytest.mark.parametrize("n", [300, 30])
@pytest.mark.parametrize("pairs", ["all", "adjacent"])
def test_the_same_bits_on_any_number_of_threads(n, views, pairs):
    stack, x = stack_of(48, 4), normal(n, 9, 48)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            options = {"route": "samples", "pairs": pairs, "views": views, "progress": False}
            found.append(rgfast.probe(stack, x, **options).dataset)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name in other.data_vars:
            np.testing.assert_array_equal(other[name], found[0][name])


class Foreign(torch.nn.Module):
    """A stack of residual blocks that knows nothing of us; ``inplace`` adds to the stream where it lies."""

    def __init__(self, width, depth, inplace=False):
        super().__init__()
        torch.manual_seed(3)
        self.blocks = torch.nn.ModuleList(Block(width, inplace) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Block(torch.nn.Module):
    def __init__(self, width, inplace):
        super().__init__()
        self.mlp = torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, width))
        self.inplace = inplace

    def forward(self, x):
        return x.add_(self.mlp(x)) if self.inplace else x + self.mlp(x)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("pairs", ["all", "adjacent"])
def test_rows_of_any_model_are_held(pairs, inplace):
    model, x = Foreign(24, 3, inplace), normal(300, 5, 24)
    layers = ["blocks.0:input", "blocks.0", "blocks.1", "blocks.2"]
    found = [
        rgfast.probe(
            model, [part.clone() for part in x.split(70)], route=route, layers=layers, pairs=pairs, **OPTIONS
        ).dataset
        for route in ("samples", "moments")
    ]
    for name in ("effective_rank", "stable_rank", "singular_values", "cka", "kernel_drift", "kernel_change"):
        np.testing.assert_allclose(found[0][name], found[1][name], atol=1e-6, err_msg=name)


class Reusing(Foreign):
    """Writes every forward's output over the last one's."""

    def __init__(self, width, depth):
        super().__init__(width, depth)
        self.kept = torch.nn.Identity()
        self.place = None

    def forward(self, x):
        y = super().forward(x)
        self.place = y.clone() if self.place is None else self.place.copy_(y)
        return self.kept(self.place)


def test_outputs_that_the_model_writes_over_are_copied():
    model, x = Reusing(24, 2), normal(300, 5, 24)
    options = {"layers": ["blocks.0", "blocks.1", "kept"], **OPTIONS}
    for inference in (False, True):
        with torch.inference_mode(inference):
            model.place = None
            found = [rgfast.probe(model, x.split(60), route=r, **options) for r in ("samples", "moments")]
        a, b = (result.dataset.effective_rank for result in found)
        np.testing.assert_allclose(a, b, rtol=1e-9)


class Turning(Reusing):
    """Gives out memory of its own, one place after the other; where ``silent`` no version tells of it."""

    def __init__(self, width, depth, places, first, silent):
        super().__init__(width, depth)
        self.places, self.first, self.silent, self.calls = [None] * places, first, silent, 0

    def forward(self, x):
        y = Foreign.forward(self, x)
        self.calls += 1
        if self.calls <= self.first:
            return self.kept(y)
        at = self.calls % len(self.places)
        if self.places[at] is None:
            self.places[at] = y.detach().clone()
        elif self.silent:
            self.places[at].detach().numpy()[...] = y.detach().numpy()
        else:
            self.places[at].copy_(y.detach())
        return self.kept(self.places[at])


@pytest.mark.parametrize("places", [1, 2, 3])
@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("route", ["samples", "auto"])
def test_models_that_take_turns_between_buffers_are_found_out(places, silent, route):
    x = normal(300, 5, 24)
    options = {"layers": ["blocks.0", "blocks.1", "kept"], **OPTIONS}
    model, plain = Turning(24, 2, places, 0, silent), Turning(24, 2, 1, 99, silent)
    found = rgfast.probe(model, x.split(25), route=route, **options).dataset
    want = rgfast.probe(plain, x.split(25), route="moments", **options).dataset
    np.testing.assert_allclose(found.effective_rank, want.effective_rank, rtol=1e-9)


@pytest.mark.parametrize("route", ["samples", "auto"])
def test_a_model_that_begins_to_write_over_its_outputs_is_refused(route):
    with pytest.raises(RuntimeError, match="the model wrote to the output of kept of an earlier forward"):
        rgfast.probe(Turning(24, 2, 1, 5, False), normal(300, 5, 24).split(25), route=route,
                     layers=["blocks.0", "blocks.1", "kept"], **OPTIONS)  # fmt: skip


def test_what_was_held_is_summed_up_where_it_grows_too_long(monkeypatch):
    monkeypatch.setattr(samples, "LIMIT", 250)
    model = rgfast.ResidualStack(24, 3, mixing="mixer", length=5, w2_scale=0.5)
    x = normal(300, 5, 24)
    found = [rgfast.probe(model, x.split(70), route=r, **OPTIONS) for r in ("auto", "moments")]
    assert found[0].dataset.equals(found[1].dataset)
    assert found[0].merge(found[1]).dataset.attrs["sequences"] == 600


def test_a_loop_of_ones_own_may_ask_in_between():
    model = rgfast.ResidualStack(24, 3, mixing="mixer", length=5, w2_scale=0.5)
    x = normal(300, 5, 24)
    with rgfast.Probe(model, route="samples", **OPTIONS) as p, torch.no_grad():
        model(x[:100])
        first = p.result()
        model(x[100:])
        second = p.result()
    want = rgfast.probe(model, x, route="moments", **OPTIONS).dataset
    assert [r.dataset.attrs["sequences"] for r in (first, second)] == [100, 300]
    np.testing.assert_allclose(second.dataset.effective_rank, want.effective_rank, rtol=1e-9)
    np.testing.assert_allclose(second.dataset.kernel_drift, want.kernel_drift, atol=1e-6)


def test_a_saved_result_is_whole(tmp_path):
    stack, x = stack_of(16, 2), normal(50, 3, 16)
    result = rgfast.probe(stack, x, route="samples", **OPTIONS)
    result.save(tmp_path / "run.nc")
    again = rgfast.ProbeResult.load(tmp_path / "run.nc")
    assert again.dataset.equals(result.dataset)
    assert "by samples" in repr(again)
    assert len(again.to_dataframe()) == len(result.to_dataframe())
