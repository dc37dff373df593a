"""CKA and drift by batched fp64 products: truth on awkward shapes, one read at the end."""

import guards
import pytest
import torch

import rgfast
from rgfast import ImplUnavailable
from rgfast.ops.cka import batched
from rgfast.ops.cka.api import OP, alignment
from rgfast.ops.cka.call import Call
from rgfast.ops.cka.sums import Wanted

F64 = torch.float64


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=F64, device="cpu")


def stream(layers, positions, n, d, dtype=torch.float32):
    return (drawn(layers, positions, n, d).cumsum(0) + 50.0).to(dtype)


def definition(x, y, debiased):
    """Of [n, d], by kernels, as Kornblith et al. 2019 and Song et al. 2012 write it."""
    n = len(x)
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    k, m = x @ x.T, y @ y.T
    if not debiased:
        return (k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt()

    def hsic(k, m):
        k, m = (g - torch.diag(g.diagonal()) for g in (k, m))
        whole = k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * (k.sum(0) @ m.sum(0)) / (n - 2)
        return (k * m).sum() + whole

    return hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()


SHAPES = [
    (3, 2, 12, 5),
    (4, 2, 9, 30),
    (3, 2, 6, 65),
    (2, 1, 4, 1),
    (2, 3, 97, 17),
    (3, 1, 16, 16),
    (1, 2, 5, 3),
]


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_pair_against_the_definition(shape, debiased):
    x = stream(*shape)
    found = rgfast.cka_matrix(x, debiased=debiased, impl="library")
    for p in range(shape[1]):
        for i in range(shape[0]):
            for j in range(shape[0]):
                want = definition(x[i, p], x[j, p], debiased)
                assert abs(float(found[p, i, j] - want)) < 1e-11, (p, i, j)
    drift = rgfast.kernel_drift(x, debiased=debiased, impl="library")
    torch.testing.assert_close(drift, 1 - found.diagonal(1, -2, -1), rtol=0, atol=2e-14)
    one = rgfast.cka(x[0], x[-1], debiased=debiased, impl="library")
    torch.testing.assert_close(one, found[:, 0, -1], rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("debiased", [True, False])
def test_layers_of_two_models_and_of_several_widths(dtype, debiased):
    first = [drawn(2, 20, d, seed=d).to(dtype) for d in (3, 40)]
    other = [drawn(2, 20, d, seed=9 + d).to(dtype) for d in (7, 1, 30)]
    found = rgfast.cka_matrix(first, other, debiased=debiased, impl="library")
    assert found.shape == (2, 2, 3)
    for p in range(2):
        want = [[definition(x[p], y[p], debiased) for y in other] for x in first]
        torch.testing.assert_close(found[p], torch.tensor(want, dtype=F64), rtol=0, atol=1e-11)
    within = rgfast.cka_matrix(other, debiased=debiased, impl="library")
    reference = rgfast.cka_matrix(other, debiased=debiased, impl="reference")
    torch.testing.assert_close(within, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1e-4, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("width", [6, 60])
def test_a_small_drift_keeps_its_digits(size, width):
    x = drawn(2, 30, width)
    y = x + size * drawn(2, 30, width, seed=1)
    found = rgfast.kernel_drift([x, y], impl="library")
    want = rgfast.kernel_drift([x, y], impl="reference")
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-30)
    shifted = rgfast.kernel_drift([x + 1e3, y + 1e3], impl="library")
    if size >= 1e-9:
        torch.testing.assert_close(shifted, want, rtol=1e-3, atol=0)
    assert (rgfast.kernel_drift([x, x], impl="library") < 1e-31).all()


@pytest.mark.parametrize("scale", [1e150, 1e-150])
def test_any_scale(scale):
    x = stream(3, 2, 12, 5, F64)
    torch.testing.assert_close(
        rgfast.cka_matrix(scale * x, impl="library"), rgfast.cka_matrix(x, impl="library"), rtol=0, atol=1e-13
    )


def test_layers_without_variance_are_nan():
    x = stream(3, 2, 8, 4)
    x[1, 0] = 7.0
    found = rgfast.cka_matrix(x, impl="library")
    undefined = torch.zeros(3, 3, dtype=torch.bool)
    undefined[1] = undefined[:, 1] = True
    assert torch.equal(found[0].isnan(), undefined)
    assert not found[1].isnan().any()
    assert rgfast.kernel_drift(x, impl="library")[0].isnan().all()


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
@pytest.mark.parametrize("adjacent", [True, False])
@pytest.mark.parametrize("width", [4, 40])
def test_alignment_with_and_without_groups(groups, adjacent, width):
    layers = [x[:, :23] for x in stream(4, 2, 25, width)]
    found = alignment(layers, adjacent=adjacent, groups=groups, impl="library")
    want = alignment(layers, adjacent=adjacent, groups=groups, impl="reference")
    torch.testing.assert_close(found, want, rtol=0, atol=1e-11, equal_nan=True)


def test_by_features_beyond_the_limit_and_by_samples_give_the_same(monkeypatch):
    x = stream(3, 2, 20, 30)
    limited = rgfast.cka_matrix(x, sample_limit=10, impl="library")
    routes = []
    original = batched._by_samples
    monkeypatch.setattr(batched, "_by_samples", lambda *args: routes.append(1) or original(*args))
    torch.testing.assert_close(rgfast.cka_matrix(x, impl="library"), limited, rtol=0, atol=1e-12)
    monkeypatch.setattr(batched, "product_seconds", lambda *_: (1.0, 0.0))
    by_samples = rgfast.cka_matrix(x, impl="library")
    assert routes
    torch.testing.assert_close(by_samples, limited, rtol=0, atol=1e-12)
    monkeypatch.setattr(batched, "_LONG", 100)  # sums are cut in gcd(400, 64) parts
    torch.testing.assert_close(rgfast.cka_matrix(x, impl="library"), limited, rtol=0, atol=1e-12)
    monkeypatch.setattr(batched, "_WORK_BYTES", 8 * 3 * 20 * 30)
    torch.testing.assert_close(rgfast.cka_matrix(x, impl="library"), limited, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("layers", "n", "width", "near", "cheaper"),
    [(7, 1024, 64, False, 0), (25, 1024, 256, False, 1), (49, 1024, 256, True, 0), (24, 256, 512, False, 1)],
)
def test_the_cheaper_route_is_the_one_that_was_measured_so(layers, n, width, near, cheaper):
    times = batched.product_seconds(16, n, width, Wanted(layers, layers, near))
    assert times.index(min(times)) == cheaper


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_named(bad):
    x = stream(3, 2, 8, 4)
    x[1, 1, 3, 2] = bad
    with pytest.raises(
        ValueError, match="layers must be finite, got 1 NaN or Inf values in layer 1 at position 1"
    ):
        rgfast.cka_matrix(x, impl="library")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (
            lambda x: rgfast.hsic(x[0], x[1], impl="library"),
            "only CKA and drift of linear kernels are batched, not 'hsic'",
        ),
        (lambda x: rgfast.cka(x[0], x[1], kernel="rbf", impl="library"), "not 'rbf'"),
        (lambda x: rgfast.minibatch_cka(x, batch_size=4, impl="library"), "not 'minibatch'"),
        (lambda x: rgfast.cka_matrix(x.requires_grad_(), impl="library"), "a gradient is wanted"),
    ],
)
def test_what_it_refuses(call, reason):
    with pytest.raises(ImplUnavailable, match=f"cka: impl='library' cannot run this input: .*{reason}"):
        call(stream(2, 2, 8, 4))


def test_auto_leaves_the_cpu_as_it_was():
    told = rgfast.explain(rgfast.cka_matrix, stream(3, 2, 12, 5))
    reason = "on the CPU it multiplies as the reference does, which keeps the bits there"
    assert dict(told.candidates)["library"] == reason
    assert told.chosen != "library"


@pytest.mark.parametrize("shape", [(3, 2, 12, 5), (3, 2, 8, 300)])
def test_one_value_is_read_and_it_is_the_last(shape):
    x = stream(*shape)
    for call in (
        lambda: rgfast.cka_matrix(x, impl="library"),
        lambda: rgfast.kernel_drift(x, debiased=True, impl="library"),
        lambda: alignment(list(x), adjacent=True, groups=3, impl="library"),
    ):
        with guards.Waits() as watch:
            call()
        assert watch.found == ["_local_scalar_dense"]
        assert watch.after == 0


def test_on_a_fake_gpu_auto_takes_it():
    with guards.fake_gpu(), guards.Waits() as watch:
        x = torch.empty(4, 3, 40, 8, device="cuda")
        told = rgfast.explain(rgfast.cka_matrix, x)
        hsic = rgfast.explain(rgfast.hsic, x[0], x[1])
        for task, options in {
            "matrix": (("debiased", True),),
            "drift": (("debiased", False),),
            "alignment": (("adjacent", False), ("groups", 3)),
        }.items():
            value, finite = batched._computed(Call(task, ("layers",), tuple(x), options=options))
            assert value.device.type == finite.device.type == "cuda"
    assert told.chosen == "library"
    assert hsic.chosen == "reference"
    assert watch.found == []
    costs = dict(zip((name for name, _ in told.candidates), told.costs, strict=True))
    assert costs["library"] < costs["reference"] == 2 * OP.impls["library"].cost(_call(x))


def _call(x):
    with guards.fake_gpu():
        layers = tuple(torch.empty(3, 40, 8, device="cuda") for _ in range(4))
    return Call("matrix", ("layers",), layers)
