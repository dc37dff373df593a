"""Triton kernels on a GPU: the checks that are interpreted elsewhere, and the same bits run after run."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import triton_process

import rgfast

OPS = Path(__file__).resolve().parents[1] / "ops"
CHECKS = [
    (room, name)
    for room in sorted({path.parent for path in OPS.glob("*/triton_checks*.py")})
    for name in triton_process.names_of(room)
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch finds"),
]


def test_what_the_interpreter_checks(tmp_path):
    def wrong(check):
        room, name = check
        # cuBLAS asks for the second where new tensors are to start as NaN.
        env = {"TRITON_INTERPRET": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        path = tmp_path / f"{room.name} {name}.json"
        return triton_process.wrong(triton_process.checked(room, path, name, **env)[name])

    # Nearly all of the time goes into compiling, which a process does one kernel after the other.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        found = dict(zip(CHECKS, threads.map(wrong, CHECKS), strict=True))
    assert CHECKS
    assert {str(check): each for check, each in found.items() if each} == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_a_large_block_by_name(d, dtype):
    generator = torch.Generator().manual_seed(d)
    shapes = ((40_000, d), (4 * d, d), (d, 4 * d))
    x, w1, w2 = (torch.randn(*s, generator=generator).to("cuda", dtype) for s in shapes)
    w1, w2 = w1 / d**0.5, w2 / d**0.5

    def run(*given, impl="triton"):
        leaves = [t.clone().requires_grad_() for t in given]
        y = rgfast.residual_mlp(leaves[0], leaves[1], None, leaves[2], None, impl=impl)
        return [y.detach(), *torch.autograd.grad(y, leaves, y.detach())]

    want = run(*(t.double() for t in (x, w1, w2)), impl="reference")
    eager, got, again = run(x, w1, w2, impl="reference"), run(x, w1, w2), run(x, w1, w2)
    for found, same, own, wanted in zip(got, again, eager, want, strict=True):
        assert torch.equal(found, same)
        error, of_eager = ((each.double() - wanted).norm() / wanted.norm() for each in (found, own))
        # The library sums gradients of weights over all rows, in an order of its own.
        assert float(error) <= (2 * float(of_eager) + 2**-22 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("d", [64, 128])
def test_a_stack_is_captured_in_a_graph(d):
    generator = torch.Generator().manual_seed(d)
    shapes = ((9_000, d), (3, 4 * d, d), (3, d, 4 * d))
    x, w1, w2 = (torch.randn(*s, generator=generator).to("cuda") for s in shapes)
    w1, w2 = w1 / d**0.5, w2 / d**0.5

    def run(x):
        return rgfast.residual_stack(x, w1, None, w2, None, impl="triton")

    rgfast.warmup()
    want, other = run(x.neg()), run(x)
    truth = rgfast.residual_stack(x.neg().double(), w1.double(), None, w2.double(), None, impl="reference")
    assert float((want.double() - truth).norm() / truth.norm()) < 1e-6
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x)
    graph.replay()
    assert torch.equal(y, other)
    x.neg_()
    graph.replay()
    assert torch.equal(y, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(9, 16, 700, 130), (40, 1, 1500, 64), (3, 2, 4096, 4096)], ids=str)
def test_cka_in_single_precision_by_name(shape, dtype):
    made = torch.Generator("cuda").manual_seed(0)
    x = (torch.randn(*shape, generator=made, device="cuda").cumsum(0) + 30).to(dtype)
    for call in (rgfast.cka_matrix, rgfast.kernel_drift):
        found, again = (call(x, precision="single", impl="triton") for _ in range(2))
        assert torch.equal(found, again)
        wanted = call(x, impl="library")
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6, equal_nan=True)
