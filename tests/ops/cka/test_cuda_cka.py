"""Kernels for a GPU by the package's own way to them, run on this processor, by features and by samples."""

import math

import pytest
import torch

import rgfast
from rgfast import ImplUnavailable
from rgfast.ops.cka.api import OP, alignment
from rgfast.ops.cka.impl import cuda as kernels
from rgfast.runtime.known_answers import _ANSWERS, unproven

F64 = torch.float64
TINY = 3e-5  # a step of so much makes a drift of about 1e-9


@pytest.fixture
def gpu(emulated_gpu, monkeypatch):
    """Answers are tried in a test of their own."""
    monkeypatch.setattr(kernels, "unproven", lambda device, *names: None)
    emulated_gpu.admit(OP)
    return emulated_gpu


@pytest.fixture(params=["features", "samples"])
def way(gpu, request, monkeypatch):
    """What is multiplied, whatever the shape is."""
    monkeypatch.setattr(kernels, "_takes_samples", lambda call: request.param == "samples")
    return request.param


@pytest.mark.parametrize(
    ("count", "positions", "n", "d", "debiased"),
    [
        (3, 2, 12, 5, True),
        (3, 2, 12, 5, False),
        (2, 1, 4, 3, True),
        (2, 1, 5, 1, False),
        (4, 1, 65, 17, True),
        (2, 1, 70, 66, False),
        (2, 1, 130, 9, True),
    ],
)
def test_every_pair_against_explicit_kernels(way, make, truth, count, positions, n, d, debiased):
    layers = make(count, positions, n, d)
    found = rgfast.cka_matrix(layers, debiased=debiased, impl="cuda")
    assert truth.worst(found, layers, debiased=debiased) < (1e-12 if n > 4 else 1e-11)
    assert (found.diagonal(0, 1, 2) == 1).all()
    assert torch.equal(found, found.mT)
    drift = rgfast.kernel_drift(layers, debiased=debiased, impl="cuda")
    torch.testing.assert_close(drift, 1 - found.diagonal(1, 1, 2), rtol=0, atol=1e-14)
    pair = rgfast.cka(layers[0], layers[-1], debiased=debiased, impl="cuda")
    torch.testing.assert_close(pair, found[:, 0, -1], rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_two_models_and_several_widths(way, dtype, truth, make):
    first = [make(1, 2, 30, d, seed=d)[0].to(dtype) for d in (3, 28)]
    other = [make(1, 2, 30, d, seed=d)[0].to(dtype) for d in (7, 1, 30)]
    found = rgfast.cka_matrix(first, other, impl="cuda")
    assert found.shape == (2, 2, 3)
    for p in range(2):
        wanted = truth.matrix([x[p] for x in first], [y[p] for y in other])
        torch.testing.assert_close(found[p], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("adjacent", [True, False])
def test_both_kinds_of_an_alignment(way, make, adjacent):
    layers = [*make(4, 2, 30, 9)]
    found = alignment(layers, adjacent=adjacent, impl="cuda")
    wanted = alignment(layers, adjacent=adjacent, impl="reference")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("offset", "scale"), [(1e4, 1.0), (1e4, 1e18), (1e4, 1e-18), (0.0, 1e18), (0.0, 1e-18), (0.0, 1e-38)]
)
def test_offsets_and_scales(way, make, truth, offset, scale, dtype, debiased):
    layers = ((make(3, 1, 20, 9) + offset) * scale).to(dtype)
    found = rgfast.cka_matrix(layers, debiased=debiased, impl="cuda")
    assert truth.worst(found, layers, debiased=debiased) < 1e-12


@pytest.mark.parametrize("debiased", [True, False])
def test_the_rounding_of_a_mean_is_not_lost(way, make, truth, debiased):
    layers = make(3, 1, 40, 9) * 2.0**-20 + 100.0
    found = rgfast.cka_matrix(layers, debiased=debiased, impl="cuda")
    assert truth.worst(found, layers, debiased=debiased) < 1e-12


def test_what_leaves_the_range_is_computed_again(way, make):
    layers = make(3, 2, 20, 9)
    wanted = rgfast.cka_matrix(layers, impl="reference")
    drift = rgfast.kernel_drift(layers, impl="reference")
    for scale in (1e100, 1e-100, 1e-170, 1e200):
        given = layers.clone()
        given[:, 1] *= scale
        found = rgfast.cka_matrix(given, impl="cuda")
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(rgfast.kernel_drift(given, impl="cuda"), drift, rtol=0, atol=1e-12)
    far = layers + 1e9
    found = rgfast.cka_matrix(far, impl="cuda")
    torch.testing.assert_close(found, rgfast.cka_matrix(far, impl="reference"), rtol=0, atol=1e-12)
    said = "its products leave the range of fp64, or an offset leaves too few digits"
    for call in (
        lambda impl: rgfast.hsic(1e-100 * layers[0], layers[1], impl=impl),
        lambda impl: rgfast.minibatch_cka(1e-100 * layers, batch_size=10, impl=impl),
    ):
        with pytest.raises(ImplUnavailable, match=said):
            call("cuda")
        torch.testing.assert_close(call("auto"), call("reference"), rtol=1e-12, atol=0)


def test_equal_rows_of_zeros_are_computed_by_kernels(way, make, monkeypatch):
    monkeypatch.setattr(kernels, "_mend", None)  # nothing is wrong with them
    layers = make(2, 1, 12, 3)
    layers[1] = 0.0
    assert rgfast.cka_matrix(layers, impl="cuda")[0, 0].isnan().tolist() == [False, True]


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_drift_keeps_its_digits(way, make, truth, debiased, offset):
    x, step = make(1, 1, 40, 9)[0], make(1, 1, 40, 9, seed=5)[0]
    for size in (1e-1, 2e-3, TINY):
        layers = torch.stack([x, x + size * step]) + offset
        found = float(rgfast.kernel_drift(layers, debiased=debiased, impl="cuda"))
        wanted = truth.drift(layers[0, 0], layers[1, 0], debiased)
        assert found == pytest.approx(wanted, rel=1e-6)


def test_only_positions_with_tiny_drifts_are_computed_again(way, make, monkeypatch):
    layers = make(2, 3, 30, 9)
    layers[1, 1] = layers[0, 1] + TINY * make(1, 1, 30, 9, seed=5)[0, 0]
    before = rgfast.kernel_drift(layers[:, [0, 2]], impl="cuda")
    again = []
    run = kernels.batched.run
    monkeypatch.setattr(kernels.batched, "run", lambda call: again.append(call) or run(call))
    found = rgfast.kernel_drift(layers, impl="cuda")
    assert [each.first[0].shape for each in again] == [(1, 30, 9)]
    assert torch.equal(found[[0, 2]], before)
    wanted = rgfast.kernel_drift(layers, impl="reference")
    assert 1e-10 < float(found[1]) < 1e-8
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-10, atol=0)
    assert rgfast.kernel_drift(layers[[0, 0]], impl="cuda").max() < 1e-30


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_layers_without_variance_are_nan(way, make, dtype):
    layers = make(3, 2, 12, 5).to(dtype)
    layers[1, 0] = 1 / 3
    found = rgfast.cka_matrix(layers, impl="cuda")
    nothing = torch.zeros(3, 3, dtype=torch.bool)
    nothing[1] = nothing[:, 1] = True
    assert torch.equal(found[0].isnan(), nothing)
    assert not found[1].isnan().any()
    drift = rgfast.kernel_drift(layers, impl="cuda")
    assert drift[0].isnan().all()
    assert not drift[1].isnan().any()
    assert rgfast.hsic(layers[0], layers[1], impl="cuda")[0] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_named(way, make, bad):
    layers = make(3, 2, 12, 15)
    layers[1, 1, 3, 2] = bad
    said = "layers must be finite, got 1 NaN or Inf values in layer 1 at position 1"
    for call in (
        rgfast.cka_matrix,
        rgfast.kernel_drift,
        lambda x, **by: alignment([*x], adjacent=True, groups=3, **by),
        lambda x, **by: rgfast.minibatch_cka(x, batch_size=5, **by),
    ):
        with pytest.raises(ValueError, match=said):
            call(layers, impl="cuda")


def test_bits_depend_on_a_position_alone(way, make, gpu, monkeypatch):
    layers = make(3, 2, 37, 20, dtype=torch.float32)
    together = rgfast.cka_matrix(layers, impl="cuda")
    gpu.seed(7)
    assert torch.equal(rgfast.cka_matrix(layers[:, 1:2], impl="cuda"), together[1:2])
    monkeypatch.setattr(kernels, "_WORK_BYTES", 1)
    assert torch.equal(rgfast.cka_matrix(layers, impl="cuda"), together)
    apart = torch.empty(3, 2, 37, 41)[..., 1::2].copy_(layers)
    back = layers.transpose(1, 3).contiguous().transpose(1, 3)
    for other in (apart, back):
        assert torch.equal(rgfast.cka_matrix(other, impl="cuda"), together)


def test_more_samples_than_a_block_of_moments_has(gpu, make):
    layers = make(2, 1, 1100, 3)
    found = rgfast.cka_matrix(layers, impl="cuda")
    torch.testing.assert_close(found, rgfast.cka_matrix(layers, impl="reference"), rtol=0, atol=1e-13)


def test_no_position(way, make):
    assert rgfast.cka_matrix(make(2, 0, 6, 3), impl="cuda").shape == (0, 2, 2)
    assert rgfast.kernel_drift(make(1, 2, 6, 3), impl="cuda").shape == (2, 0)
    assert alignment([*make(2, 0, 8, 3)], adjacent=False, groups=2, impl="cuda").shape == (3, 2, 0, 2, 2)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x: rgfast.cka(x[0], x[1], kernel="rbf", impl="cuda"), "only measures of linear kernels have"),
        (lambda x: rgfast.cka_matrix(x.requires_grad_(), impl="cuda"), "a gradient is wanted"),
        (
            lambda x: rgfast.cka(x[0], x[1].float(), impl="cuda"),
            "layers must have one dtype, and these have float32 and float64",
        ),
    ],
)
def test_what_it_refuses(gpu, make, call, reason):
    with pytest.raises(ImplUnavailable, match=f"cka: impl='cuda' cannot run this input: .*{reason}"):
        call(make(2, 1, 8, 5))


def test_limits_of_a_launch(gpu, make, monkeypatch):
    layers = make(3, 1, 8, 5)
    monkeypatch.setattr(kernels, "_MOST_ROWS", 7)
    with pytest.raises(ImplUnavailable, match="it sums up to 7 samples, not 8"):
        rgfast.cka_matrix(layers, impl="cuda")
    monkeypatch.setattr(kernels, "_MOST_ROWS", 8)
    OP._chosen.clear()
    monkeypatch.setattr(kernels, "MOST_SIDE", 2)
    with pytest.raises(ImplUnavailable, match="and 2 of pairs of layers or of groups"):
        rgfast.cka_matrix(layers, impl="cuda")


def test_beyond_the_limit_features_are_multiplied_anyhow(gpu, make):
    layers = make(2, 1, 6, 9)
    found = rgfast.cka_matrix(layers, sample_limit=5, impl="cuda")
    torch.testing.assert_close(found, rgfast.cka_matrix(layers, impl="reference"), rtol=0, atol=1e-11)


def test_a_graph_does_not_hold_it(gpu, make, monkeypatch):
    layers = make(2, 1, 8, 5)
    rgfast.cka_matrix(layers, impl="cuda")
    monkeypatch.setattr(kernels.cuda, "capturing", lambda device: True)
    with pytest.raises(ImplUnavailable, match="its table and its result go through the host"):
        rgfast.cka_matrix(layers, impl="cuda")


def test_every_kernel_has_an_answer(gpu):
    names = [name for name in gpu.kernels() if name.startswith("rgfast_cka")]
    assert len(names) == 36
    assert {*names} <= {*_ANSWERS}
    assert unproven(gpu.device, *names) is None


def test_auto_takes_it_where_a_row_stands(gpu, make, monkeypatch):
    layers = make(2, 1, 8, 5)
    why = dict(rgfast.explain(rgfast.cka_matrix, layers).candidates)["cuda"]
    assert why == "it was not measured on sm_90 (rgfast bench --device cuda --save does that)"
    monkeypatch.setattr(kernels.measured, "refusal", lambda op, impl, device: None)
    assert dict(rgfast.explain(rgfast.cka_matrix, layers).candidates)["cuda"] is None
