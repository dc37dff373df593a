"""Every result is the same, bit for bit, under any default dtype and device of PyTorch."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rgfast
from rgfast import MarkovChain, MaskedTokenModel, ResidualStack, masking
from rgfast.streaming import MomentAccumulator
from rgfast.training import TrainingConfig, train

EXPLICIT = {"dtype": torch.float32, "device": "cpu"}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **EXPLICIT)


X = normal(3, 4, 40, 6)
ARRAY = X.numpy()
STREAM = normal(60, 5, 16, seed=1)
PARAMETERS = [normal(*shape, seed=2) for shape in ((24, 16), (24,), (16, 24), (16,), (16,), (16,))]
CHAIN = MarkovChain.from_correlation_length(5, states=6, clusters=3)
TOKENS = torch.arange(60 * 5, dtype=torch.int64, device="cpu").reshape(60, 5) * 7 % 6
HIDDEN = torch.arange(60 * 5, dtype=torch.int64, device="cpu").reshape(60, 5) % 3 == 0


class Watch(TorchDispatchMode):
    """Fails at the operator that lets in the dtype or the device, which no input has."""

    def __init__(self, dtype=None, device=None):
        super().__init__()
        self.dtype, self.device = dtype, device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
            for tree in ((args, kwargs), out)
        )
        for kind in ("dtype", "device"):
            foreign = getattr(self, kind)
            if foreign is None or any(getattr(t, kind) == foreign for t in given):
                continue
            assert all(getattr(t, kind) != foreign for t in made), (
                f"{func} makes a tensor of the default {kind}"
            )
        return out


@pytest.fixture(params=["float16", "bfloat16", "float64", "meta"])
def under(request):
    """Calls a function under a foreign default, twice if watched, and puts back what was the default before.

    The value is that of a call without the watch, since some operators compute otherwise under one.
    """

    def call(function, watched=True):
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        assert (dtype, device) == (torch.float32, torch.device("cpu"))
        foreign = getattr(torch, request.param, None)
        try:
            if request.param == "meta":
                torch.set_default_device("meta")
                watch = Watch(device=torch.device("meta"))
            else:
                torch.set_default_dtype(foreign)
                watch = Watch(dtype=None if foreign == torch.float64 else foreign)
            if watched:
                with watch:
                    function()
            return function()
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(dtype)

    return call


def contents(result):
    """Everything in a result as arrays and plain values, in order."""
    if isinstance(result, torch.Tensor):
        assert result.is_cpu
        kind = str(result.dtype)
        return [kind, result.detach().to(torch.float64).numpy()]
    if isinstance(result, (np.ndarray, np.generic)):
        return [str(result.dtype), np.asarray(result)]
    if isinstance(result, xr.Dataset):
        return [part for name in sorted(result.variables) for part in contents(result[name].values)]
    if dataclasses.is_dataclass(result):
        return [part for f in dataclasses.fields(result) for part in contents(getattr(result, f.name))]
    if isinstance(result, dict):
        return [part for key in result for part in contents(result[key])]
    if isinstance(result, (list, tuple)):
        return [part for one in result for part in contents(one)]
    return [result]


def same(one, other):
    one, other = contents(one), contents(other)
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        if isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
        elif isinstance(a, float) and math.isnan(a):
            assert math.isnan(b)
        else:
            assert a == b


def residual_mlp(impl="auto"):
    w1, b1, w2, b2, weight, bias = PARAMETERS
    return rgfast.residual_mlp(STREAM, w1, b1, w2, b2, norm_weight=weight, norm_bias=bias, impl=impl)


def residual_mlp_backward(impl="auto"):
    x, w1, b1, w2, b2, weight, bias = (t.clone().requires_grad_(True) for t in (STREAM, *PARAMETERS))
    y = rgfast.residual_mlp(x, w1, b1, w2, b2, norm_weight=weight, norm_bias=bias, impl=impl)
    return torch.autograd.grad(y.square().sum(), (x, w1, b1, w2, b2, weight, bias))


def residual_stack(impl="auto"):
    w1, b1, w2, b2, weight, bias = ([p, p, p] for p in PARAMETERS)
    seen = []
    y = rgfast.residual_stack(
        STREAM, w1, b1, w2, b2, norm_weight=weight, norm_bias=bias, impl=impl, tile=16,
        consumer=lambda first, states: seen.append((first, states.clone())),
    )  # fmt: skip
    return y, seen


def accumulated(make, finish, masked=True):
    stream = make()
    keep = torch.arange(40, dtype=torch.int64, device="cpu").expand(4, 40) % 5 != 0
    for first in (0, 16):
        rows = X[:, :, first : first + 20]
        stream.update(rows, keep[:, first : first + 20] if masked else None)
    other = make()
    other.update(X[:, :, 30:])
    return finish(stream.merge(other))


def restored(moments):
    again = MomentAccumulator(pairs="all", factors=(1,))
    again.load_state_dict(moments.state_dict())
    return again.count, again.mean(0), again.cross(0, 2), again.scatter(1), again.factor(1)


def gradients(function):
    x = X.clone().requires_grad_(True)
    return torch.autograd.grad(function(x).sum(), x)


OPS = {
    "effective_rank": lambda impl: rgfast.effective_rank(X, impl=impl),
    "effective_rank of numpy": lambda impl: rgfast.effective_rank(ARRAY, impl=impl),
    "effective_rank, single": lambda impl: rgfast.effective_rank(X, impl=impl, precision="single"),
    "rank_measures": lambda impl: rgfast.rank_measures(X, impl=impl),
    "singular_values": lambda impl: rgfast.singular_values(X, impl=impl),
    "eigvalsh": lambda impl: rgfast.eigvalsh(X.mT @ X, impl=impl),
    "cka": lambda impl: rgfast.cka(X[0], X[1], impl=impl),
    "cka of numpy": lambda impl: rgfast.cka(ARRAY[0], ARRAY[1], impl=impl),
    "cka_matrix": lambda impl: rgfast.cka_matrix(X, impl=impl),
    "cka_matrix of two": lambda impl: rgfast.cka_matrix(X, X[:2], impl=impl),
    "kernel_drift": lambda impl: rgfast.kernel_drift(X, impl=impl),
    "residual_mlp": residual_mlp,
    "residual_mlp_backward": residual_mlp_backward,
    "residual_stack": residual_stack,
    "rank_measures_from_moment": lambda impl: rgfast.rank_measures_from_moment(
        (X.mT @ X).double(), 40, accumulated=np.full((3, 4), 300.0), impl=impl
    ),
}

WITHOUT_IMPL = {
    "numerical_rank": lambda: rgfast.numerical_rank(X),
    "participation_ratio": lambda: rgfast.participation_ratio(X),
    "stable_rank": lambda: rgfast.stable_rank(X),
    "hsic": lambda: rgfast.hsic(X[0], X[1]),
    "minibatch_cka": lambda: rgfast.minibatch_cka(X, batch_size=12),
    "minibatch_cka of numpy": lambda: rgfast.minibatch_cka(ARRAY, batch_size=12),
    "kernel_change": lambda: rgfast.kernel_change(X),
    "mutual_knn": lambda: rgfast.mutual_knn(X[0], X[1]),
    "mutual_knn, euclidean": lambda: rgfast.mutual_knn(X[0], X[1], k=3, metric="euclidean"),
    "mutual_knn by reference": lambda: rgfast.mutual_knn(X[0], X[1], k=3, impl="reference"),
    "procrustes": lambda: rgfast.procrustes(X[0], X[1]),
    "rsa": lambda: rgfast.rsa(X[0], X[1]),
    "calibrate": lambda: [
        dataclasses.astuple(rgfast.calibrate(name, X[0], X[1], null=3))[:2]
        for name in ("cka", "mutual_knn", "procrustes", "rsa")
    ],
    "calibrate a function": lambda: rgfast.calibrate(rgfast.hsic, X[0], X[1], null=2).null,
    "intrinsic_dimension": lambda: rgfast.intrinsic_dimension(X[0]),
    "cka_null": lambda: rgfast.cka_null(40, 6, 6),
    "isotropic_baseline": lambda: rgfast.isotropic_baseline(30, 20),
    "effective_rank_estimate": lambda: rgfast.effective_rank_estimate((X.mT @ X).double()[0, 0]),
    "moment_operator": lambda: rgfast.effective_rank_estimate(
        rgfast.moment_operator([X[0], X[1]], 6), 6
    ),
    "gradient of effective_rank": lambda: gradients(rgfast.effective_rank),
    "gradient of cka": lambda: gradients(lambda x: rgfast.cka(x[0], x[1])),
    "CKAAccumulator": lambda: accumulated(rgfast.CKAAccumulator, lambda s: s.finalize()),
    "MinibatchCKAAccumulator": lambda: accumulated(
        lambda: rgfast.MinibatchCKAAccumulator(batch_size=8), lambda s: (s.left_out, s.finalize())
    ),
    "SecondMoments": lambda: accumulated(
        rgfast.SecondMoments, lambda s: (s.count, s.mean(0), s.singular_values(1), s.rank_measures(2))
    ),
    "MomentAccumulator": lambda: accumulated(
        lambda: MomentAccumulator(pairs="all", factors=(1,)), restored
    ),
    "sample": lambda: (
        CHAIN.sample(5, 7, torch.Generator().manual_seed(1)),
        CHAIN.sample(90, 7, torch.Generator().manual_seed(1)),
    ),
    "chain": lambda: (
        CHAIN.transition, CHAIN.stationary, CHAIN.autocorrelation([0, 1, 5]), CHAIN.mutual_information(2),
    ),
    "bayes_posterior": lambda: (
        CHAIN.bayes_posterior(TOKENS, HIDDEN), CHAIN.bayes_posterior(TOKENS, HIDDEN, radius=1),
    ),
    "masking": lambda: (
        masking.iid_mask(30, 6, 0.3, torch.Generator().manual_seed(1)),
        masking.exact_mask(30, 6, 2, torch.Generator().manual_seed(1)),
        masking.balanced_mask(31, 6, 0.1, torch.Generator().manual_seed(1)),
        masking.corrupt(TOKENS, HIDDEN, 6, 6, "bert", torch.Generator().manual_seed(1)),
        TrainingConfig(mask_rate_max=0.5).draw_mask(30, 6, torch.Generator().manual_seed(1)),
    ),
}  # fmt: skip


CALLS = [(name, impl) for name in OPS for impl in ("auto", "native", "reference")]
CALLS.remove(("effective_rank, single", "native"))  # which refuses it


@pytest.mark.parametrize(("name", "impl"), CALLS)
def test_ops(under, name, impl):
    same(OPS[name](impl), under(lambda: OPS[name](impl)))


@pytest.mark.parametrize("name", WITHOUT_IMPL)
def test_other_functions(under, name):
    same(WITHOUT_IMPL[name](), under(WITHOUT_IMPL[name]))


def stack_of(mixing="none"):
    return ResidualStack(
        16, 3, 24, mixing, 5, w2_scale=0.5, generator=torch.Generator().manual_seed(3), **EXPLICIT
    )


def plain():
    return nn.Sequential(*stack_of().blocks)


@pytest.mark.parametrize("route", ["moments", "samples"])
@pytest.mark.parametrize("make", [stack_of, plain])
def test_probe(under, make, route):
    model = make()

    def probe():
        return rgfast.probe(
            model,
            STREAM,
            pairs="all",
            groups=3,
            views=["position"],
            route=route,
            batch_size=16,
            progress=False,
        ).dataset

    same(probe(), under(probe))


def test_probe_with_everything(under, tmp_path):
    model = stack_of("mixer")
    batch = {"x": STREAM.numpy(), "hidden": HIDDEN.numpy(), "attention_mask": TOKENS != 5, "token": TOKENS}
    targets = {
        "array": np.linspace(0.0, 1.0, 60),
        "token": "token",
        "list": lambda entries: [[0.1 * float(v) for v in row] for row in entries["token"]],
    }

    def probe(folder):
        return rgfast.probe(
            model, batch, groups=2, mask="hidden", targets=targets, checkpoint=tmp_path / folder,
            checkpoint_every=1, batch_size=30, progress=False,
        )  # fmt: skip

    want, got = probe("before"), under(lambda: probe("under"))
    same(want.dataset, got.dataset)
    same(want.flow("position"), under(lambda: want.flow("position")))
    written = [tmp_path / name for name in ("one.html", "two.html")]
    want.report(written[0])
    under(lambda: want.report(written[1]), watched=False)
    assert written[0].read_bytes() == written[1].read_bytes()


@pytest.mark.parametrize("mixing", ["mixer", "window"])
def test_training(under, mixing):
    untrained = MaskedTokenModel(6, 5, 8, 2, mixing=mixing, w2_scale=1.0, **EXPLICIT)

    def trained():
        model = copy.deepcopy(untrained)
        config = TrainingConfig(steps=3, batch=16, warmup=1, log_every=2, log_sequences=32)
        return train(model, CHAIN, config, permute_targets=True), list(model.parameters())

    same(trained(), under(trained))


def test_new_models_follow_the_defaults_as_linear_does(under):
    seed = torch.Generator().manual_seed(5)
    model, like = under(
        lambda: (MaskedTokenModel(6, 5, 8, 2, w2_scale=1.0, generator=seed), nn.Linear(2, 2)),
        watched=False,
    )
    assert {(p.dtype, p.device) for p in model.parameters()} == {(like.weight.dtype, like.weight.device)}
    again = MaskedTokenModel(6, 5, 8, 2, w2_scale=1.0, generator=seed.manual_seed(5), **EXPLICIT)
    if not like.weight.is_meta:
        same([p.to(like.weight.dtype) for p in again.parameters()], list(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_loads_in_the_dtype_it_was_saved_in(under, tmp_path, dtype):
    model = MaskedTokenModel(6, 5, 8, 2, w2_scale=1.0, dtype=dtype, device="cpu")
    model.save(tmp_path)
    same(
        list(model.parameters()),
        list(under(lambda: MaskedTokenModel.load(tmp_path), watched=False).parameters()),
    )
