"""Checks of everything that is given its rows in batches, with masks, in the manner of :mod:`ops`."""

from itertools import pairwise

import numpy as np
import torch
import truths
from draws import layers_of
from judging import excess, judged, poisoned, refused

import rgfast
from rgfast.streaming import MomentAccumulator
from rgfast.validation import as_tensor


def streamed(draw, make, layers, mask):
    """An accumulator, or the merger of two, that was given the layers in random batches."""
    streams = [make() for _ in range(draw.choose((1, 2)))]
    n = layers[0].shape[-2]
    cuts = sorted({0, n, *draw.rng.integers(0, n + 1, draw.choose((0, 1, 4))).tolist()})
    for k, (first, last) in enumerate(pairwise(cuts)):
        part = [x[..., first:last, :] for x in layers]
        streams[k * len(streams) // max(1, len(cuts) - 1)].update(
            part, None if mask is None else mask[..., first:last]
        )
    for other in streams[1:]:
        streams[0].merge(other)
    return streams[0]


def masked_layers(draw, most=3):
    """Layers as tensors, a mask or None, the rows that count of every layer at every position, and as above.

    What does not count is NaN.
    """
    layers, extreme = layers_of(draw, most)
    layers = [as_tensor(x, "x") for x in layers]
    mask = draw.mask(tuple(layers[0].shape[:-1])) if draw.chance(0.7) else None
    if mask is not None:
        layers = [x.masked_fill(~mask[..., None], torch.nan) for x in layers]
    keep = torch.ones(layers[0].shape[:-1], dtype=torch.bool, device="cpu") if mask is None else mask
    rows = [
        [m[k] for m, k in zip(truths.matrices(x), keep.reshape(-1, keep.shape[-1]).numpy(), strict=True)]
        for x in layers
    ]
    return layers, mask, rows, extreme


def moments(draw):
    layers, mask, rows, _ = masked_layers(draw)
    if draw.chance(0.05) and (mask is None or bool(mask.all())):
        bad = [*layers[:-1], poisoned(draw, layers[-1])]
        return refused(lambda: MomentAccumulator(pairs="all").update(bad, mask), ValueError, "finite")
    factors = tuple(range(len(layers))) if draw.chance(0.5) else ()
    budget = draw.choose((1, 256 << 20))
    stream = streamed(
        draw, lambda: MomentAccumulator(pairs="all", pending_bytes=budget, factors=factors), layers, mask
    )
    counts = [len(m) for m in rows[0]]
    assert stream.count.reshape(-1).tolist() == counts
    worst = 0.0
    last = len(layers) - 1
    for position, number in enumerate(counts):
        if not number:
            continue
        unit = [2.0 ** stream.exponent(k) for k in (0, last)]
        scaled = zip((0, last), unit, strict=True)
        x, y = (np.asarray(rows[k][position], dtype=np.longdouble) / u for k, u in scaled)
        centred = [v - v[:1] - (v - v[:1]).mean(0) for v in (x, y)]
        want = (centred[0].T @ centred[1]).astype(np.float64)
        pair = stream.pair(0, last)
        got = pair.cross.reshape(-1, *pair.cross.shape[-2:])[position].numpy()
        # Rounding goes with what was summed: the spread about the shift, a mean of earlier rows.
        spread = [float((v - v[:1]).astype(np.float64).__pow__(2).sum()) for v in (x, y)]
        size = [float((np.abs(v).max() * 2.0**-52) ** 2) * v.size for v in (x, y)]
        allowed = 1e-12 * np.sqrt((spread[0] + size[0]) * (spread[1] + size[1])) + 1e-300
        worst = max(worst, excess(got, want, allowed, "cross"))
        mean = stream.mean(0).reshape(len(counts), -1)[position].numpy()
        top = np.abs(rows[0][position]).max()
        exact = rows[0][position].astype(np.longdouble).mean(0).astype(np.float64)
        worst = max(worst, excess(mean, exact, 1e-13 * top + 1e-300, "mean"))
    return ("right" if any(counts) else "undefined"), worst


def second_moments(draw):
    layers, mask, rows, _ = masked_layers(draw)
    stream = streamed(draw, rgfast.SecondMoments, layers, mask)
    centering = draw.choose(("mean", "none"))
    found = stream.rank_measures(0, centering=centering)
    counts, worst = [len(m) for m in rows[0]], 0.0
    for position, number in enumerate(counts):
        got, bound = (float(v.reshape(-1)[position]) for v in (found.effective_rank, found.error_bound))
        if number == 0:
            assert np.isnan(got), got
            continue
        sigma = truths.sigma(rows[0][position], centering == "mean")
        want = truths.rank_of(sigma)
        worst = max(worst, excess(got, want, want * min(bound, 1e6) + 1e-10, "rank"))
        ratio = float(found.participation_ratio.reshape(-1)[position])
        if bound < 1e-2:
            worst = max(worst, excess(ratio, truths.energy_ratio(sigma), 1e-6 * (1 + ratio), "ratio"))
    return ("right" if any(counts) else "undefined"), worst


def cka_stream(draw):
    layers, mask, rows, _ = masked_layers(draw)
    debiased = draw.chance(0.5)
    options = {"pairs": "all", "route": draw.choose(("auto", "sample", "features"))}
    options["sample_limit"] = draw.choose((8, 4096))
    stream = streamed(draw, lambda: rgfast.CKAAccumulator(**options), layers, mask)
    counts = [len(m) for m in rows[0]]
    least = 4 if debiased else 1
    if max(counts, default=0) < least:
        return refused(lambda: stream.finalize(debiased=debiased), ValueError, "at least")
    matrix = stream.finalize(debiased=debiased).matrix
    last = len(layers) - 1
    got = matrix[..., 0, last].reshape(-1).numpy()
    want, magnified = np.full(len(counts), np.nan), np.full(len(counts), np.inf)
    for position, number in enumerate(counts):
        if number >= least:
            want[position], magnified[position] = truths.cka(
                rows[0][position], rows[last][position], debiased
            )
        else:
            assert np.isnan(got[position])
    # A feature-route sum is of moments about an earlier mean: translation costs digits there.
    return judged(got, want, magnified, 1e-6 * np.maximum(magnified, 1), "stream")


def minibatch_stream(draw):
    layers, mask, rows, extreme = masked_layers(draw)
    size = draw.choose((4, 16, 64))
    n = layers[0].shape[-2]
    stream = rgfast.MinibatchCKAAccumulator(batch_size=size)
    for first in range(0, n, 11):
        part = [x[..., first : first + 11, :] for x in layers]
        stream.update(part, None if mask is None else mask[..., first : first + 11])
    counts = [len(m) for m in rows[0]]
    if max(counts, default=0) < 4:
        return refused(stream.finalize, ValueError, "at least 4")
    found = stream.finalize()
    if extreme:
        return "undefined", 0.0
    last = len(layers) - 1
    got = found[..., 0, last].reshape(-1).numpy()
    want, magnified = np.full(len(counts), np.nan), np.full(len(counts), np.inf)
    for position, number in enumerate(counts):
        a, b = rows[0][position], rows[last][position]
        cut = [slice(k, k + size) for k in range(0, number, size) if min(number, k + size) - k >= 4]
        want[position], magnified[position] = truths.minibatch_cka(a, b, cut)
    return judged(got, want, magnified, 1e-6 * np.maximum(magnified, 1), "minibatch stream")
