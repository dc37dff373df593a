"""Recorded probes: models, batches, views, routes, error bars, checkpoints and merges."""

import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from registry import CONTRACT, FP32_MODEL, add, call, filled, normal
from torch import nn

import rgfast

# The contract of a probe's moments; models here are fp64 unless the route needs fp32.
PROBE = 1e-9


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        return x + self.inner(x)


class Conv(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + torch.tanh(self.conv(x))


class Layer(nn.Module):
    """An encoder layer as Hugging Face writes them: attention with a padding mask, returned in a tuple."""

    def __init__(self, width):
        super().__init__()
        self.attention, self.output = nn.Linear(width, 3 * width), Residual(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden_states, attention_mask=None):
        q, k, v = self.attention(hidden_states).chunk(3, -1)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask[:, None, :] == 0, -1e9)
        return (self.norm(self.output(hidden_states + scores.softmax(-1) @ v)),)


class Encoder(nn.Module):
    def __init__(self, width=8, depth=2, vocabulary=11):
        super().__init__()
        self.embeddings = nn.Embedding(vocabulary, width)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Layer(width) for _ in range(depth))

    def forward(self, input_ids, attention_mask=None):
        x = self.embeddings(input_ids)
        for layer in self.encoder.layer:
            x = layer(x, attention_mask)[0]
        return SimpleNamespace(last_hidden_state=x)


def sequential(width=6, depth=3, dtype=torch.float64):
    return filled(nn.Sequential(*(Residual(width) for _ in range(depth))).to(dtype))


def stack(mixing="none", dtype=torch.float64, width=6, depth=3, **options):
    return filled(rgfast.ResidualStack(width, depth, mixing=mixing, length=4, **options).to(dtype), 0.5)


def tokens(seed, n, length=5, vocabulary=11):
    ids = np.random.default_rng(seed).integers(0, vocabulary, (n, length))
    lengths = 1 + np.arange(n) % length
    padding = np.arange(length) < np.where(lengths < 2, length, lengths)[:, None]
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(padding.astype(np.int64))}


def probed(model, batches, **options):
    """The result of ``rgfast.probe``, in silence."""
    return rgfast.probe(model, batches, progress=False, **options)


def numbers(result):
    """All that a result holds but its texts, its plan and its baselines, which depend on sizes alone."""
    names = [str(name) for name in result.dataset.variables if not str(name).endswith("_baseline")]
    found = {name: result.dataset[name].values for name in names}
    return {**found, **{name: result.dataset.attrs[name] for name in ("route", "sequences", "length")}}


def probe(name, model, batches, tol=PROBE, **options):
    """A call: the probe of ``model()`` over ``batches()``."""
    add(f"probe/{name}", lambda: numbers(probed(model(), batches(), **options)), tol)


SIZES = (7, 1, 30, 2, 20)


def pieces(*shape, dtype=torch.float64, sizes=SIZES, seed=100):
    return list(normal(seed, sum(sizes), *shape, dtype=dtype).split(sizes))


probe("sequential/BD", sequential, lambda: pieces(6))
probe("sequential/BTD", sequential, lambda: pieces(4, 6))
probe("sequential/array", sequential, lambda: normal(101, 61, 4, 6), batch_size=13)
probe(
    "sequential/fp32",
    lambda: sequential(dtype=torch.float32),
    lambda: pieces(4, 6, dtype=torch.float32),
    FP32_MODEL,
)
probe("sequential/halves", lambda: sequential().bfloat16(), lambda: pieces(6, dtype=torch.bfloat16), 0.1)
probe(
    "plain",
    lambda: filled(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()),
    lambda: pieces(6),
    layers=["0", "1", "2"],
)
probe("conv", lambda: filled(nn.Sequential(Conv(3), Conv(3)).double()), lambda: pieces(3, 2, 3))
for mixing in ("none", "flat", "mixer"):
    probe(f"stack/{mixing}", lambda mixing=mixing: stack(mixing), lambda: pieces(4, 6))
    probe(
        f"stack/{mixing}/fp32",
        lambda mixing=mixing: stack(mixing, torch.float32),
        lambda: pieces(4, 6, dtype=torch.float32),
        FP32_MODEL,
        route="moments",
    )
probe("stack/BD", stack, lambda: pieces(6))
probe("stack/rms", lambda: stack(norm="rms", activation="silu"), lambda: pieces(4, 6))
probe(
    "stack/collapsed",
    lambda: rgfast.ResidualStack(6, 2, mixing="none").double(),
    lambda: [torch.ones(20, 2, 6).double()],
)
probe("stack/offset", stack, lambda: [x + 1e4 for x in pieces(4, 6)], 1e-6)
probe("stack/few", lambda: stack(width=12, depth=2), lambda: pieces(4, 12, sizes=(3, 4)), CONTRACT)
for pairs in ("all", [(0, 2), (1, 3)]):
    probe(f"pairs/{pairs}", sequential, lambda: pieces(4, 6), pairs=pairs)
for view in ("position", "pooled", "mean_pooled", "flattened"):
    probe(f"views/{view}", sequential, lambda: pieces(4, 6), views=[view])
probe("views/two", sequential, lambda: pieces(4, 6), views=["pooled", "position"], pairs="all")
probe("positions", sequential, lambda: pieces(4, 6), positions=[3, 0])
probe("positions/auto", sequential, lambda: pieces(30, 6), positions="auto", memory="300KiB", refine=False)
probe("measures", sequential, lambda: pieces(4, 6), measures=["effective_rank", "kernel_change"])
probe("measures/uncentred", sequential, lambda: pieces(4, 6), measures=["effective_rank_uncentred"])
probe(
    "refine",
    lambda: filled(nn.Sequential(*(nn.Sequential(Residual(8), nn.LayerNorm(8)) for _ in range(2))).double()),
    lambda: pieces(3, 8),
    layers=["0", "1"],
    refine=True,
)
probe("refine/never", sequential, lambda: pieces(4, 6), refine=False)
probe("layers", sequential, lambda: pieces(4, 6), layers=["1:input", 3, re.compile(r"2\.inner\.\d")])
probe("layers/glob", sequential, lambda: pieces(4, 6), layers="*.inner.0")
probe("groups", sequential, lambda: pieces(3, 6), groups=4)
probe("groups/stack", lambda: stack(width=5), lambda: pieces(2, 5), groups=3, pairs="all")
probe("encoder", lambda: filled(Encoder().double()), lambda: [tokens(1, 40)], 1e-6)
probe(
    "encoder/ragged",
    lambda: filled(Encoder().double()),
    lambda: [tokens(s, n) for s, n in ((2, 33), (3, 1), (4, 20))],
    1e-6,
    pairs="all",
    groups=2,
)
probe(
    "encoder/whole",
    lambda: filled(Encoder().double()),
    lambda: tokens(5, 50),
    1e-6,
    batch_size=7,
    views=["pooled", "position"],
)


def masked(n=70, seed=110):
    hidden = (torch.arange(n)[:, None] + torch.arange(4)) % 3 == 0
    return {"input": normal(seed + 1, n, 4, 6), "hidden": hidden, "y": normal(seed + 2, n, 4, 2)}


def labels(n=70):
    return torch.arange(n) * 7 % 3


probe("mask", sequential, masked, mask="hidden", batch_size=11)
probe("mask/function", sequential, masked, mask=lambda entries: ~entries["hidden"], groups=2)
probe(
    "mask/stack", stack, lambda: {"x": normal(115, 60, 4, 6), "hidden": normal(116, 60, 4) > 0}, mask="hidden"
)
probe("targets", sequential, masked, 1e-7, targets={"y": "y", "label": labels()}, batch_size=17)
probe(
    "targets/groups",
    sequential,
    masked,
    1e-7,
    groups=3,
    mask="hidden",
    views=["visible", "masked", "pooled"],
    targets={"square": lambda entries: entries["y"] ** 2},
)

# The sample route: fp32, positions only; automatic where it pays.
POSITION = {"views": ["position"]}
for pairs in ("adjacent", "all"):
    for groups in (1, 3):
        for name, model in (("stack", stack), ("sequential", sequential)):
            probe(
                f"samples/{name}/{pairs}/{groups}",
                lambda model=model: model(dtype=torch.float32),
                lambda: pieces(4, 6, dtype=torch.float32),
                FP32_MODEL,
                route="samples",
                pairs=pairs,
                groups=groups,
                **POSITION,
            )
probe(
    "samples/auto",
    lambda: stack(dtype=torch.float32, width=128),
    lambda: pieces(4, 128, dtype=torch.float32, sizes=(400, 401, 3)),
    FP32_MODEL,
    **POSITION,
    pairs="all",
)
probe(
    "samples/auto/held",
    lambda: sequential(64, dtype=torch.float32),
    lambda: pieces(16, 64, dtype=torch.float32, sizes=(300, 301, 302, 9)),
    FP32_MODEL,
    **POSITION,
    pairs="all",
)
probe(
    "samples/auto/not",
    lambda: stack(dtype=torch.float32),
    lambda: pieces(4, 6, dtype=torch.float32),
    FP32_MODEL,
    **POSITION,
)
probe(
    "samples/mixer",
    lambda: stack("mixer", torch.float32),
    lambda: pieces(4, 6, dtype=torch.float32),
    FP32_MODEL,
    **POSITION,
    route="samples",
)


@call("probe/checkpoint", PROBE)
def resumed():
    batches, options = pieces(4, 6), {"groups": 2, "checkpoint_every": 2}

    def broken():
        yield from batches[:3]
        raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.checkpoint"
        try:
            probed(sequential(), broken(), checkpoint=path, **options)
        except KeyboardInterrupt:
            again = probed(sequential(), batches, checkpoint=path, **options)
    return {"resumed": numbers(again), "whole": numbers(probed(sequential(), batches, groups=2))}


@call("probe/merge", PROBE)
def merged():
    one, two = (probed(sequential(), pieces(3, 6, seed=seed), groups=2) for seed in (120, 121))
    return numbers(one.merge(two))


@call("probe/saved", PROBE)
def saved():
    result = probed(sequential(), pieces(3, 6))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.nc"
        result.save(path)
        back = rgfast.ProbeResult.load(path)
        return {"loaded": numbers(back), "merged": numbers(back.merge(result))}


@call("probe/context", PROBE)
def context():
    model = sequential()
    with rgfast.Probe(model, mask="hidden", pairs="all", progress=False) as watch:
        for x in pieces(4, 6):
            watch.note(hidden=x[..., 0] > 0)
            model(x)
        before = numbers(watch.result())
        watch.run({"input": normal(122, 8, 4, 6), "hidden": normal(123, 8, 4) > 0})
    return {"before": before, "after": numbers(watch.result())}


@call("probe/loader", PROBE)
def loader():
    data = torch.utils.data.TensorDataset(normal(124, 53, 4, 6), torch.arange(53))
    return numbers(probed(sequential(), torch.utils.data.DataLoader(data, batch_size=9)))


@call("probe/frame", 1e-7)
def frame():
    result = probed(sequential(depth=2), masked(), targets={"y": "y"}, pairs="all", groups=2, mask="hidden")
    return {"plain": result.to_dataframe(), "spectra": result.to_dataframe(spectra=True)}


@call("probe/read", 1e-7)
def read():
    result = probed(sequential(depth=4), masked(), targets={"y": "y"}, mask="hidden")
    found = {"views": result.views, "layers": result.layers, "measures": result.measures}
    for view in result.views:
        found[view] = {
            "rank": result.order_parameter(view).values,
            "positions": result.by_position("kernel_drift", view).values,
            "baseline": result.dataset.effective_rank_baseline.sel(view=view).values,
            "r2": result.target_r2("y", view).values,
            "flow": [result.flow(view).rank, result.flow(view).drift],
        }
    return found
