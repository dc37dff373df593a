"""Every value of a comparison against brute force on stored activations."""

import copy

import pytest
import torch
from torch import nn

import rgfast

A, B = ["blocks.0:input", "blocks.0", "blocks.1", "blocks.2"], ["blocks.0:input", "blocks.0", "blocks.1"]


def compared(a, b, batches, **options):
    return rgfast.compare(a, b, batches, progress=False, **options)


def close(found, want, tol=1e-8):
    got = torch.as_tensor(found.values)
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    assert (got - want).abs().nan_to_num(0.0).max() <= tol, (got - want).abs().max()


def counted(layers, keeps):
    """Rows ``[R, d]`` that count, and means ``[n, d]`` over them, of stored batches."""
    rows = [torch.cat([x[k] for x, k in zip(layer, keeps, strict=True)]) for layer in layers]
    means = [
        torch.cat(
            [
                (x.double() * k[..., None]).sum(1) / k.sum(1, keepdim=True)
                for x, k in zip(layer, keeps, strict=True)
            ]
        )
        for layer in layers
    ]
    return rows, means


@pytest.mark.parametrize("route", ["moments", "samples"])
@pytest.mark.parametrize("seed", [0, 1])
def test_padded_sequences_of_two_depths_and_widths(kit, route, seed):
    a, b = kit.Encoder(6, 3, seed=seed), kit.Encoder(11, 2, seed=seed + 10)
    batches = kit.padded(70, 9, seed=seed)
    found = compared(
        a,
        b,
        batches,
        measures=["cka", "cka_biased"],
        views=["position", "pooled", "mean_pooled"],
        route=route,
    )
    assert (found.layers_a, found.layers_b) == (tuple(A), tuple(B))
    assert found.dataset.attrs["route"] == route
    of_a, of_b = kit.stored(a, A, batches), kit.stored(b, B, batches)
    keeps = [batch["attention_mask"].bool() for batch in batches]
    (rows_a, means_a), (rows_b, means_b) = counted(of_a, keeps), counted(of_b, keeps)
    for name, debiased in (("cka", True), ("cka_biased", False)):
        close(found.matrix(name, "pooled"), kit.matrix_of(rows_a, rows_b, debiased))
        close(found.matrix(name, "mean_pooled"), kit.matrix_of(means_a, means_b, debiased))
        for position in (0, 4, 8):
            at = [
                [
                    torch.cat(
                        [
                            x[:, position][k[:, position]]
                            for x, k in zip(layer, keeps, strict=True)
                            if position < x.shape[1]
                        ]
                    )
                    for layer in layers
                ]
                for layers in (of_a, of_b)
            ]
            close(found.matrix(name, "position", position=position), kit.matrix_of(*at, debiased))
    assert found.rows("pooled") == (len(rows_a[0]),) * 2
    assert found.rows("mean_pooled") == (70, 70)


@pytest.mark.parametrize("route", ["moments", "samples"])
def test_vectors_have_one_view_and_an_offset_costs_no_digits(kit, route):
    a, b = kit.Mlp(5, 7, 3), kit.Mlp(5, 4, 2, seed=1)
    with torch.no_grad():
        a.enter.bias += 1e3
    x = torch.randn(90, 5, generator=torch.Generator().manual_seed(0))
    found = compared(a, b, x, route=route, batch_size=32)
    assert found.views == ("pooled",)
    layers = [[torch.cat(layer) for layer in kit.stored(m, n, x.split(32))] for m, n in ((a, A), (b, B))]
    close(found.matrix("cka", view="pooled"), kit.matrix_of(*layers))


def test_a_model_with_itself_a_copy_and_two_loaders_has_ones_on_the_diagonal(kit):
    model = kit.Encoder(6, 3)
    batches = kit.padded(40, 7)
    twice = kit.padded(40, 7)
    copied = copy.deepcopy(model)
    for other, more in ((model, None), (copied, None), (model, twice), (copied, twice)):
        found = compared(model, other, batches, batches_b=more, measures=["cka", "cka_biased"])
        assert found.views == ("pooled", "mean_pooled")
        for name in found.measures:
            for view in found.views:
                diagonal = torch.as_tensor(found.matrix(name, view).values).diagonal()
                assert (diagonal - 1).abs().max() <= 1e-12
    loaders = [torch.utils.data.DataLoader(torch.randn(64, 5), batch_size=16) for _ in range(2)]
    mlp = kit.Mlp(5, 6, 2)
    found = compared(mlp, mlp, loaders[0], batches_b=loaders[0])
    assert abs(found.matrix().values.diagonal() - 1).max() <= 1e-12
    assert compared(mlp, mlp, loaders[0], batches_b=loaders[1]).matrix().values.diagonal().max() < 0.9


def test_groups_give_the_jackknife_over_sequences(kit):
    a, b = kit.Encoder(6, 2), kit.Encoder(4, 2, seed=3)
    batches = kit.padded(44, 6)
    keeps = [batch["attention_mask"].bool() for batch in batches]
    (_, means_a), (_, means_b) = (counted(kit.stored(m, B, batches), keeps) for m in (a, b))
    group = torch.arange(44) % 4
    parts = torch.stack(
        [kit.matrix_of([x[group != g] for x in means_a], [x[group != g] for x in means_b]) for g in range(4)]
    )
    want = (3 / 4 * (parts - parts.mean(0)).square().sum(0)).sqrt()
    for route in ("moments", "samples"):
        found = compared(a, b, batches, groups=4, route=route)
        close(found.standard_error("cka", "mean_pooled"), want)
        assert float(found.standard_error("cka", "pooled").min()) > 0
    assert compared(a, b, batches).standard_error() is None


def test_another_tokenizer_compares_means_over_each_models_own_tokens(kit):
    a, b = kit.Encoder(6, 2), kit.Encoder(5, 2, tokens=50, seed=2)
    mine, theirs = kit.padded(48, 7), kit.padded(48, 12, tokens=50, seed=9)
    found = compared(a, b, mine, batches_b=theirs)
    assert found.views == ("mean_pooled",)
    assert any("left out" in note and "positions" in note for note in found.notes)
    assert not any("ranks" in note for note in found.notes)  # a comparison has none
    means = [
        counted(kit.stored(m, B, batches), [each["attention_mask"].bool() for each in batches])[1]
        for m, batches in ((a, mine), (b, theirs))
    ]
    close(found.matrix("cka"), kit.matrix_of(*means))
    with pytest.raises(ValueError, match=r"view must be one of mean_pooled, got 'pooled' .*left out"):
        found.matrix("cka", view="pooled")


def test_rows_that_are_padding_for_either_do_not_count(kit):
    a, b = kit.Encoder(6, 2), kit.Encoder(5, 2, seed=2)
    batches = kit.padded(48, 7)
    for batch in batches:
        batch["other_mask"] = batch["attention_mask"] * (torch.rand(batch["input_ids"].shape) < 0.7)
        batch["other_mask"][:, 0] = 1
    found = compared(a, b, batches, padding=("attention_mask", "other_mask"))
    rows, means = zip(
        *(
            counted(
                kit.stored(m, B, [{k: x[k] for k in ("input_ids", "attention_mask")} for x in batches]),
                [x["other_mask"].bool() for x in batches],
            )
            for m in (a, b)
        ),
        strict=True,
    )
    close(found.matrix("cka", "pooled"), kit.matrix_of(*rows))
    close(found.matrix("cka", "mean_pooled"), kit.matrix_of(*means))


def test_hidden_tokens_are_views_of_their_own(kit):
    a, b = kit.Encoder(6, 1), kit.Encoder(5, 1, seed=2)
    ids = torch.randint(1, 30, (80, 4))
    hidden = torch.rand(80, 4) < 0.5
    batch = {"input_ids": ids, "hidden": hidden}
    found = compared(a, b, [batch], mask="hidden")
    assert found.views == ("visible", "masked", "position", "pooled", "mean_pooled")
    names = ["blocks.0:input", "blocks.0"]
    of = [[layer[0] for layer in kit.stored(m, names, [{"input_ids": ids}])] for m in (a, b)]
    at = [[x[:, 2][hidden[:, 2]] for x in layers] for layers in of]
    close(found.matrix("cka", "masked", position=2), kit.matrix_of(*at))
    each = torch.stack(
        [kit.matrix_of(*([x[:, t][~hidden[:, t]] for x in layers] for layers in of)) for t in range(4)]
    )
    close(found.matrix("cka", "visible"), each.mean(0))
    by_sample = compared(a, b, [batch], mask="hidden", route="samples")
    close(by_sample.matrix("cka", "visible"), each.mean(0))


def test_batches_do_not_change_a_value(kit):
    a, b = kit.Mlp(5, 7, 2), kit.Mlp(5, 4, 2, seed=1)
    x = torch.randn(100, 5)
    found = [compared(a, b, [part.contiguous() for part in x.split(size)]) for size in (100, 7)]
    assert abs(found[0].matrix().values - found[1].matrix().values).max() < 1e-6  # the models' own rounding


def test_a_layer_without_variance_is_nan_and_never_a_match(kit):
    class Dead(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x) + 2.0

    a, b = kit.Mlp(5, 7, 2), kit.Mlp(5, 4, 2, seed=1)
    b.blocks.append(Dead())
    found = compared(a, b, torch.randn(60, 5), layers_b=["blocks.0", "blocks.2"])
    values = found.matrix().values
    assert (values[:, 1] != values[:, 1]).all()
    assert set(found.best_match().match) == {0}
    assert found.best_match(side="b").match[1] == -1


def test_convolutions_of_several_sizes_are_compared_by_means(kit):
    def network(seed, channels):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        )

    a, b, x = network(0, 4), network(1, 6), torch.randn(50, 3, 8, 8)
    found = compared(a, b, x, layers_a=["1", "2"], layers_b=["0", "2"])
    assert found.views == ("mean_pooled",)
    means = [
        [layer[0].double().mean((2, 3)) for layer in kit.stored(m, names, [x])]
        for m, names in ((a, ["1", "2"]), (b, ["0", "2"]))
    ]
    close(found.matrix(), kit.matrix_of(*means))
    with pytest.raises(ValueError, match=r"views: 'pooled' .*layer a.2 has 16 positions where a.1 has 64"):
        compared(a, b, x, layers_a=["1", "2"], layers_b=["0"], views=["pooled"])
    same = compared(a, b, x, layers_a="1", layers_b="0", views=["pooled"])
    flat = [
        [kit.stored(m, [name], [x])[0][0].permute(0, 2, 3, 1).flatten(0, 2)]
        for m, name in ((a, "1"), (b, "0"))
    ]
    close(same.matrix(), kit.matrix_of(*flat))


def test_half_precision_and_doubles_side_by_side(kit):
    model = kit.Mlp(5, 8, 2)
    low, x = copy.deepcopy(model).bfloat16(), torch.randn(64, 5)
    found = compared(model.double(), low, x.double(), batches_b=x.bfloat16(), views=["pooled"])
    layers = [
        [layer[0] for layer in kit.stored(m, B, [each])]
        for m, each in ((model, x.double()), (low, x.bfloat16()))
    ]
    close(found.matrix(), kit.matrix_of(*layers))
    assert found.matrix().values.diagonal().min() > 0.99
