"""CKA in Triton: its kernels under the interpreter, and when it is refused; the gate compiles them."""

from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton_process
from allocated import Allocated
from guards import fake_gpu

from rgfast.ops.cka import batched
from rgfast.ops.cka import call as call_module
from rgfast.ops.cka.api import OP
from rgfast.ops.cka.call import Call
from rgfast.ops.cka.gpu import answers, launch, table
from rgfast.ops.cka.impl import triton
from rgfast.ops.residual_mlp.gpu import needs
from rgfast.runtime import known_answers, measured

HERE = Path(__file__).parent
CHECKS = triton_process.names_of(HERE)
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """What each check found, of one process for all: Triton settles at import whether it interprets."""
    path = tmp_path_factory.mktemp("interpreted") / "found.json"
    return triton_process.checked(HERE, path, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(interpreted, check):
    assert triton_process.wrong(interpreted[check]) == {}


def test_there_is_something_to_interpret():
    assert len(CHECKS) > 10


def call_of(*shapes, task="matrix", dtype=torch.float32, device="cuda", **options):
    """A call for layers of these shapes, without data."""
    layers = tuple(torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
    return Call(task, ("layers",), layers, options=tuple(options.items()))


@pytest.fixture
def h100(monkeypatch):
    """Calls on a GPU that is not there, an H100."""
    monkeypatch.setattr(needs, "capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "group_at", lambda device: "h100")
    monkeypatch.setattr(measured, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(call_module, "is_plain", lambda x: True)
    with fake_gpu():
        yield monkeypatch


SINGLE = {"debiased": True, "sample_limit": 4096, "precision": "single"}
ROW = ("sm_90", "a GPU", "a case", "library", 2.0, 1.9, 2.1, 1.0, 2.0, "0", "0")


def test_it_is_taken_if_single_precision_is_asked_for_and_was_measured(h100):
    single = call_of((16, 1024, 256), (16, 1024, 256), **SINGLE)
    assert triton.CKA.can_run(single) is None
    assert triton.CKA.by_name_only(single).startswith("it was not measured on sm_90")
    row = measured.Measured("cka", "triton", *ROW)
    h100.setattr(measured, "_standing", lambda: {("cka", "triton", "sm_90"): [row]})
    assert triton.CKA.by_name_only(single) is None
    assert triton.CKA.cost(single) < OP.impls["library"].cost(single)
    fast = 'precision="single" is not asked for, and this GPU is fast in fp64'
    for any_precision in (
        single._replace(options=tuple((SINGLE | {"precision": None}).items())),
        call_of((2, 40, 8), task="alignment", adjacent=False, groups=1),
    ):
        assert triton.CKA.can_run(any_precision) is None
        assert triton.CKA.by_name_only(any_precision) == fast
        with mock.patch.object(triton, "card", return_value=("sm_89", 128, 64)):
            assert triton.CKA.by_name_only(any_precision) is None


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: call_of((9, 4), (9, 4), task="hsic", debiased=True), "only CKA and drift of linear kernels"),
        (lambda: call_of((9, 4), **(SINGLE | {"precision": "double"})), "it computes in single precision"),
        (
            lambda: call_of((2, 9, 4), task="alignment", adjacent=True, groups=3),
            "samples are not left out by groups",
        ),
        (
            lambda: call_of((9, 4), dtype=torch.float64, **SINGLE),
            "layers must have one dtype of at most 32 bits, and these have float64",
        ),
        (
            lambda: call_of((9, 4), **SINGLE)._replace(
                second=(torch.empty(9, 4, dtype=torch.float16, device="cuda"),)
            ),
            "layers must have one dtype of at most 32 bits, and these have float16 and float32",
        ),
        (lambda: call_of((5000, 4), **SINGLE), "it multiplies samples, up to sample_limit=4096, not 5000"),
        (lambda: call_of((0, 9, 4), **SINGLE), "there is no position"),
        (
            lambda: call_of((4096, 8192), (4096, 4), **SINGLE),
            "two layers of 4096 samples and 8192 features do not fit its memory",
        ),
    ],
)
def test_what_it_refuses(h100, call, reason):
    assert triton.CKA.refusal(call()).startswith(reason)


def test_other_reasons(h100):
    call = call_of((9, 4), **SINGLE)
    assert triton.CKA.refusal(call_of((9, 4), device="cpu", **SINGLE)) == "it runs on the cuda, not on cpu"
    h100.setattr(needs, "capability", lambda device: (7, 5))
    assert triton.CKA.refusal(call).startswith("it is for compute capability 8.0 and later")
    recorded = call._replace(first=(call.first[0].requires_grad_(),))
    assert triton.CKA.refusal(recorded) == "a gradient is wanted"


def test_a_graph_does_not_hold_it(h100):
    h100.setattr(torch.cuda, "device", lambda device: mock.MagicMock())
    h100.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(triton.HandOff, match="its table and its result go through the host"):
        triton.run(call_of((9, 4), **SINGLE))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ({"task": "matrix", "debiased": True}, "cka_split_all_float32"),
        ({"task": "drift", "debiased": True, "dtype": torch.float16}, "cka_split_near_float16"),
        ({"task": "alignment", "adjacent": True, "dtype": torch.bfloat16}, "cka_split_near_bfloat16"),
    ],
)
def test_kernels_are_tried_before(h100, call, name):
    asked = []
    h100.setattr(known_answers, "unproven", lambda device, *kernels: asked.extend(kernels))
    assert triton.CKA.unproven(call_of((9, 4), **call)) is None
    assert asked == [name]
    assert name in known_answers._ANSWERS


@pytest.mark.parametrize("mistake", [0.0, 1e-5])
def test_a_planted_mistake_is_caught(monkeypatch, mistake):
    """In place of the kernels the library, one of whose sums is off."""

    def sums(flat, start, positions, wanted):
        z = batched._centred(flat, slice(None))
        found = batched._sums(z, wanted, 4096)
        found.off[:, 0, 1] *= 1 + mistake
        return found, torch.ones((), dtype=torch.bool)

    monkeypatch.setattr(answers, "sums", sums)
    monkeypatch.setattr(known_answers, "_TRIED", {})
    reason = known_answers.unproven(torch.device("cpu"), "cka_split_all_float32")
    assert (reason is None) == (mistake == 0)


def test_every_pair_of_layers_is_computed_together_once_at_least():
    for layers in (1, 2, 3, 7, 12):
        for most in (2, 3, 4, 5, 20):
            for near in (True, False):
                parts = launch.at_once(layers, most, near=near)
                assert max(map(len, parts)) <= most
                together = {(i, j) for part in parts for i in part for j in part}
                wanted = {(i, j) for i in range(layers) for j in range(layers) if not near or abs(i - j) < 2}
                assert wanted <= together


def test_runs_of_neighbors_keep_multiprocessors_busy():
    assert launch._run(576, 49, 132) == 25
    assert launch._run(132, 49, 132) == 49
    assert launch._run(3, 24, 132) == 1
    assert launch._run(108, 49, 132) == 7
    assert launch._run(1, 1, 132) == 1


def test_the_table_has_every_group():
    from rgfast.ops.residual_mlp.gpu.table import GROUPS

    for tiles in (table.GRAMS, table.NEAR):
        assert set(tiles) == set(GROUPS)
        for tile in tiles.values():
            # Rows are made ready so many at a time, and entries of a tile are multiplied in whole spans.
            assert tile.side % table.ROWS == tile.side**2 % table.SPAN == 0


class Enough(Exception):
    """Sums of the first positions are there."""


@needs_triton
@pytest.mark.parametrize("task", ["drift", "matrix"])
@pytest.mark.parametrize(
    "shape",
    [(25, 16, 4096, 256), (100, 1, 4096, 4096), (24, 300, 64, 128), (49, 16, 1024, 256), (50, 64, 512, 64)],
)
def test_less_than_256_mib_beside_the_layers(monkeypatch, shape, task):
    """Until sums of the first positions are added up; others are computed in the same memory."""
    from rgfast.ops.cka.gpu import kernels

    count, *rest = shape
    call = call_of(*[rest] * count, task=task, device="meta", **SINGLE)
    launched = []
    for name in kernels.__all__:
        kernel = mock.MagicMock()
        kernel.__getitem__.side_effect = lambda grid, name=name: lambda *a, **k: launched.append(name)
        monkeypatch.setattr(kernels, name, kernel)

    def stop(apart, to):
        raise Enough

    monkeypatch.setattr(launch, "_gather", stop)
    with Allocated() as made, pytest.raises(Enough):
        triton._computed(call)
    most = made.bytes_beside(call.first)
    assert 0 < most < 250 << 20
    assert {"prepare", "norms", "pairs"} < set(launched)
