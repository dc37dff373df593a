"""No forward waits for the device: what must be known on the host is read at the end or at intervals.

The CPU stands in for a device here (`waiting._EVERYWHERE`), and a dispatch mode sees every operator.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from waits import Waits

import rgfast
from rgfast.probing.estimators.finite import FiniteCheck
from rgfast.runtime import waiting

BATCHES = 14  # a count of rows doubles several times, and blocks of rows are summed up
BATCH, LENGTH, WIDTH = 64, 5, 6


class Blocks(nn.Module):
    def __init__(self, dtype, bias=True):
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=bias, dtype=dtype) for _ in range(3))
        self.skipped = False

    def forward(self, x, attention_mask=None, hidden=None):
        for k, block in enumerate(self.blocks):
            if k != 1 or not self.skipped:
                x = torch.tanh(block(x))
        return x


def drawn(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def batch_of(seed, case):
    dtype, needs = case.get("dtype", torch.float64), case.get("needs", ())
    batch = {"x": case.get("scale", 1.0) * drawn(seed, BATCH, LENGTH, WIDTH, dtype=dtype)}
    made = torch.Generator().manual_seed(seed)
    if "attention_mask" in needs or "scores" in needs:
        lengths = torch.randint(2, LENGTH + 1, (BATCH, 1), generator=made)
        keep = torch.arange(LENGTH) < lengths
        batch["attention_mask"] = (~keep).float() * -1e4 if "scores" in needs else keep.long()
    if "hidden" in needs:
        batch["hidden"] = torch.rand(BATCH, LENGTH, generator=made) < 0.3
    if "labels" in needs:
        batch["labels"] = torch.randint(0, 4, (BATCH, LENGTH), generator=made)
        batch["labels"][0, :4] = torch.arange(4)
        batch["vector"] = drawn(seed + 100, BATCH, 2)
    return batch


ROWS = torch.arange(BATCHES * BATCH) % 3
POSITIONS = {"views": ["position"]}
PADDED = {"needs": ["attention_mask"], "views": ["position", "pooled", "mean_pooled"]}
CASES = {
    "plain": {"views": ["position", "pooled", "mean_pooled", "flattened"]},
    "default": {},
    "padded": PADDED,
    "scores to be added": PADDED | {"needs": ["scores"]},
    "last": PADDED | {"positions": [0, "last"], "views": ["position", "pooled"]},
    "first": PADDED | {"positions": ["first", 1], "views": ["position"]},
    "masked": {"needs": ["hidden"], "mask": "hidden"},
    "masked and padded": {
        "needs": ["hidden", "attention_mask"],
        "mask": lambda entries: entries["hidden"],
        "views": ["visible", "masked", "position"],
    },
    "groups": {"views": ["position", "pooled"], "groups": 4},
    "some": {"views": ["position", "pooled"], "positions": [0, 2]},
    "all pairs": {"views": ["position"], "pairs": "all"},
    "factors": {"views": ["position", "pooled"], "refine": True},
    "factors and padding": PADDED | {"refine": True},
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16, "views": ["position", "pooled"]},
    "float16": {"dtype": torch.float16, "views": ["position", "pooled"]},
    "tiny": {"scale": 1e-150, "measures": ["effective_rank", "effective_rank_uncentred"]},
    "tiny float32": {"scale": 1e-30, "dtype": torch.float32, "views": ["position"]},
    "targets": POSITIONS
    | {"needs": ["labels"], "targets": {"b": "vector", "c": ROWS, "d": lambda entries: entries["vector"]}},
    "rows": {
        "needs": ["hidden", "attention_mask", "labels"],
        "views": ["pooled", "hidden ones", "class", "last", "thirds", "none"],
        "rows": {
            "hidden ones": "hidden",
            "class": ("labels", [1, 2]),
            "last": "last",
            "first": "first",
            "thirds": (ROWS, 1),
            "none": lambda entries: entries["hidden"] & ~entries["hidden"],
        },
    },
    "samples": {"route": "samples"},
}
# What is not an option of the probe. Scaled rows go through blocks without bias, which would drown them.
OWN = ("needs", "dtype", "scale")


def probed(case, watch=None, spoil=None, skip=()):
    """The result of a probe, of whose forwards ``watch`` saw every operator."""
    options = {"route": "moments"} | {name: value for name, value in case.items() if name not in OWN}
    model = Blocks(case.get("dtype", torch.float64), bias="scale" not in case)
    layers = [f"blocks.{k}" for k in range(3)]
    with rgfast.Probe(model, layers=layers, progress=False, **options) as probe:
        for k in range(BATCHES):
            batch = batch_of(k, case)
            model.skipped = k in skip
            if spoil == k:
                kept = 0 if "attention_mask" not in batch else int(batch["attention_mask"][:, 2].argmax())
                batch["x"][kept, 2, 1] = float("nan")
            with watch or nullcontext():
                probe.run(batch)
    return probe.result()


def assert_alike(there, here, rtol=1e-10):
    assert set(there.dataset.data_vars) == set(here.dataset.data_vars)
    for name in here.dataset.data_vars:
        if not name.endswith("_bound"):  # which know how the sums were made
            got, want = (torch.from_numpy(x.dataset[name].values.astype(float)) for x in (there, here))
            torch.testing.assert_close(got, want, rtol=rtol, atol=rtol, equal_nan=True, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_forwards_do_not_wait_and_give_the_same(name, monkeypatch):
    case = CASES[name]
    here = probed({"refine": False} | case if case.get("route") != "samples" else case)
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    watch = Waits(here=True)
    there = probed(case, watch)
    assert watch.found == []
    assert_alike(there, here)


def test_labels_on_a_device_are_read_once_to_know_how_many_there_are(monkeypatch):
    case = POSITIONS | {"needs": ["labels"], "targets": {"a": "labels"}}
    here = probed(case)
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    watch = Waits(here=True)
    assert_alike(probed(case, watch), here)
    assert watch.found == ["_local_scalar_dense"]


def test_a_layer_that_misses_batches_does_not_wait(monkeypatch):
    case = {"views": ["position", "pooled"], "refine": True}
    here = probed(case, skip={4, 9})
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    watch = Waits(here=True)
    there = probed(case, watch, skip={4, 9})
    assert watch.found == []
    assert_alike(there, here)


@pytest.mark.parametrize("mixing", ["none", "mixer"])
def test_a_stack_that_hands_over_tiles(mixing, monkeypatch):
    length = None if mixing == "none" else LENGTH
    stack = rgfast.ResidualStack(width=WIDTH, depth=3, mixing=mixing, length=length)
    x = drawn(0, 3, 200, LENGTH, WIDTH, dtype=torch.float32)

    def probed(watch):
        with torch.no_grad(), rgfast.Probe(stack, progress=False, route="moments", refine=False) as probe:
            for piece in x:
                with watch:
                    stack(piece)
        return probe.result()

    here = probed(nullcontext())
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    watch = Waits(here=True)
    there = probed(watch)
    assert watch.found == []
    assert_alike(there, here)


FAULTS = {
    "_local_scalar_dense": (FiniteCheck, "check", lambda self, batch, seen: batch.first.sum().item()),
    "nonzero": (FiniteCheck, "check", lambda self, batch, seen: batch.first[:, 0, 0].nonzero()),
    "index with a mask": (FiniteCheck, "check", lambda self, batch, seen: batch.first[batch.first > 0]),
    "masked_select": (
        FiniteCheck,
        "check",
        lambda self, batch, seen: torch.masked_select(batch.first, batch.first > 0),
    ),
    "equal": (FiniteCheck, "check", lambda self, batch, seen: torch.equal(batch.first, batch.first)),
    "lift_fresh of a list": (FiniteCheck, "check", lambda self, batch, seen: torch.tensor([1.0])),
    "_to_copy from cpu to meta": (
        FiniteCheck,
        "check",
        lambda self, batch, seen: batch.first.to("meta"),
    ),
    "copy_ from cpu to meta": (
        FiniteCheck,
        "check",
        lambda self, batch, seen: torch.empty_like(batch.first, device="meta").copy_(batch.first),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_mode_sees_a_fault(name, monkeypatch):
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    owner, method, fault = FAULTS[name]
    was = getattr(owner, method)

    def faulty(self, *args, **options):
        fault(self, *args)
        return was(self, *args, **options)

    monkeypatch.setattr(owner, method, faulty)
    watch = Waits(here=True)
    probed(CASES["plain"], watch)
    assert {*watch.found} == {name}


@pytest.mark.parametrize("name", CASES)
def test_the_mode_sees_what_the_cpu_reads(name):
    watch = Waits(here=True)
    probed(CASES[name], watch)
    assert "_local_scalar_dense" in watch.found or name == "samples"


@pytest.mark.parametrize("kind", ["plain", "padded"])
def test_what_is_not_finite_is_said_later_in_the_same_words(kind, monkeypatch):
    with pytest.raises(ValueError, match="activations must be finite") as here:
        probed(CASES[kind], spoil=1)
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    with pytest.raises(ValueError, match="activations must be finite") as there:
        probed(CASES[kind], spoil=1)
    assert str(there.value) == str(here.value)
    assert "in layer 0 at position 2 (blocks.0, sequences 64 to 127)" in str(there.value)


WRONG = {
    "a score": ("scores", "attention_mask", -3.0, "or 0 and 1, got -3"),
    "a label": ("labels", "labels", 9, r"must have labels 0 to 3 .*, got 9"),
    "a target": ("labels", "vector", float("inf"), r"targets\['b'\] must be finite"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_wrong_entry_is_said_at_once_or_at_the_end(name, everywhere, monkeypatch):
    monkeypatch.setattr(waiting, "_EVERYWHERE", everywhere)
    needs, entry, value, text = WRONG[name]
    case = {"needs": [needs]}
    targets = {"a": "labels", "b": "vector"} if needs == "labels" else None
    with rgfast.Probe(
        Blocks(torch.float64), layers=["blocks.0"], progress=False, route="moments", targets=targets
    ) as probe:
        probe.run(batch_of(0, case))
        batch = batch_of(1, case)
        batch[entry][3, 1] = value
        if not everywhere:
            with pytest.raises(ValueError, match=text):
                probe.run(batch)
            return
        probe.run(batch)
        probe.run(batch_of(2, case))
    for _ in range(2):
        with pytest.raises(ValueError, match=text):
            probe.result()


def test_it_is_said_during_a_long_run_and_ever_after(monkeypatch):
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    bad = batch_of(0, {})
    bad["x"][0] = float("inf")
    model = Blocks(torch.float64)
    with rgfast.Probe(model, layers=["blocks.0"], progress=False, route="moments") as probe:
        for _ in range(63):
            probe.run(batch_of(1, {}) if probe.nbytes else bad)
        with pytest.raises(ValueError, match="sequences 0 to 63"):
            probe.run(bad)
    with pytest.raises(ValueError, match="sequences 0 to 63"):
        probe.result()


def test_other_ranks_know_of_what_is_said_at_the_end(monkeypatch):
    monkeypatch.setattr(waiting, "_EVERYWHERE", True)
    bad = batch_of(0, {})
    bad["x"][0] = float("nan")
    with rgfast.Probe(Blocks(torch.float64), layers=["blocks.0"], progress=False, route="moments") as probe:
        probe.run(bad)
    told = []
    probe._tally._ranks = SimpleNamespace(fail=told.append)
    with pytest.raises(ValueError, match="activations must be finite") as raised:
        probe.result()
    assert told == [raised.value]
