import pytest
import torch

import rgfast
from rgfast.ops.cka import reference
from rgfast.ops.cka.impl import native as kernels
from rgfast.runtime import native

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason="the native module is not built"
)

ISAS = pytest.mark.parametrize("isa", native.available_isas())
BOTH = pytest.mark.parametrize("debiased", [True, False])
PRECISIONS = pytest.mark.parametrize(("precision", "bound"), [("double", 1e-11), ("single", 1e-6)])
SHAPES = [(1, 4, 1), (2, 15, 16), (1, 17, 97), (3, 63, 65), (1, 130, 33), (1, 65, 200), (2, 257, 7)]


@ISAS
@BOTH
@PRECISIONS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("by_features", [False, True])
def test_every_pair_against_the_reference(make, isa, shape, debiased, precision, bound, by_features):
    layers = make(5, *shape).float() + 5.0
    if debiased and shape[-2] == 4:
        bound *= 1e3  # one of the two degrees of freedom of a U-centred 4x4 kernel may all but vanish
    limit = 1 if by_features else 4096
    expected = reference.matrix(list(layers), None, debiased=debiased)
    with native.use_isa(isa), rgfast.record() as log:
        options = {"debiased": debiased, "precision": precision, "impl": "native"}
        got = rgfast.cka_matrix(layers, sample_limit=limit, **options)
        drift = rgfast.kernel_drift(layers, **options)
    assert [(entry.op, entry.impl, entry.isa) for entry in log] == [("cka", "native", isa)] * 2
    assert (got - expected).abs().max() <= bound
    assert (got.diagonal(0, -2, -1) - 1).abs().max() <= 1e-12
    assert (drift - (1 - expected.diagonal(1, -2, -1))).abs().max() <= bound


@ISAS
def test_few_samples_of_many_features_at_several_positions(make, isa):
    # Whole Grams of one position fill the room that there is for them.
    layers = make(20, 2, 320, 192).float()
    with native.use_isa(isa):
        got = rgfast.cka_matrix(layers, debiased=True, precision="single", impl="native")
    assert (got - reference.matrix(list(layers), None, debiased=True)).abs().max() <= 1e-6


@BOTH
@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize(("shape", "limit"), [((390, 176), 1), ((2000, 60), 4096), ((256, 500), 4096)])
def test_single_products_keep_the_bound_of_single_data(shape, limit, offset, power, debiased):
    # At 1e4 the data has ten bits: squares of so few round the same way every time. With a steep spectrum few
    # entries carry everything, and nothing averages.
    generator = torch.Generator().manual_seed(int(offset + 10 * power) + shape[0])
    decay = torch.arange(1, shape[1] + 1, dtype=torch.float64) ** -power
    steps = torch.randn(4, *shape, generator=generator, dtype=torch.float64) * decay
    layers = (steps.cumsum(0) + offset).float()
    expected = reference.matrix(list(layers), None, debiased=debiased)
    options = {"debiased": debiased, "sample_limit": limit, "impl": "native"}
    for precision in (None, "single"):
        got = rgfast.cka_matrix(layers, precision=precision, **options)
        assert (got - expected).abs().max() <= 1e-6
    assert (got != rgfast.cka_matrix(layers, precision="double", **options)).any()  # "single" meant floats
    drift = rgfast.kernel_drift(layers, debiased=debiased)
    assert (drift - (1 - expected.diagonal(1))).abs().max() <= 1e-6


@PRECISIONS
@pytest.mark.parametrize("limit", [1, 4096])
def test_layers_of_different_widths_and_two_models(make, precision, bound, limit):
    layers = [make(1, 90, d, seed=d)[0].float() for d in (3, 40, 130)]
    other = [layers[1] + 1.0, make(1, 90, 17, seed=9)[0]]
    options = {"precision": precision, "sample_limit": limit, "impl": "native"}
    within = rgfast.cka_matrix(layers, **options)
    across = rgfast.cka_matrix(layers, other, **options)
    assert (within - reference.matrix(layers, None, debiased=True)).abs().max() <= bound
    assert (across - reference.matrix(layers, other, debiased=True)).abs().max() <= bound
    pair = rgfast.cka(layers[0], other[1], impl="native")
    assert (pair - reference.pair(layers[0], other[1], debiased=True)).abs().max() <= 1e-10


@ISAS
@pytest.mark.parametrize("precision", ["double", "single"])
@pytest.mark.parametrize(("shape", "limit"), [((2, 150, 300), 4096), ((3, 200, 20), 1)])
def test_the_same_bits_on_any_number_of_threads(make, isa, precision, shape, limit):
    layers = make(6, *shape).float()
    before = torch.get_num_threads()
    found = []
    try:
        with native.use_isa(isa):
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                options = {"precision": precision, "impl": "native"}
                found.append(
                    (
                        rgfast.cka_matrix(layers, sample_limit=limit, **options),
                        rgfast.kernel_drift(layers, **options),
                    )
                )
    finally:
        torch.set_num_threads(before)
    for matrix, drift in found[1:]:
        assert torch.equal(matrix, found[0][0])
        assert torch.equal(drift, found[0][1])


@ISAS
@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("by_features", [True, False])
def test_nothing_that_was_not_written_is_read(make, isa, single, by_features):
    module = native.load()
    layers = [make(1, 2, 37, d, seed=d)[0] for d in (5, 33)]
    pairs = [(0, 0), (1, 1), (0, 1)]
    results = []
    with native.use_isa(isa):
        for poison in (0.0, torch.nan):
            options = ([native.tensor(x) for x in layers], pairs, by_features, single, 1, 2)
            space = torch.full((module.cka_workspace(*options) // 8,), poison, dtype=torch.float64)
            out = [torch.full((size,), torch.nan, dtype=torch.float64) for size in (6, 6, 4, 4)]
            assert not module.cka_products(*options, *(native.tensor(x) for x in (*out, space)))
            results.append(torch.cat(out))
    assert results[0].isfinite().all()
    assert torch.equal(*results)


def test_positions_are_taken_in_portions(make, monkeypatch):
    layers = make(3, 5, 3, 40, 6)
    whole = rgfast.cka_matrix(layers, impl="native"), rgfast.kernel_drift(layers, impl="native")
    monkeypatch.setattr(kernels, "_WORK_BYTES", 1)
    assert torch.equal(rgfast.cka_matrix(layers, impl="native"), whole[0])
    assert torch.equal(rgfast.kernel_drift(layers, impl="native"), whole[1])


def test_the_workspace_holds_no_kernel():
    layers = [torch.zeros(1, 2048, 16) for _ in range(4)]
    pairs = [(i, j) for i in range(4) for j in range(i, 4)]
    needed = native.load().cka_workspace([native.tensor(x) for x in layers], pairs, False, True, 1, 2)
    assert needed < 2048 * 2048 * 4


@pytest.mark.parametrize("precision", ["double", "single"])
def test_strides_and_dtypes(make, precision):
    base = make(6, 3, 40, 30)
    views = [
        base[::2, :, ::2, 1::3],
        base.transpose(1, 2).contiguous().transpose(1, 2),
        base.mT.contiguous().mT,
        base[:, :1].expand(6, 4, 40, 30),
        base.bfloat16(),
        base.half(),
    ]
    for view in views:
        dense = view.double().contiguous()
        got = rgfast.cka_matrix(view, precision=precision, impl="native")
        expected = rgfast.cka_matrix(dense, impl="reference")
        assert (got - expected).abs().max() <= (1e-11 if precision == "double" else 1e-6)


@pytest.mark.parametrize("precision", [None, "single"])
def test_an_outlier_late_in_the_samples_is_no_overflow(make, precision):
    layers = make(2, 200, 300).float()
    layers[0, 170] *= 1e15
    layers[1, 170] += 1e12
    for debiased in (True, False):
        got = rgfast.cka_matrix(layers, debiased=debiased, precision=precision, impl="native")
        if not debiased:
            assert (got - reference.matrix(list(layers), None, debiased=False)).abs().max() < 1e-6
        assert got.isfinite().all() or debiased


def test_samples_that_come_sorted(make, truth):
    layers = make(3, 300, 400).float()
    layers[:, 150:] += 30.0
    got = rgfast.cka_matrix(layers, precision="single", impl="native")
    assert (got - truth.matrix(layers)).abs().max() < 1e-6


def test_single_products_are_read_again_where_they_cancel():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, 40000, generator=generator)
    y = x + 0.5 * torch.randn(x.shape, generator=generator)
    assert x.numel() * 8 > kernels._TRIVIAL_FLOPS
    got = rgfast.cka(x, y, impl="native")
    assert (got - reference.pair(x, y, debiased=True)).abs().max() < 1e-9


def test_small_drifts_are_read_again(make):
    x = make(1, 4, 600, 64)[0].float()
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    layers = torch.stack([x, x + 3e-5 * step, x + 0.3 * step, x + 0.3 * step])
    assert layers.numel() * 64 > kernels._TRIVIAL_FLOPS
    got = rgfast.kernel_drift(layers)
    expected = reference.drift(list(layers), debiased=False)
    assert 1e-12 < expected[:, 0].min() < expected[:, 0].max() < 1e-8
    assert ((got - expected).abs() <= 1e-4 * expected).all()
    assert (got[:, 2] == 0).all()


@BOTH
@pytest.mark.parametrize("size", [(40, 5), (300, 400)])
def test_constant_layers(make, size, debiased):
    layers = make(3, 2, *size).float()
    layers[1, 0] = 0.1
    got = rgfast.cka_matrix(layers, debiased=debiased, impl="native")
    assert torch.equal(got.isnan(), rgfast.cka_matrix(layers, debiased=debiased, impl="reference").isnan())
    assert got[1].isfinite().all()


def test_what_the_kernels_refuse(make):
    x, y = make(2, 9, 3)
    with pytest.raises(rgfast.ImplUnavailable, match="only CKA and drift of linear kernels"):
        rgfast.hsic(x, y, impl="native")
    with pytest.raises(rgfast.ImplUnavailable, match="only CKA and drift of linear kernels"):
        rgfast.cka(x, y, kernel="rbf", impl="native")
    with pytest.raises(rgfast.ImplUnavailable, match="a gradient is wanted"):
        rgfast.cka(x.clone().requires_grad_(), y, impl="native")
    with torch.no_grad():
        assert rgfast.cka(x.clone().requires_grad_(), y, impl="native").isfinite()
    with pytest.raises(ValueError, match="y must be finite, got 1 NaN"):
        rgfast.cka(x, torch.where(y == y.max(), torch.nan, y), impl="native")
    with pytest.raises(rgfast.ImplUnavailable, match="it runs on the cpu, not on meta"):
        rgfast.cka(x.to("meta"), y.to("meta"), impl="native")


@pytest.mark.parametrize("debiased", [False, True])
def test_a_drift_without_digits_is_handed_to_the_reference_by_auto_alone(make, debiased):
    layers = make(4, 3, 20, 6)
    layers[1, 1] = layers[0, 1] * (1 + 1e-7 * torch.linspace(0, 1, 6))
    want = rgfast.kernel_drift(layers, debiased=debiased, impl="reference")
    assert want[1, 0] < 1e-8
    with rgfast.record() as log:
        got = rgfast.kernel_drift(layers, debiased=debiased)
        rgfast.kernel_drift(layers[1:], debiased=debiased)
    assert got[1, 0] == want[1, 0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert [(r.impl, [n.impl for n in r.nested]) for r in log] == [("native", ["reference"]), ("native", [])]
    with pytest.raises(rgfast.ImplUnavailable, match="a drift is below 1e-08"):
        rgfast.kernel_drift(layers, debiased=debiased, impl="native")
    rgfast.kernel_drift(layers, debiased=debiased, precision="single", impl="native")


def test_auto_takes_the_kernels(make):
    with rgfast.record() as log:
        rgfast.cka_matrix(make(2, 9, 3))
        rgfast.cka_matrix(make(2, 9, 3).requires_grad_())
    assert [entry.impl for entry in log] == ["native", "reference"]


def test_fp64_at_the_end_of_its_range_goes_to_the_reference(make):
    x, y = make(2, 20, 4)
    x = x / x.abs().max() * 1.7e308
    with rgfast.record() as log:
        assert float(rgfast.cka(x, y)) == pytest.approx(float(rgfast.cka(x / 1e300, y)), abs=1e-10)
    assert [(r.impl, [n.impl for n in r.nested]) for r in log] == [("native", ["reference"]), ("native", [])]
    with pytest.raises(rgfast.ImplUnavailable, match="its products leave the range of fp64"):
        rgfast.cka(x, y, impl="native")


def test_single_products_of_few_samples_keep_their_bound_where_u_centring_cancels(make):
    # Two degrees of freedom of a U-centred 4x4 kernel; one of them may all but vanish.
    first, second = make(2, 4000, 4, 65, seed=12).half()
    options = {"debiased": True, "impl": "native"}
    exact = rgfast.cka_matrix([first, second], precision="double", **options)
    single = rgfast.cka_matrix([first, second], precision="single", **options)
    assert (single - exact).abs().max() <= 1e-4


def test_bad_calls_of_the_module_are_refused(make):
    module = native.load()
    x = make(1, 2, 9, 3)[0]
    good = [native.tensor(x)]
    with pytest.raises(ValueError, match=r"pairs must be \(l, m\)"):
        module.cka_workspace(good, [(0, 1)], True, True, 1, 1)
    with pytest.raises(ValueError, match="threads must be at least 1"):
        module.cka_workspace(good, [(0, 0)], True, True, 1, 0)
    with pytest.raises(ValueError, match="layers must be float64 or float32"):
        module.cka_workspace([native.tensor(x.half())], [(0, 0)], True, True, 1, 1)
    with pytest.raises(ValueError, match="layers must have contiguous features"):
        module.cka_workspace([native.tensor(x.mT)], [(0, 0)], True, True, 1, 1)
    with pytest.raises(ValueError, match="layers must agree"):
        module.cka_workspace([*good, native.tensor(x[:1])], [(0, 0)], True, True, 1, 1)
    out = [native.tensor(torch.empty(2, dtype=torch.float64)) for _ in range(4)]
    small = native.tensor(torch.empty(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="workspace must be contiguous and hold"):
        module.cka_products(good, [(0, 0)], True, True, 1, 1, *out, small)
