"""The Triton block: its kernels under the interpreter, a few of them compiled, and when it is refused."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from guards import fake_gpu

import rgfast
from rgfast.ops.residual_mlp.call import Call
from rgfast.ops.residual_mlp.gpu import needs, table
from rgfast.ops.residual_mlp.impl import triton

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

CHECKS = [
    line.split("check_")[1].split("(")[0]
    for line in (HERE / "triton_checks.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("def check_")
]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """What each check found, of one process for all: Triton settles at import whether it interprets."""
    path = tmp_path_factory.mktemp("interpreted") / "found.json"
    done = subprocess.run(
        [sys.executable, HERE / "triton_checks.py", path],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text(encoding="utf-8"))


@needs_triton
@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(interpreted, check):
    found = interpreted[check]
    assert isinstance(found, dict), found
    assert found
    # Either whether something holds, or an error by what is allowed.
    assert [each for each, value in found.items() if value is False or not value <= 1] == []


def test_there_is_something_to_interpret():
    assert len(CHECKS) > 10


@needs_triton
@pytest.mark.parametrize(("arch", "name"), [(90, "forward split 64"), (80, "backward plain 64")])
def test_a_few_kernels_compile_and_fit(arch, name):
    """All of them: ``make gate``."""
    done = subprocess.run(
        [sys.executable, HERE / "triton_gate.py", "--arch", str(arch), "--only", name, "--limits"],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert name in done.stdout


def gpu_call(*shape, dtype=torch.float32, h=64, across="features"):
    x = torch.empty(shape, dtype=dtype, device="cuda")
    width = shape[-2] if across == "positions" else shape[-1]
    w1, w2 = (torch.empty(s, dtype=dtype, device="cuda") for s in ((h, width), (width, h)))
    return Call(x, w1, None, w2, None, None, None, "layer", "gelu", 1.0, 1e-5, across)


@pytest.fixture
def h100(monkeypatch):
    """Calls on a GPU that is not there, an H100."""
    monkeypatch.setattr(needs, "capability", lambda device: (9, 0))
    monkeypatch.setattr(triton.needs, "capability", lambda device: (9, 0))
    monkeypatch.setattr(triton, "_MISSING", None)
    with fake_gpu():
        yield monkeypatch


def refused(call):
    return triton.BLOCK.refusal(call), triton.BLOCK.by_name_only(call)


def test_it_runs_by_name_and_waits_for_a_measured_row(h100):
    able = gpu_call(4, 64)
    assert refused(able) == (None, "no measured row stands for this architecture")
    h100.setattr(triton, "MEASURED", frozenset({(9, 0)}))
    assert refused(able) == (None, None)
    assert refused(gpu_call(4, 5)) == (None, "D=5, H=64 is too narrow for its vectors")
    assert triton.BLOCK.cost(able) < rgfast.ops.residual_mlp.api.OP.impls["reference"].cost(able)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: gpu_call(4, 64, dtype=torch.float64),
            "it computes in fp32 and narrower types, and x is float64",
        ),
        (lambda: gpu_call(4, 8, 64, across="positions"), "it does not mix positions"),
    ],
)
def test_what_it_cannot_do(h100, call, words):
    assert refused(call())[0] == words


def test_an_architecture_without_these_tensor_cores(h100):
    h100.setattr(needs, "capability", lambda device: (7, 5))
    words = "it is for compute capability 8.0 and later, and this GPU has 7.5"
    assert refused(gpu_call(4, 64))[0] == words


def test_on_the_cpu_it_is_refused():
    x, w = torch.zeros(4, 16), torch.zeros(16, 16)
    with pytest.raises(rgfast.ImplUnavailable, match="it runs on the cuda, not on cpu"):
        rgfast.residual_mlp(x, w, None, w, None, impl="triton")


@pytest.fixture
def fresh():
    needs.missing.cache_clear()
    yield
    needs.missing.cache_clear()


@pytest.mark.parametrize(
    ("spec", "found", "hip", "compilers", "words"),
    [
        (None, "3.7.1", None, {"gcc"}, "Triton is not importable"),
        ("triton", "3.3.1", None, {"gcc"}, "Triton 3.3.1 is older than 3.4"),
        ("triton", "3.10.0", None, {"gcc"}, None),
        ("triton", "3.4.0", None, {"clang"}, None),
        ("triton", "4.0.0+git", None, {"gcc"}, None),
        ("triton", "3.7.1", "6.4", {"gcc"}, "it is for NVIDIA GPUs, and this PyTorch is for AMD's"),
        ("triton", "3.7.1", None, set(), "a C compiler, and neither gcc nor clang is there"),
    ],
)
def test_what_triton_needs(monkeypatch, fresh, spec, found, hip, compilers, words):
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(needs, "version", lambda name: found)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(needs.shutil, "which", lambda name: name if name in compilers else None)
    monkeypatch.delenv("CC", raising=False)
    reason = needs.missing()
    assert reason is None if words is None else words in reason


def test_a_compiler_that_is_named_and_not_there(monkeypatch, fresh):
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: "triton")
    monkeypatch.setattr(needs, "version", lambda name: "3.7.1")
    monkeypatch.setenv("CC", "no-such-compiler")
    assert needs.missing().endswith("CC=no-such-compiler is not one")


@pytest.mark.parametrize(
    ("x", "w", "products"),
    [
        (torch.float32, torch.float32, "fp32"),
        (torch.bfloat16, torch.bfloat16, "bf16"),
        (torch.float16, torch.float16, "fp16"),
        (torch.bfloat16, torch.float32, "fp32"),
        (torch.float32, torch.float16, "fp32"),
    ],
)
def test_products_follow_the_types(x, w, products):
    call = Call(
        torch.zeros(2, 8).to(x),
        *(torch.zeros(8, 8).to(w) if k in (0, 2) else None for k in range(6)),
        *("layer", "gelu", 1.0, 1e-5, "features"),
    )
    assert needs.products_of(call) == products
    with torch.autocast("cpu", dtype=torch.float16):
        assert needs.products_of(call) == "fp16"
        with torch.autocast("cpu", enabled=False):
            assert needs.products_of(call) == products


CODE = """
import torch
from rgfast.ops.residual_mlp.call import Call
from rgfast.ops.residual_mlp.gpu.needs import products_of
{setting}
z = torch.zeros(8, 8)
print(products_of(Call(z, z, None, z, None, None, None, "layer", "gelu", 1.0, 1e-5, "features")))
"""


@pytest.mark.parametrize(
    ("setting", "products"),
    [
        ("torch.set_float32_matmul_precision('high')", "tf32"),
        ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32"),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
    ],
)
def test_products_follow_the_precision_that_torch_is_set_to(setting, products):
    # In a process of its own: one way of setting it makes reading it another way an error from then on.
    command = [sys.executable, "-W", "error", "-c", CODE.format(setting=setting)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.split() == [products]


def test_the_table_has_every_form_width_and_architecture():
    for group in table.GROUPS:
        for form in ("plain", "single", "split"):
            for tiles in (table.FORWARD, table.BACKWARD):
                assert list(tiles[group, form]) == [64, 128, 256]
                for width, tile in tiles[group, form].items():
                    assert tile.rows % 16 == tile.units % 16 == 0
                    assert width // tile.halves >= 64
    assert [table.group_of(each) for each in ((9, 0), (8, 0), (10, 0), (8, 9), (13, 7))] == [
        "h100", "a100", "b200", "other", "other",
    ]  # fmt: skip
    assert [table.padded(width) for width in (1, 16, 17, 64, 65, 256)] == [16, 16, 32, 64, 128, 256]
