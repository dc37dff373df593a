"""``on_one_thread``: pins the forward and the backward pass, and is otherwise the function itself."""

import pytest
import torch

import rgfast
from rgfast.runtime.threads import on_one_thread, one_thread


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


SEEN = []


class Seen(torch.autograd.Function):
    """The identity, which notes how many threads there are on the way and on the way back."""

    @staticmethod
    def forward(ctx, x):
        SEEN.append(torch.get_num_threads())
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        SEEN.append(torch.get_num_threads())
        return dy.clone()


def test_both_passes_run_on_one_thread(three_threads):
    SEEN.clear()
    x = torch.ones(4, requires_grad=True)
    y = on_one_thread(lambda t: Seen.apply(t) ** 2, x)
    assert torch.get_num_threads() == 3
    y.sum().backward()
    assert SEEN == [1, 1]
    assert torch.get_num_threads() == 3
    assert torch.equal(x.grad, torch.full((4,), 2.0))


def test_an_exception_gives_the_threads_back(three_threads):
    def fail(t):
        raise ZeroDivisionError

    for x in (torch.ones(2), torch.ones(2, requires_grad=True)):
        with pytest.raises(ZeroDivisionError):
            on_one_thread(fail, x)
        assert torch.get_num_threads() == 3
    with one_thread(), one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


def test_gradients_to_second_order_unused_and_absent_arguments():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, 3, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))

    def f(a, b):
        return on_one_thread(lambda s, t, absent: (s.sin() @ t.mT).pow(2).sum(), a, b, None)

    assert torch.autograd.gradcheck(f, (x, y))
    assert torch.autograd.gradgradcheck(f, (x, y))
    value = f(x, y.detach())
    first = torch.autograd.grad(value, x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(value, x)[0])
    unused = on_one_thread(lambda s, t: s.sum(), x, y)
    assert torch.autograd.grad(unused, [x, y], allow_unused=True)[1] is None


def test_a_changed_input_is_refused_by_the_second_order_pass():
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    value = on_one_thread(lambda t: t.pow(3).sum(), y)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, x, create_graph=True)


# torch's own forward mode compiles its decompositions with it.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_transforms_of_torch_func_see_through():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(8, 3, dtype=torch.float64, generator=generator) for _ in range(2))

    def f(t):
        return on_one_thread(lambda a, b: (a * b).sin().sum(), t, y)

    want = (x * y).cos() * y
    assert torch.allclose(torch.func.grad(f)(x), want)
    assert torch.allclose(torch.func.jvp(f, (x,), (y,))[1], (want * y).sum())
    assert torch.allclose(torch.vmap(f)(x[None].expand(2, -1, -1)), f(x))
    leaf = x.clone().requires_grad_()
    rgfast.kernel_drift([leaf, y]).sum().backward()
    assert torch.isfinite(leaf.grad).all()
