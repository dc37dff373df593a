"""Our own stack hands its layers over a tile at a time: the numbers of hooks, and nothing is stored."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import rgfast
from rgfast.probing.capture import watcher


def model_of(mixing):
    torch.manual_seed(0)
    if mixing == "model":
        return rgfast.MaskedTokenModel(states=4, length=5, width=8, depth=3, mixing="window", w2_scale=0.7)
    return rgfast.ResidualStack(8, 3, mixing=mixing, length=5, w2_scale=0.7)


def batches_of(mixing):
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(300, 5, generator=generator) < 0.4
    if mixing == "model":
        return {"tokens": torch.randint(5, (300, 5), generator=generator), "mask": mask}
    return {"x": torch.randn(300, 5, 8, generator=generator), "mask": mask}


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("mixing", ["none", "flat", "mixer", "model"])
def test_the_numbers_are_those_of_hooks(monkeypatch, mixing, groups):
    model, batches = model_of(mixing), batches_of(mixing)
    options = {"mask": "mask", "groups": groups, "progress": False, "batch_size": 200}
    tiled = rgfast.probe(model, batches, **options).dataset
    seen = []
    monkeypatch.setattr(watcher, "tile_streamer", lambda *args: seen.append(args))
    hooked = rgfast.probe(model, batches, **options).dataset
    assert seen
    for name in hooked.data_vars:
        np.testing.assert_allclose(
            tiled[name].values, hooked[name].values, rtol=1e-6, atol=1e-9, err_msg=name
        )


def test_targets_follow_their_tiles(monkeypatch):
    model, batches = model_of("none"), batches_of("none")
    labels = torch.randint(3, (300, 5), generator=torch.Generator().manual_seed(2))
    options = {"targets": {"label": labels.numpy()}, "progress": False, "batch_size": 200}
    tiled = rgfast.probe(model, batches, **options).dataset
    monkeypatch.setattr(watcher, "tile_streamer", lambda *args: None)
    hooked = rgfast.probe(model, batches, **options).dataset
    np.testing.assert_allclose(tiled.target_r2.values, hooked.target_r2.values, rtol=1e-6, atol=1e-9)


def test_a_stack_that_runs_twice_is_refused():
    stack = model_of("none")
    twice = torch.nn.Sequential(stack, stack)
    with pytest.raises(ValueError, match="ran twice in one forward"):
        rgfast.probe(twice, torch.randn(20, 5, 8), layers=["0.blocks.0:input", "0.blocks.*"], progress=False)
    assert torch.equal(stack(torch.ones(2, 5, 8)), stack(torch.ones(2, 5, 8)))


def test_other_layers_are_hooked():
    stack = model_of("none")
    result = rgfast.probe(stack, torch.randn(20, 5, 8), layers=["blocks.1"], progress=False)
    assert list(result.layers) == ["blocks.1"]


def test_no_activation_is_stored():
    """One batch whose layers would take 200 MiB: the probe holds a tile of them."""
    code = """
import resource
import torch
import rgfast

torch.set_num_threads(1)
stack = rgfast.ResidualStack(64, 24, hidden=64, mixing="none", w2_scale=0.5)
x = torch.randn(1 << 14, 2, 64)
options = {"progress": False, "views": ["position"], "measures": "participation_ratio", "pairs": []}
rgfast.probe(stack, x[:256], batch_size=256, **options)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rgfast.probe(stack, x, batch_size=len(x), **options)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 64 << 20
