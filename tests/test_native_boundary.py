"""What kernels are given is checked where it is passed: a wrong buffer is a Python error."""

import pytest
import torch

import rgfast
from rgfast.ops.spectrum.impl import native as spectrum
from rgfast.runtime import native

if native.unavailable_reason() is not None:
    pytest.skip(str(native.unavailable_reason()), allow_module_level=True)


@pytest.mark.parametrize(
    ("x", "got"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), r"int64 \[3, 2\] on cpu"),
        (torch.zeros(3, dtype=torch.float64, device="meta"), r"float64 \[3\] on meta"),
    ],
)
def test_tensors_of_other_kinds_are_refused(x, got):
    with pytest.raises(TypeError, match=f"a kernel takes float64, .* on the CPU, got {got}"):
        native.tensor(x)


@pytest.mark.parametrize(
    ("x", "got"),
    [
        (torch.zeros(4), r"float32 \[4\] on cpu"),
        (torch.zeros(3, dtype=torch.float64), r"float64 \[3\] on cpu"),
        (torch.zeros(8, dtype=torch.float64)[::2], r"float64 \[4\] on cpu, not contiguous"),
        (torch.zeros(4, dtype=torch.float64, device="meta"), r"float64 \[4\] on meta"),
    ],
)
def test_addresses_of_other_memory_are_refused(x, got):
    with pytest.raises(TypeError, match=f"raw must be 4 contiguous float64 numbers on the CPU, got {got}"):
        native.address(x, torch.float64, 4, "raw")


def test_addresses():
    x = torch.zeros(2, 2, dtype=torch.int64)
    assert native.address(x, torch.int64, 4, "x") == x.data_ptr()
    assert native.address(None, torch.int64, 4, "x") == 0


def test_buffers_of_second_moments():
    x = torch.ones(2, 5, 3)
    for dtype, count in ((torch.float32, 6), (torch.float64, 5)):
        with pytest.raises(TypeError, match="raw must be 6 contiguous float64 numbers"):
            spectrum.gram_spectrum(x, raw=torch.zeros(count, dtype=dtype))
    with pytest.raises(TypeError, match="raw must be 12 contiguous float64 numbers"):
        spectrum.left_out_spectrum(torch.ones(2, 8, 3), 2, torch.zeros(12))
    with pytest.raises(TypeError, match="a must be float64 or float32 on the CPU, got bfloat16 on cpu"):
        spectrum.eigvalsh(torch.ones(3, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize("wrong", range(5))
def test_results_of_products_must_be_fp64(wrong):
    module = native.load()
    layers = [torch.ones(1, 4, 3, dtype=torch.float64)]
    options = ([native.tensor(x) for x in layers], [(0, 0)], True, False, 1, 1)
    size = module.cka_workspace(*options)
    sizes = (1, 1, 1, 1, size)
    buffers = [
        torch.zeros(n, dtype=torch.float32 if k == wrong else torch.float64) for k, n in enumerate(sizes)
    ]
    name = ("centered", "u_centered", "trace", "grand", "workspace")[wrong]
    with pytest.raises(ValueError, match=f"^{name} must be float64$"):
        module.cka_products(*options, *(native.tensor(x) for x in buffers))


def block(**other):
    tensors = {
        "x": torch.ones(5, 16), "w1": torch.ones(32, 16), "b1": torch.ones(32), "w2": torch.ones(16, 32),
        "b2": torch.ones(16), "norm_weight": torch.ones(16), "norm_bias": torch.ones(16),
    }  # fmt: skip
    return [*{**tensors, **other}.values(), "layer", "gelu", 1.0, 1e-5, "features"]


REFUSAL = "residual_mlp must get x, its parameters and the gradient of its output as float32 on the CPU"


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.ones(5, 16, dtype=torch.bfloat16)},
        {"x": torch.ones(5, 8)},
        {"x": torch.ones(())},
        {"w1": torch.ones(32, 16, dtype=torch.float16)},
        {"w1": torch.ones(32)},
        {"b1": torch.ones(16)},
        {"w2": torch.ones(16, 16)},
        {"b2": torch.ones(16, dtype=torch.float64)},
        {"norm_weight": torch.ones(8)},
        {"norm_bias": torch.ones(16, dtype=torch.float16)},
    ],
)
def test_operators_called_directly(other):
    with pytest.raises(TypeError, match=REFUSAL):
        torch.ops.rgfast.residual_mlp(*block(**other))
    with pytest.raises(TypeError, match=REFUSAL):
        torch.ops.rgfast.residual_mlp_backward(torch.ones(5, 16), *block(**other), [True] * 7)


@pytest.mark.parametrize("dy", [torch.ones(5, 16, dtype=torch.float16), torch.ones(4, 16)])
def test_gradients_passed_to_the_operator(dy):
    with pytest.raises(TypeError, match=REFUSAL):
        torch.ops.rgfast.residual_mlp_backward(dy, *block(), [True] * 7)


@pytest.mark.parametrize("change", [torch.Tensor.half, torch.Tensor.double, lambda w: w[:4]])
def test_parameters_replaced_between_forward_and_backward(change):
    w1, w2 = (torch.ones(shape, requires_grad=True) for shape in ((32, 16), (16, 32)))
    y = rgfast.residual_mlp(torch.ones(5, 16), w1, None, w2, None, impl="native")
    w1.data = change(w1.detach())
    with pytest.raises(TypeError, match=REFUSAL):
        y.sum().backward()
