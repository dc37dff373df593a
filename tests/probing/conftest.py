"""Small models of the kinds a probe meets, and the brute-force answer from stored activations."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import rgfast


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        return x + self.inner(x)


class InPlace(Residual):
    """Writes to the stream it was given, as memory-savers do."""

    def forward(self, x):
        x += self.inner(x)
        return x


@dataclasses.dataclass
class Output:
    note: str
    hidden_state: torch.Tensor


class Wrapped(nn.Module):
    """A block that returns its stream inside a tuple, a dataclass or a dict."""

    def __init__(self, width, kind):
        super().__init__()
        self.block, self.kind = Residual(width), kind

    def forward(self, x):
        if isinstance(x, tuple):
            x = x[0]
        elif isinstance(x, Output):
            x = x.hidden_state
        elif isinstance(x, dict):
            x = x["hidden_states"]
        x = self.block(x)
        wraps = {"tuple": (x, "extra"), "dataclass": Output("extra", x), "dict": {"hidden_states": x}}
        return wraps[self.kind]


class ConvBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + torch.tanh(self.conv(x))


def spectrum(x, centred):
    """Singular values by LAPACK from the fp64 rows; n rows centred have no more than n − 1."""
    x = x.to(torch.float64)
    if centred:
        x = x - x[:1]
        x = x - x.mean(0)
    sigma = torch.linalg.svdvals(x)
    return sigma[: len(x) - 1] if centred else sigma


def exp_entropy(weight):
    p = weight / weight.sum()
    return float(torch.special.entr(p).sum().exp()) if weight.sum() > 0 else 0.0


def ranks_of(x):
    """All ranks from their definitions."""
    sigma, raw = spectrum(x, True), spectrum(x, False)
    energy, top = sigma.square().sum(), sigma[0].square()
    return {
        "effective_rank": exp_entropy(sigma),
        "effective_rank_variance": exp_entropy(sigma.square()),
        "participation_ratio": float(energy.square() / sigma.pow(4).sum()) if top > 0 else 0.0,
        "stable_rank": float(energy / top) if top > 0 else 0.0,
        "numerical_rank": float((sigma > 1e-7 * sigma[0]).sum()),
        "effective_rank_uncentred": exp_entropy(raw),
        "effective_rank_variance_uncentred": exp_entropy(raw.square()),
    }


def brute(layers, keep=None):
    """All measures of stored ``[n, d]`` activations: the truth that a stream must meet."""
    layers = [x.to(torch.float64) if keep is None else x[keep].to(torch.float64) for x in layers]
    each = [ranks_of(x) for x in layers]
    out = {name: [found[name] for found in each] for name in each[0]}
    out["kernel_drift"] = rgfast.kernel_drift(layers).tolist()
    out["kernel_drift_debiased"] = rgfast.kernel_drift(layers, debiased=True).tolist()
    out["kernel_change"] = rgfast.kernel_change(layers).tolist()
    out["cka"] = rgfast.cka_matrix(layers).tolist()
    out["cka_biased"] = rgfast.cka_matrix(layers, debiased=False).tolist()
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in out.items()}


def assert_equal_to(truth, dataset, view, position=-1, tol=1e-10):
    """Every measure of a probe at one view and position against :func:`brute`, relative to at least 1.

    The stated bounds on the effective ranks must hold too.
    """
    for name, want in truth.items():
        got = torch.from_numpy(dataset[name].sel(view=view, position=position).values.copy())
        if name in ("cka", "cka_biased"):
            kept = torch.from_numpy(~dataset[name].isnull().all(["view", "position"]).values)
            got, want = got[kept], want[kept]
        assert torch.equal(got.isnan(), want.isnan()), (name, got, want)
        error = ((got - want).abs() / want.abs().clamp_min(1.0)).nan_to_num(0.0)
        assert (error <= tol).all(), (name, error.tolist())
        if f"{name}_bound" in dataset:
            bound = torch.from_numpy(dataset[f"{name}_bound"].sel(view=view, position=position).values.copy())
            assert (error <= bound + 1e-13).all(), (name, error.tolist(), bound.tolist())


def stored(functions, x, size=256):
    """Outputs of a chain of functions, in batches of ``size`` as in the probe: fp32 bits depend on it."""
    batches = []
    with torch.no_grad():
        for part in x.split(size):
            layers = []
            for function in functions:
                part = function(part)
                layers.append(part.clone())
            batches.append(layers)
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def stream_of(model, tokens, size=256):
    """The residual stream of a token model at every layer, ``[B, T, D]`` each, by hand."""
    return stored([model.embed, *model.stack.blocks], tokens, size)


@pytest.fixture
def kit():
    """The models and helpers of this file (test modules cannot import each other)."""
    return SimpleNamespace(
        Residual=Residual,
        InPlace=InPlace,
        Wrapped=Wrapped,
        ConvBlock=ConvBlock,
        stored=stored,
        brute=brute,
        ranks_of=ranks_of,
        assert_equal_to=assert_equal_to,
        stream_of=stream_of,
    )


@pytest.fixture
def token_model():
    torch.manual_seed(0)
    return rgfast.MaskedTokenModel(states=12, length=6, width=7, depth=3, w2_scale=0.5)


@pytest.fixture
def token_data(token_model):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 12, (300, 6), generator=generator)
    mask = torch.rand(300, 6, generator=generator) < 0.3
    return {"tokens": tokens.masked_fill(mask, token_model.mask_token), "mask": mask}


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are too small for a second thread to be worth waking."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
