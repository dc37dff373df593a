"""Views of rows=: each pools the rows that it selects and that count, as brute force on plain hooks does."""

import json

import matplotlib as mpl
import numpy as np
import pytest
import torch
from models import Block, Tokens, seeded
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rgfast
from rgfast.probing.estimators import samples
from rgfast.probing.spec import ProbeSpec

mpl.use("Agg")

B, T = 300, 7
GENERATOR = torch.Generator().manual_seed(4)
IDS = torch.randint(20, (B, T), generator=GENERATOR)
LENGTHS = torch.randint(0, T + 1, (B, 1), generator=GENERATOR)
KEEP = torch.arange(T) < LENGTHS
NOUNS = torch.rand(B, T, generator=GENERATOR) < 0.4
TAGS = torch.randint(5, (B, T), generator=GENERATOR)
KINDS = torch.arange(B) % 3
BATCH = {"input_ids": IDS, "attention_mask": KEEP, "is_noun": NOUNS, "tags": TAGS}
ROUTES = {"moments": 1e-10, "samples": 1e-6}  # and to what CKA and drift agree with brute force

ROWS = {
    "nouns": "is_noun",
    "rest": ~NOUNS,
    "tag 3": ("tags", 3),
    "tags 0 and 1": (lambda entries: entries["tags"], [0, 1]),
    "token 7": ("input_ids", 7),
    "kind 2": (KINDS.numpy(), 2),
    "some": (KINDS == 0).tolist(),
    "last": "last",
    "first": "first",
}


def ends(keep):
    """Each sequence's first and last position that counts, one by one."""
    first, last = torch.zeros_like(keep), torch.zeros_like(keep)
    for row, at in enumerate(keep):
        if at.any():
            where = at.nonzero()[:, 0]
            first[row, where[0]] = last[row, where[-1]] = True
    return first, last


def wanted(keep):
    first, last = ends(keep)
    found = {
        "nouns": NOUNS,
        "rest": ~NOUNS,
        "tag 3": TAGS == 3,
        "tags 0 and 1": TAGS < 2,
        "token 7": IDS == 7,
        "kind 2": (KINDS == 2)[:, None],
        "some": (KINDS == 0)[:, None],
        "last": last,
        "first": first,
    }
    return {name: mask & keep for name, mask in found.items()}


def hooked(model, ids=IDS):
    """The rows of the stream ``[B, T, D]`` by plain hooks."""
    rows = []
    handles = [model.layer[0].register_forward_pre_hook(lambda module, args: rows.append(args[0]))]
    handles += [
        block.register_forward_hook(lambda module, args, out: rows.append(out)) for block in model.layer
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return rows


def probe(batches=BATCH, model=None, **options):
    return rgfast.probe(model or seeded(Tokens), batches, progress=False, **options)


def assert_same(one, other, view, like, rtol=1e-9):
    """All that one result has in ``view`` is what the other has in ``like``."""
    for name in one.dataset.data_vars:
        if "view" in one.dataset[name].dims and not name.endswith("_bound"):
            got, want = (r.variable(name, v).values.astype(float) for r, v in ((one, view), (other, like)))
            np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol, err_msg=name)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("side", ["right", "left", "none"])
def test_every_kind_of_selection_is_brute_forces(route, side, kit):
    keep = {"right": KEEP, "left": KEEP.flip(1), "none": torch.ones_like(KEEP)}[side]
    batch = {**BATCH, "attention_mask": keep}
    if side == "none":
        del batch["attention_mask"]
    result = probe(batch, rows=ROWS, route=route, batch_size=70, pairs="all")
    assert result.views == ("position", "pooled", "mean_pooled", "flattened", *ROWS)
    stream = hooked(seeded(Tokens))
    for name, mask in wanted(keep).items():
        assert result.rows(name) == (int(mask.sum()),) * 2
        truth = kit.brute([x[mask] for x in stream])
        kit.assert_equal_to(truth, result.dataset, name, tol=ROUTES[route])
        sigma = torch.linalg.svdvals((x := stream[1][mask].double()) - x.mean(0))
        got = result.variable("singular_values", name).values[1, 0]
        np.testing.assert_allclose(got[: len(sigma)], sigma, rtol=1e-6, atol=1e-9 * float(sigma[0]))


@pytest.mark.parametrize("route", ROUTES)
def test_error_bars_and_targets_are_those_of_a_probe_of_these_rows(route):
    """The pooled view of a probe that takes all other rows for padding, error bars and R² included."""
    asked = {"route": route, "groups": 4, "targets": {"tag": TAGS, "number": torch.arange(B).double()}}
    result = probe(rows=ROWS, **asked)
    for name, mask in wanted(KEEP).items():
        alone = probe({**BATCH, "mine": mask}, padding="mine", **asked, views=["pooled"])
        assert_same(result, alone, name, "pooled", rtol=1e-9 if route == "moments" else 1e-6)
        assert np.isfinite(result.variable("effective_rank_se", name)).all()


@pytest.mark.parametrize("route", ROUTES)
def test_all_rows_are_the_pooled_view(route):
    result = probe(rows={"all": torch.ones(B, T, dtype=torch.bool)}, route=route, groups=3)
    assert_same(result, result, "all", "pooled", rtol=1e-9 if route == "moments" else 1e-6)


def test_a_single_selection_is_the_view_rows():
    result = probe(rows="is_noun", views=["pooled", "rows"])
    assert result.views == ("pooled", "rows")
    assert_same(result, probe(rows={"nouns": "is_noun"}), "rows", "nouns")
    assert probe(rows=("tags", 3), views=["rows"]).rows("rows")[0] == int(((TAGS == 3) & KEEP).sum())
    assert probe(rows="last", views=["rows"]).rows("rows")[0] == int(KEEP.any(1).sum())


@pytest.mark.parametrize("route", ROUTES)
def test_loaders_and_the_probe_of_ones_own_loop(route):
    model = seeded(Tokens)
    rows = {"nouns": "is_noun", "rest": ~NOUNS, "last": "last"}
    want = probe(rows=rows, route=route)
    loader = DataLoader(TensorDataset(IDS, KEEP, NOUNS), 64)
    batches = [{"input_ids": ids, "attention_mask": keep, "is_noun": nouns} for ids, keep, nouns in loader]
    for got in (probe(batches, rows=rows, route=route), probe(iter(batches), rows=rows, route=route)):
        for view in rows:
            assert_same(got, want, view, view)
    with rgfast.Probe(model, rows=rows, route=route, progress=False) as own, torch.no_grad():
        for batch in batches:
            own.note(is_noun=batch.pop("is_noun"))
            model(**batch)
    for view in rows:
        assert_same(own.result(), want, view, view)
    tuples = probe(loader, rows={"nouns": "input2"}, route=route)
    assert_same(tuples, want, "nouns", "nouns")


def test_bits_do_not_depend_on_batches():
    one, other = (
        probe(rows=ROWS, route="moments", batch_size=size, views=list(ROWS)).dataset for size in (300, 11)
    )
    assert one.drop_attrs().equals(other.drop_attrs())


def test_rows_move_with_the_first_token():
    batch = {**BATCH, "attention_mask": KEEP.flip(1)}
    one, other = (probe(batch, rows=ROWS, route="moments", origin=origin) for origin in ("token", "column"))
    for view in ROWS:
        assert_same(one, other, view, view)


@pytest.mark.parametrize("route", ROUTES)
def test_beside_hidden_tokens(route, kit):
    result = probe({**BATCH, "hidden": TAGS == 0}, rows={"nouns": "is_noun"}, mask="hidden", route=route)
    assert result.views[:2] == ("visible", "masked")
    mask = NOUNS & KEEP
    truth = kit.brute([x[mask] for x in hooked(seeded(Tokens))])
    kit.assert_equal_to(truth | {}, result.dataset, "nouns", tol=ROUTES[route])


@pytest.mark.parametrize("route", ROUTES)
def test_merge_save_and_load(route, tmp_path):
    asked = {"rows": {"nouns": "is_noun", "last": "last"}, "route": route, "groups": 4}
    parts = [{name: x[at] for name, x in BATCH.items()} for at in (slice(160), slice(160, B))]
    whole, one, other = probe(**asked), probe(parts[0], **asked), probe(parts[1], **asked)
    one.save(tmp_path / "one.nc")
    merged = rgfast.ProbeResult.load(tmp_path / "one.nc").merge(other)
    for view in whole.views:
        assert_same(merged, whole, view, view, rtol=1e-6)
    assert merged.dataset.attrs["route"] == route
    message = r"other must have the same views: .*'nouns', 'last'\), got .*'nouns'\)"
    with pytest.raises(ValueError, match=message):
        one.merge(probe(parts[1], **{**asked, "rows": {"nouns": "is_noun"}}))
    message = r"other must be of the same rows: .*is_noun.*, got .*tags"
    with pytest.raises(ValueError, match=message):
        one.merge(probe(parts[1], **{**asked, "rows": {"nouns": ("tags", 3), "last": "last"}}))


def test_rows_and_moments_merge():
    asked = {"rows": {"nouns": "is_noun", "last": "last"}}
    parts = [{name: x[at] for name, x in BATCH.items()} for at in (slice(160), slice(160, B))]
    one = probe(parts[0], route="samples", **asked)
    merged = one.merge(probe(parts[1], route="moments", **asked))
    for view in ("nouns", "last"):
        assert_same(merged, probe(route="moments", **asked), view, view)


@pytest.mark.parametrize("route", ROUTES)
def test_a_checkpoint_goes_on(route, tmp_path):
    asked = {"rows": ROWS, "route": route, "batch_size": 40, "checkpoint_every": 1}
    whole = probe(**asked)

    model, left = seeded(Tokens), [4]

    def stop(module, args):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    handle = model.embedding.register_forward_hook(lambda module, args, out: stop(module, args))
    with pytest.raises(KeyboardInterrupt):
        probe(model=model, checkpoint=tmp_path / "state", **asked)
    handle.remove()
    went_on = probe(checkpoint=tmp_path / "state", **asked)
    assert went_on.dataset.drop_attrs().equals(whole.dataset.drop_attrs())
    with pytest.raises(ValueError, match=r"checkpoint is of another probe: rows was .* now None; delete it"):
        probe(checkpoint=tmp_path / "state", **{**asked, "rows": None})


def test_what_outgrows_its_limit_is_summed_up(monkeypatch):
    monkeypatch.setattr(samples, "LIMIT", 200)
    model = seeded(Tokens, width=64)
    rows = {"nouns": "is_noun", "last": "last", "kind": (KINDS, 1)}
    got = probe(model=model, rows=rows, batch_size=50)
    assert got.dataset.attrs["route"] == "moments"
    want = probe(model=model, rows=rows, batch_size=50, route="moments")
    assert got.dataset.drop_attrs().equals(want.dataset.drop_attrs())


class Skips(Tokens):
    """Leaves out its second block in the first forward."""

    def stream(self, ids):
        x = self.layer[0](self.embedding(ids))
        self.forwards = getattr(self, "forwards", 0) + 1
        return x if self.forwards == 1 else self.layer[1](x)


def test_arrays_stay_in_order_if_a_layer_missed_the_first_batch(kit):
    rows = {"nouns": NOUNS, "last": "last"}
    result = probe(model=seeded(Skips), layers=["layer.0", "layer.1"], rows=rows, batch_size=100)
    stream = hooked(seeded(Tokens))
    mask, late = NOUNS & KEEP, torch.arange(B)[:, None] >= 100
    assert result.variable("n_by_layer", "nouns").values[:, 0].tolist() == [mask.sum(), (mask & late).sum()]
    want = [kit.ranks_of(stream[1][mask]), kit.ranks_of(stream[2][mask & late])]
    got = result.by_position("effective_rank", "nouns").values[:, 0]
    assert got == pytest.approx([each["effective_rank"] for each in want], rel=1e-9)


def test_a_stack_that_hands_over_tiles(kit):
    stack = rgfast.ResidualStack(width=6, depth=3, mixing="none", w2_scale=0.5)
    x = torch.randn(B, T, 6, generator=torch.Generator().manual_seed(2))
    truth = kit.stored(list(stack.blocks), x)
    for route, tol in ROUTES.items():
        result = probe(x, stack, rows={"nouns": NOUNS, "last": "last"}, route=route, batch_size=280)
        kit.assert_equal_to(kit.brute([y[NOUNS] for y in (x, *truth)]), result.dataset, "nouns", tol=tol)
        kit.assert_equal_to(kit.brute([y[:, -1] for y in (x, *truth)]), result.dataset, "last", tol=tol)


class Two(nn.Module):
    """An encoder and a decoder, each with padding of its own."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.encoder = nn.ModuleList([Block()])
        self.decoder = nn.ModuleList([Block()])

    def forward(self, input_ids, attention_mask, decoder_attention_mask):
        x = self.embedding(input_ids)
        return self.decoder[0](self.encoder[0](x))


def test_the_last_token_is_that_of_each_layers_padding(kit):
    model, theirs = seeded(Two), KEEP.flip(0)
    batch = {"input_ids": IDS, "attention_mask": KEEP, "decoder_attention_mask": theirs}
    result = probe(batch, model, layers=["encoder.0", "decoder.0"], rows={"last": "last", "nouns": NOUNS})
    with torch.no_grad():
        x = model.encoder[0](model.embedding(IDS))
        stream = [x, model.decoder[0](x)]
    for view, masks in (
        ("last", [ends(KEEP)[1], ends(theirs)[1]]),
        ("nouns", [NOUNS & KEEP, NOUNS & theirs]),
    ):
        want = [kit.ranks_of(x[mask])["effective_rank"] for x, mask in zip(stream, masks, strict=True)]
        assert result.by_position("effective_rank", view).values[:, 0] == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("groups", [1, 3])
def test_too_few_rows_are_noted(route, groups):
    none = torch.zeros(B, T, dtype=torch.bool)
    one = none.clone()
    one[int((LENGTHS[:, 0] > 2).nonzero()[0]), 0] = True
    options = {"groups": groups, "targets": {"tag": "tags"}} if groups > 1 else {}
    result = probe(rows={"none": none, "one": one}, route=route, **options)
    assert result.rows("none") == (0, 0)
    assert result.rows("one") == (1, 1)
    for view in ("none", "one"):
        assert np.isnan(result.variable("effective_rank", view)).all()
        assert np.isnan(result.variable("cka", view)).all()
    assert "the view 'none' has 0 rows that count, too few for any measure" in result.notes
    assert "the view 'one' has 1 row that count, too few for any measure" in result.notes
    assert np.isfinite(result.variable("effective_rank", "pooled")).all()


def test_what_is_asked_is_written_down():
    result = probe(rows={"nouns": "is_noun", "rest": ~NOUNS, "tag": ("tags", [3, 4]), "last": "last"})
    told = {"nouns": "is_noun", "rest": "an array", "tag": ["tags", [3, 4]], "last": "last"}
    assert result.provenance["rows"] == told
    assert "rows" not in probe().provenance
    assert "rows" not in ProbeSpec().to_json([])
    assert ProbeSpec(rows=lambda entries: entries["x"]).to_json([])["rows"] == {"rows": "a function"}
    assert ProbeSpec(rows=(KINDS, 1)).to_json([])["rows"] == {"rows": ["an array", [1]]}


def test_entries_that_the_model_takes_are_still_its_own(kit):
    """Tokens and padding may be asked for too."""

    class Any(Tokens):
        def forward(self, **entries):
            assert set(entries) == {"input_ids", "attention_mask"}
            return self.stream(entries["input_ids"])

    asked = {"nouns": "is_noun", "token 7": ("input_ids", 7), "kept": ("attention_mask", 1)}
    batch = {"input_ids": IDS, "attention_mask": KEEP.long(), "is_noun": NOUNS}
    result = probe(batch, seeded(Any), rows=asked)
    assert result.rows("pooled") == result.rows("kept") == (int(KEEP.sum()),) * 2
    assert result.rows("token 7")[0] == int(((IDS == 7) & KEEP).sum())


def test_of_shuffled_tokens_labels_stay_where_they_are():
    result = probe(rows={"tag": ("tags", 3)}, control="shuffled_tokens")
    assert result.rows("tag")[0] == int(((TAGS == 3) & KEEP).sum())


def test_state_is_planned_with_every_view():
    first = {name: x[:50] for name, x in BATCH.items()}
    plain, more = (rgfast.plan(seeded(Tokens), first, route="moments", rows=rows) for rows in (None, ROWS))
    assert more.state_bytes > plain.state_bytes
    with pytest.raises(ValueError, match=r"memory: .* raise memory= or take .*fewer selections in rows="):
        probe(rows=ROWS, route="moments", memory="2KiB")


def test_figures_page_and_flow_know_the_views(tmp_path):
    result = probe(rows={"nouns <b>": "is_noun", "a rather long name": ~NOUNS}, groups=2)
    assert "a rather long name" in str(result)
    assert result.flow("nouns <b>").view == "nouns <b>"
    result.plot_drift(views=["nouns <b>"])
    result.plot_cka(view="nouns <b>")
    result.plot_spectra(view="nouns <b>")
    colors = [line.get_color() for line in result.plot_rank().get_lines() if line.get_linestyle() == "-"]
    assert len({*colors}) == len(colors) == 5
    result.report(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "the rows that rows= selects as" in page
    assert "nouns <b>" not in page.split("<script")[0]


def test_a_monitor_takes_them():
    monitor = rgfast.Monitor(seeded(Tokens), BATCH, every=1, rows={"nouns": "is_noun", "rest": ~NOUNS})
    monitor.step(0)
    want = probe(rows={"nouns": "is_noun", "rest": ~NOUNS})
    got = monitor.result().by_step("effective_rank", "nouns").values
    np.testing.assert_array_equal(got.reshape(-1), want.order_parameter("nouns").values)


REFUSED = {
    "no selection": ({}, ValueError, "rows must hold at least one selection, got an empty mapping"),
    "a number": (3, TypeError, r"rows must be an array, the name of a batch entry, .* got int"),
    "an empty name": ({" ": NOUNS}, TypeError, "rows must have names of views, .* got ' '"),
    "a number as a name": ({3: NOUNS}, TypeError, "rows must have names of views, .* got 3"),
    "a view's name": ({"pooled": NOUNS}, ValueError, "rows must have names that no other view .* 'pooled'"),
    "floats": ({"n": NOUNS.float()}, TypeError, r"rows\['n'\] must be bool, True for .* got float32$"),
    "labels alone": (
        {"n": TAGS},
        TypeError,
        r"rows\['n'\] must be bool, .* got int64; labels are asked for as a pair \(labels, 3\)",
    ),
    "a label of bool": (
        {"n": (NOUNS, 1)},
        TypeError,
        r"rows\['n'\] asks for a label, so it must hold whole numbers, got bool",
    ),
    "a word as a label": (
        {"n": ("tags", "NOUN")},
        TypeError,
        r"rows\['n'\] must have a whole number or a list of them as its label, got 'NOUN'",
    ),
    "True as a label": ({"n": ("tags", True)}, TypeError, "as its label, got True"),
    "half a label": ({"n": ("tags", [1, 0.5])}, TypeError, r"as its label, got \[1, 0.5\]"),
    "no label": ({"n": ("tags", [])}, TypeError, r"as its label, got \[\]"),
    "three in a pair": (
        {"n": ("tags", 1, 2)},
        TypeError,
        r"must be a pair \(selection, label\), got a tuple",
    ),
    "a label of the last": (("last", 1), ValueError, "rows asks for a label, and 'last' is each sequence's"),
    "three axes": (
        {"n": NOUNS[..., None]},
        ValueError,
        r"rows\['n'\] must be \[n, T\] or \[n\] .* \(300, 7, 1\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_work(name):
    rows, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        ProbeSpec(rows=rows)


IN_BATCHES = {
    "no such entry": (
        {"n": "verbs"},
        ValueError,
        r"rows\['n'\]: there is no entry 'verbs' in the batch \(input_ids",
    ),
    "a short array": (
        {"n": NOUNS[:250]},
        ValueError,
        r"rows\['n'\] must have a row for every sequence, got 250 rows and sequence number 255",
    ),
    "fewer positions": (
        {"n": NOUNS[:, :5]},
        ValueError,
        r"rows\['n'\] must be \[256, 7\] or \[256\] for this batch, got shape \(256, 5\)",
    ),
    "an entry of floats": (
        {"n": lambda entries: entries["is_noun"].double()},
        TypeError,
        r"rows\['n'\] must be bool, .* got float64",
    ),
    "an entry of labels": ({"n": "tags"}, TypeError, r"rows\['n'\] must be bool, .* got int64; labels are"),
    "a sparse entry": (
        {"n": lambda entries: entries["is_noun"].to_sparse()},
        TypeError,
        r"rows\['n'\] must be dense, got torch.sparse_coo",
    ),
}


@pytest.mark.parametrize("name", IN_BATCHES)
def test_refused_with_the_batch(name):
    rows, kind, message = IN_BATCHES[name]
    with pytest.raises(kind, match=message):
        probe(rows=rows)


def test_nothing_of_a_refused_batch_is_added():
    model = seeded(Tokens)
    with rgfast.Probe(model, rows="is_noun", route="moments", progress=False) as own:
        own.run({name: x[:100] for name, x in BATCH.items()})
        with pytest.raises(TypeError, match="rows must be bool"):
            own.run({**{name: x[100:] for name, x in BATCH.items()}, "is_noun": TAGS[100:]})
        assert own.result().dataset.attrs["sequences"] == 100


def test_arrays_beside_a_loader_that_shuffles_are_refused():
    loader = DataLoader(TensorDataset(IDS, KEEP), 64, shuffle=True)
    message = (
        r"rows\['n'\] must be in the order of the sequences, and the loader shuffles them .* hold it and"
    )
    with pytest.raises(ValueError, match=message):
        probe(loader, rows={"n": NOUNS})


def test_views_that_do_not_fit_rows_are_refused():
    with pytest.raises(ValueError, match=r"views must have a view of rows= \(nouns\), got pooled"):
        ProbeSpec(rows={"nouns": NOUNS}, views=["pooled"])
    with pytest.raises(ValueError, match=r"views must be among visible, .* flattened, nouns, got 'verbs'"):
        ProbeSpec(rows={"nouns": NOUNS}, views=["verbs"])
    with pytest.raises(ValueError, match=r"views must be among visible, .* flattened, got 'nouns'"):
        ProbeSpec(views=["nouns"])


def test_layers_of_other_positions_are_refused():
    class Reduced(Tokens):
        def __init__(self):
            super().__init__()
            self.pool = nn.AdaptiveAvgPool1d(3)

        def forward(self, input_ids, attention_mask=None):
            return self.pool(self.stream(input_ids).mT).mT

    layers = ["layer.0", "pool"]
    axes = {"pool": "N D T"}
    message = (
        r"rows\['n'\] selects rows by position, and the layers differ .* layer.0 has 7, pool has 3; probe"
    )
    with pytest.raises(ValueError, match=message):
        probe({"input_ids": IDS}, seeded(Reduced), layers=layers, axes=axes, rows={"n": NOUNS})


def test_a_result_without_rows_is_as_before():
    plan = json.loads(probe().dataset.attrs["plan"])
    assert plan["rows"] == []
