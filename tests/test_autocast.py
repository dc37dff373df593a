"""Inside torch.autocast every op computes as outside: values, gradients of first and second order, probes."""

import pytest
import torch
from torch import nn

import rgfast

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(3, 70, 20, generator=DRAW)
Y = X + torch.randn(3, 70, 20, generator=DRAW)
UP, DOWN = torch.randn(24, 20, generator=DRAW) / 4, torch.randn(20, 24, generator=DRAW) / 4
SYMMETRIC = X[0].T @ X[0]
SINGLE = {"precision": "single"}

VALUES = {
    "effective_rank": lambda impl: rgfast.effective_rank(X, impl=impl, **SINGLE),
    "variance": lambda impl: rgfast.effective_rank(X, spectrum="variance", impl=impl, **SINGLE),
    "uncentered": lambda impl: rgfast.effective_rank(X, centering="none", impl=impl, **SINGLE),
    "lanczos": lambda impl: rgfast.effective_rank(X, method="lanczos", impl=impl, **SINGLE),
    "singular_values": lambda impl: rgfast.singular_values(X, impl=impl, **SINGLE),
    "participation_ratio": lambda impl: rgfast.participation_ratio(X, impl=impl, **SINGLE),
    "stable_rank": lambda impl: rgfast.stable_rank(X, impl=impl, **SINGLE),
    "numerical_rank": lambda impl: rgfast.numerical_rank(X, impl=impl, **SINGLE),
    "rank_measures": lambda impl: rgfast.rank_measures(X, impl=impl, **SINGLE).effective_rank,
    "double": lambda impl: rgfast.effective_rank(X, impl=impl),
    "eigvalsh": lambda impl: rgfast.eigvalsh(SYMMETRIC, impl=impl),
    "cka": lambda impl: rgfast.cka(X, Y, impl=impl),
    "cka_matrix": lambda impl: rgfast.cka_matrix([X, Y], impl=impl, **SINGLE),
    "kernel_drift": lambda impl: rgfast.kernel_drift([X, Y], impl=impl, **SINGLE),
    "minibatch_cka": lambda impl: rgfast.minibatch_cka([X, Y], batch_size=20, impl=impl),
    "rbf": lambda impl: rgfast.cka(X, Y, kernel="rbf"),
    "hsic": lambda impl: rgfast.hsic(X, Y),
    "kernel_change": lambda impl: rgfast.kernel_change([X, Y]),
    "CKAAccumulator": lambda impl: rgfast.CKAAccumulator(pairs="all").update([X, Y]).finalize().matrix,
    "features": lambda impl: rgfast.CKAAccumulator(route="features").update([X, Y]).finalize().drift,
    "SecondMoments": lambda impl: rgfast.SecondMoments().update([X]).rank_measures(0).effective_rank,
    "residual_mlp": lambda impl: rgfast.residual_mlp(X, UP, None, DOWN, None, impl=impl),
    "residual_stack": lambda impl: rgfast.residual_stack(X, [UP] * 2, None, [DOWN] * 2, None, impl=impl),
}


def block(impl):
    return lambda x, up, down: rgfast.residual_mlp(x, up, None, down, None, impl=impl)


FUNCTIONS = {
    **{f"residual_mlp by {impl}": block(impl) for impl in ("auto", "native", "reference")},
    "residual_stack": lambda x, up, down: rgfast.residual_stack(x, [up] * 2, None, [down] * 2, None),
    "cka": lambda x, up, down: rgfast.cka(x, Y),
    "kernel_drift": lambda x, up, down: rgfast.kernel_drift([x, Y]),
}
ONCE = {
    "effective_rank": lambda x, up, down: rgfast.effective_rank(x, **SINGLE),
    "participation_ratio": lambda x, up, down: rgfast.participation_ratio(x, **SINGLE),
    "stable_rank": lambda x, up, down: rgfast.stable_rank(x, **SINGLE),
}


def in_autocast(function):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        return function()


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("name", VALUES)
def test_values(name, impl):
    want = VALUES[name](impl)
    got = in_autocast(lambda: VALUES[name](impl))
    assert got.dtype == want.dtype
    assert torch.equal(got, want)


def test_single_precision_keeps_its_bound_inside():
    truth = rgfast.participation_ratio(X.double())
    got = in_autocast(lambda: rgfast.participation_ratio(X, precision="single", impl="reference"))
    assert ((got - truth).abs() / truth).max() < 1e-6


def gradients(function, order):
    leaves = [t.clone().requires_grad_() for t in (X, UP, DOWN)]
    value = function(*leaves).square().sum()
    found = torch.autograd.grad(value, leaves, create_graph=order == 2, allow_unused=True)
    if order == 2:
        total = sum(g.square().sum() for g in found if g is not None)
        found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [g for g in found if g is not None]


@pytest.mark.parametrize(
    ("name", "order"), [*((n, k) for n in FUNCTIONS for k in (1, 2)), *((n, 1) for n in ONCE)]
)
def test_gradients(name, order):
    function = {**FUNCTIONS, **ONCE}[name]
    want = gradients(function, order)
    got = in_autocast(lambda: gradients(function, order))
    assert got
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.one, self.two = nn.Linear(20, 20), nn.Linear(20, 20)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def test_a_probe_runs_the_model_under_autocast_and_its_own_sums_outside():
    model, x, seen = Model(), X[0], []
    hook = model.one.register_forward_hook(lambda module, args, output: seen.append(output))
    options = {"layers": ["one", "two"], "progress": False, "targets": {"t": X[1]}, "groups": 2}
    found = in_autocast(lambda: rgfast.probe(model, x, **options)).dataset
    hook.remove()
    assert {output.dtype for output in seen} == {torch.bfloat16}
    want = rgfast.effective_rank(torch.cat(seen))
    assert abs(float(found.effective_rank[0, 0, 0]) - float(want)) < 1e-9 * float(want)
    # The same moments, read outside.
    with rgfast.Probe(model, **options) as probe:
        in_autocast(lambda: model(x))
    plain = probe.result().dataset
    for name in plain.data_vars:
        assert (found[name].values == plain[name].values).all() or found[name].equals(plain[name])
