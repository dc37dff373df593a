"""Without each group of samples, and over batches of them, by the kernels for a GPU on this processor."""

import dataclasses

import pytest
import torch

import rgfast
from rgfast.ops.cka.api import OP, alignment
from rgfast.ops.cka.call import Call
from rgfast.ops.cka.impl import cuda as kernels


@pytest.fixture(params=["features", "samples"])
def way(emulated_gpu, request, monkeypatch):
    """What is multiplied, and that variants are not computed one by one, whatever the shape is."""
    monkeypatch.setattr(kernels, "unproven", lambda device, *names: None)
    emulated_gpu.admit(OP)
    monkeypatch.setattr(kernels, "_takes_samples", lambda call: request.param == "samples")
    monkeypatch.setattr(kernels, "_worth_sharing", lambda call: True)
    return request.param


@pytest.fixture
def apart(monkeypatch):
    """Variants that are computed by themselves."""
    seen = []
    without = kernels._without
    monkeypatch.setattr(kernels, "_without", lambda call, group: seen.append(group) or without(call, group))
    return seen


def both(layers, *, groups, adjacent=False):
    return [
        alignment([*layers], adjacent=adjacent, groups=groups, impl=impl) for impl in ("cuda", "reference")
    ]


@pytest.mark.parametrize("adjacent", [True, False])
@pytest.mark.parametrize(
    ("count", "n", "d", "groups"),
    [(4, 40, 9, 3), (3, 131, 20, 2), (2, 66, 67, 2), (3, 64, 3, 4), (3, 65, 9, 2), (2, 9, 2, 5)],
)
def test_every_variant(way, make, count, n, d, groups, adjacent):
    found, wanted = both(make(count, 1, n, d), groups=groups, adjacent=adjacent)
    assert found.shape == (1 + groups, 2, 1, count, count)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12, equal_nan=True)


def test_against_explicit_kernels(way, make, truth):
    layers = make(3, 1, 70, 6)
    found = alignment([*layers], adjacent=False, groups=3, impl="cuda")
    for variant in range(4):
        rest = layers[:, 0, torch.arange(70) % 3 != variant - 1]
        for values, debiased in zip(found[variant], (True, False), strict=True):
            torch.testing.assert_close(values[0], truth.matrix(rest, debiased=debiased), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_widths_and_dtypes(way, make, dtype):
    layers = [make(1, 2, 41, d, seed=d)[0].to(dtype) for d in (5, 70)]
    found = alignment(layers, adjacent=False, groups=3, impl="cuda")
    wanted = alignment([x.double() for x in layers], adjacent=False, groups=3, impl="reference")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("offset", "scale"), [(1e4, 1.0), (0.0, 1e18), (1e4, 1e-18)])
def test_offsets_and_scales(way, make, apart, offset, scale):
    found, wanted = both((make(3, 1, 60, 9) + offset) * scale, groups=4)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert not apart


def test_a_constant_layer_is_nan(way, make, apart):
    layers = make(3, 2, 24, 5)
    layers[1, 0] = 1 / 3
    found, wanted = both(layers, groups=3)
    assert found[:, :, 0, 1].isnan().all()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12, equal_nan=True)
    assert not apart


def test_a_group_that_moves_the_mean_or_the_scale_is_left_out_by_itself(way, make, apart):
    layers = make(3, 3, 40, 5)
    layers[2, 0, 1::4] += 1e3  # only without group 1 the others are near their mean
    sign = torch.tensor([1.0, -1.0]).repeat(5)[:, None]
    layers[1, 1, 2::4] += 1e6 * sign
    found, wanted = both(layers, groups=4)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert sorted(apart) == [1, 2]


def test_constant_but_for_a_group(way, make, apart):
    layers = make(3, 1, 40, 5)
    layers[1] = 3.0
    layers[1, :, 1::4] += make(1, 1, 10, 5)[0]
    found, wanted = both(layers, groups=4)
    assert found[2, :, 0, 1].isnan().all()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12, equal_nan=True)
    assert apart == [1]


def test_what_leaves_the_range_is_computed_again_for_all_variants(way, make):
    layers = make(2, 2, 24, 5)
    wanted = alignment([*layers], adjacent=False, groups=3, impl="reference")
    layers[:, 1] *= 1e-100
    found = alignment([*layers], adjacent=False, groups=3, impl="cuda")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_bits_do_not_depend_on_what_is_together(way, make, monkeypatch):
    layers = [*make(3, 3, 70, 9, dtype=torch.float32)]
    together = alignment(layers, adjacent=False, groups=2, impl="cuda")
    alone = alignment([x[1:2] for x in layers], adjacent=False, groups=2, impl="cuda")
    assert torch.equal(alone, together[:, :, 1:2])
    monkeypatch.setattr(kernels, "_WORK_BYTES", 1)
    assert torch.equal(alignment(layers, adjacent=False, groups=2, impl="cuda"), together)


@pytest.mark.parametrize("tiles", [1, 3])
def test_some_tiles_at_a_time(way, make, monkeypatch, tiles):
    from rgfast.ops.cka import launches

    monkeypatch.setattr(launches, "_SCRATCH", tiles * 3 * launches.TILE_BYTES)
    found, wanted = both(make(3, 2, 130, 4), groups=3)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_layers_that_are_not_flat(way, make):
    layers = make(3, 6, 40, 7)
    flat = alignment([*layers], adjacent=False, groups=3, impl="cuda")
    found = alignment([x.view(2, 3, 40, 7) for x in layers], adjacent=False, groups=3, impl="cuda")
    assert torch.equal(found, flat.view(4, 2, 2, 3, 3, 3))


def test_many_small_groups_are_left_out_one_by_one(emulated_gpu, make, apart):
    emulated_gpu.admit(OP)
    found, wanted = both(make(2, 1, 12, 30), groups=12)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert not apart


@pytest.mark.parametrize(
    ("shape", "groups", "shared"),
    [((7, 64, 1024, 64), 8, True), ((25, 16, 1024, 256), 8, True), ((25, 16, 1024, 256), 1024, False)],
)
def test_when_products_are_shared(shape, groups, shared):
    count, *rest = shape
    layers = tuple(torch.empty(rest, device="meta") for _ in range(count))
    options = (("adjacent", False), ("groups", groups))
    assert kernels._worth_sharing(Call("alignment", ("layers",), layers, options=options)) is shared


@pytest.mark.parametrize(
    ("n", "d", "size"), [(40, 5, 10), (41, 9, 7), (12, 20, 4), (70, 6, 64), (130, 3, 130), (9, 3, 4)]
)
def test_minibatches(way, make, n, d, size):
    layers, other = make(3, 2, n, d), make(2, 2, n, d + 1, seed=3)
    for against in (None, other):
        found = rgfast.minibatch_cka(layers, against, batch_size=size, impl="cuda")
        wanted = rgfast.minibatch_cka(layers, against, batch_size=size, impl="reference")
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)


def test_minibatches_of_any_strides_and_constant_layers(way, make):
    layers = make(3, 2, 40, 6).transpose(2, 3).contiguous().transpose(2, 3)
    layers[1, 0] = 2.0
    layers[2] = (layers[2] + 1e4) * 1e18
    found = rgfast.minibatch_cka(layers, batch_size=10, impl="cuda")
    wanted = rgfast.minibatch_cka(layers, batch_size=10, impl="reference")
    assert found[0, 1].isnan().all()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11, equal_nan=True)


def test_two_launches_of_sums_serve_all_batches(way, make, emulated_gpu):
    layers = make(2, 2, 41, 5)
    rgfast.minibatch_cka(layers, batch_size=6, impl="cuda")
    emulated_gpu.log("cuLaunchKernelEx")
    rgfast.minibatch_cka(layers, batch_size=6, impl="cuda")
    names = [launch["kernel"] for launch in emulated_gpu.log("cuLaunchKernelEx")]
    assert names.count("rgfast_cka_sums") == 2
    assert names.count("rgfast_cka_finish") == 1


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e18, 1e-18])
def test_hsic(way, make, debiased, scale):
    x, y = scale * make(1, 3, 22, 4)[0], make(1, 3, 22, 7, seed=1)[0] + 1e4
    found, wanted = (rgfast.hsic(x, y, debiased=debiased, impl=impl) for impl in ("cuda", "reference"))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=0)


@pytest.fixture
def chosen(way, monkeypatch):
    """Tasks that auto gives to kernels, which are cheapest here."""
    seen = []
    for name, impl in OP.impls.items():
        cost = (lambda call: 0.0) if name == "cuda" else (lambda call: 1.0)
        monkeypatch.setitem(OP.impls, name, dataclasses.replace(impl, cost=cost))
    monkeypatch.setattr(kernels.measured, "refusal", lambda op, impl, device: None)
    computed = kernels._computed
    monkeypatch.setattr(kernels, "_computed", lambda call: seen.append(call.task) or computed(call))
    return seen


def test_streams_that_keep_rows_are_summed_by_kernels(chosen, make):
    layers = make(3, 2, 22, 4)
    mask = torch.ones(2, 22, dtype=torch.bool)
    mask[1, 3:7] = False
    mini, whole = rgfast.MinibatchCKAAccumulator(batch_size=8), rgfast.CKAAccumulator()
    for start in range(0, 22, 5):
        piece = slice(start, start + 5)
        mini.update(layers[:, :, piece], mask[:, piece])
        whole.update(layers[:, :, piece], mask[:, piece])
    found, result = mini.finalize(), whole.finalize()
    assert {*chosen} == {"hsic_sums", "drift", "matrix"}
    for p in range(2):
        rows = layers[:, p, mask[p]]
        wanted = rgfast.cka_matrix(rows, impl="reference")
        torch.testing.assert_close(result.matrix[p], wanted, rtol=0, atol=1e-12)
        parts = [rgfast.hsic(x, y, impl="reference") for x, y in _pairs(rows, 8)]
        sums = torch.stack(parts).reshape(-1, 3, 3).sum(0)
        own = sums.diagonal()
        torch.testing.assert_close(found[p], sums / (own[:, None] * own).sqrt(), rtol=0, atol=1e-12)


def _pairs(rows, size):
    """Of every batch of at least 4, all layers with all."""
    for batch in rows.split(size, 1):
        if batch.shape[1] >= 4:
            yield from ((x, y) for x in batch for y in batch)


def test_sums_of_a_stream_out_of_range_are_the_references(chosen, make):
    layers = make(2, 1, 16, 4)
    wanted = rgfast.minibatch_cka(layers, batch_size=8, impl="reference")
    layers[0] *= 1e-100
    stream = rgfast.MinibatchCKAAccumulator(batch_size=8).update(layers)
    assert chosen == ["hsic_sums"] * 2
    torch.testing.assert_close(stream.finalize(), wanted, rtol=0, atol=1e-12)
