"""Sums about means from extended sums, by every implementation, against the rows."""

import pytest
import torch

from rgfast import ImplUnavailable
from rgfast.ops.moments import add_products, centered, centering
from rgfast.ops.moments.api import CENTERED
from rgfast.ops.moments.call import Uncentered
from rgfast.ops.moments.impl import library
from rgfast.runtime import measured

F64 = torch.float64
LAYERS, WIDTH, OTHER = 3, 7, 4


@pytest.fixture(params=["reference", "library", "cuda"])
def impl(request):
    if request.param == "cuda":
        request.getfixturevalue("emulated_gpu").admit(CENTERED)
    return request.param


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Part:
    """Rows of layers and of another, narrower one at some positions, of which those kept are summed."""

    def __init__(self, positions, b, seed, *, offset=2.0, scale=1.0, keep=None):
        widths = [WIDTH] * LAYERS + [OTHER]
        self.rows = [scale * (drawn(positions, b, d, seed=seed + k) + offset) for k, d in enumerate(widths)]
        self.shifts = [x[:, 0] + scale / 8 for x in self.rows]
        self.keep = torch.ones(positions, b, dtype=torch.bool) if keep is None else keep
        self.sums = {
            (i, j): torch.zeros(positions, widths[i] + 2, widths[j] + 2, dtype=F64)
            for i in range(LAYERS + 1)
            for j in range(i, LAYERS + 1)
        }
        add_products(self.sums, self.rows, self.shifts, keep=self.keep)

    def centred(self, layer):
        """Rows less their mean, zero where they do not count, and the mean."""
        kept = self.keep[..., None].to(F64)
        mean = (self.rows[layer] * kept).sum(1) / kept.sum(1).clamp_min(1.0)
        return (self.rows[layer] - mean[:, None]) * kept, mean


def wanted(parts, pairs):
    norms, products, traces, accumulated = [], [], [], []
    for i, j in pairs:
        for part in parts:
            (x, _), (y, _) = part.centred(i), part.centred(j)
            norms.append((x.mT @ y).square().sum((1, 2)))
            products.append((x.square().sum(2) * y.square().sum(2)).sum(1))
            traces.append(x.square().sum((1, 2)))
            shifted = (part.rows[i] - part.shifts[i][:, None]) * part.keep[..., None]
            accumulated.append(shifted.square().sum((1, 2)))
    return torch.stack([torch.cat(each) for each in (norms, products, traces, accumulated)])


def assert_right(found, parts, pairs, layers, rtol=1e-12):
    want = wanted(parts, pairs).view(4, len(pairs), -1)
    torch.testing.assert_close(found.sums[:2], want[:2], rtol=rtol, atol=0.0)
    own = [k for k, (i, j) in enumerate(pairs) if i == j]
    torch.testing.assert_close(found.sums[2:, own], want[2:, own], rtol=rtol, atol=0.0)
    if not layers:
        assert found.matrix is None
        assert found.mean is None
        return
    assert torch.equal(found.accumulated, found.sums[3, : len(layers)].flatten())
    at = 0
    for layer in layers:
        for part in parts:
            x, mean = part.centred(layer)
            count = part.keep.sum(1).to(F64)[:, None]
            where = slice(at, at + len(x))
            matrix = x.mT @ x
            size = matrix.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
            assert bool(((found.matrix[where].tril() - matrix.tril()).abs() <= rtol * size).all())
            torch.testing.assert_close(found.mean[where], mean * count.sqrt(), rtol=rtol, atol=1e-14)
            at = where.stop
    assert len(found.matrix) == len(found.mean) == at


def given(parts, pairs, layers):
    sums = [[part.sums[pair] for part in parts] for pair in pairs]
    return sums, [[part.shifts[layer] for part in parts] for layer in layers]


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("places", [(3,), (3, 1), (1, 2, 1)])
def test_all_pairs_of_one_shape(impl, places, layers):
    parts = [Part(positions, 9 + k, 10 * k) for k, positions in enumerate(places)]
    pairs = [(0, 0), (1, 1), (0, 1), (1, 2), (2, 2), (0, 2)]
    sums, shifts = given(parts, pairs, range(layers))
    assert_right(centered(sums, shifts=shifts, impl=impl), parts, pairs, range(layers))


def test_layers_of_two_widths(impl):
    parts = [Part(2, 12, 3), Part(1, 6, 30)]
    pairs = [(0, 3), (2, 3)]
    assert_right(centered(given(parts, pairs, ())[0], impl=impl), parts, pairs, ())


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_positions_of_any_number_of_rows(impl, offset):
    """None, one, two and all. What is left of a mean's square takes digits with it."""
    keep = torch.arange(11) < torch.tensor([0, 1, 2, 11, 0])[:, None]
    parts = [Part(5, 11, 4, offset=offset, keep=keep), Part(1, 11, 40, keep=torch.zeros(1, 11) > 0)]
    pairs = [(0, 0), (1, 1), (0, 1)]
    sums, shifts = given(parts, pairs, range(2))
    found = centered(sums, shifts=shifts, impl=impl)
    none = torch.tensor([True, False, False, False, True, True])
    assert bool((found.sums[:, :, none] == 0).all())
    assert bool((found.matrix[none.repeat(2)].tril() == 0).all())
    assert bool((found.mean[none.repeat(2)] == 0).all())
    # The mean of one row is the row, of which rounding leaves something.
    assert bool((found.sums[[0, 2]][..., 1].abs() <= 1e-12).all())
    some = [keep[2:4]]
    late = [Part(5, 11, 4, offset=offset, keep=keep)]
    for each in late:
        each.rows = [x[2:4] for x in each.rows]
        each.shifts, each.keep = [x[2:4] for x in each.shifts], some[0]
    want = wanted(late, pairs).view(4, len(pairs), -1)
    torch.testing.assert_close(found.sums[:2, :, 2:4], want[:2], rtol=1e-8 if offset else 1e-11, atol=0.0)


@pytest.mark.parametrize("scale", [1e-140, 1e70])
def test_units(impl, scale):
    """Rows are in other units than their shifts."""
    plain = Part(2, 8, 5)
    shifts = [[scale * plain.shifts[layer]] for layer in range(2)]
    sums, true = given([plain], [(0, 0), (1, 1)], range(2))
    found = centered(sums, shifts=shifts, units=[1 / scale] * 2, impl=impl)
    want = centered(sums, shifts=true, impl=impl)
    assert torch.equal(found.sums, want.sums)
    torch.testing.assert_close(found.mean, want.mean, rtol=1e-14, atol=0.0)


def test_a_call_has_sizes():
    part = Part(2, 5, 6)
    sums, shifts = given([part, part], [(0, 3), (1, 3), (2, 3)], ())
    call = Uncentered(sums, shifts)
    assert call.positions == [2, 2]
    assert call.widths == (WIDTH, OTHER)
    more = Uncentered(sums[:2], shifts)
    assert 0 < library.CENTERED.cost(more) <= library.CENTERED.cost(call)
    assert call.shape_class() != more.shape_class()


def test_moments_of_any_strides(impl):
    """As those of layers in another order are, read as transposed ones."""
    part = Part(2, 9, 7)
    sums = part.sums[0, 1].mT
    want = centered([[sums.contiguous()]], impl=impl)
    torch.testing.assert_close(centered([[sums]], impl=impl).sums, want.sums, rtol=1e-12, atol=0.0)


def test_all_in_one_launch_with_the_same_bits_in_any_call(emulated_gpu, monkeypatch):
    emulated_gpu.admit(CENTERED)
    monkeypatch.setattr(measured, "refusal", lambda op, impl, device: None)
    parts = [Part(3, 9, 1), Part(1, 12, 20)]
    pairs = [(0, 0), (1, 1), (0, 1), (1, 2)]
    sums, shifts = given(parts, pairs, range(2))
    centered(sums[:1], impl="cuda")  # with what is known
    emulated_gpu.reset()
    emulated_gpu.seed(5)
    found = centered(sums, shifts=shifts)
    assert [call["kernel"] for call in emulated_gpu.log("cuLaunchKernelEx")] == ["rgfast_moments_centered"]
    for k in range(4):
        alone = centered(sums[k : k + 1], shifts=shifts[k : k + 1])
        assert torch.equal(alone.sums[:, 0], found.sums[:, k])
        if k < 2:
            assert torch.equal(alone.mean, found.mean[4 * k : 4 * k + 4])
            assert torch.equal(alone.matrix.tril(), found.matrix[4 * k : 4 * k + 4].tril())
    assert centered([[sums[0][0][:0]]]).sums.shape == (4, 1, 0)


def test_what_the_kernel_refuses(emulated_gpu, monkeypatch):
    emulated_gpu.admit(CENTERED)
    sums, shifts = given([Part(1, 5, 2)], [(0, 0)], range(1))
    there = [[x.to("meta") for x in part] for part in shifts]
    with pytest.raises(ImplUnavailable, match="sums and shifts must be on one device"):
        centered(sums, shifts=there, impl="cuda")
    monkeypatch.setattr(centering, "MOST_SIDE", 0)
    with pytest.raises(ImplUnavailable, match="a grid has 0 blocks of pairs and parts at most"):
        centered(sums, shifts=shifts, impl="cuda")
