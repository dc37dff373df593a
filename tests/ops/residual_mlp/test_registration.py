"""The block inside autograd, torch.library, torch.compile and the rest of PyTorch's machinery."""

import copy

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import rgfast
from rgfast.runtime import native
from rgfast.runtime.threads import one_thread

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=str(native.unavailable_reason())
)


class Block(torch.nn.Module):
    def __init__(self, d=16, h=24, impl="native"):
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.LayerNorm(d)
        self.up = torch.nn.Linear(d, h)
        self.down = torch.nn.Linear(h, d)
        self.impl = impl

    def forward(self, x):
        return rgfast.residual_mlp(
            x,
            self.up.weight,
            self.up.bias,
            self.down.weight,
            self.down.bias,
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            impl=self.impl,
        )


@pytest.fixture
def module():
    return Block()


@pytest.fixture
def x():
    return torch.randn(5, 6, 16, generator=torch.Generator().manual_seed(1))


def outcome(function, module, x):
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = function(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def arguments(x, module, requires_grad):
    norm, up, down = module.norm, module.up, module.down
    tensors = (x, up.weight, up.bias, down.weight, down.bias, norm.weight, norm.bias)
    return tuple(t.detach().clone().requires_grad_(requires_grad) for t in tensors)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_forward(x, module, requires_grad):
    tensors = arguments(x, module, requires_grad)
    opcheck(torch.ops.rgfast.residual_mlp.default, (*tensors, "layer", "gelu", 0.5, 1e-5, "features"))
    bare = (tensors[0], tensors[1], None, tensors[3], None, None, None)
    opcheck(torch.ops.rgfast.residual_mlp.default, (*bare, None, "tanh", 0.5, 1e-5, "features"))


def test_opcheck_backward(x, module):
    tensors = arguments(x, module, False)
    wanted = [True, True, False, True, True, True, False]
    op = torch.ops.rgfast.residual_mlp_backward.default
    opcheck(op, (torch.ones_like(x), *tensors, "layer", "gelu", 0.5, 1e-5, "features", wanted))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("impl", ["auto", "native", "reference"])
def test_compiled_in_one_graph(x, backend, impl):
    module = Block(impl=impl)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    with one_thread():  # a graph of the reference is the compiler's to run, on as many threads as it likes
        assert same(outcome(compiled, module, x), outcome(module, module, x))
        with torch.no_grad():
            assert torch.equal(compiled(x), module(x))


def test_the_operator_is_differentiable_by_itself(x, module):
    tensors = arguments(x, module, True)
    y = torch.ops.rgfast.residual_mlp(*tensors, "layer", "gelu", 1.0, 1e-5, "features")
    y.square().sum().backward()
    assert same(
        [y.detach(), *(t.grad for t in tensors[:2])], [*outcome(module, module, x)[:2], module.up.weight.grad]
    )


def test_autocast_leaves_it_in_fp32(x, module):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = module(x)
        mixed = module(torch.nn.functional.linear(x, torch.eye(16)))
    assert torch.equal(inside, module(x))
    assert mixed.dtype == torch.bfloat16


def test_functional_call(x, module):
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.up.weight.mul_(0.5)
    got = torch.func.functional_call(module, dict(other.named_parameters()), (x,))
    assert torch.equal(got, other(x))


def test_functional_gradients(x, module):
    parameters = {k: p.detach() for k, p in module.named_parameters()}

    def loss(values):
        return torch.func.functional_call(module, values, (x,)).square().sum()

    got = torch.func.grad(loss)(parameters)
    want = outcome(module, module, x)[2:]
    for (name, _), gradient in zip(module.named_parameters(), want, strict=True):
        torch.testing.assert_close(got[name], gradient)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(x, module, use_reentrant):
    def checkpointed(value):
        return checkpoint(module, value, use_reentrant=use_reentrant)

    assert same(outcome(checkpointed, module, x), outcome(module, module, x))


def test_one_weight_used_twice(x):
    native_module, reference = Block(), Block(impl="reference")
    got = outcome(lambda v: native_module(native_module(v)), native_module, x)
    want = outcome(lambda v: reference(reference(v)), reference, x)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)

    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(3), requires_grad=True)
    rgfast.residual_mlp(x, weight, None, weight, None, impl="native").sum().backward()
    tied = weight.grad
    first, second = weight.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    rgfast.residual_mlp(x, first, None, second, None, impl="native").sum().backward()
    assert torch.equal(tied, first.grad + second.grad)


def test_follows_changed_weights(x, module):
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        module(x).square().mean().backward()
        optimiser.step()
        with torch.no_grad():
            torch.testing.assert_close(module(x), rgfast_reference(module, x))
    module.up.weight.data.mul_(-1)
    torch.testing.assert_close(module(x), rgfast_reference(module, x))


def rgfast_reference(module, x):
    other = copy.deepcopy(module)
    other.impl = "reference"
    return other(x)


def layouts(x):
    yield "transposed", x.transpose(0, 1)
    yield "features apart", torch.stack([x, x], -1)[..., 0]
    yield "rows apart", torch.cat([x, x], -1)[..., :16]
    yield "every other row", x[:, ::2]
    yield "expanded row", x[:1, :1].expand(4, 3, -1)
    yield "expanded features", x[..., :1].expand(-1, -1, 16)
    yield "one row", x[0, 0]
    yield "no rows", x[:0]


@pytest.mark.parametrize("index", range(8))
def test_any_layout(x, module, index):
    name, view = list(layouts(x))[index]
    dense = view.clone(memory_format=torch.contiguous_format)
    assert torch.equal(module(view), module(dense)), name
    grad = torch.zeros(()).expand(view.shape)  # what a sum hands back
    for value in (view, dense):
        value = value.detach().requires_grad_()
        (got,) = torch.autograd.grad(module(value), value, grad)
        assert torch.equal(got, torch.zeros(view.shape))


def test_weights_in_any_layout(x, module):
    want = module(x)
    for parameter in (module.up.weight, module.down.weight):
        parameter.data = parameter.data.t().contiguous().t()
    assert not module.up.weight.is_contiguous()
    assert torch.equal(module(x), want)


def test_second_derivatives(x):
    def penalised(impl):
        module = Block(impl=impl)
        value = x.detach().requires_grad_()
        y = module(value)
        (slope,) = torch.autograd.grad(y.square().sum(), value, create_graph=True)
        (y.sum() + slope.square().sum()).backward()
        return [value.grad, *(p.grad for p in module.parameters())]

    for got, want in zip(penalised("native"), penalised("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
