"""Small models and the brute-force CKA of stored activations."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        return x + self.inner(x)


class Encoder(nn.Module):
    """Tokens ``[B, T]`` and padding to a stream ``[B, T, width]``."""

    def __init__(self, width, depth, tokens=30, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(tokens, width)
            self.mix = nn.Linear(width, width)
            self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        if attention_mask is not None:
            keep = attention_mask[..., None].to(x.dtype)
            x = x + self.mix((x * keep).sum(1, keepdim=True) / keep.sum(1, keepdim=True))
        for block in self.blocks:
            x = block(x)
        return x


class Mlp(nn.Module):
    def __init__(self, inputs, width, depth, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.enter = nn.Linear(inputs, width)
            self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return x


def gram_cka(x, y, debiased=True):
    """CKA of ``x[n, d]`` and ``y[n, e]`` from whole n × n kernels in fp64, by the definition."""
    x, y = (z.to(torch.float64) - z.to(torch.float64).mean(0) for z in (x, y))
    k, m, n = x @ x.T, y @ y.T, len(x)
    if not debiased:
        return float((k * m).sum() / (k.norm() * m.norm()))

    def centered(g):
        g = g - torch.diag(g.diagonal())
        rows = g.sum(1) / (n - 2)
        out = g - rows[:, None] - rows[None] + g.sum() / ((n - 1) * (n - 2))
        return out - torch.diag(out.diagonal())

    k, m = centered(k), centered(m)
    return float((k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt())


def matrix_of(a, b, debiased=True):
    """CKA ``[L_a, L_b]`` of stored layers ``[n, d]``."""
    values = [[gram_cka(x, y, debiased) for y in b] for x in a]
    return torch.tensor(values, dtype=torch.float64)


def stored(model, names, batches):
    """What the modules ``names`` put out for every batch, by forward hooks of the test's own: ``[B, T, d]``.

    ``name:input`` is what a module is given.
    """
    modules, seen = dict(model.named_modules()), {name: [] for name in names}

    def keep(name):
        def hook(module, args, out=None):
            x = args if out is None else out
            seen[name].append((x[0] if isinstance(x, tuple) else x).clone())

        return hook

    handles = []
    for name in names:
        module = modules[name.removesuffix(":input")]
        given = name.endswith(":input")
        handles.append(
            (module.register_forward_pre_hook if given else module.register_forward_hook)(keep(name))
        )
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    for handle in handles:
        handle.remove()
    return [seen[name] for name in names]


def padded(n, length, size=16, tokens=30, seed=0):
    """Batches of token ids padded on the right, of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for start in range(0, n, size):
        count = min(size, n - start)
        longest = length - (start // size) % 2
        ids = torch.randint(1, tokens, (count, longest), generator=generator)
        keep = torch.arange(longest) < torch.randint(2, longest + 1, (count, 1), generator=generator)
        batches.append({"input_ids": ids * keep, "attention_mask": keep.long()})
    return batches


@pytest.fixture(scope="package")
def kit():
    """The models and helpers of this file (test modules cannot import each other)."""
    return SimpleNamespace(
        Block=Block,
        Encoder=Encoder,
        Mlp=Mlp,
        gram_cka=gram_cka,
        matrix_of=matrix_of,
        stored=stored,
        padded=padded,
    )


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Models here are too small for a second thread to be worth waking."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
