"""Accumulators read together: what each gives by itself, with the CPU for a device where they are joined."""

import pytest
import torch

from rgfast.ops import moments
from rgfast.runtime import waiting
from rgfast.streaming import MomentAccumulator, Together, algebra, sizes
from rgfast.streaming.sums import Sums

F64 = torch.float64
WIDTHS = (5, 7, 5, 7)


def drawn(seed, lead, scale=1.0, widths=WIDTHS):
    g = torch.Generator().manual_seed(seed)
    layers = [torch.randn(*lead, 40, d, generator=g, dtype=F64) + k for k, d in enumerate(widths)]
    for x in layers:
        x[..., 0, 0] = 12.0  # the largest, which says the unit
    return [scale * x for x in layers]


def made(leads, pairs="all", scale=1.0, **options):
    parts = []
    for seed, lead in enumerate(leads):
        parts.append(MomentAccumulator(pairs=pairs, **options).update(drawn(seed, lead, scale)))
    return parts


@pytest.fixture(params=[False, True], ids=["whole", "in parts"])
def elsewhere(request, monkeypatch):
    """Where reading waits, with and without memory for several sums at once."""
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    if request.param:
        monkeypatch.setattr(sizes, "_AT_ONCE", 1)


@pytest.mark.parametrize("scale", [1.0, 1e-60])
@pytest.mark.parametrize("pairs", ["adjacent", "all"])
@pytest.mark.parametrize("leads", [[(3,)], [(3,), ()], [(), (2,), ()]])
def test_all_is_what_each_gives(elsewhere, leads, pairs, scale):
    parts = made(leads, pairs, scale)
    assert Together.fit(parts)
    whole = Together(parts)
    assert whole.pairs == parts[0].pairs
    assert whole.count.tolist() == [40] * sum(part.count.numel() for part in parts)
    for some in whole.at_once(4):
        found = whole.centered(some)
        raw = torch.baddbmm(found.matrix, found.mean[:, :, None], found.mean[:, None])
        for centering, matrix in (("mean", found.matrix), ("none", raw)):
            wanted = [
                part.scatter(layer, centering=centering, scaled=True).reshape(-1, d, d)
                for layer in some
                for part in parts
                for d in [WIDTHS[layer]]
            ]
            torch.testing.assert_close(matrix.tril(), torch.cat(wanted).tril(), rtol=1e-12, atol=1e-12)
        summed = [part.accumulated(layer, scaled=True).reshape(-1) for layer in some for part in parts]
        assert torch.equal(found.accumulated, torch.cat(summed))
        assert torch.equal(whole.accumulated(some), found.accumulated)
    sums = whole.kernels(products=True)
    assert sums.pairs == (*((k, k) for k in range(4)), *parts[0].pairs)
    for k, (i, j) in enumerate(sums.pairs):
        pairs_of = [part.pair(i, j) for part in parts]
        norms = torch.cat([pair.cross.square().sum((-2, -1)).reshape(-1) for pair in pairs_of])
        torch.testing.assert_close(sums.norms[k], norms, rtol=1e-12, atol=0.0)
        products = torch.cat([pair.norm_product.reshape(-1) for pair in pairs_of])
        torch.testing.assert_close(sums.products[k], products, rtol=1e-12, atol=0.0)
        traces = torch.cat([pair.trace_i.reshape(-1) for pair in pairs_of])
        torch.testing.assert_close(sums.traces[i], traces, rtol=1e-12, atol=0.0)
        assert (sums.exponents[i], sums.exponents[j]) == (pairs_of[0].exponent_i, pairs_of[0].exponent_j)
    assert whole.kernels(products=False).products is None


def test_layers_of_one_width_are_joined_where_memory_allows(monkeypatch):
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    parts = made([(3,), ()])
    assert list(Together(parts).at_once(4)) == [[0, 2], [1, 3]]
    assert list(Together(parts).at_once(1)) == [[0], [2], [1], [3]]
    monkeypatch.setattr(sizes, "_AT_ONCE", 8 * 4 * 9 * 9)  # one layer of the wider ones at 4 positions
    assert list(Together(parts).at_once(4)) == [[0], [2], [1], [3]]


def test_which_fit(monkeypatch):
    assert not Together.fit(made([(3,), ()]))  # on the CPU bits depend on what is joined
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    assert Together.fit(made([(3,), ()]))
    assert not Together.fit([*made([(3,)]), *made([()], scale=1e-60)])
    assert not Together.fit([*made([(3,)]), *made([()], "adjacent")])
    assert not Together.fit(made([(3,), ()], factors=(0,)))
    assert not Together.fit([MomentAccumulator(), MomentAccumulator()])
    other = MomentAccumulator(pairs="all").update(drawn(0, (), widths=(5, 7, 5, 6)))
    assert not Together.fit([*made([(3,)]), other])


def test_blocks_are_larger_where_a_sum_is_a_launch(monkeypatch):
    rows = drawn(0, (96,))
    assert MomentAccumulator().update(rows).rows_at_once == 128
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    assert MomentAccumulator().update(rows).rows_at_once == 1024
    assert MomentAccumulator(pending_bytes=8 * 96 * 24 * 256).update(rows).rows_at_once == 256
    assert MomentAccumulator(factors=(0,)).update(rows).rows_at_once == 128


@pytest.mark.parametrize(
    ("positions", "width", "rows"), [(1, 4, 1024), (1, 96, 512), (1, 768, 128), (8, 64, 128), (4, 64, 256)]
)
def test_blocks_are_larger_where_a_sum_is_soon_over(positions, width, rows):
    x = torch.randn(positions, 3, width)
    assert MomentAccumulator().update([x]).rows_at_once == rows


@pytest.mark.parametrize("scale", [1.0, 1e-60, 1e60])
def test_positions_pooled_are_those_of_the_cpu(monkeypatch, scale):
    rows = drawn(3, (4,), scale)
    keep = torch.rand(4, 40, generator=torch.Generator().manual_seed(1)) < 0.6
    keep[1] = False  # a position without rows
    here = MomentAccumulator(pairs="all").update(rows, keep).pooled()
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    there = MomentAccumulator(pairs="all").update(rows, keep).pooled()
    assert there.count == here.count
    for i, j in [(0, 0), (3, 3), *here.pairs]:
        size = here.pair(i, j).cross.abs().max()
        assert (there.pair(i, j).cross - here.pair(i, j).cross).abs().max() <= 1e-12 * size
        torch.testing.assert_close(
            there.pair(i, j).norm_product, here.pair(i, j).norm_product, rtol=1e-12, atol=0.0
        )
        torch.testing.assert_close(there.mean(i), here.mean(i), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("together", [True, False])
def test_rows_that_follow_what_was_pooled_are_added(monkeypatch, together):
    """To sums that have begun, in whose shift they are, and which more than these rows stand behind."""
    first, later = drawn(3, (4,)), [x[0] for x in drawn(5, (1,))]
    here = MomentAccumulator(pairs="all").update(first).pooled().update(later)
    if not together:
        monkeypatch.setattr(algebra, "_SMALL", 0)
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    there = MomentAccumulator(pairs="all").update(first).pooled().update(later)
    assert there.few is None
    for i, j in [(0, 0), *here.pairs]:
        torch.testing.assert_close(there.pair(i, j).cross, here.pair(i, j).cross, rtol=1e-12, atol=1e-9)


def test_a_constant_column_pools_to_no_variance(monkeypatch):
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    rows = [torch.cat([x, torch.full_like(x[..., :1], 0.1)], -1) for x in drawn(0, (3,))]
    pooled = MomentAccumulator().update(rows).pooled()
    assert all((pooled.scatter(layer)[-1] == 0).all() for layer in range(4))


@pytest.mark.parametrize("masked", [False, True])
def test_sums_of_no_rows_take_no_memory_on_a_device(masked, monkeypatch):
    """Nor a launch for every pair: what first rows come to is put where there was nothing."""
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    acc = MomentAccumulator(pending_bytes=1)
    sums = type(acc._sums).empty([3, 3], [(0, 0), (0, 1), (1, 1)], 2, [torch.device("cpu")] * 2)
    assert {x.untyped_storage().nbytes() for x in (*sums.moment.values(), *sums.shift)} == {8}
    assert all((x == 0).all() for x in (*sums.moment.values(), *sums.shift))
    keep = torch.tensor([[True, False, True, True], [False] * 4]) if masked else None
    rows = [torch.arange(24.0, dtype=F64).view(2, 4, 3) ** k for k in (1, 2)]
    for _ in range(2):
        sums.add(rows, keep)
    monkeypatch.setattr(waiting, "_EVERYWHERE", False)
    here = type(sums).empty([3, 3], [(0, 0), (0, 1), (1, 1)], 2, [torch.device("cpu")] * 2)
    for _ in range(2):
        here.add(rows, keep)
    sums.settle([float(x) for value in sums.asked() for x in value.reshape(-1)])
    for i, j in here.moment:
        got, want = (one.product(i, j, centred=False, scaled=False) for one in (sums, here))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0.0, equal_nan=True)
    assert torch.equal(sums.count(), here.count())


def test_first_rows_that_fail_leave_nothing_in_sums(monkeypatch):
    """Memory that was taken for them holds anything."""
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    monkeypatch.setattr(torch, "empty_like", lambda x, **how: torch.full_like(x, 12345.0, **how))
    sums = Sums.empty([3], [(0, 0)], 2, [torch.device("cpu")])
    rows, real = [torch.arange(24.0, dtype=F64).view(2, 4, 3)], moments.add_products

    def fails(*args, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(moments, "add_products", fails)
    with pytest.raises(torch.OutOfMemoryError):
        sums.add(rows, None)
    monkeypatch.setattr(moments, "add_products", real)
    sums.add(rows, None)
    assert sums.count().tolist() == [4, 4]


@pytest.mark.parametrize("scale", [1e-36, 1e-9, 1.0, 1e36])
def test_a_device_does_not_look_for_the_unit_of_narrow_rows(scale, monkeypatch):
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    rows = drawn(0, (3,), scale)
    there = MomentAccumulator()
    for some in ([x[:, :25] for x in rows], [x[:, 25:] for x in rows]):
        there.update(some, finite=True, narrow=True).flush()
    assert not there._sums.late
    assert there._sums.unread == {0, 1, 2, 3}
    monkeypatch.setattr(waiting, "_EVERYWHERE", False)
    here = MomentAccumulator().update(rows)
    for layer in range(4):
        torch.testing.assert_close(there.scatter(layer), here.scatter(layer), rtol=1e-10, atol=0.0)
        assert there.exponent(layer) == pytest.approx(here.exponent(layer), abs=4)


def test_wide_rows_among_narrow_ones_have_their_unit_looked_for(monkeypatch):
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    rows = drawn(0, (3,), 1e-200)
    there = MomentAccumulator()
    there.update([x[:, :20] for x in rows], finite=True, narrow=True)
    there.update([x[:, 20:] for x in rows], finite=True)
    assert not there._sums.narrow
    monkeypatch.setattr(waiting, "_EVERYWHERE", False)
    here = MomentAccumulator().update(rows)
    for layer in range(4):
        torch.testing.assert_close(
            there.scatter(layer, scaled=True), here.scatter(layer, scaled=True), rtol=1e-10, atol=0.0
        )


def test_exponents_of_layers_on_a_device_are_each_ones_own(monkeypatch):
    """Layers of several sizes, one of them zero, in a narrow and a wide dtype."""
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    scales = (1e-60, 1.0, 0.0, 1e20)
    rows = [x / 12.0 * scale for x, scale in zip(drawn(0, (3,)), scales, strict=True)]
    rows[3] = rows[3].to(torch.float32)
    there = MomentAccumulator().update(rows)
    monkeypatch.setattr(waiting, "_EVERYWHERE", False)
    here = MomentAccumulator().update(rows)
    assert [there.exponent(k) for k in range(3)] == [here.exponent(k) for k in range(3)]
    assert there.exponent(0) < -190
    assert there.exponent(3) > 60
    for layer in range(4):
        torch.testing.assert_close(there.scatter(layer), here.scatter(layer), rtol=1e-10, atol=0.0)
