"""Activation checkpointing: what a backward runs again is not counted, and its gradients are unchanged."""

import functools
import warnings

import numpy as np
import pytest
import torch
from models import Block, seeded
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import rgfast
from rgfast.probing.capture.evidence import Evidence

WAYS = {
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
    "whole": {"use_reentrant": False},  # run again to the end, so that hooks of outputs run too
}
BATCHES = torch.randn(4, 6, 5, 8, generator=torch.Generator().manual_seed(2))


class Checkpointed(nn.Module):
    """Blocks that are run again one by one; the last of them runs twice."""

    def __init__(self, **how):
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in (*self.blocks, self.blocks[-1]):
            x = checkpoint(block, x, **self.how) if self.how else block(x)
        return x


class Branches(Checkpointed):
    """Blocks that return their branch and their residual; ``output=`` multiplies them."""

    def __init__(self, **how):
        super().__init__(**how)
        self.blocks = nn.ModuleList(Pair() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            branch, x = checkpoint(block, x, **self.how) if self.how else block(x)
            x = x + branch
        return x


class Pair(Block):
    def forward(self, x):
        return torch.tanh(self.inner(x.sin().clone())), x  # the clone is what the weight's gradient needs


def trained(model, probe=None, *, of=lambda model: model, accumulated=1):
    """Weights and loss after a few steps; ``accumulated`` forwards before each backward."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for parts in BATCHES.split(accumulated):
        loss = sum(of(model)(x.requires_grad_()).square().mean() for x in parts.clone())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()], loss.detach()


def assert_same(found, wanted):
    for x, y in zip(found[0], wanted[0], strict=True):
        assert torch.equal(x, y)
    assert torch.equal(found[1], wanted[1])


def assert_same_values(found, wanted):
    assert found.layers == wanted.layers
    for name in ("n", "effective_rank", "kernel_drift"):
        np.testing.assert_array_equal(found.dataset[name], wanted.dataset[name])


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_a_training_step_is_counted_once(way, accumulated):
    asked = {"layers": ["blocks.0:input", "blocks.0", "blocks.2"], "progress": False}
    plain = seeded(Checkpointed)
    with rgfast.Probe(plain, **asked) as wanted:
        before = trained(plain, accumulated=accumulated)
    model = seeded(Checkpointed, **WAYS[way])
    with set_checkpoint_early_stop(way != "whole"), rgfast.Probe(model, **asked) as found:
        after = trained(model, accumulated=accumulated)
    assert_same(after, before)
    assert found.result().dataset.n.max() == 4 * 6 * 5
    assert_same_values(found.result(), wanted.result())


@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_is_run_again_as_a_whole(way, stack):
    """Its own hooks run again too; our stack hands over tiles."""

    def build():
        torch.manual_seed(0)
        return rgfast.ResidualStack(8, 2, mixing="none", w2_scale=0.5) if stack else Checkpointed()

    plain, model = build(), build()
    with rgfast.Probe(plain, progress=False) as wanted:
        before = trained(plain)
    again = functools.partial(checkpoint, model, **WAYS[way])
    with set_checkpoint_early_stop(way != "whole"), rgfast.Probe(model, progress=False) as found:
        after = trained(model, of=lambda model: again)
    assert_same(after, before)
    assert found.result().dataset.n.max() == 4 * 6 * 5
    assert_same_values(found.result(), wanted.result())


def test_selective_checkpointing_does_not_see_what_is_captured():
    """It hands out what it saved by operator in their order, so one more would move all others."""

    def clones(ctx, op, *args, **kwargs):
        saved = op == torch.ops.aten.clone.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, clones)
    how = {"use_reentrant": False, "context_fn": contexts}
    asked = {"layers": ["blocks.0:input", "blocks.*"], "output": {"blocks.?": lambda out: out[0] * out[1]}}
    before = trained(seeded(Branches, **how))
    model = seeded(Branches, **how)
    with rgfast.Probe(model, progress=False, **asked) as found:
        after = trained(model)
    assert_same(after, before)
    assert found.result().dataset.n.max() == 4 * 6 * 5


@pytest.mark.parametrize("how", [{"use_reentrant": True}, {"use_reentrant": False}])
def test_hugging_face_models(how):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=3,
        n_head=2,
        n_embd=16,
        vocab_size=40,
        n_positions=8,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    ids = torch.randint(40, (3, 4, 8), generator=torch.Generator().manual_seed(0))

    def run(checkpointed, monitored):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).train()
        if checkpointed:
            with warnings.catch_warnings():  # the name changes with version 6
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
            model.config.use_cache = False
        monitor = rgfast.Monitor(model, ids[0], every=1) if monitored else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with rgfast.Probe(model, progress=False) as found:
            for i, batch in enumerate(ids):
                model(batch, labels=batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if monitor is not None:
                    monitor.step(i)
        return found.result(), monitor, torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    wanted, _, weights = run(False, False)
    found, monitor, same = run(True, True)
    assert torch.equal(weights, same)
    assert found.dataset.n.max() == (3 + 3) * 4 * 8  # the monitor's forwards are forwards of this model
    assert monitor.result().steps == (0, 1, 2)
    assert found.layers == wanted.layers


def test_what_is_measured_inside_a_backward_is_measured():
    """Optimizers that step as soon as a gradient is there run hooks inside of the backward."""
    model = seeded(Checkpointed, use_reentrant=False)
    monitor = rgfast.Monitor(model, BATCHES[0], every=1, layers=["blocks.0", "blocks.1"])
    first = next(model.parameters())
    first.register_post_accumulate_grad_hook(lambda p: monitor.step(0) and None)
    model(BATCHES[0]).square().mean().backward()
    assert monitor.result().steps == (0,)
    found = monitor.result().dataset
    wanted = rgfast.probe(model, [BATCHES[0]], layers=["blocks.0", "blocks.1"], progress=False).dataset
    np.testing.assert_array_equal(
        found.effective_rank.isel(step=0).values.squeeze(), wanted.effective_rank.values.squeeze()
    )


def test_how_parts_are_called_again_is_no_evidence_of_axes():
    layer = seeded(nn.TransformerEncoderLayer, 8, 2, 16, 0.0)  # positions first
    evidence = Evidence(layer)
    evidence.open()
    y = checkpoint(layer, torch.randn(5, 6, 8, requires_grad=True), use_reentrant=False)
    assert evidence.batches == {6}
    evidence.forget()
    y.sum().backward()
    assert evidence.batches == frozenset()
    evidence.close()
