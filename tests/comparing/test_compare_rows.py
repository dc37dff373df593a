"""Views of some rows only, against brute force on stored activations."""

import numpy as np
import pytest
import torch

import rgfast

A, B = ["blocks.0:input", "blocks.0", "blocks.1", "blocks.2"], ["blocks.0:input", "blocks.0", "blocks.1"]


def compared(a, b, batches=None, **options):
    return rgfast.compare(a, b, batches, progress=False, **options)


def assert_truth(found, kit, models, batches, chosen):
    """The matrix of every view is the definition's of the rows ``chosen[view]``, bool ``[B, T]`` a batch."""
    layers = [kit.stored(m, names, batches) for m, names in zip(models, (A, B), strict=True)]
    for view, keeps in chosen.items():
        rows = [
            [torch.cat([x[k] for x, k in zip(layer, keeps, strict=True)]) for layer in side]
            for side in layers
        ]
        got = torch.as_tensor(found.matrix("cka", view).values)
        assert (got - kit.matrix_of(*rows)).abs().max() <= 1e-8
        assert found.rows(view) == (len(rows[0][0]),) * 2


def tagged(kit, n=60, length=8):
    """Padded batches with a tag for each token, which no model takes."""
    batches = kit.padded(n, length)
    generator = torch.Generator().manual_seed(3)
    for batch in batches:
        batch["tags"] = torch.randint(0, 4, batch["input_ids"].shape, generator=generator)
    return batches


def plain(batches):
    return [{name: x for name, x in batch.items() if name != "tags"} for batch in batches]


@pytest.mark.parametrize("route", ["moments", "samples"])
def test_labels_functions_ends_and_arrays(kit, route):
    models, batches = (kit.Encoder(6, 3), kit.Encoder(11, 2, seed=1)), tagged(kit)
    keeps = [batch["attention_mask"].bool() for batch in batches]
    some = torch.rand(sum(len(keep) for keep in keeps), generator=torch.Generator().manual_seed(1)) < 0.5
    rows = {
        "two kinds": ("tags", [1, 3]),
        "even": lambda entries: entries["input_ids"] % 2 == 0,
        "ends": "last",
        "starts": "first",
        "some": some.numpy(),
    }
    found = compared(*models, batches, rows=rows, route=route)
    assert found.dataset.attrs["route"] == route
    assert found.views == ("pooled", "mean_pooled", *rows)
    ends = [keep & (keep.flip(1).cumsum(1).flip(1) == 1) for keep in keeps]
    starts = [keep & (keep.cumsum(1) == 1) for keep in keeps]
    parts = some.split([len(keep) for keep in keeps])
    chosen = {
        "pooled": keeps,
        "two kinds": [k & ((b["tags"] == 1) | (b["tags"] == 3)) for k, b in zip(keeps, batches, strict=True)],
        "even": [k & (b["input_ids"] % 2 == 0) for k, b in zip(keeps, batches, strict=True)],
        "ends": ends,
        "starts": starts,
        "some": [k & part[:, None] for k, part in zip(keeps, parts, strict=True)],
    }
    assert_truth(found, kit, models, plain(batches), chosen)


def test_one_selection_beside_named_views_with_error_bars_and_a_null(kit):
    models, batches = (kit.Encoder(6, 3), kit.Encoder(11, 2, seed=1)), tagged(kit)
    found = compared(*models, batches, rows=("tags", 2), views=["rows"], groups=4, null=19, sample_limit=50)
    assert found.views == ("rows",)
    keeps = [b["attention_mask"].bool() & (b["tags"] == 2) for b in batches]
    assert_truth(found, kit, models, plain(batches), {"rows": keeps})
    assert (
        found.samples["rows"]["rows"] <= 50 < found.samples["rows"]["of"] == sum(int(k.sum()) for k in keeps)
    )
    assert np.isfinite(found.standard_error("cka", "rows").values).all()
    assert (found.best_match(view="rows").p >= 1 / 20).all()
    # Without the sequences of a group, as from those alone.
    left = []
    number = torch.arange(sum(len(batch["tags"]) for batch in batches))
    for group in range(4):
        of = number % 4 != group
        parts = of.split([len(batch["tags"]) for batch in batches])
        some = [{name: x[part] for name, x in b.items()} for b, part in zip(batches, parts, strict=True)]
        left.append(compared(*models, some, rows=("tags", 2), views=["rows"]).matrix().values)
    left = np.stack(left)
    want = np.sqrt(3 / 4 * ((left - left.mean(0)) ** 2).sum(0))
    assert np.allclose(found.standard_error("cka", "rows").values, want, rtol=1e-6)


def test_other_inputs_of_the_same_tokens_and_both_paddings(kit):
    models, batches = (kit.Encoder(6, 3), kit.Encoder(11, 2, seed=1)), tagged(kit)
    theirs = [{**batch, "attention_mask": batch["attention_mask"].clone()} for batch in plain(batches)]
    for batch in theirs:
        batch["attention_mask"][:, 0] = 0  # padding for b alone
        batch["attention_mask"][:, 1] = 1
    found = compared(*models, batches, batches_b=theirs, rows={"ones": ("tags", 1)}, views=["ones"])
    both = [
        x["attention_mask"].bool() & y["attention_mask"].bool() & (x["tags"] == 1)
        for x, y in zip(batches, theirs, strict=True)
    ]
    a, b = kit.stored(models[0], A, plain(batches)), kit.stored(models[1], B, theirs)
    rows = [
        [torch.cat([x[k] for x, k in zip(layer, both, strict=True)]) for layer in side] for side in (a, b)
    ]
    assert (torch.as_tensor(found.matrix().values) - kit.matrix_of(*rows)).abs().max() <= 1e-8


def test_saved_activations(kit):
    models, batches = (kit.Encoder(6, 3), kit.Encoder(11, 2, seed=1)), tagged(kit)
    for batch in batches:
        batch["attention_mask"][:] = 1
    length = max(b["input_ids"].shape[1] for b in batches)
    batches = [b for b in batches if b["input_ids"].shape[1] == length]
    sides = [
        rgfast.Activations(
            {f"l{k}": torch.cat(x) for k, x in enumerate(kit.stored(m, names, plain(batches)))}
        )
        for m, names in zip(models, (A, B), strict=True)
    ]
    tags = torch.cat([b["tags"] for b in batches])
    found = compared(*sides, rows={"ones": (tags, 1), "ends": "last"}, batch_size=16)
    ones = [b["tags"] == 1 for b in batches]
    ends = [torch.zeros_like(one) for one in ones]
    for end in ends:
        end[:, -1] = True
    assert_truth(found, kit, models, plain(batches), {"ones": ones, "ends": ends})


def test_files_tables_and_reports_have_the_views(kit, tmp_path):
    models, batches = (kit.Encoder(6, 3), kit.Encoder(11, 2, seed=1)), tagged(kit)
    found = compared(*models, batches, rows={"ones & <twos>": ("tags", [1, 2])})
    found.save(tmp_path / "c.nc")
    assert rgfast.Comparison.load(tmp_path / "c.nc").views[-1] == "ones & <twos>"
    assert "ones & <twos>" in set(found.to_dataframe().view)
    found.report(tmp_path / "r.html")
    assert "ones &amp; &lt;twos&gt;" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"rows": {"pooled": "first"}}, ValueError, "rows must have names that no other view has"),
        ({"rows": {"x": 3}}, TypeError, r"rows\['x'\] must be an array"),
        ({"rows": "first", "views": ["pooled"]}, ValueError, r"views must have a view of rows= \(rows\)"),
        ({"rows": "nowhere"}, ValueError, "rows: there is no entry 'nowhere'"),
        ({"rows": "tags"}, TypeError, "rows must be bool.*labels are asked for as a pair"),
        ({"rows": torch.ones(3, dtype=torch.bool)}, ValueError, "rows must have a row for every sequence"),
    ],
)
def test_what_says_nothing_about_rows_is_refused(kit, options, kind, message):
    with pytest.raises(kind, match=message):
        compared(kit.Encoder(6, 3), kit.Encoder(6, 2), tagged(kit), **options)


def test_arrays_beside_a_loader_that_shuffles_are_refused(kit):
    x = torch.randn(64, 5)
    loader = torch.utils.data.DataLoader(x, batch_size=16, shuffle=True)
    with pytest.raises(ValueError, match="rows must be in the order of the sequences"):
        compared(kit.Mlp(5, 6, 2), kit.Mlp(5, 4, 2), loader, rows=torch.ones(64, dtype=torch.bool))


def test_rows_that_do_not_correspond_are_refused(kit):
    batches = kit.padded(20, 6)
    other = [{**b, "input_ids": (b["input_ids"] + 1) % 30} for b in batches]
    with pytest.raises(
        ValueError, match="rows: 'ends' compares row by row, and the models have other tokens"
    ):
        compared(kit.Encoder(6, 3), kit.Encoder(6, 2), batches, batches_b=other, rows={"ends": "last"})
