"""Compiled models and modules are probed eagerly, with the numbers and the layer names of the plain model."""

import warnings

import pytest
import torch
from torch import nn

import rgfast


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """Other tests count towards torch's limit of compilations, beyond which a function runs eagerly."""
    torch.compiler.reset()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def net():
    torch.manual_seed(0)
    return Net().eval()


def wrapped(model, **options):
    return torch.compile(model, backend="eager", **options)


def in_place(model):
    model.compile(backend="eager")
    return model


def blocks_wrapped(model):
    model.blocks = nn.ModuleList([wrapped(block) for block in model.blocks])
    return model


def blocks_in_place(model):
    for block in model.blocks:
        block.compile(backend="eager")
    return model


def forward_wrapped(model):
    model.forward = wrapped(model.forward)
    return model


WAYS = {
    "wrapper": wrapped,
    "full graph": lambda model: wrapped(model, fullgraph=True),
    "dynamic": lambda model: wrapped(model, dynamic=True),
    "in place": in_place,
    "blocks": blocks_wrapped,
    "blocks in place": blocks_in_place,
    "forward": forward_wrapped,
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_compiled_models(way, has_run):
    x = torch.randn(60, 4, 8)
    want = rgfast.probe(net(), x, progress=False)
    model = WAYS[way](net())
    if has_run:
        with torch.no_grad():
            model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = rgfast.probe(model, x, progress=False)
    assert got.layers == want.layers
    for name in want.measures:
        assert got.dataset[name].equals(want.dataset[name]), name
    seen = []
    with torch.no_grad():  # compiled again afterwards, and right
        handle = net().register_forward_hook(lambda *args: seen.append(1))
        torch.testing.assert_close(model(x), net()(x))
        handle.remove()


def test_nothing_is_compiled_for_a_probe():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model, x = torch.compile(net(), backend=backend), torch.randn(60, 4, 8)
    rgfast.probe(model, x, progress=False)
    assert not compiled
    model(x)
    assert compiled


def test_a_loop_of_ones_own_calls_the_compiled_model():
    model, x = wrapped(net()), torch.randn(60, 4, 8)
    model(x)
    want = rgfast.probe(net(), x, progress=False)
    with torch.no_grad(), rgfast.Probe(model, progress=False) as p:
        model(x)
    assert p.result().dataset.effective_rank.equals(want.dataset.effective_rank)
