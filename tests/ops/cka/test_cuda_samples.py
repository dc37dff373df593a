"""CKA by the Gram tiles of the kernels for a GPU, run on this processor, and when samples are multiplied."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rgfast
from rgfast import ImplUnavailable
from rgfast.ops.cka import launches
from rgfast.ops.cka.api import OP, alignment
from rgfast.ops.cka.call import Call
from rgfast.ops.cka.impl import cuda as kernels
from rgfast.ops.cka.sums import wanted_by

F64 = torch.float64


@pytest.fixture
def gpu(emulated_gpu, monkeypatch):
    """Samples are multiplied whatever the shape is."""
    emulated_gpu.admit(OP)
    monkeypatch.setattr(kernels, "_takes_samples", lambda call: True)
    return emulated_gpu


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize(
    ("count", "positions", "n", "d"), [(3, 2, 12, 30), (2, 1, 4, 3), (4, 1, 65, 17), (3, 2, 130, 9)]
)
def test_every_pair_against_explicit_kernels(gpu, make, truth, count, positions, n, d, debiased):
    layers = make(count, positions, n, d)
    found = rgfast.cka_matrix(layers, debiased=debiased, impl="cuda")
    assert truth.worst(found, layers, debiased=debiased) < (1e-12 if n > 4 else 1e-11)
    assert (found.diagonal(0, 1, 2) == 1).all()
    assert torch.equal(found, found.mT)
    pair = rgfast.cka(layers[0], layers[-1], debiased=debiased, impl="cuda")
    torch.testing.assert_close(pair, found[:, 0, -1], rtol=0, atol=1e-15)
    drift = rgfast.kernel_drift(layers, debiased=debiased, impl="cuda")
    torch.testing.assert_close(drift, 1 - found.diagonal(1, 1, 2), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_two_models_and_several_widths(gpu, dtype, truth, make):
    first = [make(1, 2, 30, d, seed=d)[0].to(dtype) for d in (3, 48)]
    other = [make(1, 2, 30, d, seed=d)[0].to(dtype) for d in (7, 1, 30)]
    found = rgfast.cka_matrix(first, other, impl="cuda")
    assert found.shape == (2, 2, 3)
    for p in range(2):
        wanted = truth.matrix([x[p] for x in first], [y[p] for y in other])
        torch.testing.assert_close(found[p], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("adjacent", [True, False])
def test_both_kinds_of_an_alignment(gpu, make, adjacent):
    layers = [*make(7, 2, 66, 9)]
    found = alignment(layers, adjacent=adjacent, impl="cuda")
    wanted = alignment(layers, adjacent=adjacent, impl="reference")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13, equal_nan=True)


def test_more_layers_than_a_tile_has_columns(gpu, make):
    layers = make(66, 1, 6, 2)
    found = rgfast.cka_matrix(layers, debiased=False, impl="cuda")
    wanted = rgfast.cka_matrix(layers, debiased=False, impl="reference")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("offset", "scale"), [(1e4, 1.0), (1e4, 1e18), (1e4, 1e-18), (0.0, 1e18), (0.0, 1e-18), (0.0, 1e-38)]
)
def test_offsets_and_scales(gpu, make, truth, offset, scale, dtype, debiased):
    layers = ((make(3, 1, 20, 30) + offset) * scale).to(dtype)
    found = rgfast.cka_matrix(layers, debiased=debiased, impl="cuda")
    assert truth.worst(found, layers, debiased=debiased) < 1e-12


@pytest.mark.parametrize("debiased", [True, False])
def test_the_rounding_of_a_mean_is_not_lost(gpu, make, truth, debiased):
    layers = make(3, 1, 40, 9) * 2.0**-20 + 100.0
    found = rgfast.cka_matrix(layers, debiased=debiased, impl="cuda")
    assert truth.worst(found, layers, debiased=debiased) < 1e-12


def test_one_row_far_from_the_others_hides_nothing(gpu, make, truth):
    layers = make(2, 1, 24, 40)
    layers[:, :, 5] += 1e5 * torch.eye(2, 40, dtype=F64)[:, None]
    found = rgfast.cka_matrix(layers, debiased=False, impl="cuda")
    assert truth.worst(found, layers, debiased=False) < 1e-12


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_drift_keeps_its_digits_or_is_left_to_others(gpu, make, truth, debiased, offset):
    x, step = make(1, 1, 40, 50)[0], make(1, 1, 40, 50, seed=5)[0]
    for size in (1e-1, 1e-2, 2e-3):
        layers = torch.stack([x, x + size * step]) + offset
        found = float(rgfast.kernel_drift(layers, debiased=debiased, impl="cuda"))
        assert found == pytest.approx(truth.drift(layers[0, 0], layers[1, 0], debiased), rel=1e-6)
    near = torch.stack([x, x + 3e-5 * step])  # a drift of about 1e-9
    for layers in (near, torch.stack([x, x])):
        with pytest.raises(ImplUnavailable, match="a drift is below 1e-08, where 1 - CKA has lost digits"):
            rgfast.kernel_drift(layers, debiased=debiased, impl="cuda")


def test_layers_without_variance_are_nan(gpu, make):
    layers = make(3, 2, 12, 15).float()
    layers[1, 0] = 1 / 3
    found = rgfast.cka_matrix(layers, impl="cuda")
    nothing = torch.zeros(3, 3, dtype=torch.bool)
    nothing[1] = nothing[:, 1] = True
    assert torch.equal(found[0].isnan(), nothing)
    assert not found[1].isnan().any()
    drift = rgfast.kernel_drift(layers, impl="cuda")
    assert drift[0].isnan().all()
    assert not drift[1].isnan().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_named(gpu, make, bad):
    layers = make(3, 2, 12, 15)
    layers[1, 1, 3, 2] = bad
    said = "layers must be finite, got 1 NaN or Inf values in layer 1 at position 1"
    for call in (rgfast.cka_matrix, rgfast.kernel_drift):
        with pytest.raises(ValueError, match=said):
            call(layers, impl="cuda")


@pytest.mark.parametrize("call", [rgfast.cka_matrix, rgfast.kernel_drift])
def test_bits_depend_on_a_position_alone(gpu, make, monkeypatch, call):
    layers = make(6, 3, 70, 20, dtype=torch.float32)
    together = call(layers, impl="cuda")
    assert torch.equal(call(layers[:, 1:2], impl="cuda"), together[1:2])
    turned = layers.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(call(turned, impl="cuda"), together)
    gpu.seed(7)
    monkeypatch.setattr(launches, "_SCRATCH", 4 * 6 * launches.TILE_BYTES)  # of one position at a time
    monkeypatch.setattr(launches, "_RUN", 1)
    assert torch.equal(call(layers, impl="cuda"), together)
    monkeypatch.setattr(launches, "_RUN", 5)
    monkeypatch.setattr(kernels, "_WORK_BYTES", 1)
    assert torch.equal(call(layers, impl="cuda"), together)


def test_some_tiles_at_a_time(gpu, make, truth, monkeypatch):
    layers = make(3, 2, 130, 4)
    for tiles in (1, 4):
        monkeypatch.setattr(launches, "_SCRATCH", tiles * 3 * launches.TILE_BYTES)
        found = rgfast.cka_matrix(layers, impl="cuda")
        assert truth.worst(found, layers, debiased=True) < 1e-12
    assert launches.chunk(3, 130) == (1, 4)  # of six


def test_what_is_there_at_a_time_fills_the_multiprocessors():
    """Positions, and tiles of each."""
    assert launches.chunk(25, 1024) == (1, 31)  # two turns of 396 blocks
    assert launches.chunk(2, 64) == (396, 1)
    assert launches.chunk(2, 65) == (132, 3)
    assert launches.chunk(900, 1024) == (1, 1)


@pytest.mark.parametrize(
    ("call", "kinds"),
    [
        (rgfast.cka_matrix, ["cka_grams_float64", "cka_inner", "moments_gather", "cka_sums"]),
        (rgfast.kernel_drift, ["cka_near_float64", "moments_gather", "cka_sums"]),
    ],
)
def test_what_is_launched(gpu, make, call, kinds):
    layers = make(3, 2, 70, 80)
    call(layers, impl="cuda")  # known answers come first
    gpu.log("cuLaunchKernelEx")
    call(layers, impl="cuda")
    names = [launch["kernel"] for launch in gpu.log("cuLaunchKernelEx")]
    kinds = ["cka_centers_float64", "cka_norms_float64", *kinds]
    assert names == [f"rgfast_{kind}" for kind in kinds]


def test_no_position(gpu, make):
    assert rgfast.cka_matrix(make(2, 0, 6, 9), impl="cuda").shape == (0, 2, 2)
    assert rgfast.kernel_drift(make(1, 2, 6, 9), impl="cuda").shape == (2, 0)


def call_of(count, positions, n, d, *, near=False, limit=4096):
    """The call for so many layers without data."""
    layers = tuple(torch.empty(positions, n, d, device="meta") for _ in range(count))
    options = (("debiased", False), *(() if near else (("sample_limit", limit),)))
    return Call("drift" if near else "matrix", ("layers",), layers, options=options)


@pytest.mark.parametrize(
    ("shape", "options", "samples"),
    [
        ((7, 64, 1024, 64), {}, False),
        ((25, 16, 1024, 256), {}, True),
        ((25, 16, 1024, 256), {"limit": 1000}, False),
        ((49, 16, 1024, 256), {"near": True}, False),
        ((4, 1, 512, 513), {"near": True}, True),
        ((4, 1, 512, 2048), {"near": True}, True),
        ((24, 1, 256, 512), {}, True),
        ((2, 1, 40, 41), {}, True),
        ((2, 1, 40, 41), {"limit": 39}, False),
        ((2, 1, 40, 40), {}, False),
    ],
)
def test_samples_are_multiplied_if_that_is_faster_or_features_are_more(shape, options, samples):
    assert kernels._takes_samples(call_of(*shape, **options)) is samples


def test_the_kernels_of_each_way():
    names = {
        kind: kernels._kernels(call)
        for kind, call in {
            "features": call_of(2, 1, 40, 40),
            "all": call_of(2, 1, 40, 41),
            "neighbors": call_of(2, 1, 40, 41, near=True),
        }.items()
    }
    shared = ["rgfast_cka_centers_float32", "rgfast_cka_norms_float32", "rgfast_cka_sums"]
    assert all(each[:3] == shared for each in names.values())
    assert names["features"][3:] == ["rgfast_cka_squares_float32"]
    assert names["neighbors"][3:] == ["rgfast_cka_near_float32", "rgfast_moments_gather"]
    gathered = ["rgfast_cka_inner", "rgfast_moments_gather"]
    assert names["all"][3:] == ["rgfast_cka_grams_float32", *gathered]


class Allocated(TorchDispatchMode):
    """Bytes of all tensors that are made, as if none were freed."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor):
                self.storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return found

    @property
    def bytes(self):
        return sum(each.nbytes() for each in self.storages.values())


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize(
    ("count", "positions", "n", "d"), [(25, 16, 4096, 256), (100, 3, 4096, 4096), (24, 300, 64, 128)]
)
def test_less_than_256_mib_beside_the_layers(monkeypatch, count, positions, n, d, near):
    launched = []
    monkeypatch.setattr(launches.cuda, "launch", lambda kernel, *rest, **more: launched.append(kernel))
    call = call_of(count, positions, n, d, near=near)
    for samples in (False, True):
        launched.clear()
        flat, wanted = [*call.first], wanted_by(call)
        step = min(positions, max(1, kernels._WORK_BYTES // kernels._bytes(flat, wanted, samples=samples)))
        with Allocated() as made:
            made.storages = {}
            kernels._sums([x[:step] for x in flat], wanted, samples=samples)
            kept = {x.untyped_storage()._cdata for x in flat}
            made.storages = {key: each for key, each in made.storages.items() if key not in kept}
        assert 0 < made.bytes < 256 << 20
        assert launched
