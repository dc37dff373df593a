"""What a probe keeps: a sample of the sequences that is read back, and measured as the model is on them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import xarray as xr
from models import Tokens, seeded
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rgfast
from rgfast.probing.sources import keep as module

B, T = 90, 7
GENERATOR = torch.Generator().manual_seed(2)
IDS = torch.randint(20, (B, T), generator=GENERATOR)
KEEP = torch.arange(T) < torch.randint(1, T + 1, (B,), generator=GENERATOR)[:, None]
ONE = 3 * T * 8 * 4  # bytes of a sequence: three layers, fp32


def probe(source, batches=None, **options):
    return rgfast.probe(source, batches, **{"progress": False, "route": "moments", **options})


def assert_same(found, want):
    assert set(found.dataset.data_vars) == set(want.dataset.data_vars)
    for name in want.dataset.data_vars:
        xr.testing.assert_equal(found.dataset[name], want.dataset[name])


def test_all_that_fits_is_kept_and_measured_as_it_was(tmp_path):
    model = seeded(Tokens)
    want = probe(model, {"input_ids": IDS}, keep=tmp_path / "kept")
    acts = rgfast.Activations(tmp_path / "kept")
    assert acts.layers == want.layers
    assert acts.ids == tuple(range(B))
    assert_same(probe(acts), want)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("source", ["mapping", "loader", "iterator"])
def test_a_sample_within_the_budget(tmp_path, source):
    model = seeded(Tokens)
    batches = {
        "mapping": {"input_ids": IDS},
        "loader": DataLoader(TensorDataset(IDS), batch_size=11),
        "iterator": iter(IDS.split(4)),
    }[source]
    probe(model, batches, keep=tmp_path / "kept", keep_bytes=20 * ONE + 5)
    acts = rgfast.Activations(tmp_path / "kept")
    assert len(acts) == 20
    assert list(acts.ids) == sorted(acts.ids)
    assert_same(probe(acts), probe(model, {"input_ids": IDS[list(acts.ids)]}))


def test_the_sample_depends_on_the_seed_alone(tmp_path):
    model = seeded(Tokens)
    found = {}
    for name, size, seed in (("a", 7, 0), ("b", 256, 0), ("c", 256, 1)):
        options = {"batch_size": size, "keep_seed": seed, "keep_bytes": 15 * ONE}
        probe(model, {"input_ids": IDS}, keep=tmp_path / name, **options)
        found[name] = rgfast.Activations(tmp_path / name)
    assert found["a"].ids == found["b"].ids != found["c"].ids
    one, other = (next(found[name].batches()) for name in "ab")
    assert all(torch.equal(one.layers[k], other.layers[k]) for k in one.layers)


def test_the_sample_is_uniform(tmp_path):
    model = seeded(Tokens)
    counts = torch.zeros(B)
    for seed in range(60):
        folder = tmp_path / str(seed)
        probe(model, {"input_ids": IDS}, keep=folder, keep_bytes=30 * ONE, keep_seed=seed, measures="cka")
        counts[list(rgfast.Activations(folder).ids)] += 1
    # Each is binomial with mean 20 and variance 40/3; their sum of squares is near chi-squared.
    chi = float(((counts - 20).square() / (40 / 3)).sum())
    assert 45 < chi < 145


def test_padding_hidden_tokens_and_places(tmp_path):
    model = seeded(Tokens)
    hidden = torch.rand(B, T, generator=GENERATOR) < 0.3
    batch = {"input_ids": IDS, "attention_mask": KEEP, "hidden": hidden}
    options = {"positions": [0, 2, "last"], "groups": 3}
    want = probe(model, batch, mask="hidden", keep=tmp_path / "a", **options)
    assert_same(probe(rgfast.Activations(tmp_path / "a"), mask="masked", **options), want)
    left = {"input_ids": IDS, "attention_mask": KEEP.flip(1)}
    want = probe(model, left, origin="token", keep=tmp_path / "b", **options)
    assert_same(probe(rgfast.Activations(tmp_path / "b"), origin="token", **options), want)


def test_batches_of_other_lengths_and_without_padding(tmp_path):
    model = seeded(Tokens)
    short = {"input_ids": IDS[:40, :5], "attention_mask": KEEP[:40, :5]}
    probe(model, [{"input_ids": IDS[40:]}, short], keep=tmp_path / "kept", keep_bytes=50 * ONE)
    acts = rgfast.Activations(tmp_path / "kept")
    assert set(acts.lengths) == {5, 7}
    tokens, keep = torch.zeros_like(IDS), torch.zeros_like(KEEP)
    tokens[:50], keep[:50] = IDS[40:], True
    tokens[50:, :5], keep[50:, :5] = IDS[:40, :5], KEEP[:40, :5]
    some = list(acts.ids)
    want = probe(model, {"input_ids": tokens[some], "attention_mask": keep[some]})
    assert_same(probe(acts), want)


def test_rows_stay_as_they_were_computed(tmp_path):
    model = seeded(Tokens).bfloat16()
    want = probe(model, {"input_ids": IDS}, keep=tmp_path / "kept")
    acts = rgfast.Activations(tmp_path / "kept")
    assert {x.dtype for x in next(acts.batches()).layers.values()} == {torch.bfloat16}
    assert_same(probe(acts), want)


def test_a_stack_that_hands_over_tiles(tmp_path):
    stack = rgfast.ResidualStack(width=6, depth=3, mixing="none")
    x = torch.randn(300, 4, 6, generator=GENERATOR)
    for route in ("moments", "samples"):
        want = probe(stack, x, route=route, keep=tmp_path / route, groups=2)
        assert_same(probe(rgfast.Activations(tmp_path / route), route=route, groups=2), want)


def test_a_store_is_made_smaller(tmp_path):
    names = [f"text {k}" for k in range(B)]
    rows = {"a": torch.randn(B, T, 8), "b": torch.randn(B, T, 8)}
    acts = rgfast.Activations({**rows, "attention_mask": KEEP}, ids=names)
    probe(acts, keep=tmp_path / "kept", keep_bytes=10_000)
    fewer = rgfast.Activations(tmp_path / "kept")
    assert 10 < len(fewer) < B
    assert set(fewer.ids) < set(names)
    kept = next(fewer.batches()).layers["b"]
    assert torch.equal(kept, rows["b"][[names.index(one) for one in fewer.ids]])


def test_what_is_dropped_is_deleted_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PENDING", 2 * ONE)
    most = []
    save = module.Keeper._save

    def watching(self, number, rows):
        save(self, number, rows)
        most.append(sum(x.stat().st_size for x in self._folder.glob("part-*")))

    monkeypatch.setattr(module.Keeper, "_save", watching)
    model = seeded(Tokens)
    tokens = torch.randint(20, (3000, T), generator=GENERATOR)
    probe(model, {"input_ids": tokens}, batch_size=20, keep=tmp_path / "kept", keep_bytes=30 * ONE)
    acts = rgfast.Activations(tmp_path / "kept")
    assert len(acts) == 30
    assert max(most) < 4 * 30 * ONE  # twice, and headers
    assert_same(probe(acts), probe(model, {"input_ids": tokens[list(acts.ids)]}))


def test_nothing_is_left_of_a_run_that_fails(tmp_path):
    def batches():
        yield IDS[:50]
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        probe(seeded(Tokens), batches(), keep=tmp_path / "kept")
    assert not list(tmp_path.iterdir())


KILLED = """
import sys, time, torch, rgfast
from models import Tokens, seeded
def batches():
    yield torch.zeros(300, 7, dtype=torch.int64)
    print("begun", flush=True)
    time.sleep(60)
from rgfast.probing.sources import keep
keep._PENDING = 1
rgfast.probe(seeded(Tokens), batches(), keep=sys.argv[1], progress=False)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process")
def test_what_a_killed_run_leaves_is_no_store(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "kept")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "kept").exists()
    (left,) = tmp_path.iterdir()
    assert list(left.glob("part-*"))
    with pytest.raises(ValueError, match=r"part of a store without activations\.json, which is written last"):
        rgfast.Activations(left)


def test_a_store_whose_files_do_not_fit_together(tmp_path):
    folder = tmp_path / "kept"
    probe(seeded(Tokens), {"input_ids": IDS}, keep=folder)
    with pytest.raises(ValueError, match=r"axes: .* has 'N T D', got 'T N D'"):
        rgfast.Activations(folder, "T N D")
    manifest = json.loads((folder / "activations.json").read_text())

    def refused(message, **changes):
        (folder / "activations.json").write_text(json.dumps({**manifest, **changes}))
        with pytest.raises(ValueError, match=message):
            rgfast.Activations(folder)

    refused("written by a newer rgfast", format_version=2)
    refused("is no list of activations", format="other")
    refused("ids must be one per sequence, got 1", ids=[3])
    refused("names and holds other layers", layers=["a"])
    refused(r"lacks part-000007\.safetensors", parts=["part-000007.safetensors"])
    (folder / "activations.json").write_text("{")
    with pytest.raises(ValueError, match=r"activations\.json is damaged"):
        rgfast.Activations(folder)


class Skips(nn.Module):
    """The second block runs every other time."""

    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.runs = 0

    def forward(self, x):
        x, self.runs = self.layer[0](x), self.runs + 1
        return self.layer[1](x) if self.runs % 2 else x


def test_what_cannot_be_kept(tmp_path):
    model = seeded(Tokens)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()

    def refused(message, batches=None, error=ValueError, of=model, **options):
        with pytest.raises(error, match=message):
            probe(of, {"input_ids": IDS} if batches is None else batches, **options)

    refused("keep must be a new or empty folder, and .*full is not: it holds files", keep=tmp_path / "full")
    refused("is not: it is a file", keep=tmp_path / "full" / "file")
    refused("keep must be the path of a folder, got int", keep=3, error=TypeError)
    refused("keep_bytes must be bytes or text", keep=tmp_path / "a", keep_bytes="much")
    refused("must hold at least 2 sequences of 672 B each, got 1", keep=tmp_path / "a", keep_bytes=1000)
    refused("goes on from a checkpoint", keep=tmp_path / "a", checkpoint=tmp_path / "b")
    batches = list(torch.randn(3, 20, 4))
    refused(
        r"keep: layer\.1 did not run in a forward",
        batches,
        of=Skips(),
        layers=["layer.0", "layer.1"],
        keep=tmp_path / "a",
    )
    with pytest.raises(TypeError, match="Probe has no option 'keep'"):
        rgfast.Probe(model, keep=tmp_path / "a")
    assert [x.name for x in tmp_path.iterdir()] == ["full"]
