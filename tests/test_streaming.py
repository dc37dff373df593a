"""The streaming accumulator against brute force: any split, merge order, mask, scale and thread count."""

import itertools

import numpy as np
import pytest
import torch

from rgfast.streaming import MomentAccumulator, NonFiniteError, check_finite, state_bytes

F64 = torch.float64


def make_layers(seed=0, lead=(3,), n=301, widths=(5, 7, 4), offset=0.0, scale=1.0, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(*lead, n, max(widths), generator=g, dtype=F64)
    noise = [torch.randn(*lead, n, d, generator=g, dtype=F64) for d in widths]
    return [((base[..., :d] + k * 0.3 * e + offset) * scale).to(dtype) for k, (d, e) in
            enumerate(zip(widths, noise, strict=True))]  # fmt: skip


def feed(acc, layers, cuts, mask=None):
    edges = [0, *cuts, layers[0].shape[-2]]
    for a, b in itertools.pairwise(edges):
        acc.update([x[..., a:b, :] for x in layers], None if mask is None else mask[..., a:b])
    return acc


def centred(x, keep):
    x = x[keep].to(F64)
    return x - x.mean(0)


def assert_matches(acc, layers, mask=None, tol=1e-12):
    lead = layers[0].shape[:-2]
    mask = torch.ones(layers[0].shape[:-1], dtype=torch.bool) if mask is None else mask
    for p in itertools.product(*map(range, lead)):
        keep = mask[p]
        n = int(keep.sum())
        assert acc.count[p] == n
        c = [centred(x[p], keep) for x in layers]
        for i in range(len(layers)):
            scale = (c[i] ** 2).sum()
            assert (acc.scatter(i)[p] - c[i].T @ c[i]).abs().max() <= tol * scale
            spread = (scale / n) ** 0.5
            mean = layers[i][p][keep].to(F64).mean(0)
            assert (acc.mean(i)[p] - mean).abs().max() <= tol * spread + 4e-16 * mean.abs().max()
        for i, j in acc.pairs:
            size = c[i].norm() * c[j].norm()
            assert (acc.cross(i, j)[p] - c[i].T @ c[j]).abs().max() <= tol * size
            got = acc.pair(i, j)
            a, b = (c[i] ** 2).sum(1), (c[j] ** 2).sum(1)
            unit_i, unit_j = 4.0**got.exponent_i, 4.0**got.exponent_j
            assert abs(got.trace_i[p] * unit_i - a.sum()) <= tol * a.sum()
            assert abs(got.trace_j[p] * unit_j - b.sum()) <= tol * b.sum()
            assert abs(got.norm_product[p] * unit_i * unit_j - a @ b) <= tol * (a.norm() * b.norm())


@pytest.mark.parametrize("pairs", ["adjacent", "all", [(2, 0)]])
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_brute_force(pairs, offset, masked):
    layers = make_layers(offset=offset)
    mask = torch.rand(3, 301, generator=torch.Generator().manual_seed(1)) < 0.3 if masked else None
    acc = feed(MomentAccumulator(pairs=pairs), layers, [1, 4, 140], mask)
    assert_matches(acc, layers, mask)
    if pairs == [(2, 0)]:
        assert acc.pairs == ((0, 2),)
        assert torch.equal(acc.cross(2, 0), acc.cross(0, 2).transpose(-1, -2))


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("n", [1, 2, 3, 127, 128, 129, 256])
def test_leading_shapes_and_block_edges(lead, n):
    layers = make_layers(lead=lead, n=n, widths=(3, 1))
    assert_matches(MomentAccumulator().update(layers), layers, tol=1e-12 if n > 1 else 0)


@pytest.mark.parametrize("seed", range(5))
def test_any_split_and_merge_order(seed):
    rng = np.random.default_rng(seed)
    # A drift of the mean along the samples gives the parts different shifts.
    layers = make_layers(seed, n=700, offset=50.0)
    layers = [x + torch.linspace(0, 20, 700, dtype=F64)[:, None] for x in layers]
    mask = torch.rand(3, 700, generator=torch.Generator().manual_seed(seed)) < 0.7
    edges = [0, *sorted(rng.choice(700, 6, replace=False)), 700]
    parts = []
    for a, b in itertools.pairwise(edges):
        part = feed(MomentAccumulator(pairs="all"), [x[:, a:b] for x in layers], [(b - a) // 3], mask[:, a:b])
        parts.append(part)
    rng.shuffle(parts)
    while len(parts) > 1:
        a, b = parts.pop(), parts.pop(int(rng.integers(len(parts))))
        parts.append(a.merge(b))
    assert_matches(parts[0], layers, mask)


def test_merge_with_a_single_far_row_and_with_nothing():
    far = [torch.full((1, 1, 2), 1e6, dtype=F64), torch.full((1, 1, 2), -1e6, dtype=F64)]
    near = make_layers(lead=(1,), n=500, widths=(2, 2))
    both = [torch.cat([a, b], 1) for a, b in zip(far, near, strict=True)]
    assert_matches(MomentAccumulator().update(far).merge(MomentAccumulator().update(near)), both)
    acc = MomentAccumulator().update(near).merge(MomentAccumulator())
    assert_matches(MomentAccumulator().merge(acc), near)


@pytest.mark.parametrize("cuts", [[], [1], [100], [128], [3, 4, 5, 200, 256, 257], list(range(1, 301))])
def test_bits_do_not_depend_on_batches(cuts):
    layers = make_layers(dtype=torch.float32)
    mask = torch.rand(3, 301, generator=torch.Generator().manual_seed(1)) < 0.3
    one = MomentAccumulator(pairs="all").update(layers, mask)
    acc = feed(MomentAccumulator(pairs="all"), layers, cuts, mask)
    assert torch.equal(acc.count, one.count)
    for i, j in itertools.combinations_with_replacement(range(3), 2):
        assert torch.equal(acc.cross(i, j), one.cross(i, j))
        assert torch.equal(acc.pair(i, j).norm_product, one.pair(i, j).norm_product)


@pytest.mark.parametrize("lead", [(1,), (2,), (12,)])
@pytest.mark.parametrize("width", [3, 16, 65, 256])
def test_bits_do_not_depend_on_threads(lead, width):
    layers = make_layers(lead=lead, n=260, widths=(width, width + 1), dtype=torch.float32)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            acc = MomentAccumulator().update(layers)
            pair = acc.pooled().pair(0, 1)
            seen.append([acc.scatter(0), acc.cross(0, 1), acc.mean(1), acc.pair(0, 1).norm_product])
            seen[-1] += [pair.cross, pair.norm_product]
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1e18), (torch.float32, 1e-18), (F64, 1e150), (F64, 1e-150)]
)
def test_extreme_scales_stay_finite(dtype, scale):
    layers = make_layers(scale=scale, dtype=dtype, widths=(4, 4))
    plain = [x.to(F64) / scale for x in layers]
    acc = feed(MomentAccumulator(), layers, [77])
    got, want = acc.pair(0, 1), MomentAccumulator().update(plain).pair(0, 1)

    def biased(p):
        return p.cross.square().sum((-1, -2)) / (p.trace_i * p.trace_j)

    assert torch.allclose(biased(got), biased(want), rtol=1e-12, atol=0)
    other = MomentAccumulator().update([x / scale for x in plain]).merge(acc)
    assert all(torch.isfinite(m).all() for m in other._sums.moment.values())


def test_merge_across_scales():
    a, b = make_layers(1, scale=1e12), make_layers(2, scale=1e10)
    both = [torch.cat(pair, 1) for pair in zip(a, b, strict=True)]
    assert_matches(
        MomentAccumulator(pairs="all").update(b).merge(MomentAccumulator(pairs="all").update(a)), both
    )


def test_constant_columns_are_exactly_zero():
    layers = make_layers(n=400, dtype=torch.float32)
    layers[1][..., 2] = 0.1
    layers[2][:] = torch.randn(3, 1, 4)
    acc = feed(MomentAccumulator(pairs="all"), layers, [7, 130])
    acc.merge(feed(MomentAccumulator(pairs="all"), layers, [50]))
    assert (acc.scatter(1)[:, 2] == 0).all()
    assert (acc.scatter(2) == 0).all()
    assert (acc.pair(0, 2).trace_j == 0).all()


def test_pooled_is_one_cloud_and_at_is_one_position():
    layers = make_layers(lead=(2, 3), offset=3.0)
    mask = torch.rand(2, 3, 301, generator=torch.Generator().manual_seed(3)) < 0.5
    acc = MomentAccumulator().update(layers, mask)
    flat = [x.reshape(-1, x.shape[-1]) for x in layers]
    assert_matches(acc.pooled(), flat, mask.reshape(-1))
    assert_matches(acc.at(4), [x[1, 1] for x in layers], mask[1, 1])


def test_pooled_of_positions_with_nothing_and_with_a_common_constant():
    layers = make_layers(lead=(3,), dtype=torch.float32)
    layers[0][..., 1] = 0.1
    mask = torch.ones(3, 301, dtype=torch.bool)
    mask[0] = False
    pooled = MomentAccumulator().update(layers, mask).pooled()
    assert_matches(pooled, [x.reshape(-1, x.shape[-1]) for x in layers], mask.reshape(-1))
    assert (pooled.scatter(0)[1] == 0).all()
    assert int(MomentAccumulator().update(layers, mask & False).pooled().count) == 0


def test_uncentred_scatter():
    layers = make_layers(lead=(), offset=2.0)
    acc = MomentAccumulator().update(layers)
    assert torch.allclose(acc.scatter(0, centering="none"), layers[0].T @ layers[0], rtol=1e-13)
    assert torch.allclose(acc.cross(0, 1, centering="none"), layers[0].T @ layers[1], rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_input_is_widened_before_anything(dtype):
    layers = make_layers(dtype=dtype, offset=8.0)
    assert_matches(feed(MomentAccumulator(), layers, [5, 6]), layers)


def test_odd_strides():
    layers = make_layers(lead=(3,))
    odd = [
        layers[0].transpose(0, 1).contiguous().transpose(0, 1),
        layers[1][:1].expand(3, -1, -1),
        layers[2].flip(-1),
    ]
    assert_matches(feed(MomentAccumulator(), odd, [9]), odd)


def test_state_dict_continues_bit_for_bit():
    layers = make_layers(dtype=torch.bfloat16)
    mask = torch.rand(3, 301, generator=torch.Generator().manual_seed(1)) < 0.3
    whole = MomentAccumulator(pairs="all").update(layers, mask)
    for cut in (0, 1, 127, 128, 129, 300):
        first = MomentAccumulator(pairs="all").update([x[:, :cut] for x in layers], mask[:, :cut])
        state = {k: v.copy() for k, v in first.state_dict().items()}
        assert all(v.dtype != object for v in state.values())
        second = MomentAccumulator(pairs="all")
        second.load_state_dict(state)
        second.update([x[:, cut:] for x in layers], mask[:, cut:])
        for i, j in itertools.combinations_with_replacement(range(3), 2):
            assert torch.equal(second.cross(i, j), whole.cross(i, j))


def test_empty_accumulator_round_trips_and_other_pairs_are_refused():
    acc = MomentAccumulator().update(make_layers())
    acc.load_state_dict(MomentAccumulator().state_dict())
    assert acc.lead == ()
    assert acc.widths == ()
    with pytest.raises(ValueError, match="state must hold the pairs 'all'"):
        MomentAccumulator(pairs="all").load_state_dict(MomentAccumulator().update(make_layers()).state_dict())


def test_nan_names_layer_and_position_and_adds_nothing():
    layers = make_layers()
    acc = MomentAccumulator().update(layers)
    before = acc.scatter(0)
    bad = [x.clone() for x in layers]
    bad[1][2, 5, 0] = float("nan")
    bad[1][2, 6, 1] = float("inf")
    with pytest.raises(NonFiniteError, match=r"got 2 NaN or infinite values in layer 1, position 2") as error:
        acc.update(bad)
    assert (error.value.layer, error.value.position, error.value.count) == (1, (2,), 2)
    assert torch.equal(acc.scatter(0), before)
    keep = torch.ones(3, 301, dtype=torch.bool)
    keep[2, 5:7] = False
    assert_matches(MomentAccumulator().update(bad, keep), layers, keep)


def test_mask_that_selects_nothing():
    layers = make_layers()
    keep = torch.ones(3, 301, dtype=torch.bool)
    keep[1] = False
    acc = MomentAccumulator().update(layers, keep)
    assert acc.count.tolist() == [301, 0, 301]
    assert acc.mean(0)[1].isnan().all()
    late = keep.clone()
    late[:, :200] = False
    assert_matches(MomentAccumulator().update([x[[0, 2]] for x in layers], late[[0, 2]]),
                   [x[[0, 2]] for x in layers], late[[0, 2]])  # fmt: skip


def test_memory_is_what_was_stated_whatever_the_sample_number():
    layers = make_layers(n=2048)  # no row is left in an open block
    acc = MomentAccumulator(pairs="all").update(layers)
    stated = state_bytes((5, 7, 4), 3, "all")
    assert acc.nbytes == stated
    for _ in range(5):
        acc.update(layers)
    assert acc.nbytes == stated


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MomentAccumulator(pairs="some"), "pairs must be"),
        (lambda: MomentAccumulator().update([]), "at least one layer"),
        (lambda: MomentAccumulator().update([torch.zeros(3)]), r"layers\[0\] must have at least 2"),
        (lambda: MomentAccumulator().update([torch.zeros(3, 2), torch.zeros(4, 2)]), "must agree"),
        (lambda: MomentAccumulator().update([torch.zeros(3, 2)], torch.ones(3)), "bool"),
        (
            lambda: MomentAccumulator().update([torch.zeros(3, 2)], torch.ones(4, dtype=torch.bool)),
            r"mask must have shape \(3,\)",
        ),
        (lambda: MomentAccumulator(pairs=[(0, 5)]).update([torch.zeros(3, 2)]), "layers 0 to 0"),
        (lambda: MomentAccumulator().update([torch.zeros(3, 2)]).cross(0, 1), "not kept"),
        (
            lambda: MomentAccumulator().update([torch.zeros(3, 2)]).update([torch.zeros(3, 4)]),
            "must keep leading shape",
        ),
        (
            lambda: MomentAccumulator().update([torch.zeros(3, 2)]).merge(
                MomentAccumulator().update([torch.zeros(3, 4)])
            ),
            "other must have",
        ),
        (lambda: MomentAccumulator().update([torch.zeros(3, 2, dtype=torch.int64)]), "must be one of"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_accumulated_is_the_trace_about_the_shift_and_never_less_than_the_variance():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 3000, 5, generator=generator, dtype=torch.float64)
    x[:, 1500:] += 100.0  # the mean drifts away from the first rows, and with it from the shift
    moments = MomentAccumulator().update([x])
    trace = (x - x.mean(1, keepdim=True)).square().sum((1, 2))
    summed = moments.accumulated(0)
    shift = moments.mean(0) - x.mean(1)
    assert shift.abs().max() < 1e-11
    assert (summed >= trace * (1 - 1e-12)).all()
    # The shift is a mean of early rows, so the late ones are about 100 away from it.
    assert (summed > 1.5 * trace).all()


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
def test_what_is_not_finite_is_named_however_rows_lie_in_memory(axes):
    x = torch.zeros(3, 4, 5).permute(axes)
    check_finite(x, None, 0)
    check_finite(x[:, :1].expand(-1, 6, -1), None, 0)
    x[1, 2, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="1 NaN or infinite values in layer 7, position 1"):
        check_finite(x, None, 7)
