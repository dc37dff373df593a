"""Checkpoints of rows: a run that goes on has the bits of one that never stopped, whatever it held."""

import json

import numpy as np
import pytest
import torch
from test_probe_rows import CASES, Model, names, normal, whole

import rgfast
from rgfast.probing import checkpoint as checkpoints
from rgfast.probing.estimators import samples
from rgfast.probing.estimators.rows import Rows


class Stop(Exception):
    pass


def stopping(batches, after):
    yield from batches[:after]
    raise Stop


def probed(model, batches, path=None, **options):
    given = {"layers": names(model), "route": "samples", "progress": False, "checkpoint_every": 1, **options}
    return rgfast.probe(model, batches, checkpoint=path, **given)


def stopped(model, batches, path, after, **options):
    with pytest.raises(Stop):
        probed(model, stopping(batches, after), path, **options)
    return checkpoints.read(path)


def assert_same(got, want):
    attrs = [{**one.dataset.attrs, "provenance": {**one.provenance, "created": ""}} for one in (got, want)]
    assert attrs[0] == attrs[1]
    for name in want.dataset.data_vars:
        np.testing.assert_array_equal(got.dataset[name], want.dataset[name], err_msg=name)
    assert set(got.moments) == set(want.moments)
    for name, value in want.moments.items():
        np.testing.assert_array_equal(got.moments[name], value, err_msg=name)


def hidden(batches):
    generator = torch.Generator().manual_seed(8)
    return [{**b, "hidden": torch.rand(b["x"].shape[:2], generator=generator) < 0.3} for b in batches]


RUNS = {
    "plain": (*CASES["more rows than features"], {}),
    "wide": (*CASES["more features than rows"], {"pairs": "all"}),
    "padding": (*CASES["padding"], {"groups": 3}),
    "lengths": (*CASES["lengths differ"], {"positions": [0, 4]}),
    "hidden": (CASES["padding"][0], hidden(CASES["padding"][1]), {"mask": "hidden"}),
    "bf16": (Model(24, 24).bfloat16(), whole(normal(90, 4, 24).bfloat16(), 25), {}),
    "fp16": (Model(24, 24).half(), whole(normal(90, 4, 24).half(), 25), {"views": ["flattened"]}),
    "fp64": (Model(12, 12).double(), whole(normal(90, 4, 12).double(), 25), {}),
    "targets": (
        Model(12, 12),
        [
            {"x": x, "v": x[..., :2].double().sin(), "k": torch.arange(len(x)) % 3}
            for x in normal(90, 4, 12).split(25)
        ],
        {"targets": {"v": "v", "k": "k", "s": normal(90, 2, seed=3)}, "groups": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_goes_on_to_the_same_bits(name, after, tmp_path):
    model, batches, options = RUNS[name]
    path, want = tmp_path / "run.checkpoint", probed(model, batches, **options)
    header, arrays = stopped(model, batches, path, after, **options)
    assert Rows.is_state(arrays)
    assert header["batches"] == after
    got = probed(model, batches, path, **options)
    assert got.dataset.attrs["route"] == "samples"
    assert_same(got, want)
    assert_same(probed(model, iter(batches), path, **options), want)  # all is in the checkpoint now


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_rows_that_outgrow_the_limit_after_a_stop(after, tmp_path, monkeypatch):
    model, batches, options = RUNS["targets"]
    monkeypatch.setattr(samples, "LIMIT", 60)
    options = {**options, "route": "auto"}
    want = probed(model, batches, **options)
    assert want.dataset.attrs["route"] == "moments"
    _, arrays = stopped(model, batches, tmp_path / "c", after, **options)
    assert Rows.is_state(arrays) == (after < 3)
    assert_same(probed(model, batches, tmp_path / "c", **options), want)


def test_rows_that_outgrow_memory_do_so_wherever_a_run_stopped(tmp_path):
    model, batches = Model(24, 24).bfloat16(), whole(normal(160, 4, 24).bfloat16(), 15)
    options = {
        "views": ["position"], "positions": [0], "pairs": (), "route": "auto", "memory": 40_000,
        "measures": ["effective_rank"],
    }  # fmt: skip
    want = probed(model, batches, **options)
    assert want.dataset.attrs["route"] == "moments"
    once, again = (
        [Rows.is_state(stopped(model, batches, path, k, **options)[1]) for k, path in enumerate(paths, 1)]
        for paths in ([tmp_path / str(k) for k in range(1, 11)], [tmp_path / "again"] * 10)
    )
    assert once == again == sorted(once, reverse=True)
    assert 2 < sum(once) < 10
    assert_same(probed(model, batches, tmp_path / "again", **options), want)


def test_nan_leaves_the_last_good_checkpoint(tmp_path):
    model, batches = CASES["more rows than features"]
    bad = [{"x": batch["x"].clone()} for batch in batches]
    bad[2]["x"][3, 1, 2] = torch.nan
    match = r"1 NaN or infinite values in layer 0 at position 1 \(layers.0:input, sequences 60 to 89\)"
    with pytest.raises(ValueError, match=match):
        probed(model, bad, tmp_path / "c")
    assert checkpoints.read(tmp_path / "c")[0]["batches"] == 2
    assert_same(probed(model, batches, tmp_path / "c"), probed(model, batches))


def test_a_checkpoint_of_moments_goes_on_as_moments(tmp_path):
    """What 0.1 wrote: format 1, and nothing but moments."""
    model, batches = CASES["more rows than features"]
    path, want = tmp_path / "c", probed(model, batches, route="moments")
    header, arrays = stopped(model, batches, path, 2, route="moments")
    assert not Rows.is_state(arrays)
    old = {**header, "format_version": 1, "first": None}
    with path.open("wb") as file:
        np.savez(file, header=np.frombuffer(json.dumps(old).encode(), dtype=np.uint8), **arrays)
    with pytest.raises(
        ValueError, match="route: 'samples' cannot be taken, since the checkpoint is of moments"
    ):
        probed(model, batches, path)
    assert_same(probed(model, batches, path, route="auto"), want)


def test_rows_of_a_checkpoint_are_summed_up_if_moments_are_asked_for(tmp_path):
    model, batches = CASES["more rows than features"]
    stopped(model, batches, tmp_path / "c", 2)
    want = probed(model, batches, route="moments")
    assert_same(probed(model, batches, tmp_path / "c", route="moments"), want)


def test_notes_survive_a_stop(tmp_path):
    model, x = CASES["more rows than features"][0], normal(100, 5, 12)
    batches = [{"x": part, "pad_mask": torch.ones(len(part), 5)} for part in x.split(30)]
    want = probed(model, batches, padding=None)
    stopped(model, batches, tmp_path / "c", 2, padding=None)
    assert probed(model, batches, tmp_path / "c", padding=None).notes == want.notes


def test_outputs_that_the_model_reuses_are_kept_after_a_stop(tmp_path):
    """A model that writes its output to one buffer, which shows from the third batch on."""

    class Reusing(Model):
        def forward(self, x):
            out = super().forward(x)
            if not hasattr(self, "buffer") or self.buffer.shape != out.shape:
                self.buffer = torch.empty_like(out)
            return self.buffer.copy_(out)

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Reusing(8, 8), Reusing(8, 8)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    batches = whole(normal(120, 3, 8), 20)
    want = probed(Outer(), batches, route="moments")
    for after in (1, 2, 3, 5):
        path = tmp_path / str(after)
        stopped(Outer(), batches, path, after)
        got = probed(Outer(), batches, path)
        np.testing.assert_allclose(got.dataset.effective_rank, want.dataset.effective_rank, rtol=1e-9)
