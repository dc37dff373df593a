"""What has no kernels for a GPU, on what stands for one: gradients and RBF kernels by the reference."""

import guards
import pytest
import torch

from rgfast.ops.cka import reference

TASKS = {
    "matrix": lambda x: reference.run("matrix", x, None, debiased=True),
    "drift": lambda x: reference.run("drift", x, debiased=False),
    "minibatch": lambda x: reference.run("minibatch", x, None, debiased=True, bounds=(0, 9, 19)),
    "hsic": lambda x: reference.run("hsic", x[0], x[1], debiased=True),
    "rbf": lambda x: rbf(x[0], x[1]),
    "change": lambda x: reference.run("change", x),
}


def rbf(x, y):
    return reference.run("rbf", x, y, debiased=True, threshold=1.0, bandwidth=None, normalized=True)


@pytest.mark.parametrize("task", TASKS)
def test_gradients_stay_on_the_device_and_nothing_is_read(task):
    with guards.Waits() as watch:
        layers = [torch.empty(2, 19, d, device="meta", requires_grad=True) for d in (5, 30)]
        value = TASKS[task](layers)
        (gradient, _) = torch.autograd.grad(value.sum(), layers)
    assert value.device.type == gradient.device.type == "meta"
    assert [name for name in watch.found if "between devices" not in name] == []


def test_rbf_kernels_take_the_memory_that_the_readme_says():
    n = 600
    x, y = torch.randn(2, n, 8, generator=torch.Generator().manual_seed(0))
    with guards.Peak([x, y]) as peak:
        rbf(x, y)
    assert peak.most == pytest.approx(49 * n * n, rel=0.02)
