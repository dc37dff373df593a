"""The compiled block against the fp64 reference, on the budget that the fp32 reference sets itself."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.special import expit, ndtr

import rgfast
from rgfast.ops.residual_mlp import contract
from rgfast.ops.residual_mlp.call import LEAST_WIDTH
from rgfast.ops.residual_mlp.impl import mkl
from rgfast.ops.residual_mlp.reference import ACTIVATIONS, residual_mlp_reference
from rgfast.runtime import native

needs_native = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=str(native.unavailable_reason())
)

NAMES = ("x", "w1", "b1", "w2", "b2", "norm_weight", "norm_bias")
UNIT = 2.0**-24


def block(seed, rows, d, h, *, norm="layer", biases=True):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    affine = biases and norm is not None
    return {
        "x": draw(rows, d) + 0.3,
        "w1": draw(h, d) / d**0.5,
        "b1": draw(h) * 0.3 if biases else None,
        "w2": draw(d, h) / h**0.5,
        "b2": draw(d) * 0.3 if biases else None,
        "norm_weight": 1 + 0.2 * draw(d) if affine else None,
        "norm_bias": 0.2 * draw(d) if affine else None,
    }


def run(function, tensors, dy, dtype):
    """Output and gradients of ``function`` at ``tensors`` in ``dtype``."""
    leaves = {k: None if t is None else t.detach().to(dtype).requires_grad_() for k, t in tensors.items()}
    y = function(leaves)
    present = [k for k in NAMES if leaves[k] is not None]
    gradients = torch.autograd.grad(y, [leaves[k] for k in present], dy.to(dtype))
    return {"y": y.detach()} | dict(zip(present, gradients, strict=True))


def reference(options):
    return lambda t: residual_mlp_reference(*(t[k] for k in NAMES), *options)


def public(options, impl="native"):
    norm, activation, scale, eps = options

    def call(t):
        return rgfast.residual_mlp(
            *(t[k] for k in NAMES[:5]),
            norm=norm,
            norm_weight=t["norm_weight"],
            norm_bias=t["norm_bias"],
            activation=activation,
            residual_scale=scale,
            eps=eps,
            impl=impl,
        )

    return call


def over_budget(got, truth, single):
    """Which of the arrays err by more than 2x the fp32 reference's own error + 4u of the truth."""
    failed = {}
    for name, want in truth.items():
        assert got[name].shape == want.shape
        assert torch.isfinite(got[name]).all(), name
        error = (got[name].double() - want).norm().item()
        own = (single[name].double() - want).norm().item()
        limit = 2 * own + 4 * UNIT * want.norm().item()
        if error > limit:
            failed[name] = (error, limit)
    return failed


def check(shape, *, norm="layer", activation="gelu", scale=1.0, biases=True, seed=0, impls=("native",)):
    rows, d, h = shape
    tensors = block(seed, rows, d, h, norm=norm, biases=biases)
    dy = torch.randn(rows, d, generator=torch.Generator().manual_seed(seed + 1))
    options = (norm, activation, scale, 1e-5)
    truth = run(reference(options), tensors, dy, torch.float64)
    single = run(reference(options), tensors, dy, torch.float32)
    for impl in impls:
        got = run(public(options, impl), tensors, dy, torch.float32)
        assert over_budget(got, truth, single) == {}, impl


def grid():
    """The cheap part of the grid in full and one cell in a few of the rest, by a fixed draw."""
    rng = np.random.default_rng(20)
    kinds = itertools.cycle(itertools.product(("layer", "rms", None), ACTIVATIONS))
    for d in (1, 3, 16, 17, 64, 100, 256, 384, 1000, 2048):
        for h in sorted({1, d, 3 * d + 1, 4 * d}):
            for rows in (0, 1, 2, 47, 48, 49, 1000):
                cost = rows * d * h
                if cost < 1e6 or (cost < 1.2e9 and rng.random() < 1.5e6 / cost):
                    yield (rows, d, h), *next(kinds)


def test_the_budget_can_be_exceeded():
    tensors = block(0, 5, 16, 16)
    dy = torch.ones(5, 16)
    options = ("layer", "gelu", 1.0, 1e-5)
    truth = run(reference(options), tensors, dy, torch.float64)
    single = run(reference(options), tensors, dy, torch.float32)
    off = {k: v * (1 + 32 * UNIT) for k, v in single.items()}
    assert set(over_budget(off, truth, single)) == set(truth)
    assert over_budget(single, truth, single) == {}


@needs_native
@pytest.mark.parametrize(("shape", "norm", "activation"), list(grid()))
def test_error_budget(shape, norm, activation):
    impls = ("auto", "native") if min(shape[1:]) >= LEAST_WIDTH else ("auto",)
    check(shape, norm=norm, activation=activation, scale=0.7, impls=impls)


@needs_native
@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_every_instruction_set(isa, norm, activation):
    with native.use_isa(isa):
        for shape in ((49, 17, 52), (30, 300, 270)):
            check(shape, norm=norm, activation=activation)
            check(shape, norm=norm, activation=activation, biases=False, seed=3)


@needs_native
@pytest.mark.parametrize("shape", [(1000, 16, 64), (49, 100, 301), (700, 256, 256), (48, 1024, 512)])
def test_same_bits_for_every_thread_count(shape):
    tensors = block(1, *shape)
    dy = torch.randn(shape[0], shape[1], generator=torch.Generator().manual_seed(5))
    before = torch.get_num_threads()
    outcomes = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            outcomes.append(run(public(("layer", "gelu", 1.0, 1e-5)), tensors, dy, torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in outcomes[1:]:
        assert all(torch.equal(outcomes[0][k], other[k]) for k in outcomes[0])


@needs_native
@pytest.mark.parametrize("shape", [(49, 128, 100), (300, 130, 300), (260, 300, 70)])
def test_sums_that_were_kept_give_the_bits_of_sums_formed_again(monkeypatch, shape):
    tensors = block(8, *shape)
    dy = torch.randn(shape[0], shape[1], generator=torch.Generator().manual_seed(5))
    found = []
    for kept_from in (1, 1 << 40):
        monkeypatch.setattr(contract, "KEPT_FROM", kept_from)
        found.append(run(public(("layer", "gelu", 0.7, 1e-5)), tensors, dy, torch.float32))
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


@needs_native
def test_every_output_is_written():
    torch.use_deterministic_algorithms(True)  # new tensors then start as NaN
    try:
        assert torch.empty(3).isnan().all()
        for shape in ((1, 17, 9), (47, 33, 70), (0, 16, 16)):
            for norm in ("layer", None):
                check(shape, norm=norm)
    finally:
        torch.use_deterministic_algorithms(False)


@needs_native
def test_a_large_common_offset_costs_no_more_than_in_the_reference():
    tensors = block(2, 50, 64, 256)
    tensors["x"] = tensors["x"] + 1e4
    dy = torch.ones(50, 64)
    options = ("layer", "gelu", 1.0, 1e-5)
    truth = run(reference(options), tensors, dy, torch.float64)
    single = run(reference(options), tensors, dy, torch.float32)
    assert over_budget(run(public(options), tensors, dy, torch.float32), truth, single) == {}


@needs_native
def test_nan_stays_in_its_row():
    tensors = block(3, 20, 16, 64)
    call = public(("layer", "gelu", 1.0, 1e-5))
    clean = call(tensors)
    tensors["x"][7, 3] = float("nan")
    got = call(tensors)
    assert got[7].isnan().all()
    keep = torch.arange(20) != 7
    assert torch.equal(got[keep], clean[keep])


@needs_native
def test_gradients_only_where_wanted():
    tensors = block(4, 30, 16, 24)
    options = ("layer", "gelu", 1.0, 1e-5)
    everything = run(public(options), tensors, torch.ones(30, 16), torch.float32)
    for wanted in NAMES:
        leaves = {k: t.clone().requires_grad_(k == wanted) for k, t in tensors.items()}
        public(options)(leaves).sum().backward()
        assert {k for k, t in leaves.items() if t.grad is not None} == {wanted}
        assert torch.equal(leaves[wanted].grad, everything[wanted])


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_storage_only(dtype):
    tensors = {k: t.to(dtype) for k, t in block(5, 30, 16, 24).items()}
    options = ("layer", "gelu", 1.0, 1e-5)
    dy = torch.ones(30, 16)
    got = run(public(options), tensors, dy, dtype)
    wide = run(public(options), tensors, dy, torch.float32)
    assert all(got[k].dtype == dtype and torch.equal(got[k], wide[k].to(dtype)) for k in got)


TRUTHS = {
    "gelu": lambda x: x * ndtr(x),
    "gelu_tanh": lambda x: x * expit(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * expit(x),
    "tanh": np.tanh,
}
CODES = {"gelu": 0, "gelu_tanh": 1, "relu": 2, "silu": 3, "tanh": 4}


def native_activation(name, x):
    values, slopes = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    native.load().residual_mlp_activation(
        CODES[name], x.numel(), x.data_ptr(), values.data_ptr(), slopes.data_ptr()
    )
    return values, slopes


def line():
    """fp32 numbers over the whole line: dense near the origin, then every magnitude, subnormals included."""
    rng = np.random.default_rng(11)
    dense = rng.uniform(-12, 12, 300_000)
    sizes = np.exp(rng.uniform(np.log(1e-44), np.log(3e38), 60_000)) * rng.choice([-1.0, 1.0], 60_000)
    return torch.from_numpy(np.concatenate([dense, sizes]).astype(np.float32))


@needs_native
@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activation_error(isa, name):
    x = line()
    wide = x.double().numpy()
    with np.errstate(over="ignore"):
        truth = TRUTHS[name](wide)
    with native.use_isa(isa):
        got = native_activation(name, x)[0].double().numpy()
    library = ACTIVATIONS[name](x).double().numpy()
    spacing = np.maximum(np.abs(np.spacing(truth.astype(np.float32))).astype(np.float64), 2.0**-149)
    right = wide >= -1

    def worst(values):
        error = np.abs(values - truth)
        return (error / spacing)[right].max(), (error / np.maximum(1, np.abs(wide)))[~right].max()

    ulps, absolute = worst(got)
    assert ulps <= 4
    assert absolute <= 2.0**-23
    if isa == native.active_isa():
        library_ulps, library_absolute = worst(library)
        assert ulps <= library_ulps
        assert absolute <= library_absolute


@needs_native
@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activation_at_the_edges(isa, name):
    inf = float("inf")
    x = torch.tensor([0.0, -0.0, inf, -inf, float("nan"), 3e38, -3e38, 1e-45, -1e-45])
    with native.use_isa(isa):
        values, slopes = native_activation(name, x)
    low, high = (-1.0, 1.0) if name == "tanh" else (0.0, inf)
    assert values[0] == 0
    assert not values[0].signbit()
    assert values[1] == 0
    assert values[2] == high
    assert values[3] == low
    assert values[4].isnan()
    assert values[5] == (1.0 if name == "tanh" else x[5])
    assert values[6] == low
    assert (values[7:].abs() <= 1e-45).all()
    finite = torch.tensor([True, True, True, True, False, True, True, True, True])
    assert slopes[finite].isfinite().all()
    assert (slopes[2:4] - torch.tensor([0.0 if name == "tanh" else 1.0, 0.0])).abs().max() < 1e-7
    assert slopes[4].isnan() or name == "relu"


@needs_native
@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_slope_error(isa, name):
    x = torch.from_numpy(np.random.default_rng(12).uniform(-12, 12, 100_000).astype(np.float32))
    wide = x.double().requires_grad_()
    ACTIVATIONS[name](wide).sum().backward()
    with native.use_isa(isa):
        slopes = native_activation(name, x)[1]
    assert (slopes.double() - wide.grad).abs().max() <= 4 * UNIT


@needs_native
def test_routes():
    tensors = block(6, 40, 16, 64)
    call = public(("layer", "gelu", 1.0, 1e-5), "auto")
    with rgfast.record() as log:
        call(tensors)
        call({k: t.double() for k, t in tensors.items()})
        call(block(6, 40, 3, 12))
    assert [(r.impl, r.isa) for r in log] == [
        ("native", native.active_isa()),
        ("reference", None),
        ("fp64", None),
    ]


@needs_native
def test_refusals_say_why():
    wide = {k: t.double() for k, t in block(7, 4, 16, 16).items()}
    with pytest.raises(rgfast.ImplUnavailable, match="x is float64"):
        public(("layer", "gelu", 1.0, 1e-5))(wide)
    meta = [torch.zeros(s, device="meta") for s in ((4, 16), (16, 16), (16, 16))]
    with pytest.raises(rgfast.ImplUnavailable, match="not on meta"):
        rgfast.residual_mlp(meta[0], meta[1], None, meta[2], None, impl="native")


def told(rows, d, *, recorded=False, h=8):
    args = torch.zeros(rows, d), torch.zeros(h, d, requires_grad=recorded), None, torch.zeros(d, h), None
    return rgfast.explain("residual_mlp", *args)


@needs_native
def test_blocks_too_narrow_for_the_budget_go_through_fp64():
    explained = told(2, 3, h=9)
    assert explained.chosen == "fp64"
    assert dict(explained.candidates)["native"] == "D=3, H=9 is too narrow for its vectors"
    with rgfast.record() as log:
        public(("layer", "gelu", 1.0, 1e-5), "auto")(block(6, 40, 3, 12))
    assert [(r.impl, [n.impl for n in r.nested]) for r in log] == [("fp64", ["reference"])]


@needs_native
@pytest.mark.skipif(mkl.unavailable_reason() is not None, reason=str(mkl.unavailable_reason()))
def test_where_mkl_is_faster_it_is_taken_and_nothing_is_refused_for_its_time():
    for rows, d, recorded, chosen in (
        (49, 2048, False, "mkl"),
        (48, 4096, False, "native"),
        (49, 2047, False, "native"),
        (9999, 512, True, "mkl"),
        (1023, 511, True, "mkl"),
        (17, 256, True, "mkl"),
        (0, 512, True, "mkl"),
        (16, 511, True, "native"),
        (1024, 511, True, "native"),
        (1, 255, True, "native"),
        (0, 64, False, "native"),
    ):
        explained = told(rows, d, recorded=recorded)
        assert explained.chosen == chosen, (rows, d, recorded)
        able = [name for name, reason in explained.candidates if reason is None]
        assert able == ["native", "mkl", "reference"]
        costs = dict(zip((name for name, _ in explained.candidates), explained.costs, strict=True))
        assert costs[chosen] == min(costs[name] for name in able)
    with torch.no_grad():
        assert told(4, 512, recorded=True).chosen == "native"


@needs_native
def test_a_named_implementation_runs_what_auto_leaves_to_the_library():
    check((3, 512, 8))


def test_without_the_native_module():
    code = (
        "import sys, warnings; sys.modules['rgfast._native'] = None; warnings.simplefilter('always')\n"
        "import torch, rgfast\n"
        "args = torch.randn(5, 16), torch.randn(64, 16), None, torch.randn(16, 64), None\n"
        "with warnings.catch_warnings(record=True) as told, rgfast.record() as log:\n"
        "    y = rgfast.residual_mlp(*args); rgfast.residual_mlp(*args)\n"
        "assert [r.impl for r in log] == ['reference', 'reference'], log\n"
        "assert [w.category for w in told] == [rgfast.FallbackWarning], told\n"
        "assert torch.ops.rgfast.residual_mlp.default is not None\n"
        "try:\n    rgfast.residual_mlp(*args, impl='native')\n"
        "except rgfast.ImplUnavailable as error:\n    assert 'not importable' in str(error)\n"
        "else:\n    raise AssertionError('no error')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "RGFAST_STRICT"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
