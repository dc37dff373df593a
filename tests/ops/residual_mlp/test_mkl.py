"""The block with the library's products, and the same bits for any number of threads on every route."""

import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import rgfast
from rgfast.ops.residual_mlp.impl import mkl
from rgfast.ops.residual_mlp.reference import ACTIVATIONS, residual_mlp_reference
from rgfast.runtime import native

NAMES = ("x", "w1", "b1", "w2", "b2", "norm_weight", "norm_bias")
THREADS = (1, 2, 3, 4, 8)
UNIT = 2.0**-24

needs_library = pytest.mark.skipif(mkl.unavailable_reason() is not None, reason=str(mkl.unavailable_reason()))


def block(shape, *, norm="layer", biases=True, dtype=torch.float32, seed=0):
    rows, d, h = shape
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    affine = biases and norm is not None
    tensors = {
        "x": draw(rows, d) + 0.3,
        "w1": draw(h, d) / d**0.5,
        "b1": draw(h) * 0.3 if biases else None,
        "w2": draw(d, h) / h**0.5,
        "b2": draw(d) * 0.3 if biases else None,
        "norm_weight": 1 + 0.2 * draw(d) if affine else None,
        "norm_bias": 0.2 * draw(d) if affine and norm == "layer" else None,
    }
    return {k: None if t is None else t.to(dtype) for k, t in tensors.items()}


def call(tensors, impl="auto", **options):
    return rgfast.residual_mlp(
        *(tensors[k] for k in NAMES[:5]),
        norm_weight=tensors["norm_weight"],
        norm_bias=tensors["norm_bias"],
        impl=impl,
        **options,
    )


def outcome(function, tensors):
    """Output and all gradients, as a list."""
    leaves = {k: None if t is None else t.detach().clone().requires_grad_() for k, t in tensors.items()}
    y = function(leaves)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype))
    return [y.detach(), *(t.grad for t in leaves.values() if t is not None)]


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def for_each_count(function):
    """What ``function()`` returns, if it is the same to the bit for every number of threads."""
    found = []
    for count in THREADS:
        with threads(count):
            found.append(function())
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert torch.equal(got, want)
    return found[0]


# Every width, number of rows and ratio of H to D at least once, all routes of auto among them.
SHAPES = [
    (1, 16, 64),
    (200, 16, 16),
    (1000, 24, 73),
    (2, 64, 256),
    (49, 100, 301),
    (1000, 128, 128),
    (47, 256, 1024),
    (128, 256, 769),
    (1000, 256, 256),
    (1024, 256, 256),
    (200, 400, 400),
    (1, 512, 2048),
    (49, 512, 1537),
    (1000, 512, 512),
    (600, 768, 770),
    (48, 1000, 1000),
    (47, 1024, 3073),
    (200, 1024, 1024),
    (2, 2048, 2048),
    (128, 2048, 2048),
    (49, 2100, 90),
    (49, 90, 2100),
    (200, 4, 16),
    (2000, 7, 300),
    (300, 100, 3),
]


def kind(index):
    """Norm, activation, biases: all of each over the shapes."""
    return ("layer", "rms", None)[index % 3], list(ACTIVATIONS)[index % 5], index % 4 != 1


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_same_bits_for_any_number_of_threads(index):
    norm, activation, biases = kind(index)
    tensors = block(SHAPES[index], norm=norm, biases=biases, seed=index)
    run = partial(call, norm=norm, activation=activation, residual_scale=(1.0, 0.7)[index % 2])
    for_each_count(lambda: outcome(run, tensors))
    for_each_count(lambda: [run(tensors)])


@pytest.mark.parametrize("shape", [(200, 64, 256), (47, 512, 512), (300, 256, 300)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_same_bits_in_any_precision(shape, dtype):
    tensors = block(shape, dtype=dtype)
    for_each_count(lambda: outcome(call, tensors))
    for_each_count(lambda: [call(tensors)])


@pytest.mark.parametrize("impl", ["native", "mkl", "reference"])
@pytest.mark.parametrize("shape", [(300, 96, 200), (100, 512, 600), (33, 1000, 300)])
def test_same_bits_from_each_implementation(impl, shape):
    missing = {"native": native.unavailable_reason(), "mkl": mkl.unavailable_reason()}.get(impl)
    if missing is not None:
        pytest.skip(missing)
    tensors = block(shape)
    for_each_count(lambda: outcome(partial(call, impl=impl), tensors))


@pytest.mark.parametrize("shape", [(3, 40, 300), (4, 300, 16), (2, 520, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_across_positions(shape, dtype):
    n, length, width = shape
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=dtype)
    tensors = {"x": draw(n, length, width), "w1": draw(70, length) / length**0.5, "w2": draw(length, 70) / 8}

    def run(t):
        return rgfast.residual_mlp(t["x"], t["w1"], None, t["w2"], None, across="positions")

    for_each_count(lambda: outcome(run, tensors))
    for_each_count(lambda: [run(tensors)])


def each_layer(tensors, depth):
    return {k: None if t is None else [t] * depth for k, t in tensors.items() if k != "x"}


@pytest.mark.parametrize("shape", [(300, 64, 256), (200, 600, 700), (100, 2100, 64), (300, 5, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_from_a_stack(shape, dtype):
    tensors = block(shape, dtype=dtype)
    layers = each_layer(tensors, 3)

    def run(consumer=None):
        return rgfast.residual_stack(tensors["x"], **layers, consumer=consumer, tile=60 if consumer else None)

    def watched():
        states = []
        run(lambda first, seen: states.append(seen.clone()))
        return states

    for_each_count(lambda: [run()])
    for_each_count(watched)


@pytest.mark.parametrize(("mixing", "width"), [("none", 520), ("flat", 64), ("mixer", 24)])
def test_same_bits_from_steps_of_training(mixing, width):
    length = 12

    def trained():
        generator = torch.Generator().manual_seed(3)
        stack = rgfast.ResidualStack(
            width, 2, mixing=mixing, length=length, w2_scale=1.0, hidden=2 * width, generator=generator
        )
        optimiser = torch.optim.SGD(stack.parameters(), lr=0.1)
        x = torch.randn(10, length, width, generator=generator)
        for _ in range(3):
            optimiser.zero_grad()
            stack(x).square().mean().backward()
            optimiser.step()
        return [p.detach() for p in stack.parameters()]

    for_each_count(trained)


def over_budget(shape, norm="layer", activation="gelu", biases=True, scale=1.0, impl="mkl"):
    """Which results err by more than 2x the fp32 reference's own error + 4u of the truth."""
    tensors = block(shape, norm=norm, biases=biases, seed=sum(shape))
    options = {"norm": norm, "activation": activation, "residual_scale": scale}

    def reference(t):
        return residual_mlp_reference(*(t[k] for k in NAMES), norm, activation, scale, 1e-5)

    wide = {k: None if t is None else t.double() for k, t in tensors.items()}
    truth, single = outcome(reference, wide), outcome(reference, tensors)
    got = outcome(partial(call, impl=impl, **options), tensors)
    with torch.no_grad():
        got.append(call(tensors, impl=impl, **options))
    single.append(single[0])
    truth.append(truth[0])
    failed = []
    for index, (value, alone, want) in enumerate(zip(got, single, truth, strict=True)):
        assert torch.isfinite(value).all()
        error, own = ((t.double() - want).norm().item() for t in (value, alone))
        if error > 2 * own + 4 * UNIT * want.norm().item():
            failed.append(index)
    return failed


AWKWARD = [
    (0, 16, 16),
    (1, 8, 8),
    (2, 1000, 9),
    (47, 17, 52),
    (48, 384, 1153),
    (49, 100, 301),
    (130, 1000, 1001),
    (513, 16, 2049),
    (1000, 64, 65),
    (1000, 384, 384),
    (700, 129, 8),
    (1, 2048, 2048),
    (901, 500, 701),
    (2100, 200, 4100),
]


@needs_library
@pytest.mark.parametrize("index", range(len(AWKWARD)))
def test_error_budget(index):
    norm, activation, biases = kind(index)
    assert over_budget(AWKWARD[index], norm, activation, biases, scale=(0.7, 1.0)[index % 2]) == []
    assert over_budget(AWKWARD[index]) == []


@needs_library
@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_every_instruction_set(isa, activation):
    with native.use_isa(isa):
        for norm in ("layer", "rms", None):
            assert over_budget((49, 35, 70), norm, activation, norm != "rms", scale=0.7) == []


@needs_library
def test_several_chunks_of_rows_add_up():
    hidden = 40
    rows = 2 * (1 << 23) // hidden // 100 * 100 + 17  # just above the most that pass at once
    tensors = block((rows, 8, hidden))
    assert over_budget((rows, 8, hidden)) == []
    once = call(tensors, "mkl")
    assert torch.equal(once, call(tensors, "mkl"))


@needs_library
def test_every_output_is_written():
    torch.use_deterministic_algorithms(True)  # new tensors then start as NaN
    try:
        for shape in ((1, 17, 9), (47, 33, 70), (0, 16, 16)):
            for norm in ("layer", None):
                assert over_budget(shape, norm) == []
    finally:
        torch.use_deterministic_algorithms(False)


@needs_library
def test_gradients_only_where_wanted():
    tensors = block((60, 40, 72))
    everything = dict(zip(("y", *NAMES), outcome(partial(call, impl="mkl"), tensors), strict=True))
    dy = torch.randn(60, 40, generator=torch.Generator().manual_seed(9))
    for wanted in NAMES:
        leaves = {k: t.clone().requires_grad_(k == wanted) for k, t in tensors.items()}
        call(leaves, "mkl").backward(dy)
        assert {k for k, t in leaves.items() if t.grad is not None} == {wanted}
        assert torch.equal(leaves[wanted].grad, everything[wanted])


@needs_library
def test_any_layout_of_x():
    tensors = block((40, 24, 50))
    want = outcome(partial(call, impl="mkl"), tensors)
    apart = dict(tensors, x=torch.cat([tensors["x"], tensors["x"]], -1)[:, :24])
    expanded = dict(tensors, x=tensors["x"][:1].expand(40, 24))
    dense = dict(tensors, x=expanded["x"].contiguous())
    with torch.no_grad():
        assert torch.equal(call(apart, "mkl"), want[0])
        assert torch.equal(call(expanded, "mkl"), call(dense, "mkl"))


@needs_library
def test_nan_stays_in_its_row():
    tensors = block((600, 64, 96))
    clean = call(tensors, "mkl")
    tensors["x"][7, 3] = float("nan")
    got = call(tensors, "mkl")
    assert got[7].isnan().all()
    keep = torch.arange(600) != 7
    assert torch.equal(got[keep], clean[keep])


@needs_library
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    tensors = [t.requires_grad_(requires_grad) for t in block((9, 16, 24)).values()]
    opcheck(torch.ops.rgfast.residual_mlp.default, (*tensors, "layer", "gelu", 0.5, 1e-5, "features", True))
    plain = [t.detach() for t in tensors]
    wanted = [True, True, False, True, True, True, False]
    opcheck(
        torch.ops.rgfast.residual_mlp_backward.default,
        (torch.ones(9, 16), *plain, "layer", "gelu", 0.5, 1e-5, "features", wanted, True),
    )


@pytest.mark.parametrize("shape", [(60, 512, 512), (300, 256, 256)])
def test_compiled_in_one_graph(shape):
    tensors = block(shape)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found = for_each_count(lambda: outcome(compiled, tensors))
    for got, want in zip(found, outcome(call, tensors), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("impl", ["mkl", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inside_the_rest_of_autograd(impl, dtype):
    if impl == "mkl" and (mkl.unavailable_reason() or dtype == torch.float64):
        pytest.skip("it computes in fp32, where there is one")
    tensors = block((30, 24, 40), dtype=dtype)
    run = partial(call, impl=impl)
    want = outcome(run, tensors)

    def checkpointed(reentrant, t):
        def by_position(*values):
            return run(dict(zip(NAMES, values, strict=True)))

        return checkpoint(by_position, *t.values(), use_reentrant=reentrant)

    for reentrant in (False, True):
        found = outcome(partial(checkpointed, reentrant), tensors)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))

    def loss(x):
        return run(dict(tensors, x=x)).square().sum()

    x = tensors["x"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(x), x, create_graph=True)
    torch.testing.assert_close(torch.func.grad(loss)(tensors["x"]), slope)
    (second,) = torch.autograd.grad(slope.square().sum(), x)

    def plain(x):
        y = residual_mlp_reference(x, *list(tensors.values())[1:], "layer", "gelu", 1.0, 1e-5)
        return torch.autograd.grad(y.square().sum(), x, create_graph=True)[0].square().sum()

    (truth,) = torch.autograd.grad(plain(x), x)
    torch.testing.assert_close(second, truth, rtol=1e-4, atol=1e-2)
    if impl == "reference":
        batched = torch.stack([tensors["x"], tensors["x"] + 1])
        torch.testing.assert_close(
            torch.vmap(lambda v: run(dict(tensors, x=v)))(batched), run(dict(tensors, x=batched))
        )


@needs_library
def test_routes_and_refusals():
    tensors = block((20, 512, 64))
    leaves = dict(tensors, w1=tensors["w1"].clone().requires_grad_())
    with rgfast.record() as log:
        call(leaves)
        call(tensors)
        call(block((20, 16, 16)), "mkl")
        call(block((20, 16, 16)), "library")  # its name in 0.1
    assert [r.impl for r in log] == ["mkl", "native", "mkl", "mkl"]
    told = rgfast.explain("residual_mlp", *(leaves[k] for k in NAMES[:5]))
    assert [name for name, _ in told.candidates] == ["native", "mkl", "triton", "fp64", "reference"]
    assert told.chosen == "mkl"
    with pytest.raises(rgfast.ImplUnavailable, match="x is float64"):
        call(block((4, 16, 16), dtype=torch.float64), "mkl")
    x, w = torch.zeros(2, 8, 9), torch.zeros(8, 8)
    with pytest.raises(rgfast.ImplUnavailable, match="does not mix positions"):
        rgfast.residual_mlp(x, w, None, w, None, across="positions", impl="mkl")
    meta = torch.zeros(8, 8, device="meta")
    with pytest.raises(rgfast.ImplUnavailable, match="not on meta"):
        rgfast.residual_mlp(meta, meta, None, meta, None, impl="mkl")


HIDDEN = """
import ctypes, sys, warnings
from pathlib import Path
import torch
warnings.simplefilter("error")
opened, how = ctypes.CDLL, sys.argv[1]
class Without:
    def __init__(self, path):
        self.library = opened(path)
    def __getattr__(self, name):
        if name == "sgemm_" and how == "symbols":
            raise AttributeError(name)
        if name == "sgemm_pack_" and how == "packing":
            raise AttributeError(name)
        if name == "MKL_Set_Num_Threads_Local" and how == "threads":
            name = "MKL_Get_Max_Threads"
        return getattr(self.library, name)
ctypes.CDLL = Without
if how == "mkl":
    torch.backends.mkl.is_available = lambda: False
import rgfast
from rgfast.ops.residual_mlp.impl import mkl
print(mkl.unavailable_reason())
generator = torch.Generator().manual_seed(0)
w1, w2 = (torch.randn(*s, generator=generator).requires_grad_() for s in ((600, 512), (512, 600)))
x = torch.randn(300, 512, generator=generator)
found = []
with rgfast.record() as log:
    for threads in (1, 2, 3, 4, 8):
        torch.set_num_threads(threads)
        y = rgfast.residual_mlp(x, w1, None, w2, None)
        found.append([y, *torch.autograd.grad(y.sum(), (w1, w2))])
assert {r.impl for r in log} == {"mkl" if how == "packing" else "native"}, log
assert all(torch.equal(a, b) for other in found for a, b in zip(other, found[0]))
if how == "packing":
    sys.exit()
try:
    rgfast.residual_mlp(x, w1, None, w2, None, impl="mkl")
except rgfast.ImplUnavailable as error:
    assert mkl.unavailable_reason() in str(error)
else:
    raise AssertionError("no error")
"""


@needs_library
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("symbols", "this PyTorch does not export sgemm_"),
        ("threads", "the library's product gave a wrong result"),
        ("mkl", "this PyTorch has no MKL"),
        ("packing", "None"),
    ],
)
def test_without_the_library_our_own_products_take_its_place(how, reason):
    environment = {**os.environ, "PYTHONPATH": str(Path(rgfast.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN, how], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == reason


@needs_library
def test_the_library_gets_its_number_of_threads_back():
    code = (
        "import ctypes, torch, rgfast\n"
        "from pathlib import Path\n"
        "path = Path(torch.__file__).parent / 'lib' / 'libtorch_cpu.so'\n"
        "set_threads = ctypes.CDLL(str(path)).MKL_Set_Num_Threads_Local\n"
        "set_threads(5)\n"
        "x, w = torch.randn(30, 64), torch.randn(64, 64)\n"
        "rgfast.residual_mlp(x, w, None, w, None, impl='mkl')\n"
        "assert set_threads(0) == 5\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_library
def test_what_the_module_is_handed_is_checked():
    module = import_module("rgfast._native")
    with pytest.raises(ValueError, match="must not be null"):
        module.residual_mlp_use_library(0, 1)


@pytest.mark.parametrize("shape", [(1000, 1, 1), (47, 3, 10), (999, 2, 300), (300, 100, 5)])
def test_a_block_of_few_features_keeps_the_budget_whatever_the_order_of_adding(shape):
    with threads(1):
        assert over_budget(shape, activation="gelu_tanh", impl="auto") == []
    with threads(2):
        assert over_budget(shape, "rms", activation="gelu_tanh", impl="auto") == []
