"""Measures of a sample: which rows it has, their values, nulls and p-values."""

import numpy as np
import pytest
import torch

import rgfast
from rgfast.comparing.rows import Rows
from rgfast.comparing.sample import Sample

MEASURES = ["mutual_knn", "procrustes", "rsa"]


def compared(a, b, batches, **options):
    return rgfast.compare(a, b, batches, progress=False, **options)


def test_few_rows_are_all_in_the_sample_and_give_the_functions_values(kit):
    a, b = kit.Encoder(6, 2), kit.Encoder(5, 1, seed=1)
    batches = kit.padded(40, 6)
    views = ["position", "pooled", "mean_pooled"]
    found = compared(a, b, batches, measures=MEASURES, views=views, k=3)
    names = ["blocks.0:input", "blocks.0", "blocks.1"]
    keeps = [batch["attention_mask"].bool() for batch in batches]
    sides = kit.stored(a, names, batches), kit.stored(b, names[:2], batches)
    rows = [
        [torch.cat([x[k] for x, k in zip(layer, keeps, strict=True)]) for layer in layers] for layers in sides
    ]
    first = [[torch.cat([x[:, 0][k[:, 0]] for x, k in zip(layer, keeps, strict=True)]) for layer in layers]
             for layers in sides]  # fmt: skip
    calls = {
        "mutual_knn": lambda x, y: rgfast.mutual_knn(x, y, k=3),
        "procrustes": rgfast.procrustes,
        "rsa": rgfast.rsa,
    }
    for name, call in calls.items():
        for view, (xs, ys), position in (("pooled", rows, None), ("position", first, 0)):
            want = torch.stack([torch.stack([call(x, y) for y in ys]) for x in xs])
            got = torch.as_tensor(found.matrix(name, view, position=position).values)
            assert (got - want).abs().max() < 1e-8
    total = len(rows[0][0])
    assert found.samples["pooled"] == {"rows": total, "of": total, "sequences": 40}
    assert found.rows("pooled", "rsa") == (total, total)
    with pytest.raises(ValueError, match="measure must be one of 'mutual_knn'"):
        found.matrix("cka")


def test_a_large_sample_is_bounded_seeded_and_named(kit):
    a, b = kit.Encoder(6, 1), kit.Encoder(5, 1, seed=1)
    batches = kit.padded(200, 6)
    total = int(sum(batch["attention_mask"].sum() for batch in batches))
    options = {"measures": ["procrustes"], "sample_limit": 64}
    found = [compared(a, b, batches, **options, seed=seed) for seed in (0, 0, 1)]
    sample = found[0].samples
    assert sample["pooled"] == {"rows": 64, "of": total, "sequences": 64}
    assert sample["mean_pooled"] == {"rows": 64, "of": 200, "sequences": 64}
    first, again, other = (each.matrix("procrustes", "mean_pooled").values for each in found)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert found[0].dataset.attrs["sample_limit"] == 64


def rows_of(numbers, counts):
    """Rows whose only value names sequence and place."""
    sequence = torch.repeat_interleave(torch.tensor(numbers), torch.tensor(counts))
    place = torch.cat([torch.arange(count) for count in counts])
    return Rows([(100.0 * sequence + place)[:, None]], sequence)


@pytest.mark.parametrize("sizes", [[1] * 300, [7, 1, 12, 3] * 40, [50, 2, 2, 80]])
def test_a_sample_does_not_depend_on_how_batches_are_cut(sizes):
    def drawn(step, limit=60):
        sample = Sample(limit, 5)
        for start in range(0, len(sizes), step):
            numbers = list(range(start, min(start + step, len(sizes))))
            sample.add(rows_of(numbers, [sizes[k] for k in numbers]))
        return sample

    whole, parts = drawn(len(sizes)), drawn(7)
    assert torch.equal(whole.rows().layers[0], parts.rows().layers[0])
    rows = whole.rows()
    assert 30 <= len(rows.sequence) <= 60
    values = rows.layers[0][:, 0]
    assert (values.diff() > 0).all()  # by sequence and place
    assert torch.equal((values // 100).long(), rows.sequence)
    assert whole.seen == sum(sizes)
    unlimited = drawn(7, limit=sum(sizes))
    assert len(unlimited.rows().sequence) == sum(sizes)


def test_every_sequence_is_as_likely_in_a_sample():
    counts = torch.zeros(40)
    for seed in range(400):
        sample = Sample(10, seed)
        sample.add(rows_of(list(range(40)), [1] * 40))
        counts[sample.rows().sequence] += 1
    assert counts.sum() == 4000
    assert (counts - 100).abs().max() < 45  # five standard deviations of 8.7


def test_a_null_calibrates_and_corrects_the_best_match(kit):
    a, b = kit.Mlp(5, 8, 2), kit.Mlp(5, 8, 2, seed=1)
    x = torch.randn(80, 5, generator=torch.Generator().manual_seed(0))
    found = compared(a, b, x, measures=["cka", "rsa"], null=50, seed=3)
    layers = [[layer[0] for layer in kit.stored(m, ["blocks.0:input", "blocks.0", "blocks.1"], [x])]
              for m in (a, b)]  # fmt: skip
    for name in ("cka", "rsa"):
        want = rgfast.calibrate(name, *layers, null=50, seed=3)
        got = found.calibrated(name)
        assert (got.value - want.value).abs().max() < 1e-8
        assert (got.null - want.null).abs().max() < 1e-8
        assert torch.equal(got.p, want.p)
        for side, dim in (("a", -1), ("b", -2)):
            assert np.array_equal(found.best_match(name, side=side).p, want.best(dim).p.numpy())
    assert found.best_match("cka").p.max() == 1 / 51
    assert abs(found.matrix("cka").values - found.dataset.cka_sample.values[0, ..., 0]).max() < 1e-8

    unrelated = [torch.randn(80, 5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    chance = compared(a, b, unrelated[0], batches_b=unrelated[1], null=50)
    assert chance.best_match("cka").p.min() > 0.02
    plain = compared(a, b, x)
    assert plain.best_match().p.isna().all()
    with pytest.raises(ValueError, match="null must be given to compare"):
        plain.calibrated()


def test_the_null_moves_whole_sequences(kit):
    """Rows of a sequence are alike: shuffling rows would find any two models of unrelated texts related."""
    a, b = kit.Encoder(6, 1), kit.Encoder(6, 1, seed=1)
    generator = torch.Generator().manual_seed(0)

    def texts():  # a few tokens, one to a sequence
        return torch.randint(1, 30, (24, 1), generator=generator).expand(24, 5).contiguous()

    p = []
    for _ in range(12):
        mine, theirs = texts(), texts()
        both = {"input_ids": torch.cat([mine, theirs], 1)}
        halves = [HalfOf(a, slice(0, 5)), HalfOf(b, slice(5, 10))]
        layers = {"layers_a": ["model.blocks.0"], "layers_b": ["model.blocks.0"]}
        found = compared(*halves, both, **layers, null=39, views=["pooled"])
        p.append(float(found.calibrated("cka").p))
    assert np.mean(np.array(p) <= 0.1) < 0.5


class HalfOf(torch.nn.Module):
    def __init__(self, model, part):
        super().__init__()
        self.model, self.part = model, part

    def forward(self, input_ids):
        return self.model(input_ids[:, self.part])


def test_groups_give_measures_of_a_sample_error_bars(kit):
    a, b = kit.Mlp(5, 8, 2), kit.Mlp(5, 8, 2, seed=1)
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    found = compared(a, b, x, measures=["procrustes"], groups=5)
    names = ["blocks.0:input", "blocks.0", "blocks.1"]
    xs, ys = ([layer[0] for layer in kit.stored(m, names, [x])] for m in (a, b))
    group = torch.arange(60) % 5
    parts = torch.stack(
        [
            torch.stack(
                [torch.stack([rgfast.procrustes(p[group != g], q[group != g]) for q in ys]) for p in xs]
            )
            for g in range(5)
        ]
    )
    want = (4 / 5 * (parts - parts.mean(0)).square().sum(0)).sqrt()
    assert (torch.as_tensor(found.standard_error("procrustes").values) - want).abs().max() < 1e-8
