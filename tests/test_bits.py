"""The same bits on any number of threads, and wherever and however the data lie in memory.

Whether a library's sums depend on that is up to the processor's make: on Intel's few of these would fail
without any care. `tests/reliability/other_make.py` runs them as they run on another.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rgfast
from rgfast.ops.moments.api import OP as MOMENTS
from rgfast.ops.residual_mlp.impl import mkl
from rgfast.ops.spectrum.moments import rank_measures_from_moment
from rgfast.probing.estimators.moment_measures import measure_moments
from rgfast.runtime import native
from rgfast.runtime.threads import aligned, one_thread
from rgfast.streaming import MomentAccumulator

F64 = torch.float64
IMPLS = ["auto", "reference"]


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def shifted(x, by):
    """``x`` at an address ``by`` elements beyond one that a new tensor could have."""
    room = torch.empty(x.numel() + by, dtype=x.dtype)
    room[by:] = x.reshape(-1)
    view = room[by:].view(x.shape)
    assert view.data_ptr() == room.data_ptr() + by * x.element_size()
    return view


def lying(x, addresses):
    """``x`` in other places and orders, with the same values."""
    yield from (shifted(x, by) for by in addresses)
    yield x.mT.contiguous().mT
    yield x.movedim(0, -1).contiguous().movedim(-1, 0)
    room = torch.empty(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype)
    room[..., 1::2] = x
    yield room[..., 1::2]


@pytest.fixture
def restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_same(run, tensors):
    """``run`` of tensors on 1 to 4 threads, and of the same tensors lying otherwise."""
    torch.set_num_threads(1)
    wanted = run(*tensors)
    assert all(w.numel() for w in wanted)

    def check(found, what):
        for k, (a, b) in enumerate(zip(wanted, found, strict=True)):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), (k, what)

    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        check(run(*tensors), f"{threads} threads")
    torch.set_num_threads(2)
    small = sum(x.numel() for x in tensors) < 10_000
    addresses = range(1, 16) if small else (1, 6)
    for at, others in enumerate(zip(*(lying(x, addresses) for x in tensors), strict=True)):
        check(run(*others), f"way {at} to lie")


def measures(x, impl):
    found = rgfast.rank_measures(x, impl=impl)
    return [
        found.effective_rank,
        found.effective_rank_variance,
        found.singular_values,
        rgfast.participation_ratio(x, impl=impl),
        rgfast.stable_rank(x, impl=impl),
    ]


def with_gradient(function):
    def run(x, impl):
        x = x.detach().requires_grad_()
        value = function(x, impl=impl)
        return [value.detach(), *torch.autograd.grad(value.sum(), [x])]

    return run


SPECTRA = {
    "measures": measures,
    "svd": lambda x, impl: [rgfast.singular_values(x, method="svd", impl=impl)],
    "single": lambda x, impl: [rgfast.effective_rank(x, precision="single", impl=impl)],
    "sharp": lambda x, impl: [rgfast.numerical_rank(x, tol=1e-12, impl=impl)],
    **{
        f"gradient of {f.__name__}": with_gradient(f)
        for f in (rgfast.effective_rank, rgfast.participation_ratio, rgfast.stable_rank)
    },
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_spectrum(restored, name, dtype, impl):
    for shape in ((3, 70, 33), (1, 190, 185)):
        assert_same(lambda x: SPECTRA[name](x, impl), [drawn(*shape, dtype=dtype)])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_rows_of_rank_one_that_are_solved_again(restored, dtype, impl):
    x = drawn(2, 65, 1, dtype=F64) * drawn(2, 1, 33, dtype=F64, seed=1) + 1e-6 * drawn(2, 65, 33, dtype=F64)
    assert_same(lambda x: measures(x, impl), [x.to(dtype)])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_eigvalsh(restored, dtype, impl):
    x = drawn(3, 65, 65, dtype=dtype)
    assert_same(lambda a: [rgfast.eigvalsh(a, impl=impl)], [x @ x.mT])


def test_estimate_of_a_wide_moment(restored):
    x = drawn(700, 600, dtype=F64)
    moment = x.mT @ x

    def run(a):
        found = rgfast.effective_rank_estimate(a, probes=4, steps=8, deflate=4)
        rows = rgfast.moment_operator([x], 600)
        streamed = rgfast.effective_rank_estimate(rows, 600, probes=4, steps=8, deflate=4)
        return [torch.tensor([e.value, e.low, e.high], dtype=F64) for e in (found, streamed)]

    assert_same(run, [moment])


def test_measures_of_moments(restored):
    x = drawn(3, 90, 65, dtype=F64)

    def run(scatter):
        found = rank_measures_from_moment(scatter, 90)
        return [found.effective_rank, found.singular_values]

    assert_same(run, [x.mT @ x])


CKA = {
    "cka": lambda x, y, impl: [rgfast.cka(x, y, impl=impl), rgfast.cka(x, y, debiased=False, impl=impl)],
    "rbf": lambda x, y, impl: [rgfast.cka(x, y, kernel="rbf", impl="reference")],
    "hsic": lambda x, y, impl: [rgfast.hsic(x, y, impl="auto")],
    "matrix": lambda x, y, impl: [rgfast.cka_matrix([x, y], impl=impl)],
    "drift": lambda x, y, impl: [rgfast.kernel_drift([x, y], impl=impl)],
    "tiny drift": lambda x, y, impl: [rgfast.kernel_drift([x, x + 1e-6 * y], impl=impl)],
    "change": lambda x, y, impl: [rgfast.kernel_change([x, y])],
    "minibatch": lambda x, y, impl: [rgfast.minibatch_cka([x, y], batch_size=20, impl="auto")],
    "gradient": lambda x, y, impl: with_gradient(lambda z, impl: rgfast.cka(z, y, impl=impl))(x, impl),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("name", CKA)
def test_cka(restored, name, dtype, impl):
    for n, d in ((65, 33), (40, 130)):
        pair = [drawn(2, n, d, dtype=dtype), drawn(2, n, d, dtype=dtype, seed=1)]
        assert_same(lambda x, y: CKA[name](x, y, impl), pair)


def test_streamed_cka(restored):
    def run(x, y):
        rows, moments, mini = (
            rgfast.CKAAccumulator(),
            rgfast.CKAAccumulator(route="features"),
            rgfast.MinibatchCKAAccumulator(batch_size=32),
        )
        for stream in (rows, moments, mini):
            stream.update([x[:, :50], y[:, :50]]).update([x[:, 50:], y[:, 50:]])
        return [rows.finalize().matrix, moments.finalize().matrix, mini.finalize()]

    assert_same(run, [drawn(2, 140, 33), drawn(2, 140, 65, seed=1)])


@pytest.mark.parametrize("impl", ["auto", "reference", "native", "mkl"])
@pytest.mark.parametrize("gradients", [False, True])
def test_residual_mlp(restored, gradients, impl):
    width, hidden, rows = 64, 128, 200
    tensors = [
        drawn(rows, width),
        drawn(hidden, width, seed=1) / 8,
        drawn(1, hidden, seed=2),
        drawn(width, hidden, seed=3) / 11,
        drawn(1, width, seed=4),
        drawn(rows, width, seed=5),
    ]
    if impl == "mkl" and mkl.unavailable_reason() is not None:
        pytest.skip("this PyTorch has no MKL")

    def run(x, w1, b1, w2, b2, dy):
        given = [x, w1, b1[0], w2, b2[0]]
        if not gradients:
            return [rgfast.residual_mlp(*given, impl=impl), rgfast.residual_mlp(*given, norm=None, impl=impl)]
        leaves = [t.detach().requires_grad_() for t in given]
        y = rgfast.residual_mlp(*leaves, impl=impl)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    assert_same(run, tensors)


def moments_of(*layers, factors=(), mask=None):
    acc = MomentAccumulator(pairs="all", factors=factors)
    acc.update([x[:, :200] for x in layers], None if mask is None else mask[:, :200])
    other = MomentAccumulator(pairs="all", factors=factors)
    other.update([x[:, 200:] for x in layers], None if mask is None else mask[:, 200:])
    acc.merge(other).update([x[:, :50] for x in layers])
    pooled = acc.pooled()
    out = []
    for each in (acc, pooled):
        for i, j in ((0, 0), (0, 1), (1, 1)):
            pair = each.pair(i, j)
            out += [each.cross(i, j), pair.norm_product, pair.trace_i, each.cross(i, j, centering="none")]
        out += [each.mean(0), *([each.factor(0)] if factors else [])]
    return out


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    ("lead", "width", "dtype"),
    [(1, 190, torch.float32), (2, 65, F64), (2, 65, torch.bfloat16), (12, 17, torch.float32)],
)
def test_moments(restored, monkeypatch, lead, width, dtype, compiled):
    if not compiled:
        monkeypatch.setattr(MOMENTS, "impls", {"reference": MOMENTS.impls["reference"]})
        monkeypatch.setattr(MOMENTS, "_chosen", {})
    layers = [drawn(lead, 270, width, dtype=dtype), drawn(lead, 270, width + 1, dtype=dtype, seed=1)]
    mask = torch.rand(lead, 270, generator=torch.Generator().manual_seed(2)) < 0.8
    assert_same(moments_of, layers)
    assert_same(lambda *x: moments_of(*x, mask=mask), layers)
    if width < 100:
        assert_same(lambda *x: moments_of(*x, factors=(0,)), layers)


def test_expanded_rows(restored):
    one = drawn(1, 150, 33)

    def run(x):
        return [
            *moments_of(x.expand(4, 150, 33), x.expand(4, 150, 33).flip(0)),
            *measures(x.expand(4, 150, 33), "auto"),
            rgfast.cka_matrix([x.expand(4, 150, 33)] * 2),
        ]

    wanted = run(one)
    whole = one.expand(4, 150, 33).contiguous()
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            wanted,
            [*moments_of(whole, whole), *measures(whole, "auto"), rgfast.cka_matrix([whole, whole])],
            strict=True,
        )
    )


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        with one_thread():  # the model's own products are no part of the promise
            return x + torch.tanh(self.inner(x))


def test_a_probe(restored):
    x, target = drawn(160, 5, 24), drawn(160, 5, 2, seed=6)
    torch.manual_seed(3)
    model = nn.Sequential(*(Block(24) for _ in range(3)))

    def run(threads):
        torch.set_num_threads(threads)
        batches = [x[i : i + 40] for i in range(0, 160, 40)]
        return rgfast.probe(model, batches, targets={"t": target}, groups=4).dataset.drop_attrs()

    wanted = run(1)
    assert all(run(threads).equals(wanted) for threads in (2, 3, 4))


PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "addbmm", "addmv", "mv", "dot", "matmul", "linear", "einsum")


class Watch(TorchDispatchMode):
    """Names of the library's products that are called inside the block."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0].rstrip("_")
        if name in PRODUCTS:
            self.called.append(name)
        return function(*args, **(kwargs or {}))


def test_the_watch_sees_products():
    with Watch() as watch:
        torch.ones(2, 3) @ torch.ones(3, 2)
        torch.ones(1, 2, 2).baddbmm_(torch.ones(1, 2, 3), torch.ones(1, 3, 2))
    assert watch.called == ["mm", "baddbmm"]


@pytest.mark.skipif(native.unavailable_reason() is not None, reason="the compiled module is not built")
def test_no_product_of_the_library_is_in_the_moments_of_a_probe():
    layers = [drawn(3, 300, 33), drawn(3, 300, 40, seed=1)]
    with Watch() as watch:
        moments_of(*layers)
        moments = MomentAccumulator(pairs="all").update(layers)
        measure_moments(moments)
    assert watch.called == []
    with Watch() as watch:
        MomentAccumulator(factors=[0, 1]).update(layers)
    # Whether a first block is well conditioned is asked of its moment: of new tensors, on one thread.
    assert set(watch.called) <= {"bmm"}
    assert len(watch.called) <= 2


def test_aligned_copies_only_if_need_be():
    x = torch.randn(4, 6)
    assert aligned(x) is x
    for other in (shifted(x, 1), x.mT.contiguous().mT, x[:, :3], x[1:]):
        copy = aligned(other)
        assert copy.data_ptr() % 64 == 0
        assert copy.is_contiguous()
        assert torch.equal(copy, other)
