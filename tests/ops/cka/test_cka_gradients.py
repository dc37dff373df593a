import pytest
import torch
from torch.autograd import gradcheck

import rgfast

BOTH = pytest.mark.parametrize("debiased", [True, False])


@BOTH
@pytest.mark.parametrize(("n", "d", "e"), [(7, 3, 2), (6, 9, 8)])
def test_cka_and_hsic(make, n, d, e, debiased):
    x = make(1, 2, n, d, seed=1)[0].requires_grad_()
    y = (make(1, 2, n, e, seed=2)[0] + x.detach()[..., :1]).requires_grad_()
    assert gradcheck(lambda a, b: rgfast.cka(a, b, debiased=debiased), (x, y))
    assert gradcheck(lambda a, b: rgfast.hsic(a, b, debiased=debiased), (x, y))
    assert gradcheck(lambda a, b: rgfast.cka_matrix([a, b], debiased=debiased), (x, y))


def test_rbf_with_a_fixed_bandwidth(make):
    x, y = make(2, 6, 3)
    x, y = x.requires_grad_(), y.requires_grad_()
    assert gradcheck(lambda a, b: rgfast.cka(a, b, kernel="rbf", bandwidth=1.3), (x, y))


@BOTH
@pytest.mark.parametrize(("n", "d"), [(8, 3), (6, 9)])
def test_drift_and_change(make, n, d, debiased):
    layers = make(3, 2, n, d).requires_grad_()
    assert gradcheck(lambda z: rgfast.kernel_drift(z, debiased=debiased), (layers,))
    assert gradcheck(rgfast.kernel_change, (layers,))


@BOTH
def test_a_constant_layer_has_no_gradient_and_spoils_none(make, debiased):
    layers = make(3, 8, 3)
    layers[1] = 2.0
    layers.requires_grad_()
    matrix = rgfast.cka_matrix(layers, debiased=debiased)
    drift = rgfast.kernel_drift(layers, debiased=debiased)
    (matrix[0, 2] + matrix.nansum() + drift.nansum()).backward()
    assert layers.grad.isfinite().all()
    assert (layers.grad[1] == 0).all()
    assert (layers.grad[0] != 0).any()


def test_gradients_at_a_drift_of_zero_are_zero(make):
    x = make(1, 8, 3)[0].requires_grad_()
    rgfast.kernel_drift([x, x.detach()]).sum().backward()
    assert x.grad.abs().max() < 1e-12


def test_a_gradient_in_single_precision_comes_back_in_it(make):
    x, y = make(2, 8, 3, dtype=torch.float32)
    x.requires_grad_()
    rgfast.cka(x, y).backward()
    assert x.grad.dtype == torch.float32
