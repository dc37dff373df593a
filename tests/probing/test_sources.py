"""Activations of every source are measured as the model is that they were saved from."""

import os
import random

import numpy as np
import pytest
import torch
import xarray as xr
from models import Tokens, seeded
from safetensors.torch import save_file

import rgfast

B, T, D = 60, 7, 8
GENERATOR = torch.Generator().manual_seed(1)
IDS = torch.randint(20, (B, T), generator=GENERATOR)
LENGTHS = torch.randint(1, T + 1, (B,), generator=GENERATOR)
KEEP = torch.arange(T) < LENGTHS[:, None]


@pytest.fixture
def model():
    return seeded(Tokens)


@pytest.fixture
def saved(model):
    """The stream of the model by layer, in the order of the layers."""
    with torch.no_grad():
        rows = [model.embedding(IDS)]
        for block in model.layer:
            rows.append(block(rows[-1]))
    return {f"layer_{k + 8}": x for k, x in enumerate(rows)}  # 8, 9, 10: no alphabetical order


def probe(source, batches=None, **options):
    return rgfast.probe(source, batches, progress=False, **options)


def assert_same(found, want, ignored=()):
    """All numbers of two results are the same bits."""
    assert set(found.dataset.data_vars) == set(want.dataset.data_vars)
    for name in want.dataset.data_vars:
        one, other = (r.dataset[name].drop_vars("layer_name", errors="ignore") for r in (found, want))
        xr.testing.assert_equal(one, other)


def npy_folder(folder, saved, **more):
    for name, x in [*saved.items(), *more.items()]:
        np.save(folder / f"{name}.npy", x.numpy() if isinstance(x, torch.Tensor) else x)
    return folder


def layer_files(folder, saved, **more):
    for name, x in saved.items():
        save_file({"hidden": x.contiguous(), **more}, folder / f"{name}.safetensors")
    return folder


def batch_files(folder, saved, sizes=(10, 1, 30, 19), **more):
    at = 0
    for number, size in enumerate(sizes):
        part = {name: x[at : at + size].contiguous() for name, x in {**saved, **more}.items()}
        save_file(part, folder / f"batch{number + 8}.safetensors")
        at += size
    return folder


def request_files(folder, saved, lengths=LENGTHS, stacked=True):
    for k in range(B):
        n = int(lengths[k])
        one = {name: x[k, :n].contiguous() for name, x in saved.items()}
        if stacked:
            one = {"hidden_states": torch.stack(list(one.values()), 1)}
        save_file({"token_ids": IDS[k, :n].contiguous(), **one}, folder / f"cmpl-{k}.safetensors")
    return folder


SOURCES = {
    "a mapping": lambda saved, path: rgfast.Activations(saved, "N T D"),
    "arrays": lambda saved, path: rgfast.Activations({k: x.numpy() for k, x in saved.items()}),
    "positions first": lambda saved, path: rgfast.Activations(
        {k: x.transpose(0, 1) for k, x in saved.items()}, "T N D"
    ),
    "features second": lambda saved, path: rgfast.Activations(
        {k: x.transpose(1, 2).contiguous() for k, x in saved.items()}, "N D T"
    ),
    "axes by name": lambda saved, path: rgfast.Activations(
        {k: x.transpose(0, 1) if k == "layer_9" else x for k, x in saved.items()},
        {"layer_9": "T N D", "layer_*": "N T D"},
    ),
    "one array": lambda saved, path: rgfast.Activations(torch.stack([*saved.values()]), "L N T D"),
    "layers inside": lambda saved, path: rgfast.Activations(torch.stack([*saved.values()], 2), "N T L D"),
    "a list": lambda saved, path: rgfast.Activations(
        [{k: x[a : a + 13] for k, x in saved.items()} for a in range(0, B, 13)], "N T D"
    ),
    ".npy": lambda saved, path: rgfast.Activations(npy_folder(path, saved), "N T D"),
    ".npy in another order": lambda saved, path: rgfast.Activations(
        npy_folder(path, {k: np.asfortranarray(x.numpy()) for k, x in saved.items()})
    ),
    ".npy of other bytes": lambda saved, path: rgfast.Activations(
        npy_folder(path, {k: x.numpy().astype(">f4") for k, x in saved.items()})
    ),
    "a file per layer": lambda saved, path: rgfast.Activations(layer_files(path, saved), files="layers"),
    "a file per batch": lambda saved, path: rgfast.Activations(batch_files(path, saved), "N T D"),
    "a file per request": lambda saved, path: rgfast.Activations(
        request_files(path, saved, torch.full((B,), T))
    ),
    "one file": lambda saved, path: rgfast.Activations(batch_files(path, saved, (B,)) / "batch8.safetensors"),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("route", ["moments", "samples"])
def test_every_source_is_measured_as_its_model_bit_for_bit(model, saved, tmp_path, source, route):
    acts = SOURCES[source](saved, tmp_path)
    want = probe(model, {"input_ids": IDS}, route=route, pairs="all")
    assert (len(acts), len(acts.layers)) == (B, 3)
    assert acts.lengths.tolist() == [T] * B
    assert set(acts.widths.values()) == {D}
    assert_same(probe(acts, route=route, pairs="all", batch_size=17), want)


@pytest.mark.parametrize("stacked", [True, False], ids=["hidden_states", "by layer"])
def test_requests_of_different_lengths_are_padded_and_padding_does_not_count(model, saved, tmp_path, stacked):
    acts = rgfast.Activations(request_files(tmp_path, saved, stacked=stacked))
    assert acts.lengths.tolist() == LENGTHS.tolist()
    assert acts.is_ragged
    want = probe(
        model,
        {"input_ids": IDS, "attention_mask": KEEP},
        positions=[0, 2, "last"],
        route="moments",
        groups=3,
    )
    for size in (7, 256):
        found = probe(acts, positions=[0, 2, "last"], route="moments", groups=3, batch_size=size)
        assert_same(found, want)


def test_a_mask_inside_requests_counts_too(model, saved):
    some = KEEP & (torch.rand(B, T, generator=GENERATOR) < 0.8)
    some[:, 0] = True
    parts = []
    for k in range(B):
        n = int(LENGTHS[k])
        one = {name: x[k, :n] for name, x in saved.items()}
        parts.append({"token_ids": IDS[k, :n], "key_padding_mask": ~some[k, :n], **one})
    want = probe(model, {"input_ids": IDS, "attention_mask": some}, route="moments")
    acts = rgfast.Activations(parts)
    assert torch.equal(torch.cat([batch.keep for batch in acts.batches(9)]), some)
    assert_same(probe(acts, route="moments"), want)
    with pytest.raises(
        ValueError, match="must have one padding mask, got key_padding_mask, src_padding_mask"
    ):
        rgfast.Activations([{**part, "src_padding_mask": part["key_padding_mask"]} for part in parts])


def test_last_is_each_requests_own(tmp_path, saved, kit):
    acts = rgfast.Activations(request_files(tmp_path, saved))
    found = probe(acts, positions=["last"], views=["position"])
    own = [x[torch.arange(B), LENGTHS - 1] for x in saved.values()]
    kit.assert_equal_to(kit.brute(own), found.dataset, "position", T - 1)


def test_batches_that_differ_in_length_need_what_confirms_it(model, saved, tmp_path):
    short = {k: x[:20, :5] for k, x in saved.items()}
    long = {k: x[20:] for k, x in saved.items()}
    parts = [
        {**short, "attention_mask": KEEP[:20, :5]},
        {**long, "attention_mask": KEEP[20:]},
    ]
    for number, part in enumerate(parts):
        save_file({k: x.contiguous() for k, x in part.items()}, tmp_path / f"{number}.safetensors")
    keep = KEEP.clone()
    keep[:20, 5:] = False
    want = probe(model, {"input_ids": IDS, "attention_mask": keep}, route="moments")
    assert_same(probe(rgfast.Activations(tmp_path), route="moments"), want)
    with pytest.raises(ValueError, match=r"gives activations\[0\] 5 positions and activations\[1\] 7, which"):
        rgfast.Activations([short, long], "N T D")


def test_entries_go_by_name_to_padding_mask_and_targets(model, saved):
    hidden = torch.rand(B, T, generator=GENERATOR) < 0.4
    labels = torch.arange(B) % 3
    options = {"mask": "hidden", "targets": {"label": "label"}, "padding": "counts", "groups": 4}
    entries = {"hidden": hidden, "label": labels, "counts": KEEP.long()}
    want = probe(model, {"input_ids": IDS, **entries}, **options)
    acts = rgfast.Activations({**saved, **entries}, "N T D")
    assert set(acts.entries) == set(entries)
    assert_same(probe(acts, **options), want)
    options = {"mask": lambda e: e["hidden"], "targets": {"label": labels}, "origin": "token"}
    want = probe(model, {"input_ids": IDS, "hidden": hidden}, **options)
    assert_same(probe(acts, **options), want)


def test_layers_are_chosen_by_name_index_and_pattern(saved):
    acts = rgfast.Activations({f"stack.{k}": x for k, x in saved.items()})
    for layers in (["stack.layer_10", "stack.layer_8"], [2, 0], [-1, re_of("8")]):
        assert probe(acts, layers=layers).layers == ("stack.layer_10", "stack.layer_8")
    assert probe(acts, layers="stack.*").layers == acts.layers
    assert probe(acts, layers="re:.*_1.").layers == ("stack.layer_10",)
    only = next(acts.batches(5, ["stack.layer_9"]))
    assert list(only.layers) == ["stack.layer_9"]


def re_of(text):
    import re

    return re.compile(f".*_{text}")


def test_bf16_is_read_as_it_is(saved, tmp_path):
    half = {k: x.bfloat16() for k, x in saved.items()}
    acts = rgfast.Activations(batch_files(tmp_path, half))
    batch = next(acts.batches())
    assert all(torch.equal(batch.layers[k], half[k]) for k in half)
    assert_same(probe(acts), probe(rgfast.Activations({k: x.float() for k, x in half.items()})))


def test_the_order_is_natural_whatever_a_folder_lists(saved, tmp_path, monkeypatch):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder, seed in ((first, 0), (second, 1)):
        folder.mkdir()
        batch_files(tmp_path, saved, (5,) * 12)
        files = sorted(tmp_path.glob("*.safetensors"))
        random.Random(seed).shuffle(files)
        for file in files:
            file.rename(folder / file.name)
    listed = os.listdir

    def shuffled(path):
        names = listed(path)
        random.Random(7).shuffle(names)
        return names

    want = rgfast.Activations(first)
    monkeypatch.setattr(os, "listdir", shuffled)
    found = rgfast.Activations(second)
    for one, other in zip(want.batches(11), found.batches(11), strict=True):
        assert all(torch.equal(one.layers[k], other.layers[k]) for k in saved)
    whole = torch.cat([batch.layers["layer_9"] for batch in found.batches(11)])
    assert torch.equal(whole, saved["layer_9"])


def test_ids_travel_with_the_result(saved, tmp_path):
    names = [f"text {k}" for k in range(B)]
    acts = rgfast.Activations(saved, ids=names)
    assert acts.ids == tuple(names)
    found = probe(acts)
    found.save(tmp_path / "result.nc")
    assert rgfast.ProbeResult.load(tmp_path / "result.nc").ids == tuple(names)
    first = probe(rgfast.Activations({k: x[:30] for k, x in saved.items()}, ids=range(30)), route="moments")
    second = probe(
        rgfast.Activations({k: x[30:] for k, x in saved.items()}, ids=range(30, B)), route="moments"
    )
    both = first.merge(second)
    assert both.ids == tuple(range(B))
    np.testing.assert_allclose(both.dataset.effective_rank, found.dataset.effective_rank, rtol=1e-9)
    with pytest.raises(ValueError, match=r"other must be of other sequences, and both have 0 \(ids\)"):
        first.merge(first)
    assert probe(rgfast.Activations(saved)).ids is None


def test_ids_of_requests_are_their_files_and_give_their_order(saved, tmp_path):
    acts = rgfast.Activations(request_files(tmp_path, saved))
    assert acts.ids == tuple(f"cmpl-{k}" for k in range(B))
    order = [f"cmpl-{k}" for k in reversed(range(B))]
    turned = rgfast.Activations(tmp_path, ids=order)
    assert turned.ids == tuple(order)
    assert turned.lengths.tolist() == acts.lengths.tolist()[::-1]


def test_ids_are_read_from_the_files(saved, tmp_path):
    numbers = torch.arange(100, 100 + B)
    batch_files(tmp_path, saved, ids=numbers)
    assert rgfast.Activations(tmp_path).ids == tuple(numbers.tolist())
    assert rgfast.Activations({**saved, "key": numbers}, ids="key").ids == tuple(numbers.tolist())
    folder = tmp_path / "npy"
    folder.mkdir()
    npy_folder(folder, saved, ids=np.array([f"é{k}" for k in range(B)]))
    assert rgfast.Activations(folder).ids[-1] == f"é{B - 1}"


def test_batches_are_labelled_and_bounded(saved):
    acts = rgfast.Activations({**saved, "attention_mask": KEEP}, ids=range(B))
    batches = list(acts.batches(25))
    assert [len(batch) for batch in batches] == [25, 25, 10]
    assert [batch.start for batch in batches] == [0, 25, 50]
    assert batches[1].ids == tuple(range(25, 50))
    assert torch.equal(torch.cat([batch.keep for batch in batches]), KEEP)
    assert torch.equal(batches[2].entries["attention_mask"], KEEP[50:])
    assert repr(acts) == "Activations of 60 sequences, 3 layers, 7 positions (39.4 KiB)"


def test_a_checkpoint_goes_on(saved, tmp_path):
    whole = probe(rgfast.Activations(saved), route="moments", batch_size=10)
    path = tmp_path / "run.checkpoint"
    acts = rgfast.Activations(saved)

    class Stop(Exception):
        pass

    batches = rgfast.Activations.batches

    def stopping(self, size=256, layers=None, **some):
        for number, batch in enumerate(batches(self, size, layers, **some)):
            if number == 4:
                raise Stop
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rgfast.Activations, "batches", stopping)
        with pytest.raises(Stop):
            probe(acts, batch_size=10, checkpoint=path, checkpoint_every=2)
    assert_same(probe(acts, batch_size=10, checkpoint=path), whole)
    other = rgfast.Activations({k: x + 1 for k, x in saved.items()})
    with pytest.raises(ValueError, match="batches must be those that checkpoint"):
        probe(other, batch_size=10, checkpoint=path)


def test_maps_and_objects_are_read_in_parts(saved, tmp_path):
    npy_folder(tmp_path, saved)
    maps = {k: np.load(tmp_path / f"{k}.npy", mmap_mode="r") for k in saved}

    class Lazy:
        """Knows one slice of its first axis, as readers of other libraries may."""

        def __init__(self, x):
            self.x, self.shape, self.dtype, self.parts = x, tuple(x.shape), np.float32, []

        def __getitem__(self, part):
            assert isinstance(part, slice)
            self.parts.append(part)
            return self.x[part].numpy()

    lazy = {k: Lazy(x) for k, x in saved.items()}
    want = probe(rgfast.Activations(saved))
    assert_same(probe(rgfast.Activations(maps)), want)
    assert_same(probe(rgfast.Activations(lazy)), want)
    assert [len(x.parts) for x in lazy.values()] == [1, 1, 1]


def test_feature_maps_and_pooled_vectors(saved):
    maps = {"a": torch.randn(B, 3, 4, 5), "b": torch.randn(B, 3, 4, 5)}
    acts = rgfast.Activations(maps, "N D H W")
    assert acts.lengths.tolist() == [20] * B
    assert torch.equal(next(acts.batches()).layers["a"], maps["a"].flatten(2).transpose(1, 2))
    acts = rgfast.Activations({"a": torch.randn(B, 9), "b": torch.randn(B, 4)})
    assert acts.widths == {"a": 9, "b": 4}
    assert probe(acts).views == ("pooled",)
    stages = rgfast.Activations({"a": torch.randn(B, 3, 4, 4), "b": torch.randn(B, 6, 2, 2)}, "N D H W")
    assert set(probe(stages).views) == {"pooled", "mean_pooled"}
