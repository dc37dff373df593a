"""The Triton block: its kernels under the interpreter, and when it is refused; the gate compiles them."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import triton_process
from guards import fake_gpu

import rgfast
from rgfast import FallbackWarning, dispatch
from rgfast.ops.residual_mlp import call as call_module
from rgfast.ops.residual_mlp.call import Call, StackCall
from rgfast.ops.residual_mlp.gpu import answers, needs, table
from rgfast.ops.residual_mlp.impl import triton
from rgfast.ops.residual_mlp.reference import residual_mlp_reference
from rgfast.ops.residual_mlp.stack import OP as STACK
from rgfast.ops.residual_mlp.stack import default_tile
from rgfast.runtime import known_answers, measured

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

CHECKS = triton_process.names_of(HERE)


def searched(folder):
    """What makes a process find modules in a folder as well."""
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


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


COPIES = """
import triton_gate
for arch in (80, 90, 100):
    entry = next(each for each in triton_gate.entries(arch) if each.name == "forward split 64")
    print(arch, triton_gate.compiled(entry).asm["ptx"].count("cp.async.bulk.tensor") > 1)
try:
    triton_gate.compiled(entry._replace(constants=entry.constants | {"TMA": 1}, name="planted", arch=80))
except AssertionError as error:
    print(error)
"""


@needs_triton
def test_weights_are_copied_by_descriptors_from_sm_90_on(tmp_path):
    # As a process of its own: the checks of others may have made Triton interpret.
    done = subprocess.run(
        [sys.executable, "-c", COPIES],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)} | searched(HERE),
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    found = done.stdout.splitlines()
    assert found == ["80 False", "90 True", "100 True", "planted: copies of tensors False"], done.stderr


ADDRESSES = """
import re
import triton_gate
from triton.backends.nvidia.compiler import CUDABackend

class Found(Exception):
    pass

def stop(module, metadata):
    raise Found(str(module))

add = CUDABackend.add_stages

def until_addresses(self, stages, *rest):
    add(self, stages, *rest)
    stages["ttgir"] = stop

CUDABackend.add_stages = until_addresses
CHOSEN = ("forward plain 64", "forward split 256", "backward plain 64", "stack plain 64", "stack split 128")
CHOSEN += ("backward split 256", "begin 1024", "activate 4096", "descend 4096", "finish 1024")
for entry in triton_gate.entries(80):
    if entry.name not in CHOSEN:
        continue
    try:
        triton_gate.compiled(entry)
    except Found as found:
        text = str(found)
    # What each value points into, and where offsets of 64 bits lead from.
    into, wide = {}, set()
    for made, operation, used, types in re.findall(r"(%[\\w]+) = tt\\.(\\w+) (%\\w+)[^:]*: (.*)", text):
        source = into.get(used, used)
        if operation in ("splat", "broadcast", "addptr", "expand_dims") and "ptr" in types:
            into[made] = source
        if operation == "addptr" and "i64" in types:
            wide.add(source.removeprefix("%"))
    rows = {"x", "y", "dy", "dx", "normed", "hidden", "slopes", "start", "gradient"} & entry.types.keys()
    print(entry.name, "atomic" in text, "b1" in wide, sorted(rows - wide), sep="|")
"""


@needs_triton
def test_offsets_of_rows_have_64_bits_and_nothing_is_added_atomically(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ADDRESSES],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)} | searched(HERE),
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    found = [line.split("|") for line in done.stdout.splitlines()]
    assert len(found) == 10, done.stderr
    assert {tuple(rest) for name, *rest in found if name != "activate 4096"} == {("False", "False", "[]")}
    # There biases are found by the place of a number among all of them.
    assert [rest for name, *rest in found if name == "activate 4096"] == [["False", "True", "[]"]]


def gpu_call(*shape, dtype=torch.float32, h=64, across="features"):
    x = torch.empty(shape, dtype=dtype, device="cuda")
    width = shape[-2] if across == "positions" else shape[-1]
    w1, w2 = (torch.empty(s, dtype=dtype, device="cuda") for s in ((h, width), (width, h)))
    return Call(x, w1, None, w2, None, None, None, "layer", "gelu", 1.0, 1e-5, across)


@pytest.fixture
def h100(monkeypatch):
    """Calls on a GPU that is not there, an H100."""
    monkeypatch.setattr(needs, "capability", lambda device: (9, 0))
    monkeypatch.setattr(triton, "_MISSING", None)
    monkeypatch.setattr(measured, "architecture", lambda device: "sm_90")
    for module in (triton, call_module):
        monkeypatch.setattr(module, "is_plain", lambda x: True)
    with fake_gpu():
        yield monkeypatch


def refused(call):
    return triton.BLOCK.refusal(call), triton.BLOCK.by_name_only(call)


def test_it_runs_by_name_and_waits_for_a_measured_row(h100):
    able = gpu_call(4, 64)
    runs, left_alone = refused(able)
    assert runs is None
    assert left_alone.startswith("it was not measured on sm_90")
    row = measured.Measured(
        "residual_mlp", "triton", "sm_90", "a GPU", "a case", "reference", 2.0, 1.9, 2.1, 1.0, 2.0, "0", "0"
    )
    h100.setattr(measured, "_standing", lambda: {("residual_mlp", "triton", "sm_90"): [row]})
    assert refused(able) == (None, None)
    assert refused(gpu_call(4, 5)) == (None, "D=5, H=64 is too narrow for its vectors")
    assert triton.BLOCK.cost(able) < rgfast.ops.residual_mlp.api.OP.impls["reference"].cost(able)


def test_a_loss_at_one_width_leaves_others_alone(h100):
    case = "residual_mlp", "triton", "sm_90", "a GPU", "a case", "reference"
    won = measured.Measured(*case, 2.0, 1.9, 2.1, 1.0, 2.0, "0", "0", 64)
    lost = measured.Measured(*case, 0.5, 0.5, 0.5, 2.0, 1.0, "0", "0", 512)
    rows = {(op, "triton", "sm_90"): [won, lost] for op in ("residual_mlp", "residual_stack")}
    h100.setattr(measured, "_standing", lambda: rows)
    loss = "reference was 2.00 times as fast where it was measured on sm_90 (a case)"
    assert refused(gpu_call(4, 64)) == (None, None)
    assert refused(gpu_call(4, 512)) == (None, loss)
    assert triton.STACK.by_name_only(call_module.StackCall((gpu_call(4, 64),))) is None
    h100.setattr(triton, "is_plain", lambda x: False)  # in a traced graph sizes may vary
    assert triton.BLOCK.by_name_only(gpu_call(4, 64)) == loss


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


def test_a_fake_tensor_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(triton, "_MISSING", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dispatch.op, "_WARNED", set())
    with fake_gpu():
        call = gpu_call(4, 64)
        assert triton.BLOCK.refusal(call) == "torch finds no GPU"
        with pytest.warns(FallbackWarning) as seen:
            y = rgfast.residual_mlp(call.x, call.w1, None, call.w2, None)
    assert y.device.type == "cuda"
    assert any("triton cannot run (torch finds no GPU)" in str(each.message) for each in seen)


def test_an_architecture_without_these_tensor_cores(h100):
    h100.setattr(needs, "capability", lambda device: (7, 5))
    words = "it is for compute capability 8.0 and later, and this GPU has 7.5"
    assert refused(gpu_call(4, 64))[0] == words


def test_on_the_cpu_it_is_refused():
    x, w = torch.zeros(4, 16), torch.zeros(16, 16)
    with pytest.raises(rgfast.ImplUnavailable, match="it runs on the cuda, not on cpu"):
        rgfast.residual_mlp(x, w, None, w, None, impl="triton")


@pytest.mark.parametrize(
    ("shape", "kind", "names"),
    [
        ((4, 64), {}, ["split_64"]),
        ((4, 24), {"dtype": torch.bfloat16}, ["plain_64"]),
        ((4, 65), {"dtype": torch.float16, "grad": True}, ["plain_128", "plain_128_gradient"]),
        ((4, 256), {"grad": True}, ["split_256", "split_256_gradient"]),
        ((4, 257), {}, ["wide"]),
        ((4, 257), {"grad": True}, ["wide", "wide_gradient"]),
    ],
)
def test_every_kernel_of_a_call_is_tried_before(h100, shape, kind, names):
    asked = []
    h100.setattr(known_answers, "unproven", lambda device, *kernels: asked.extend(kernels))
    grad = kind.pop("grad", False)
    call = gpu_call(*shape, **kind)
    assert triton.BLOCK.unproven(call._replace(x=call.x.requires_grad_(grad))) is None
    assert asked == [f"residual_mlp_{name}" for name in names]


def test_every_tile_has_a_known_answer():
    registered = {kernel for answer in answers.ANSWERS for kernel in answer.kernels}
    assert registered <= known_answers._ANSWERS.keys()
    tiles = {f"residual_mlp_{form}_{width}" for _, form in table.FORWARD for width in (64, 128, 256)}
    stacks = {f"residual_stack_{form}_{width}" for _, form in table.STACK for width in (64, 128)}
    blocks = {*tiles, "residual_mlp_wide"}
    assert registered == blocks | {f"{name}_gradient" for name in blocks} | stacks


def gpu_stack(*shapes, grad=False, **kind):
    calls = [gpu_call(*shape, h=h, **kind) for *shape, h in shapes]
    return StackCall(tuple(call._replace(x=calls[0].x.requires_grad_(grad)) for call in calls))


@pytest.mark.parametrize(
    ("shapes", "kind", "names"),
    [
        ([(4, 64, 256)] * 3, {}, ["residual_stack_split_64"]),
        ([(4, 128, 8)] * 2, {"dtype": torch.bfloat16}, ["residual_stack_plain_128"]),
        ([(4, 100, 8)], {}, ["residual_mlp_split_128"]),
    ],
)
def test_a_stack_of_equal_layers_goes_in_one_call(h100, shapes, kind, names):
    asked = []
    h100.setattr(known_answers, "unproven", lambda device, *kernels: asked.extend(kernels))
    call = gpu_stack(*shapes, **kind)
    assert triton.STACK.refusal(call) is None
    assert triton.STACK.by_name_only(call).startswith("it was not measured on sm_90")
    assert triton.STACK.unproven(call) is None
    assert asked == names
    row = measured.Measured(
        "residual_stack", "triton", "sm_90", "a GPU", "a case", "blocks", 2.0, 1.9, 2.1, 1.0, 2.0, "0", "0"
    )
    h100.setattr(measured, "_standing", lambda: {("residual_stack", "triton", "sm_90"): [row]})
    assert STACK.select("auto", call).name == "triton"


@pytest.mark.parametrize(
    ("shapes", "kind", "words"),
    [
        (
            [(4, 129, 8)] * 2,
            {},
            "rows of D=129 do not stay on a multiprocessor from layer to layer, up to 128 do",
        ),
        ([(4, 64, 8), (4, 64, 9)], {}, "its layers have different numbers of hidden units"),
        ([(4, 64, 8)] * 2, {"grad": True}, "with gradients blocks run one by one"),
        (
            [(4, 64, 8)] * 2,
            {"dtype": torch.float64},
            "it computes in fp32 and narrower types, and x is float64",
        ),
    ],
)
def test_what_goes_block_by_block(h100, shapes, kind, words):
    assert triton.STACK.refusal(gpu_stack(*shapes, **kind)) == words


def test_a_stack_of_weights_of_two_types_goes_block_by_block(h100):
    narrow, wide = (gpu_call(4, 64, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    call = StackCall((narrow, narrow._replace(w1=wide.w1)))
    assert triton.STACK.refusal(call) == "the weights of its layers have different types"


def test_a_choice_is_kept_for_the_same_products_only(h100):
    block, stack = gpu_call(4, 64), gpu_stack((4, 64, 8))
    before = block.shape_class(), stack.shape_class()
    h100.setattr(call_module, "_tf32_allowed", lambda: True)
    assert block.products() == "tf32"
    assert before[0] != block.shape_class()
    assert before[1] != stack.shape_class()


def test_a_consumer_sees_larger_tiles_on_a_gpu(h100):
    x = gpu_call(10_000, 16, 64).x
    assert default_tile(x, 11) == (128 << 20) // (12 * 16 * 64 * 4)
    assert default_tile(torch.empty(x.shape, device="cpu"), 11) == (4 << 20) // (12 * 16 * 64 * 4)


def computed(mistake):
    """In place of the kernels the reference, of which one number is ``mistake`` off."""

    def forward(calls, products):
        y = residual_mlp_reference(*calls[0])
        y[17, 5] += mistake
        return y

    def backward(dy, call, products, wanted):
        call = call.to(torch.float32)
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [t.clone().requires_grad_() for t in call.tensors]
            found = torch.autograd.grad(residual_mlp_reference(*leaves, *call[7:]), leaves, dy.float())
        found[3][2, 1] += mistake
        return found

    return forward, backward


@pytest.mark.parametrize("name", ["residual_mlp_split_64", "residual_mlp_split_64_gradient"])
@pytest.mark.parametrize("mistake", [0.0, 1e-3, float("nan")])
def test_a_planted_mistake_is_caught(monkeypatch, name, mistake):
    monkeypatch.setattr(known_answers, "_TRIED", {})
    for which, function in zip(("forward", "backward"), computed(mistake), strict=True):
        monkeypatch.setattr(answers, which, function)
    with torch.inference_mode():
        reason = known_answers.unproven(torch.device("cpu"), name)
    assert (reason is None) == (mistake == 0)
    if reason is not None:
        assert "gave a wrong answer to a known problem on cpu: " in reason


@pytest.mark.parametrize(
    ("device", "missing", "there", "words"),
    [
        ("cpu", None, True, "it is for NVIDIA GPUs, and this is cpu"),
        ("cuda:0", "Triton is not importable", True, "Triton is not importable"),
        ("cuda:0", None, False, "torch finds no GPU"),
        ("cuda:0", None, True, None),
    ],
)
def test_where_kernels_are_not_tried(h100, device, missing, there, words):
    h100.setattr(needs, "missing", lambda: missing)
    h100.setattr(torch.cuda, "is_available", lambda: there)
    assert {answer.cannot_run(torch.device(device)) for answer in answers.ANSWERS} == {words}


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
    assert call.products() == products
    with torch.autocast("cpu", dtype=torch.float16):
        assert call.products() == "fp16"
        with torch.autocast("cpu", enabled=False):
            assert call.products() == products


CODE = """
import torch
from rgfast.ops.residual_mlp import call as call_module
from rgfast.ops.residual_mlp.call import Call, StackCall
{setting}
z = torch.zeros(8, 8)
print(Call(z, z, None, z, None, None, None, "layer", "gelu", 1.0, 1e-5, "features").products())
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
                    # More warps would repeat each other's work, but for sm_100's sums in tensor memory.
                    assert group == "b200" or 16 * tile.warps <= max(tile.rows, 64)
                    assert not tile.tma or (tiles is table.FORWARD and group in ("h100", "b200"))
    assert [table.group_of(each) for each in ((9, 0), (8, 0), (10, 0), (8, 9), (13, 7))] == [
        "h100", "a100", "b200", "other", "other",
    ]  # fmt: skip
    assert [table.padded(width) for width in (1, 16, 17, 64, 65, 256)] == [16, 16, 32, 64, 128, 256]
