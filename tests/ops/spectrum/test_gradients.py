"""Gradients by formula: gradcheck, degenerate spectra, routes, dtypes and the compiler."""

import pytest
import torch

import rgfast

MEASURES = {
    "singular": rgfast.effective_rank,
    "variance": lambda x, **k: rgfast.effective_rank(x, spectrum="variance", **k),
    "participation": rgfast.participation_ratio,
    "stable": rgfast.stable_rank,
    "values": rgfast.singular_values,
}


def data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("centering", ["mean", "none"])
@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5), (2, 3, 7, 3), (2, 3)])
@pytest.mark.parametrize("name", MEASURES)
def test_gradcheck(name, shape, centering, impl):
    x = data(*shape).requires_grad_()
    if name == "values" and centering == "mean" and shape[-2] <= shape[-1]:
        x = data(*shape[:-2], shape[-1] + 3, shape[-1]).requires_grad_()  # sigma = 0 has no slope
    torch.autograd.gradcheck(
        lambda y: MEASURES[name](y, centering=centering, impl=impl), x, atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("name", MEASURES)
def test_agrees_with_autograd_through_the_definition(name):
    x = (data(40, 12) * torch.logspace(0, -3, 12, dtype=torch.float64) + 5).requires_grad_()
    MEASURES[name](x).sum().backward()
    got, x.grad = x.grad, None
    sigma = torch.linalg.svdvals(x - x.mean(0))
    power = sigma if name == "singular" else sigma**2
    p = power / power.sum()
    value = {
        "singular": lambda: torch.special.entr(p).sum().exp(),
        "variance": lambda: torch.special.entr(p).sum().exp(),
        "participation": lambda: 1 / p.square().sum(),
        "stable": lambda: 1 / p[0],
        "values": lambda: sigma.sum(),
    }[name]()
    value.backward()
    torch.testing.assert_close(got, x.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", MEASURES)
def test_degenerate_spectra_give_no_nan(name):
    repeated = torch.cat([torch.eye(6), -torch.eye(6)]).double()
    dead = data(20, 6)
    dead[:, 2] = 3.0
    dead[:, 4] = dead[:, 5]
    for x in (repeated, dead, torch.zeros(7, 3), torch.full((7, 3), 0.1), torch.ones(1, 4), data(3, 8),
              torch.outer(data(9)[:9], data(5))):  # fmt: skip
        y = x.double().clone().requires_grad_()
        MEASURES[name](y).sum().backward()
        assert bool(torch.isfinite(y.grad).all())
    repeated.requires_grad_()
    MEASURES["singular"](repeated).backward()
    # all singular values equal: the maximum of the effective rank
    assert float(repeated.grad.abs().max()) < 1e-12


def test_ascent_raises_the_rank():
    x = (data(64, 8) * torch.logspace(0, -2, 8, dtype=torch.float64)).float().requires_grad_()
    start = float(rgfast.effective_rank(x.detach()))
    optimiser = torch.optim.SGD([x], lr=0.5)
    for _ in range(20):
        optimiser.zero_grad()
        (-rgfast.effective_rank(x)).backward()
        optimiser.step()
    assert x.grad.dtype == torch.float32
    assert float(rgfast.effective_rank(x.detach())) > start + 0.5


@pytest.mark.parametrize("factor", [1e150, 1e-150])
@pytest.mark.parametrize("name", ["singular", "variance", "participation", "stable"])
def test_scale(name, factor):
    x = data(12, 5).requires_grad_()
    y = (x.detach() * factor).requires_grad_()
    MEASURES[name](x).backward()
    MEASURES[name](y).backward()
    torch.testing.assert_close(y.grad * factor, x.grad, rtol=1e-9, atol=1e-12)


def test_weights_of_a_batch_and_strides():
    x = data(3, 4, 10, 6).transpose(-1, -2).requires_grad_()
    weight = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
    (rgfast.effective_rank(x) * weight).sum().backward()
    assert x.grad.shape == x.shape
    for i in range(3):
        for j in range(4):
            y = x[i, j].detach().clone().requires_grad_()
            (rgfast.effective_rank(y) * weight[i, j]).backward()
            torch.testing.assert_close(x.grad[i, j], y.grad, rtol=1e-12, atol=1e-14)


def test_value_info_and_log_are_those_without_a_gradient():
    x = data(3, 20, 5)
    y = x.clone().requires_grad_()
    with rgfast.record() as log:
        value = rgfast.effective_rank(y, impl="reference")
    assert [(r.op, r.impl) for r in log] == [("spectrum", "reference")]
    assert torch.equal(value.detach(), rgfast.effective_rank(x, impl="reference"))
    value, info = rgfast.effective_rank(y, return_info=True)
    assert value.requires_grad
    assert info.path.tolist() == ["gram"] * 3
    with torch.no_grad():
        assert not rgfast.effective_rank(y).requires_grad
    with pytest.raises(ValueError, match="centering must be one of"):
        rgfast.effective_rank(y, centering="x")
    y.data[1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="in matrix 1 of the batch"):
        rgfast.effective_rank(y)


def symmetric(*shape, seed=0):
    a = data(*shape, shape[-1], seed=seed)
    return a + a.mT


@pytest.mark.parametrize("impl", ["auto", "library", "reference"])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 2, 3), (0, 3), (2, 1)])
def test_gradcheck_of_eigenvalues(shape, impl):
    a = symmetric(*shape).requires_grad_()
    torch.autograd.gradcheck(lambda b: rgfast.eigvalsh(b + b.mT, impl=impl), a)


@pytest.mark.parametrize("shape", [(2, 0, 0), (0, 3, 3)])
def test_eigenvalues_of_nothing_have_a_gradient(shape):
    a = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    rgfast.eigvalsh(a).sum().backward()
    assert a.grad.shape == shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_of_eigenvalues(dtype):
    a = (symmetric(3, 6) * torch.tensor([1.0, 1e-150, 1e18]).double()[:, None, None]).to(dtype)
    weight = data(3, 6, seed=1).to(dtype)
    got = torch.autograd.grad(rgfast.eigvalsh(b := a.clone().requires_grad_()), b, weight)[0]
    value, vectors = torch.linalg.eigh(a.double())
    want = (vectors * weight.double()[:, None]) @ vectors.mT
    assert got.dtype == dtype
    known = (value.abs().amax(1) > 0)[:, None, None]  # 1e-150 is no fp32 number
    torch.testing.assert_close(got.double() * known, want * known, rtol=1e-5, atol=1e-6)
    assert not got.isnan().any()


def test_equal_eigenvalues_share_their_gradient():
    a = torch.eye(4).double() * 2
    a[3, 3] = 5.0
    b = a.requires_grad_()
    (got,) = torch.autograd.grad(rgfast.eigvalsh(b).square().sum(), b)
    torch.testing.assert_close(got, 2 * a.detach())  # of the squared norm


def test_eigenvalues_with_a_gradient_are_those_without():
    a = symmetric(40, 12)
    b = a.clone().requires_grad_()
    with rgfast.record() as log:
        value = rgfast.eigvalsh(b)
    assert value.requires_grad
    assert torch.equal(value.detach(), rgfast.eigvalsh(a))
    assert [each.impl for each in log] == [rgfast.explain(rgfast.eigvalsh, a).chosen]
    with torch.no_grad():
        assert not rgfast.eigvalsh(b).requires_grad
    with pytest.raises(TypeError, match="a must be float64 or float32, got bfloat16"):
        rgfast.eigvalsh(a.bfloat16().requires_grad_())
    with pytest.raises(ValueError, match="a must be finite, got 1 NaN or infinite values in matrix 2"):
        rgfast.eigvalsh(torch.where(torch.arange(40 * 144).view(a.shape) == 2 * 144 + 13, torch.nan, b))
    half = (a.tril() + torch.full_like(a, torch.nan).triu(1)).requires_grad_()
    assert torch.equal(
        torch.autograd.grad(rgfast.eigvalsh(half).sum(), half)[0],
        torch.autograd.grad(rgfast.eigvalsh(b).sum(), b)[0],
    )


@pytest.mark.parametrize("name", [*MEASURES, "eigenvalues"])
def test_a_second_derivative_is_refused_also_where_it_would_be_lost(name):
    measure = MEASURES.get(name, lambda y: rgfast.eigvalsh(y.mT @ y))
    x = data(9, 4).requires_grad_()
    value = measure(x).sum()  # whose slope is a constant: nothing but x depends on x
    (slope,) = torch.autograd.grad(value + x.pow(3).sum(), x, create_graph=True)
    (once,) = torch.autograd.grad(measure(x).sum() + x.pow(3).sum(), x)
    assert torch.equal(slope.detach(), once)
    with pytest.raises(RuntimeError, match="trying to differentiate twice a function that is differentiable"):
        torch.autograd.grad(slope.square().sum(), x)


def test_registered_operators_are_consistent():
    x = data(3, 7, 4).requires_grad_()
    options = ("effective_rank", "mean", "double", 1e-6, "auto", "reference")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.rgfast.spectrum_measure.default, (x.detach(), *options), test_utils=tests)
    values = ("singular_values", *options[1:])
    torch.library.opcheck(torch.ops.rgfast.spectrum_measure.default, (x.detach(), *values), test_utils=tests)
    gradient = (x.detach(), torch.ones(3, dtype=torch.float64), "effective_rank", "mean")
    torch.library.opcheck(torch.ops.rgfast.spectrum_gradient.default, gradient, test_utils=tests)
    a = symmetric(3, 4)
    torch.library.opcheck(torch.ops.rgfast.eigvalsh.default, (a, "reference"), test_utils=tests)
    torch.library.opcheck(torch.ops.rgfast.eigvalsh_gradient.default, (a, data(3, 4)), test_utils=tests)


# torch's tracer instantiates autograd functions, which torch itself deprecates
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", [*MEASURES, "eigenvalues"])
def test_compiles_in_one_graph(name):
    measure = MEASURES.get(name, lambda y: rgfast.eigvalsh(y.mT @ y))
    x = data(2, 9, 4).requires_grad_()
    step = torch.compile(lambda y: measure(y * 2).sum(), backend="aot_eager", fullgraph=True)
    value = step(x)
    value.backward()
    got, x.grad = x.grad, None
    want = measure(x * 2).sum()
    want.backward()
    assert torch.equal(value.detach(), want.detach())
    assert torch.equal(got, x.grad)
