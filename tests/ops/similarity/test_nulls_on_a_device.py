"""Nulls of CKA as a GPU gets them, run on this processor, against the measure of reordered samples."""

import guards
import pytest
import torch

import rgfast
from rgfast.ops.similarity import slabs
from rgfast.ops.similarity.call import Call
from rgfast.ops.similarity.impl import library
from rgfast.runtime import waiting


@pytest.fixture(params=["features", "kernels"])
def way(request, monkeypatch):
    """How CKA is computed, whatever the shape is, on what stands for a device."""
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    monkeypatch.setattr(library, "_features_pay", lambda call, n: request.param == "features")
    return request.param


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(x, y, **options):
    """[1 + m, ...] by the library and by the reference."""
    found = [rgfast.calibrate("cka", x, y, null=5, impl=impl, **options) for impl in ("library", "reference")]
    return [torch.cat([each.value[None], each.null]) for each in found]


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize(
    ("n", "d", "e"), [(4, 3, 2), (5, 1, 4), (63, 9, 7), (64, 8, 64), (65, 3, 5), (130, 6, 4)]
)
def test_nulls_are_the_measure_of_samples_in_another_order(way, n, d, e, debiased):
    x = drawn(2, n, d)
    y = drawn(2, n, e, seed=1) + x[..., :1]
    found, wanted = both(x, y, debiased=debiased)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12 if n > 5 else 1e-10)


def test_layers_of_several_widths_and_dtypes(way):
    x = [drawn(3, 40, d, seed=d).to(dtype) for d, dtype in ((5, torch.float32), (17, torch.bfloat16))]
    y = [drawn(3, 40, d, seed=d).to(dtype) for d, dtype in ((7, torch.float16), (1, torch.float64))]
    found, wanted = both(x, y)
    assert found.shape == (6, 3, 2, 2)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("offset", "scale", "dtype"),
    [
        (1e4, 1.0, torch.float32),
        (0.0, 1e18, torch.float32),
        (1e4, 1e-18, torch.float32),
        (0, 1e150, torch.float64),
    ],
)
def test_offsets_and_scales(way, offset, scale, dtype):
    x = ((drawn(50, 6) + offset) * scale).to(dtype)
    y = (drawn(50, 4, seed=1).to(dtype) - x[:, :4] / scale) * scale
    found, wanted = both(x, y, debiased=False)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_layers_without_variance_are_nan(way):
    x = torch.stack([drawn(12, 3), torch.full((12, 3), 1 / 3, dtype=torch.float64)])
    found, wanted = both([*x], [*x])
    assert found.isnan().sum() == 6 * 3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(("slab", "columns", "reordered"), [(3000, 800, 900), (2000, 1100, 9000)])
def test_some_at_a_time(way, monkeypatch, slab, columns, reordered):
    x, y = [drawn(45, 6), drawn(45, 9, seed=2)], [drawn(45, 4, seed=1)]
    whole, _ = both(x, y)
    for name, size in (("_SLAB", slab), ("_COLUMNS", columns), ("_REORDERED", reordered)):
        monkeypatch.setattr(slabs, name, size)
    monkeypatch.setattr(library, "_PREPARED_ON_DEVICE", slab)
    found, _ = both(x, y)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-13)


def test_nothing_is_read(way):
    x = drawn(20, 3)
    orders = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(k)) for k in range(4)])
    call = Call("cka", (x,), (x,), orders, (("debiased", True),))
    with guards.Waits() as watch:
        library.SIMILARITY.run(call)
    assert [name for name in watch.found if "between devices" not in name] == []


@pytest.mark.parametrize(
    ("count", "n", "d"), [(1, 4096, 64), (8, 4096, 256), (1, 4096, 4096), (1, 4096, 1024), (2, 1024, 2048)]
)
def test_less_than_256_mib_beside_the_layers(count, n, d):
    layers = tuple(torch.empty(1, n, d, device="meta") for _ in range(count))
    orders = torch.empty(41, n, dtype=torch.int64, device="meta")
    call = Call("cka", layers, layers[:1], orders, (("debiased", True),))
    with guards.Peak([*layers, orders]) as peak:
        library.SIMILARITY.run(call)
    assert 0 < peak.most < 256 << 20


def test_when_features_pay():
    """On a GPU, where an entry that is looked up costs as much as more products."""

    def pay(d, n):
        x = torch.empty(1, n, d, device="meta")
        return library._features_pay(Call("cka", (x,), (x,), torch.empty(2, n)), n)

    assert [pay(d, 1024) for d in (256, 512)] == [True, False]
    assert [pay(d, 4096) for d in (1024, 2048)] == [True, False]
    assert not pay(65, 64)
