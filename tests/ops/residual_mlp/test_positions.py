"""The block across positions: the same MLP on every feature along T, the norm still over features."""

import pytest
import torch
from torch.library import opcheck

import rgfast
from rgfast.ops.residual_mlp.reference import ACTIVATIONS
from rgfast.runtime import native

needs_native = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=str(native.unavailable_reason())
)

NAMES = ("x", "w1", "b1", "w2", "b2", "norm_weight", "norm_bias")
UNIT = 2.0**-24


def tensors(shape, *, norm="layer", biases=True, seed=0):
    batch, length, d, h = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    affine = biases and norm is not None
    return {
        "x": draw(batch, length, d) + 0.3,
        "w1": draw(h, length) / length**0.5,
        "b1": draw(h) * 0.3 if biases else None,
        "w2": draw(length, h) / h**0.5,
        "b2": draw(length) * 0.3 if biases else None,
        "norm_weight": 1 + 0.2 * draw(d) if affine else None,
        "norm_bias": 0.2 * draw(d) if affine else None,
    }


def call(t, **options):
    return rgfast.residual_mlp(
        *(t[k] for k in NAMES[:5]),
        norm_weight=t["norm_weight"],
        norm_bias=t["norm_bias"],
        across="positions",
        **options,
    )


def outcome(given, dtype, **options):
    """The output and every gradient, in ``dtype``."""
    leaves = {k: None if t is None else t.detach().to(dtype).requires_grad_() for k, t in given.items()}
    y = call(leaves, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    present = [k for k in NAMES if leaves[k] is not None]
    gradients = torch.autograd.grad(y, [leaves[k] for k in present], dy)
    return {"y": y.detach()} | dict(zip(present, gradients, strict=True))


def test_the_reference_is_the_block_on_transposed_rows():
    t = tensors((3, 5, 7, 11), norm=None)
    wide = {k: None if v is None else v.double() for k, v in t.items()}
    got = call(wide, norm=None, residual_scale=0.5)
    flipped = rgfast.residual_mlp(
        wide["x"].transpose(1, 2), *(wide[k] for k in NAMES[1:5]), norm=None, residual_scale=0.5
    )
    torch.testing.assert_close(got, flipped.transpose(1, 2), rtol=1e-13, atol=1e-13)


def test_the_norm_runs_over_features():
    t = {k: v.double() for k, v in tensors((3, 5, 7, 11)).items()}
    normed = torch.nn.functional.layer_norm(t["x"], (7,), t["norm_weight"], t["norm_bias"])
    update = rgfast.residual_mlp(normed, *(t[k] for k in NAMES[1:5]), norm=None, across="positions") - normed
    torch.testing.assert_close(call(t), t["x"] + update, rtol=1e-13, atol=1e-13)


SHAPES = [
    (0, 12, 16, 24),
    (1, 1, 8, 3),
    (3, 12, 16, 24),
    (5, 17, 9, 33),
    (2, 300, 20, 70),
    (7, 8, 33, 600),
    (130, 12, 16, 24),
    (2, 16, 300, 64),
]


@needs_native
@pytest.mark.parametrize("norm", ["layer", "rms", None])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_budget(shape, norm):
    """At most twice the fp32 reference's own error + 4u of the truth, output and gradients."""
    activation = list(ACTIVATIONS)[sum(shape) % 5]
    given = tensors(shape, norm=norm, biases=sum(shape) % 3 > 0)
    options = {"norm": norm, "activation": activation, "residual_scale": 0.7}
    truth = outcome(given, torch.float64, impl="reference", **options)
    single = outcome(given, torch.float32, impl="reference", **options)
    for isa in native.available_isas():
        with native.use_isa(isa):
            got = outcome(given, torch.float32, impl="native", **options)
        for name, want in truth.items():
            own = (single[name].double() - want).norm()
            limit = 2 * own + 4 * UNIT * want.norm()
            assert torch.isfinite(got[name]).all()
            assert (got[name].double() - want).norm() <= limit, (isa, name)


@needs_native
def test_same_bits_for_every_thread_count():
    given = tensors((130, 12, 64, 48))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(outcome(given, torch.float32, impl="native"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][k], other[k]) for k in other)


@needs_native
def test_every_output_is_written():
    torch.use_deterministic_algorithms(True)  # new tensors then start as NaN
    try:
        for shape in ((3, 17, 5, 9), (1, 12, 33, 70), (0, 16, 16, 16)):
            got = outcome(tensors(shape), torch.float32, impl="native")
            assert all(torch.isfinite(t).all() for t in got.values())
    finally:
        torch.use_deterministic_algorithms(False)


@needs_native
def test_a_sequence_does_not_depend_on_the_others():
    given = tensors((40, 12, 16, 24))
    whole = call(given, impl="native")
    part = call(given | {"x": given["x"][13:15]}, impl="native")
    assert torch.equal(whole[13:15], part)
    given["x"][7, 3, 2] = float("nan")
    got = call(given, impl="native")
    keep = torch.arange(40) != 7
    assert torch.equal(got[keep], whole[keep])
    assert got[7].isnan().any()


@needs_native
def test_any_layout_and_any_leading_dimensions():
    given = tensors((6, 12, 16, 24))
    want = call(given, impl="native")
    x = given["x"]
    for view in (x.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([x, x], -1)[..., 0]):
        assert torch.equal(call(given | {"x": view}, impl="native"), want)
    assert torch.equal(call(given | {"x": x.reshape(2, 3, 12, 16)}, impl="native").flatten(0, 1), want)
    assert torch.equal(call(given | {"x": x[0]}, impl="native"), want[0])


@needs_native
def test_operator_and_compiled_graph():
    given = tensors((3, 12, 16, 24))
    args = tuple(t.requires_grad_() for t in given.values())
    opcheck(torch.ops.rgfast.residual_mlp.default, (*args, "layer", "gelu", 0.5, 1e-5, "positions"))
    torch._dynamo.reset()

    def run(x):
        return call(given | {"x": x})

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = given["x"].detach()
    assert torch.equal(compiled(x), run(x))


def test_second_derivatives_follow_the_reference():
    given = {k: t.detach() for k, t in tensors((2, 12, 16, 24)).items()}

    def penalised(impl):
        x = given["x"].clone().requires_grad_()
        (slope,) = torch.autograd.grad(call(given | {"x": x}, impl=impl).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]

    torch.testing.assert_close(penalised("auto"), penalised("reference"), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(5)}, r"x must have at least 2 dimensions, got shape \(5,\)"),
        ({"x": torch.zeros(2, 0, 4)}, r"x must have at least one position to mix, got shape \(2, 0, 4\)"),
        ({"w1": torch.zeros(6, 4)}, r"w1 must have shape \[H, 3\] .*, got \(6, 4\)"),
        ({"w2": torch.zeros(4, 6)}, r"w2 must have shape \[3, 6\], got \(4, 6\)"),
        ({"b2": torch.zeros(4)}, r"b2 must have shape \[3\] or be None, got \(4,\)"),
        ({"norm_weight": torch.zeros(3)}, r"norm_weight must have shape \[4\] or be None, got \(3,\)"),
    ],
)
def test_refusals(change, words):
    with pytest.raises(ValueError, match=words):
        call(tensors((2, 3, 4, 6)) | change)


def test_unknown_direction_is_refused():
    t = tensors((2, 3, 4, 6))
    with pytest.raises(ValueError, match="across must be one of 'features', 'positions', got 'rows'"):
        rgfast.residual_mlp(*(t[k] for k in NAMES[:5]), across="rows")
    told = rgfast.explain("residual_mlp", *(t[k] for k in NAMES[:5]), across="positions")
    assert told.candidates[-1][0] == "reference"
