"""Tensors whose numbers cannot be read, or stand for more than they are: a sentence, or the right answer."""

import warnings

import pytest
import torch
from torch.autograd import forward_ad

import rgfast

X = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SPECTRA = {
    "effective_rank": rgfast.effective_rank,
    "participation_ratio": rgfast.participation_ratio,
    "stable_rank": rgfast.stable_rank,
    "singular_values": rgfast.singular_values,
    "numerical_rank": rgfast.numerical_rank,
    "eigvalsh": lambda x: rgfast.eigvalsh(x.mT @ x),
}
ALIGNMENTS = {
    "cka": lambda x: rgfast.cka(x, X**2),
    "rbf": lambda x: rgfast.cka(x, X**2, kernel="rbf", bandwidth=1.0),
    "hsic": lambda x: rgfast.hsic(x, X**2),
    "cka_matrix": lambda x: rgfast.cka_matrix([x, X**2]),
    "kernel_drift": lambda x: rgfast.kernel_drift([x, X**2]),
    "kernel_change": lambda x: rgfast.kernel_change([x, X**2]),
    "minibatch_cka": lambda x: rgfast.minibatch_cka([x, X**2], batch_size=4),
}
# torch makes its own rules of forward mode by what it deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
ORDINARY = "must be an ordinary tensor, got one of a transform of torch.func or of forward-mode autograd"


@pytest.mark.parametrize("name", [*SPECTRA, *ALIGNMENTS])
def test_vmap_is_refused(name):
    function = (SPECTRA | ALIGNMENTS)[name]
    with pytest.raises(TypeError, match=ORDINARY):
        torch.vmap(function)(X[None])


@pytest.mark.parametrize("name", SPECTRA)
def test_transforms_of_spectra_are_refused(name):
    function = SPECTRA[name]
    for run in (
        lambda: torch.func.grad(lambda x: function(x).sum())(X),
        lambda: torch.func.jacrev(function)(X),
        lambda: torch.func.jacfwd(function)(X),
        lambda: torch.func.jvp(function, (X,), (X,)),
    ):
        with pytest.raises(TypeError, match=ORDINARY):
            run()
    with forward_ad.dual_level():
        with pytest.raises(TypeError, match=ORDINARY):
            function(forward_ad.make_dual(X, X))
        function(X)


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_alignments_have_derivatives_of_either_mode(name):
    function = ALIGNMENTS[name]
    slope = torch.randn(X.shape, generator=torch.Generator().manual_seed(1), dtype=X.dtype)
    whole = torch.autograd.functional.jacobian(function, X)
    want = (whole * slope).sum((-2, -1))
    value, tangent = torch.func.jvp(function, (X,), (slope,))
    torch.testing.assert_close(value, function(X), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(tangent, want, rtol=1e-9, atol=1e-12)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(function(forward_ad.make_dual(X, slope)))
        torch.testing.assert_close(dual.tangent, want, rtol=1e-9, atol=1e-12)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(function)(X), whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("function", [rgfast.effective_rank, lambda x: rgfast.cka(x, x)])
def test_nested_and_masked(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both are prototypes
        nested = torch.nested.nested_tensor([X[:5], X[5:]])
        masked = torch.masked.masked_tensor(X, X > 0)
    with pytest.raises(TypeError, match="x must be a dense tensor, got a nested one"):
        function(nested)
    with pytest.raises(TypeError, match="x must be a dense tensor, got a MaskedTensor"):
        function(masked)
