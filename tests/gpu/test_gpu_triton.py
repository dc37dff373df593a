"""The Triton block on a GPU: the checks that are interpreted elsewhere, and the same bits run after run."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import rgfast

CHECKS = Path(__file__).resolve().parents[1] / "ops" / "residual_mlp" / "triton_checks.py"
NAMES = [
    name
    for path in sorted(CHECKS.parent.glob("triton_checks*.py"))
    for name in re.findall(r"^def check_(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch finds"),
]


def checked(name, folder):
    """What a check found, in a process of its own; none but what is wrong."""
    path = folder / f"{name}.json"
    paths = os.pathsep.join([str(CHECKS.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, CHECKS, path, name],
        # cuBLAS asks for the second where new tensors are to start as NaN.
        env=os.environ | {"TRITON_INTERPRET": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": paths},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    if done.returncode:
        return done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))[name]
    return {k: v for k, v in found.items() if v is False or not v <= 1} if isinstance(found, dict) else found


def test_what_the_interpreter_checks(tmp_path):
    # Nearly all of the time goes into compiling, which a process does one kernel after the other.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        found = dict(zip(NAMES, threads.map(lambda name: checked(name, tmp_path), NAMES), strict=True))
    assert NAMES
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


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
