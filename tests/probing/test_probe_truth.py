"""The probe against brute force on stored activations: every view, kind of model and way of batching."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import rgfast
from rgfast.streaming import MomentAccumulator

VIEWS = ("visible", "masked", "position", "pooled", "mean_pooled", "flattened")


def run(model, data, **options):
    return rgfast.probe(model, data, progress=False, **options)


def same(a, b):
    """Bit for bit."""
    for name in a.data_vars:
        np.testing.assert_array_equal(a[name].values, b[name].values, err_msg=str(name))


def test_every_view_of_a_token_model(kit, token_model, token_data):
    result = run(token_model, token_data, mask="mask", views=VIEWS, pairs="all", batch_size=64)
    layers, hidden = kit.stream_of(token_model, token_data["tokens"], 64), token_data["mask"]
    at = result.dataset
    for t in range(6):
        rows = [x[:, t] for x in layers]
        kit.assert_equal_to(kit.brute(rows), at, "position", t)
        kit.assert_equal_to(kit.brute(rows, ~hidden[:, t]), at, "visible", t)
        truth = kit.brute(rows, hidden[:, t])
        assert truth["effective_rank"][0] == 0.0
        kit.assert_equal_to(truth, at, "masked", t)
        assert at.n.sel(view="masked", position=t) == int(hidden[:, t].sum())
        assert at.n.sel(view="position", position=t) == 300
    kit.assert_equal_to(kit.brute([x.flatten(0, 1) for x in layers]), at, "pooled")
    kit.assert_equal_to(kit.brute([x.double().mean(1) for x in layers]), at, "mean_pooled")
    kit.assert_equal_to(kit.brute([x.flatten(1) for x in layers]), at, "flattened")
    assert at.n.sel(view="pooled", position=-1) == 1800
    assert at.singular_values.sel(view="position", position=2, layer=1).values == pytest.approx(
        rgfast.singular_values(layers[1][:, 2].double()).numpy(), rel=1e-9
    )


def test_order_parameter_is_the_mean_over_positions(kit, token_model, token_data):
    result = run(token_model, token_data, mask="mask")
    layers = kit.stream_of(token_model, token_data["tokens"])
    want = rgfast.effective_rank(layers[2].transpose(0, 1).double(), method="svd")
    assert result.by_position("effective_rank", "position").sel(layer=2).values == pytest.approx(want.numpy())
    assert float(result.order_parameter("position").sel(layer=2)) == pytest.approx(float(want.mean()))
    drift = result.order_parameter("masked", "kernel_drift")
    assert drift.dims == ("transition",)
    assert np.isnan(drift.values[0])
    assert np.isfinite(drift.values[1:]).all()


@pytest.mark.parametrize("size", [1, 7, 64, 299, 300, 1000])
def test_bits_do_not_depend_on_batching_of_given_activations(size):
    # An identity model: what a model's own kernels make of another batch size is not the probe's matter.
    model = nn.Sequential(nn.Identity(), nn.Identity())
    x = torch.randn(300, 5, 4, generator=torch.Generator().manual_seed(1))
    keep = torch.rand(300, 5, generator=torch.Generator().manual_seed(2)) < 0.7
    data = {"input": x, "attention_mask": keep, "mask": keep.flip(1)}
    options = {"layers": ["0", "1"], "mask": "mask", "views": VIEWS, "groups": 3}
    same(run(model, data, **options).dataset, run(model, data, batch_size=size, **options).dataset)


def test_bits_do_not_depend_on_threads():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    x = torch.randn(400, 2, 256, generator=torch.Generator().manual_seed(1))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run(model, x, layers=["0", "1"], groups=2, targets={"x": x[..., :3]}).dataset)
    for other in found[1:]:
        same(found[0], other)


@pytest.mark.parametrize("kind", ["tuple", "dataclass", "dict"])
def test_outputs_inside_containers(kit, kind):
    torch.manual_seed(0)
    model = nn.Sequential(*(kit.Wrapped(5, kind) for _ in range(3)))
    x = torch.randn(200, 4, 5)
    result = run(model, x, pairs="all")
    layers = [x, *kit.stored([block.block for block in model], x)]
    for t in range(4):
        kit.assert_equal_to(kit.brute([y[:, t] for y in layers]), result.dataset, "position", t)


@pytest.mark.parametrize("block", ["Residual", "InPlace"])
def test_sequential_of_residual_blocks_without_positions(kit, block):
    torch.manual_seed(0)
    blocks = [getattr(kit, block)(6) for _ in range(3)]
    model = nn.Sequential(nn.Linear(9, 6), *blocks, nn.Linear(6, 2))
    x = torch.randn(150, 9)
    result = run(model, x, pairs="all", batch_size=40)
    layers = kit.stored([model[0], *blocks], x, 40)
    assert result.views == ("pooled",)
    kit.assert_equal_to(kit.brute(layers), result.dataset, "pooled")


def test_images(kit):
    torch.manual_seed(0)
    model = nn.Sequential(*(kit.ConvBlock(3) for _ in range(2)), nn.Flatten(), nn.Linear(60, 2))
    x = torch.randn(90, 3, 4, 5)
    result = run(model, [x[:50], x[50:]], pairs="all")
    layers = [x, *kit.stored(model[:2], x, 50)]
    rows = [y.flatten(2).transpose(1, 2) for y in layers]
    kit.assert_equal_to(kit.brute([y[:, 7] for y in rows]), result.dataset, "position", 7)
    kit.assert_equal_to(kit.brute([y.flatten(0, 1) for y in rows]), result.dataset, "pooled")
    assert result.dataset.sizes["position"] == 21


def test_layers_of_different_resolution_are_compared_by_their_means():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3, stride=2))
    x = torch.randn(64, 1, 9, 9)
    result = run(model, x, layers=["0", "1"])
    assert result.views == ("mean_pooled", "pooled")
    with torch.no_grad():
        means = [y.double().mean((2, 3)) for y in (model[0](x), model(x))]
    want = rgfast.kernel_drift(means)
    assert result.order_parameter("mean_pooled", "kernel_drift").values == pytest.approx(
        want.numpy(), abs=1e-12
    )


def ragged(lengths, width=4, seed=0):
    """Batches of padded sequences whose padding is NaN, and the rows that count."""
    g = torch.Generator().manual_seed(seed)
    sequences = [torch.randn(n, width, generator=g) for n in lengths]
    batches = []
    for part in itertools.batched(sequences, 8) if hasattr(itertools, "batched") else [
        sequences[i : i + 8] for i in range(0, len(sequences), 8)
    ]:  # fmt: skip
        longest = max(len(s) for s in part)
        x = torch.full((len(part), longest, width), float("nan"))
        keep = torch.zeros(len(part), longest, dtype=torch.int64)
        for row, s in enumerate(part):
            x[row, : len(s)], keep[row, : len(s)] = s, 1
        batches.append({"input": x, "attention_mask": keep})
    return sequences, batches


@pytest.mark.parametrize("first", [3, 9])
def test_padding_is_never_counted_whatever_the_lengths(kit, first):
    lengths = [first] + [1 + (5 * k) % 9 for k in range(120)]
    sequences, batches = ragged(lengths)
    model = nn.Sequential(nn.Identity(), nn.Identity())
    if first == 3:
        batches[0] = {k: v[:1, :3] for k, v in batches[0].items()}
        sequences = [sequences[0], *sequences[8:]]
    result = run(model, batches, layers=["0", "1"])
    followed = result.dataset.attrs["length"]
    assert followed == (3 if first == 3 else 9)
    rows = torch.cat(sequences)
    kit.assert_equal_to(kit.brute([rows, rows]), result.dataset, "pooled")
    means = torch.stack([s.double().mean(0) for s in sequences])
    kit.assert_equal_to(kit.brute([means, means]), result.dataset, "mean_pooled")
    for t in range(followed):
        at = torch.stack([s[t] for s in sequences if len(s) > t])
        assert result.dataset.n.sel(view="position", position=t) == len(at)
        kit.assert_equal_to(kit.brute([at, at]), result.dataset, "position", t)


def test_a_whole_row_of_padding_and_empty_batches_count_nothing():
    x = torch.randn(40, 3, 4)
    keep = torch.ones(40, 3)
    keep[5] = 0
    model = nn.Sequential(nn.Identity(), nn.Identity())
    batches = [
        {"input": x[:0], "attention_mask": keep[:0]},
        {"input": x[:1], "attention_mask": keep[:1]},
        {"input": x[1:], "attention_mask": keep[1:]},
        {"input": x[:0], "attention_mask": keep[:0]},
    ]
    n = run(
        model, batches, layers=["0", "1"], views=("position", "pooled", "mean_pooled", "flattened")
    ).dataset.n
    assert n.sel(view="position", position=1) == 39
    assert [int(n.sel(view=v, position=-1)) for v in ("pooled", "mean_pooled", "flattened")] == [117, 39, 39]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_model_of_another_dtype(kit, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(*(kit.Residual(6) for _ in range(2))).to(dtype)
    x = torch.randn(256, 3, 6).to(dtype)
    result = run(model, x, pairs="all")
    layers = [x, *kit.stored(list(model), x)]
    kit.assert_equal_to(kit.brute([y[:, 1] for y in layers]), result.dataset, "position", 1)


@pytest.mark.parametrize("exponent", [-700, -400, 400, 500])
def test_data_far_from_one(exponent):
    model = nn.Sequential(nn.Identity(), nn.Identity())
    x = torch.randn(200, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    x[..., 4] = x[..., 3] + 1e-9 * x[..., 4]
    plain = run(model, x, layers=["0", "1"], groups=2).dataset
    far = run(model, x * 2.0**exponent, layers=["0", "1"], groups=2).dataset
    for name in plain.data_vars:
        scale = 2.0**exponent if name == "singular_values" else 1.0
        np.testing.assert_allclose(far[name] / scale, plain[name], rtol=1e-12, err_msg=str(name))


def test_pairs_are_the_asked_ones(token_model, token_data):
    for pairs, number in (("adjacent", 3), ("all", 6), ([(0, 3)], 1)):
        result = run(token_model, token_data, pairs=pairs, views=("pooled",))
        frame = result.to_dataframe()
        assert (frame.measure == "cka").sum() == number
    assert result.dataset.kernel_drift.isnull().all()


def test_some_positions_and_pooled_over_all(kit, token_model, token_data):
    result = run(token_model, token_data, positions=[-1, 2])
    assert result.dataset.position.values.tolist() == [-1, 2, 5]
    layers = kit.stream_of(token_model, token_data["tokens"])
    kit.assert_equal_to(kit.brute([x[:, 5] for x in layers]), result.dataset, "position", 5)
    kit.assert_equal_to(kit.brute([x.flatten(0, 1) for x in layers]), result.dataset, "pooled")


def test_jackknife_over_groups_of_sequences(token_model, token_data):
    result = run(token_model, token_data, mask="mask", groups=5, measures=["effective_rank", "kernel_drift"])
    plain = run(token_model, token_data, mask="mask", measures=["effective_rank", "kernel_drift"])
    for name in ("effective_rank", "kernel_drift"):
        np.testing.assert_allclose(result.dataset[name], plain.dataset[name], rtol=1e-11, atol=1e-13)
    index = torch.arange(300) % 5
    left = [
        run(token_model, {k: v[index != g] for k, v in token_data.items()}, mask="mask").dataset
        for g in range(5)
    ]
    for name in ("effective_rank", "kernel_drift"):
        values = np.stack([d[name].sel(view="visible").values for d in left])
        want = np.sqrt(4 / 5 * ((values - values.mean(0)) ** 2).sum(0))
        got = result.dataset[f"{name}_se"].sel(view="visible").values
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-12)


def test_merge_is_one_probe_of_both(token_model, token_data, tmp_path):
    def part(a, b):
        return run(token_model, {k: v[a:b] for k, v in token_data.items()}, mask="mask", groups=2)

    whole, first, second = part(0, 300), part(0, 100), part(100, 300)
    second.save(tmp_path / "second.nc")
    merged = first.merge(rgfast.ProbeResult.load(tmp_path / "second.nc"))
    assert merged.dataset.attrs["sequences"] == 300
    for name in whole.measures:
        np.testing.assert_allclose(merged.dataset[name], whole.dataset[name], rtol=1e-11, atol=1e-12)
    with pytest.raises(ValueError, match="same groups"):
        first.merge(run(token_model, token_data, mask="mask"))
    second.save(tmp_path / "small.nc", moments=False)
    with pytest.raises(TypeError, match="other must be a ProbeResult, got int"):
        first.merge(3)
    with pytest.raises(ValueError, match="moments=False"):
        first.merge(rgfast.ProbeResult.load(tmp_path / "small.nc"))


def test_baselines_and_flags(token_model, token_data):
    result = run(token_model, token_data, views=("position", "flattened"))
    want = rgfast.isotropic_baseline(300, 7)
    got = result.dataset.effective_rank_baseline.sel(view="position", layer=1, position=3)
    assert float(got) == want.effective_rank
    assert not result.dataset.sample_limited.sel(view="position", position=3).any()
    assert result.dataset.sample_limited.sel(view="flattened", position=-1).all()
    bound = result.dataset.effective_rank_bound.sel(view="position", position=[0, 1])
    assert ((bound > 0) & (bound < 1e-3)).all()


@pytest.mark.parametrize("small", [1e-2, 3e-3, 1e-3, 7e-4])
@pytest.mark.parametrize("n", [18, 40, 100])
def test_sums_of_other_pieces_agree_to_1e_12(small, n):
    """As those of several ranks do; with half of the singular values this small moments alone would not."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 40, 12, dtype=torch.float64, generator=generator)
    x[..., 6:] *= small
    x = x @ torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=generator))[0]
    model = nn.Sequential(nn.Identity(), nn.Linear(12, 3)).double()
    asked = {"layers": ["0"], "views": ["position"], "route": "moments", "progress": False}
    whole, first, rest = (rgfast.probe(model, part, **asked) for part in (x, x[: n // 3], x[n // 3 :]))
    merged, whole = first.merge(rest).dataset, whole.dataset
    np.testing.assert_allclose(merged.effective_rank, whole.effective_rank, rtol=1e-12)


def test_leaving_out_many_groups_takes_few_merges(monkeypatch):
    merges = []
    merge = MomentAccumulator.merge
    monkeypatch.setattr(MomentAccumulator, "merge", lambda *both: merges.append(1) or merge(*both))
    model, x = nn.Sequential(nn.Linear(3, 3)).double(), torch.randn(64, 3, dtype=torch.float64)
    result = run(model, x, layers=["0"], views=["position"], groups=32)
    assert len(merges) < 32 * 10
    y = model(x).detach()
    left_out = [rgfast.effective_rank(y[torch.arange(64) % 32 != g]) for g in range(32)]
    spread = torch.stack(left_out).double().std(correction=0) * 31**0.5
    assert float(result.dataset.effective_rank_se.max()) == pytest.approx(float(spread), rel=1e-9)


class Stream(nn.Module):
    """Adds to its stream out of place, or where it lies by way of ``how``, from the forward ``first`` on."""

    def __init__(self, how, first=0):
        super().__init__()
        torch.manual_seed(6)
        self.blocks, self.how, self.first = nn.ModuleList(nn.Linear(5, 5) for _ in range(3)), how, first

    def forward(self, x):
        self.first -= 1
        x = self.blocks[0](x)
        for block in self.blocks[1:]:
            more = torch.tanh(block(x))
            if self.how == "add_" and self.first < 0:
                x.add_(more)
            elif self.how == "data" and self.first < 0:
                x.data.add_(more)
            elif self.how == "numpy" and self.first < 0:
                x.numpy()[...] += more.numpy()
            else:
                x = x + more
        return x


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("how", ["add_", "data", "numpy"])
def test_a_model_that_adds_to_its_stream_where_it_lies(how, inference):
    x = torch.randn(90, 2, 5, generator=torch.Generator().manual_seed(0))
    asked = {"layers": ["blocks.*"], "batch_size": 20}
    with torch.inference_mode(inference):
        found, want = run(Stream(how), x, **asked), run(Stream("not"), x, **asked)
    same(found.dataset, want.dataset)


def test_a_model_that_begins_to_do_so_is_refused():
    x = torch.randn(90, 2, 5, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match=r"wrote to the output of blocks\.0, which it left alone"):
        run(Stream("add_", first=2), x, layers=["blocks.*"], batch_size=20)
