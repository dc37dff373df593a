"""Compiled models and modules are probed eagerly, with the numbers and the layer names of the plain model."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import rgfast


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
    """Other tests count towards torch's limit of compilations, beyond which a function runs eagerly."""
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


# In a process of its own: whether torch compiles at all is decided by state of the whole process.
ALONE = """
import gc, json, torch, rgfast
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))).eval()

def compiled():
    graphs = []
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch.compiler.reset()
    return graphs, torch.compile(net(), backend=backend)

x, found, options = torch.randn(60, 4, 8), {}, {"layers": ["0", "1", "2"], "progress": False}
graphs, model = compiled()
rgfast.probe(model, x, **options)
found["probe"] = [len(graphs)]
model(x)
found["probe"].append(len(graphs))

for first in (0, 1):
    graphs, model = compiled()
    probes = [rgfast.Probe(net(), **options) for _ in range(2)]
    for probe in probes:
        probe.__enter__()
    probes.pop(first).__exit__(None, None, None)
    model(x)
    found[f"overlap {first}"] = [len(graphs)]  # the other one still watches
    probes.pop().__exit__(None, None, None)
    model(x)
    found[f"overlap {first}"].append(len(graphs))

graphs, model = compiled()
forgotten = rgfast.Probe(net(), **options)
forgotten.__enter__()
model(x)
found["forgotten"] = [len(graphs)]
del forgotten
gc.collect()
model(x)
found["forgotten"].append(len(graphs))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def alone():
    """How many graphs were compiled while something watched, and after it."""
    run = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("case", ["probe", "overlap 0", "overlap 1", "forgotten"])
def test_nothing_is_compiled_while_a_probe_watches_and_all_is_afterwards(alone, case):
    during, after = alone[case]
    assert during == 0 < after


def test_a_loop_of_ones_own_calls_the_compiled_model():
    model, x = wrapped(net()), torch.randn(60, 4, 8)
    model(x)
    want = rgfast.probe(net(), x, progress=False)
    with torch.no_grad(), rgfast.Probe(model, progress=False) as p:
        model(x)
    assert p.result().dataset.effective_rank.equals(want.dataset.effective_rank)
