"""The stack in one call: the blocks one after the other, and what a consumer sees of it."""

import subprocess
import sys

import pytest
import torch

import rgfast
from rgfast.runtime import native

needs_native = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=str(native.unavailable_reason())
)
NAMES = ("w1", "b1", "w2", "b2")


def parameters(depth, d, h, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(depth, *shape, generator=generator)

    return {
        "w1": draw(h, d) / d**0.5,
        "b1": 0.3 * draw(h),
        "w2": draw(d, h) / h**0.5,
        "b2": 0.3 * draw(d),
        "norm_weight": 1 + 0.2 * draw(d),
        "norm_bias": 0.2 * draw(d),
    }


def stack(x, p, **options):
    norms = {k: p[k] for k in ("norm_weight", "norm_bias") if options.get("norm", "layer") is not None}
    return rgfast.residual_stack(x, *(p[k] for k in NAMES), **norms, **options)


def stream(x, p, **options):
    """The input and the output of every block, by ``residual_mlp`` one by one."""
    found = [x]
    for layer in range(len(p["w1"])):
        norms = {} if options.get("norm", "layer") is None else ("norm_weight", "norm_bias")
        found.append(
            rgfast.residual_mlp(
                found[-1], *(p[k][layer] for k in NAMES), **{k: p[k][layer] for k in norms}, **options
            )
        )
    return torch.stack(found)


@needs_native
@pytest.mark.parametrize("options", [{}, {"norm": None, "activation": "silu"}, {"norm": "rms", "eps": 1e-3}])
@pytest.mark.parametrize(
    "shape", [(0, 16), (1, 16), (16, 16), (17, 16), (48, 130), (49, 130), (200, 16), (7, 30, 24), (16,)]
)
def test_bits_are_those_of_the_blocks(shape, options):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    p = parameters(3, shape[-1], 2 * shape[-1] + 3)
    want = stream(x, p, impl="native", residual_scale=0.7, **options)
    with rgfast.record() as log:
        got = stack(x, p, residual_scale=0.7, **options)
    assert [(r.op, r.impl) for r in log] == [("residual_stack", "native")]
    assert torch.equal(got, want[-1])
    if x.dim() < 2:
        return
    for tile in (None, 1, 3, 64):
        seen = torch.full_like(want, float("nan"))

        def put(first, states, seen=seen):
            seen[:, first : first + states.shape[1]] = states

        assert torch.equal(stack(x, p, residual_scale=0.7, consumer=put, tile=tile, **options), want[-1])
        assert torch.equal(seen, want)


@needs_native
def test_same_bits_for_every_thread_count_and_layout():
    x, p = torch.randn(700, 64), parameters(4, 64, 256)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(stack(x, p, impl="native"))
    finally:
        torch.set_num_threads(before)
    odd = torch.stack([x, x], -1)[..., 0]
    spaced = torch.cat([x, x], -1)[:, :64]
    found += [stack(odd, p, impl="native"), stack(spaced, p, impl="native")]
    assert all(torch.equal(found[0], other) for other in found[1:])


@needs_native
@pytest.mark.parametrize("isa", native.available_isas())
def test_every_instruction_set(isa):
    x, p = torch.randn(60, 20), parameters(2, 20, 33)
    with native.use_isa(isa):
        assert torch.equal(stack(x, p, impl="native"), stream(x, p, impl="native")[-1])


def test_layers_may_differ_in_hidden_units_and_lack_biases():
    x = torch.randn(50, 16)
    first, second = parameters(1, 16, 24), parameters(1, 16, 40, seed=2)
    got = rgfast.residual_stack(
        x, [first["w1"][0], second["w1"][0]], [None, second["b1"][0]], [first["w2"][0], second["w2"][0]], None
    )
    between = rgfast.residual_mlp(x, first["w1"][0], None, first["w2"][0], None)
    want = rgfast.residual_mlp(between, second["w1"][0], second["b1"][0], second["w2"][0], None)
    torch.testing.assert_close(got, want)


def test_gradients_are_those_of_the_blocks():
    x, p = torch.randn(30, 16, dtype=torch.float64), parameters(3, 16, 24)
    p = {k: t.double().requires_grad_() for k, t in p.items()}
    seen = []
    y = stack(x, p, consumer=lambda first, states: seen.append(states.requires_grad), tile=8)
    got = torch.autograd.grad(y.square().sum(), list(p.values()))
    want = torch.autograd.grad(stream(x, p)[-1].square().sum(), list(p.values()))
    assert not any(seen)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(stack(x, p), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_take_the_blocks_one_by_one(dtype):
    x, p = torch.randn(30, 16).to(dtype), {k: t.to(dtype) for k, t in parameters(2, 16, 24).items()}
    assert torch.equal(stack(x, p), stream(x, p)[-1])
    told = rgfast.explain("residual_stack", x, *(p[k] for k in NAMES))
    assert told.chosen == "blocks"
    assert dict(told.candidates)["native"].startswith("it keeps the stream in fp32")
    with rgfast.record() as log:
        stack(x, p)
        stack(x, p, impl="reference")
    one = "reference" if dtype == torch.float64 else "native"
    assert [(r.impl, [(n.op, n.impl) for n in r.nested]) for r in log] == [
        ("blocks", [("residual_mlp", one)] * 2),
        ("reference", [("residual_mlp", "reference")] * 2),
    ]


def test_autocast_leaves_it_in_fp32():
    x, p = torch.randn(30, 16), parameters(2, 16, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = stack(x, p)
    assert torch.equal(inside, stack(x, p))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_compiled_in_one_graph(impl):
    torch._dynamo.reset()
    x, p = torch.randn(30, 16), parameters(2, 16, 24)
    compiled = torch.compile(lambda v: stack(v, p, impl=impl), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), stack(x, p))


def test_what_a_consumer_raises_arrives():
    def refuse(first, states):
        raise KeyError(first)

    x, p = torch.randn(30, 16), parameters(2, 16, 24)
    for impl in ("auto", "reference"):
        with pytest.raises(KeyError, match="0"):
            stack(x, p, consumer=refuse, impl=impl)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"w1": torch.zeros(0, 6, 4)}, ValueError, "w1 must hold at least one layer, got none"),
        ({"w1": []}, ValueError, "w1 must hold at least one layer, got none"),
        (
            {"w1": 3.0},
            TypeError,
            "w1 must be a tensor with a leading dimension of layers or a sequence, got float",
        ),
        ({"w2": None}, TypeError, "w2 must be a tensor with .*, got NoneType"),
        ({"w2": torch.zeros(3, 4, 6)}, ValueError, "w2 must hold 2 layers like w1, got 3"),
        (
            {"w2": [torch.zeros(4, 6), torch.zeros(4, 5)]},
            ValueError,
            r"w2\[1\] must have shape \[4, 6\], got",
        ),
        ({"b1": torch.zeros(2, 4)}, ValueError, r"b1\[0\] must have shape \[6\] or be None, got \(4,\)"),
        (
            {"b2": torch.tensor(0.0)},
            ValueError,
            r"b2 must have a leading dimension of layers, got shape \(\)",
        ),
        ({"x": torch.zeros(5, 3)}, ValueError, r"w1\[0\] must have shape \[H, 3\]"),
        ({"consumer": 3}, TypeError, "consumer must be callable or None, got int"),
        (
            {"x": torch.zeros(4), "consumer": print},
            ValueError,
            "x must have at least 2 dimensions with a cons",
        ),
        ({"tile": 0}, ValueError, "tile must be at least 1, got 0"),
        ({"tile": 1.5}, TypeError, "tile must be a whole number, got 1.5"),
        ({"impl": "cuda"}, rgfast.ImplUnavailable, "residual_stack: .*cuda"),
    ],
)
def test_refusals(change, error, words):
    shapes = {"x": (5, 4), "w1": (2, 6, 4), "b1": (2, 6), "w2": (2, 4, 6), "b2": (2, 4)}
    args = {name: torch.zeros(shape) for name, shape in shapes.items()} | change
    positional = [args.pop(name) for name in shapes]
    with pytest.raises(error, match=words) as caught:
        rgfast.residual_stack(*positional, **args)
    assert "\n" not in str(caught.value)


@needs_native
def test_named_native_says_why_not():
    x, p = torch.randn(30, 16), parameters(2, 16, 24)
    with pytest.raises(rgfast.ImplUnavailable, match="with gradients blocks run one by one"):
        stack(x.requires_grad_(), p, impl="native")
    with pytest.raises(rgfast.ImplUnavailable, match=r"keeps the stream in fp32 .* float64"):
        stack(x.detach().double(), {k: t.double() for k, t in p.items()}, impl="native")


@needs_native
def test_memory_does_not_grow_with_the_layers():
    """All activations would take 24 layers of 16 MiB; one output and the tile are what it needs."""
    code = """
import resource
import torch
import rgfast

torch.set_num_threads(1)
depth, rows, d = 24, 1 << 16, 64
x = torch.randn(rows, d)
w1, w2 = torch.randn(depth, 64, d) / 8, torch.randn(depth, d, 64) / 80
total = torch.zeros(depth + 1)

def add(first, states):
    total.add_(states.square().sum((1, 2)))

with torch.no_grad():
    rgfast.residual_stack(x[:256], w1, None, w2, None, consumer=add)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rgfast.residual_stack(x, w1, None, w2, None, consumer=add)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 64 << 20
