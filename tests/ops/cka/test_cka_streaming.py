import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import rgfast
from rgfast.ops.cka.streaming import cka_of_sums
from rgfast.runtime import waiting
from rgfast.streaming import MomentAccumulator, Together

BOTH = pytest.mark.parametrize("debiased", [True, False])
ROUTES = pytest.mark.parametrize("route", ["sample", "features"])


def stream(layers, sizes, mask=None, **options):
    out = rgfast.CKAAccumulator(**options)
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        out.update([x[..., rows, :] for x in layers], None if mask is None else mask[..., rows])
        start += size
    return out


@BOTH
@ROUTES
@pytest.mark.parametrize("shape", [(60, 5), (40, 70), (3, 30, 4), (2, 2, 25, 6)])
def test_a_stream_is_the_whole(make, truth, shape, route, debiased):
    layers = make(3, *shape) + 50.0
    n = shape[-2]
    result = stream(layers, [1, 7, n - 9, 1], route=route).finalize(debiased=debiased)
    assert result.route == route
    assert (result.matrix - rgfast.cka_matrix(layers, debiased=debiased)).abs().max() < 1e-11
    assert (result.drift - rgfast.kernel_drift(layers, debiased=debiased)).abs().max() < 1e-11
    assert (result.count == n).all()
    if len(shape) == 2:
        assert (result.matrix - truth.matrix(layers, debiased=debiased)).abs().max() < 1e-10


@ROUTES
def test_any_split_and_any_order_of_merging(make, route):
    generator = np.random.default_rng(0)
    layers = make(3, 2, 200, 6, dtype=torch.float32) + 10.0
    layers[1] *= 1e3
    whole = stream(layers, [200], route=route).finalize()
    for _ in range(6):
        cuts = np.sort(generator.choice(np.arange(1, 200), 5, replace=False))
        sizes = np.diff([0, *cuts, 200]).tolist()
        split = stream(layers, sizes, route=route).finalize()
        assert (split.matrix - whole.matrix).abs().max() <= 1e-12
        parts = []
        for start, size in zip([0, *cuts.tolist()], sizes, strict=True):
            parts.append(stream(layers[..., start : start + size, :], [size], route=route))
        generator.shuffle(parts)
        while len(parts) > 1:
            at = int(generator.integers(len(parts) - 1))
            parts[at].merge(parts.pop(at + 1))
        merged = parts[0].finalize()
        assert (merged.matrix - whole.matrix).abs().max() <= 1e-12
        assert (merged.drift - whole.drift).abs().max() <= 1e-12
        assert (merged.count == 200).all()


def test_parts_with_far_apart_means_merge(make):
    layers = make(2, 120, 5)
    layers[:, 60:] += 1e3
    merged = stream(layers[:, :60], [60], route="features")
    merged.merge(stream(layers[:, 60:], [60], route="features"))
    expected = rgfast.cka_matrix(layers)
    assert (merged.finalize().matrix - expected).abs().max() < 1e-10


def test_the_route_follows_the_number_of_samples(make):
    layers = make(2, 50, 4)
    below = stream(layers, [25, 25], sample_limit=50)
    assert below.route == below.finalize().route == "sample"
    above = stream(layers, [25, 25], sample_limit=49)
    assert above.route == above.finalize().route == "features"
    assert (above.finalize().matrix - below.finalize().matrix).abs().max() < 1e-12
    left, right = stream(layers[:, :25], [25], sample_limit=30), stream(layers[:, 25:], [25], sample_limit=30)
    assert left.route == right.route == "sample"
    assert left.merge(right).route == "features"
    assert (left.finalize().matrix - below.finalize().matrix).abs().max() < 1e-12
    assert (left.finalize().count == 50).all()


@BOTH
@pytest.mark.parametrize("options", [{"route": "sample"}, {"route": "features"}, {"sample_limit": 20}])
def test_masks_select_samples_by_position(make, options, debiased):
    layers = make(3, 4, 40, 5, dtype=torch.float32)
    mask = torch.rand(4, 40, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[2] = False
    mask[3] = False
    mask[3, :3] = True
    poisoned = layers.masked_fill(~mask[..., None], torch.nan)
    result = stream(poisoned, [13, 20, 7], mask, **options).finalize(debiased=debiased)
    assert result.count.tolist() == mask.sum(-1).tolist()
    for t in range(2):
        rows = layers[:, t, mask[t]]
        assert (result.matrix[t] - rgfast.cka_matrix(rows, debiased=debiased)).abs().max() < 1e-6
        assert (result.drift[t] - rgfast.kernel_drift(rows, debiased=debiased)).abs().max() < 1e-6
    assert result.matrix[2].isnan().all()
    assert result.drift[2].isnan().all()
    assert result.reason(0, 2) == "too few samples"
    assert result.reason(0, 1) is None
    assert bool(result.matrix[3].isnan().all()) == debiased
    assert result.few.tolist() == [False, False, True, debiased]


@ROUTES
def test_constant_layers_have_their_reason(make, route):
    layers = make(3, 2, 30, 4)
    layers[1, 0] = 1e4
    result = stream(layers, [11, 19], route=route).finalize()
    assert result.reason(1, 0) == "constant"
    assert result.reason(1, 1) is None
    assert result.matrix[0, 1].isnan().all()
    assert result.matrix[0, 0, 2].isfinite()
    assert result.drift[0].isnan().all()
    assert result.drift[1].isfinite().all()


@BOTH
@ROUTES
def test_adjacent_pairs_only(make, route, debiased):
    layers = make(4, 30, 5)
    result = stream(layers, [10, 20], route=route, pairs="adjacent").finalize(debiased=debiased)
    expected = rgfast.cka_matrix(layers, debiased=debiased)
    near = (torch.arange(4)[:, None] - torch.arange(4)).abs() <= 1
    assert (result.matrix - expected)[near].abs().max() < 1e-12
    assert result.matrix[~near].isnan().all()
    assert (result.drift - rgfast.kernel_drift(layers, debiased=debiased)).abs().max() < 1e-12


@ROUTES
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e18), (torch.float64, 1e150)])
def test_scales(make, route, dtype, scale):
    layers = make(2, 30, 5).to(dtype)
    expected = rgfast.cka_matrix(layers)
    for factor in (scale, 1 / scale):
        got = stream([layers[0] * factor, layers[1]], [15, 15], route=route).finalize().matrix
        assert (got - expected).abs().max() < 1e-6


@ROUTES
def test_a_stream_goes_on_after_finalize(make, route):
    layers = make(2, 30, 5)
    running = stream(layers[:, :20], [20], route=route)
    running.finalize()
    running.update(layers[:, 20:])
    assert (running.finalize().matrix - rgfast.cka_matrix(layers)).abs().max() < 1e-12


def test_sample_memory_is_given_back_when_moments_take_over(make):
    layers = make(2, 64, 3)
    running = rgfast.CKAAccumulator(sample_limit=32)
    sizes = []
    for _ in range(20):
        running.update(layers)
        sizes.append(running.nbytes)
    assert running.route == "features"
    assert len(set(sizes[2:])) == 1


def test_errors(make):
    layers = make(2, 3, 10, 4)
    running = rgfast.CKAAccumulator()
    with pytest.raises(ValueError, match="the stream must hold at least 4 samples, got 0"):
        running.finalize()
    running.update(layers[..., :3, :])
    with pytest.raises(ValueError, match="the stream must hold at least 4 samples, got 3"):
        running.finalize()
    assert running.finalize(debiased=False).matrix.isfinite().all()
    bad = layers.clone()
    bad[1, 2, 5, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"layers must be finite, got 1 NaN or Inf values in layer 1 at position 2"
    ):
        running.update(bad)
    assert (running.finalize(debiased=False).count == 3).all()
    with pytest.raises(ValueError, match="layers must keep leading shape"):
        running.update(layers[:, :2])
    with pytest.raises(TypeError, match=r"mask must be a bool tensor, got torch\.int64"):
        running.update(layers, torch.ones(3, 10, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mask must have shape \(3, 10\), got \(3, 9\)"):
        running.update(layers, torch.ones(3, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="route must be one of"):
        rgfast.CKAAccumulator(route="fast")
    with pytest.raises(ValueError, match="other must have the options"):
        running.merge(rgfast.CKAAccumulator(pairs="adjacent"))
    other = rgfast.CKAAccumulator().update(layers[:, :2])
    with pytest.raises(ValueError, match="other must have leading shape and widths"):
        running.merge(other)


def test_minibatches_do_not_depend_on_the_updates(make):
    layers = make(3, 2, 50, 4)
    layers[0, 1, :16] = 3.0
    pieces = rgfast.MinibatchCKAAccumulator(batch_size=16)
    for part in layers.split([3, 20, 1, 26], dim=-2):
        pieces.update(part)
    assert pieces.left_out.tolist() == [2, 2]
    weights = torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [rgfast.hsic(x[..., s : s + 16, :], y[..., s : s + 16, :]) for y in layers], -1
                    )
                    for x in layers
                ],
                -2,
            )
            for s in (0, 16, 32)
        ]
    ).mean(0)
    own = weights.diagonal(0, -2, -1)
    expected = weights / (own[..., :, None] * own[..., None, :]).sqrt()
    assert (pieces.finalize() - expected).abs().max() < 1e-12
    first = rgfast.MinibatchCKAAccumulator(batch_size=16).update(1e150 * layers[..., :32, :])
    merged = first.merge(rgfast.MinibatchCKAAccumulator(batch_size=16).update(1e150 * layers[..., 32:, :]))
    assert (merged.finalize() - expected).abs().max() < 1e-12
    with pytest.raises(ValueError, match="the stream must hold at least 4 samples, got 3"):
        rgfast.MinibatchCKAAccumulator().update(layers[..., :3, :]).finalize()


def test_minibatches_with_masks(make):
    layers = make(2, 2, 40, 4)
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) < 0.7
    running = rgfast.MinibatchCKAAccumulator(batch_size=8)
    for start in range(0, 40, 10):
        running.update(layers[..., start : start + 10, :], mask[:, start : start + 10])
    result = running.finalize()
    for t in range(2):
        alone = rgfast.MinibatchCKAAccumulator(batch_size=8).update(layers[:, t, mask[t]]).finalize()
        assert (result[t] - alone).abs().max() < 1e-12


STREAM = """
import sys
from pathlib import Path
import torch
import rgfast

def peak():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 1024

assert not any(name.split(".")[0] in ("scipy", "pandas", "xarray") for name in sys.modules)
running = rgfast.CKAAccumulator(pairs="all")
generator = torch.Generator().manual_seed(0)
for batch in range(12):
    running.update(torch.randn(12, 1000, 256, generator=generator).cumsum_(0))
    if batch == 5:
        early = peak()
result = running.finalize()
assert result.route == "features"
print(early, peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc/self/status tells the peak memory")
def test_the_memory_of_the_whole_process_is_small_and_does_not_grow_with_the_samples():
    done = subprocess.run([sys.executable, "-c", STREAM], capture_output=True, text=True, check=True)
    early, late = (float(value) for value in done.stdout.split())
    assert late < 400
    assert late - early < 4


@pytest.mark.parametrize("elsewhere", [False, True])
def test_both_kinds_of_one_sum_are_what_each_is(make, elsewhere, monkeypatch):
    layers = make(4, 3, 40, 5)
    layers[1, 2] = 7.0  # constant at a position
    monkeypatch.setattr(waiting, "_EVERYWHERE", elsewhere)
    moments = MomentAccumulator(pairs=[(0, 2), (1, 2)]).update(list(layers))
    sums = Together([moments]).kernels(products=True)
    values, constant = cka_of_sums(sums, [True, False])
    kept = {(0, 0), (1, 1), (2, 2), (3, 3), (0, 2), (2, 0), (1, 2), (2, 1)}
    for kind, debiased in enumerate((True, False)):
        alone, lacking = cka_of_sums(sums, [debiased])
        assert torch.equal(values[kind].nan_to_num(9.0), alone[0].nan_to_num(9.0))
        assert torch.equal(constant[kind], lacking[0])
        assert lacking[0].nonzero().tolist() == [[1, 2]]
        for i, j in itertools.product(range(4), repeat=2):
            for t in range(3):
                known = (i, j) in kept and (t != 2 or 1 not in (i, j))
                assert bool(values[kind, i, j, t].isnan()) is not known
        expected = rgfast.cka_matrix(layers, debiased=debiased)[:, 0, 2]
        assert (values[kind, 0, 2] - expected).abs().max() < 1e-12
