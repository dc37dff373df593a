"""CKA by the Gram tiles of the kernels for a GPU, run on this processor, and when samples are multiplied."""

import pytest
import torch
from allocated import Allocated

import rgfast
from rgfast.ops.cka import launches
from rgfast.ops.cka.api import OP
from rgfast.ops.cka.call import Call
from rgfast.ops.cka.impl import cuda as kernels

F64 = torch.float64


@pytest.fixture
def gpu(emulated_gpu, monkeypatch):
    """Samples are multiplied whatever the shape is."""
    monkeypatch.setattr(kernels, "unproven", lambda device, *names: None)
    emulated_gpu.admit(OP)
    monkeypatch.setattr(kernels, "_takes_samples", lambda call: True)
    return emulated_gpu


def test_more_layers_than_are_multiplied_at_once(gpu, make):
    layers = make(34, 1, 6, 2)
    found = rgfast.cka_matrix(layers, debiased=False, impl="cuda")
    wanted = rgfast.cka_matrix(layers, debiased=False, impl="reference")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_one_row_far_from_the_others_hides_nothing(gpu, make, truth):
    layers = make(2, 1, 24, 40)
    layers[:, :, 5] += 1e5 * torch.eye(2, 40, dtype=F64)[:, None]
    found = rgfast.cka_matrix(layers, debiased=False, impl="cuda")
    assert truth.worst(found, layers, debiased=False) < 1e-12


@pytest.mark.parametrize("call", [rgfast.cka_matrix, rgfast.kernel_drift])
def test_bits_depend_on_a_position_alone(gpu, make, monkeypatch, call):
    layers = make(6, 2, 66, 5, dtype=torch.float32)
    together = call(layers, impl="cuda")
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
        (rgfast.cka_matrix, ["grams_float64", "inner", "collect"]),
        (rgfast.kernel_drift, ["near_float64", "collect"]),
    ],
)
def test_what_is_launched(gpu, make, call, kinds):
    layers = make(3, 2, 70, 80)
    gpu.log("cuLaunchKernelEx")
    call(layers, impl="cuda")
    names = [launch["kernel"] for launch in gpu.log("cuLaunchKernelEx")]
    kinds = ["centers_float64", "norms_float64", *kinds, "sums", "finish"]
    assert names == [f"rgfast_cka_{kind}" for kind in kinds]


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


@pytest.mark.parametrize("n", [64, 256, 512])
def test_the_way_does_not_depend_on_the_number_of_positions(n):
    """A position would have other bits in another call."""
    for layers in (2, 12, 40):
        for d in (20, 100, 200):
            ways = {kernels._takes_samples(call_of(layers, positions, n, d)) for positions in (1, 4, 40, 400)}
            assert len(ways) == 1


def test_the_kernels_of_each_way():
    names = {
        kind: kernels._kernels(call)
        for kind, call in {
            "features": call_of(2, 1, 40, 40),
            "all": call_of(2, 1, 40, 41),
            "neighbors": call_of(2, 1, 40, 41, near=True),
        }.items()
    }
    shared = ["centers_float32", "norms_float32", "sums", "finish"]
    assert names["features"] == named(*shared, "squares_float32")
    assert names["neighbors"] == named(*shared, "near_float32", "collect")
    assert names["all"] == named(*shared, "grams_float32", "inner", "collect")
    layers = tuple(torch.empty(1, 40, 9, device="meta") for _ in range(2))
    call = Call("alignment", ("layers",), layers, options=(("adjacent", False), ("groups", 2)))
    # Some may be left out one by one, in either way.
    groups = ["group_sums_float32", "group_products_float32", "left_out_float32"]
    alone = ["squares_float32", "grams_float32", "inner", "collect"]
    assert kernels._kernels(call) == named(*shared, *groups, *alone)


def named(*kinds):
    return [f"rgfast_cka_{kind}" for kind in kinds]


CALLS = {
    "all": lambda shape: call_of(*shape),
    "neighbors": lambda shape: call_of(*shape, near=True),
    "groups": lambda shape: call_of(*shape)._replace(
        task="alignment", options=(("adjacent", False), ("groups", 8))
    ),
    "batches": lambda shape: call_of(*shape)._replace(
        task="minibatch", options=(("debiased", True), ("bounds", (0, shape[2] // 2, shape[2])))
    ),
}
SIZES = [(25, 16, 4096, 256), (100, 3, 4096, 4096), (24, 300, 63, 128), (7, 64, 1023, 64)]


@pytest.mark.parametrize("samples", [False, True])
@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("shape", SIZES)
def test_less_than_256_mib_beside_the_layers(monkeypatch, shape, kind, samples):
    call, launched = CALLS[kind](shape), []
    if not samples and kind in ("groups", "batches"):
        # By samples, too, if features are as many as these.
        assert kernels._takes_samples(call) == (shape[3] > 64)
        samples = shape[3] > 64
    monkeypatch.setattr(kernels, "_takes_samples", lambda call: samples)
    monkeypatch.setattr(launches.cuda, "launch", lambda kernel, *rest, **more: launched.append(kernel))
    # What is allocated for the first turn; that of others takes its place.
    monkeypatch.setattr(kernels, "finish", stop)
    with Allocated() as made, pytest.raises(StopIteration):
        kernels._computed(call)
    bytes_made = made.bytes_beside(call.first)
    assert 0 < bytes_made < 256 << 20
    assert "rgfast_cka_sums" in launched


def stop(*arguments, **options):
    raise StopIteration
