"""No forward waits for the device: what must be known on the host is read at the end or at intervals.

The CPU stands in for a device here (`waiting._EVERYWHERE`), and a dispatch mode sees every operator.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rgfast
from rgfast.probing.estimators import moments as estimator
from rgfast.runtime import waiting

READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique"}
# After these the first blocks have been summed up, and no count of rows doubles before the last.
BEFORE, LAST = 9, 14
BATCH, LENGTH, WIDTH = 64, 5, 6


class Waits(TorchDispatchMode):
    """The operators that make a host wait for a device, or would on one."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in READS:
            self.found.append(name)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            chosen = [at for at in args[1] if at is not None]
            if any(at.dtype in (torch.bool, torch.uint8) for at in chosen):
                self.found.append(f"{name} with a mask")
        # A number is filled in, which takes no copy; a list is copied from the host.
        made = name == "lift_fresh" and args[0].dim()
        if made or (name == "_to_copy" and (kwargs or {}).get("device") is not None):
            self.found.append(f"{name} between devices")
        return function(*args, **(kwargs or {}))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(3))

    def forward(self, x, attention_mask=None, hidden=None):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def _batch(seed, kind):
    made = torch.Generator(device="cpu").manual_seed(seed)
    batch = {"x": torch.randn(BATCH, LENGTH, WIDTH, generator=made, dtype=torch.float64, device="cpu")}
    if kind in ("padded", "some"):
        lengths = torch.randint(2, LENGTH + 1, (BATCH, 1), generator=made, dtype=torch.int64, device="cpu")
        every = torch.arange(LENGTH, dtype=torch.int64, device="cpu")
        batch["attention_mask"] = (every < lengths).to(torch.int64)
    if kind == "masked":
        batch["hidden"] = torch.rand(BATCH, LENGTH, generator=made, dtype=torch.float64, device="cpu") < 0.3
    return batch


OPTIONS = {
    "plain": {"views": ["position", "pooled", "mean_pooled", "flattened"]},
    "padded": {"views": ["position", "pooled", "mean_pooled"]},
    "masked": {"views": ["visible", "masked"], "mask": "hidden"},
    "groups": {"views": ["position", "pooled"], "groups": 4},
    "some": {"views": ["position", "pooled"], "positions": [0, 2]},
}


def _probed(kind, watch=None, spoil=None):
    """The result of a probe, of whose forwards from BEFORE to LAST ``watch`` saw every operator."""
    layers = [f"blocks.{k}" for k in range(3)]
    with rgfast.Probe(Blocks(), layers=layers, progress=False, route="moments", **OPTIONS[kind]) as probe:
        for k in range(LAST):
            batch = _batch(k, kind)
            if spoil == k:
                batch["x"][3, 2, 1] = float("nan")
            if watch is not None and k >= BEFORE:
                with watch:
                    probe.run(batch)
            else:
                probe.run(batch)
    return probe.result()


@pytest.mark.parametrize("kind", OPTIONS)
def test_forwards_do_not_wait_and_give_the_same(kind, monkeypatch):
    here = _probed(kind)
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    watch = Waits()
    there = _probed(kind, watch)
    assert watch.found == []
    for name in here.dataset.data_vars:
        got, want = (torch.from_numpy(x.dataset[name].values.astype(float)) for x in (there, here))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, equal_nan=True, msg=name)


def test_the_mode_sees_a_forward_that_waits(monkeypatch):
    watch = Waits()
    _probed("some", watch)  # on the CPU nothing is put off
    assert {"_local_scalar_dense", "index with a mask"} <= {*watch.found}

    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    add = estimator.Moments.add

    def faulty(self, batch):
        add(self, batch)
        bool((batch.first > 0).any())
        batch.first.nonzero()
        torch.tensor([1.0], dtype=torch.float64, device="cpu")

    monkeypatch.setattr(estimator.Moments, "add", faulty)
    watch = Waits()
    _probed("plain", watch)
    assert {*watch.found} == {"_local_scalar_dense", "nonzero", "lift_fresh between devices"}


@pytest.mark.parametrize("kind", ["plain", "padded"])
def test_what_is_not_finite_is_said_later_in_the_same_words(kind, monkeypatch):
    with pytest.raises(ValueError, match="activations must be finite") as here:
        _probed(kind, spoil=1)
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    with pytest.raises(ValueError, match="activations must be finite") as there:
        _probed(kind, spoil=1)
    assert str(there.value) == str(here.value)
    assert "in layer 0 at position 2 (blocks.0, sequences 64 to 127)" in str(there.value)


def test_it_is_said_during_a_long_run_and_ever_after(monkeypatch):
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    bad = _batch(0, "plain")
    bad["x"][0] = float("inf")
    with rgfast.Probe(Blocks(), layers=["blocks.0"], progress=False, route="moments") as probe:
        for _ in range(63):
            probe.run(_batch(1, "plain") if probe.nbytes else bad)
        with pytest.raises(ValueError, match="sequences 0 to 63"):
            probe.run(bad)
    with pytest.raises(ValueError, match="sequences 0 to 63"):
        probe.result()
