"""What a user meets on a device that has no kernels: the reference, a warning once, an error if so wished."""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch

import rgfast
from rgfast import FallbackWarning, ImplUnavailable, dispatch

_SPEC = importlib.util.spec_from_file_location("elsewhere", Path(__file__).with_name("elsewhere.py"))
elsewhere = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(elsewhere)

X = torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(0))
W = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
ON_CPU = r"native cannot run \(it runs on the cpu, not on meta\); using reference"

# What is called, and the op that falls back to its reference there.
FALLS_BACK = {
    "residual_mlp": (
        lambda at: rgfast.residual_mlp(at(X.reshape(-1)[:160].view(10, 16)), at(W), None, at(W), None),
        "residual_mlp",
    ),
    "residual_stack": (
        lambda at: rgfast.residual_stack(
            at(X.reshape(-1)[:160].view(10, 16)), at(W[None]), None, at(W[None]), None
        ),
        "residual_mlp",
    ),
}

# What the library's own routines compute, with the op.
BY_THE_LIBRARY = {
    "effective_rank": (lambda at: rgfast.effective_rank(at(X)), "spectrum"),
    "singular_values": (lambda at: rgfast.singular_values(at(X)), "spectrum"),
    "numerical_rank": (lambda at: rgfast.numerical_rank(at(X)), "spectrum"),
    "rank_measures": (lambda at: rgfast.rank_measures(at(X)).effective_rank, "spectrum"),
    "participation_ratio": (lambda at: rgfast.participation_ratio(at(X)), "gram"),
    "stable_rank": (lambda at: rgfast.stable_rank(at(X)), "gram"),
    "eigvalsh": (lambda at: rgfast.eigvalsh(at(X.mT @ X)), "eigvalsh"),
    "from a moment": (
        lambda at: rgfast.rank_measures_from_moment(at(X.double().mT @ X.double()), 12).effective_rank,
        "eigvalsh",
    ),
    "svd": (lambda at: rgfast.singular_values(at(X), method="svd"), "svd"),
    "cka": (lambda at: rgfast.cka(at(X[0]), at(X[1])), "cka"),
    "cka_matrix": (lambda at: rgfast.cka_matrix(at(X)), "cka"),
    "kernel_drift": (lambda at: rgfast.kernel_drift(at(X)), "cka"),
}

# What has nothing faster anywhere.
SAYS_NOTHING = {
    "rbf": (lambda at: rgfast.cka(at(X[0]), at(X[1]), kernel="rbf"), "reference"),
    "hsic": (lambda at: rgfast.hsic(at(X[0]), at(X[1])), "reference"),
    "kernel_change": (lambda at: rgfast.kernel_change(at(X)), "reference"),
    "single precision": (lambda at: rgfast.effective_rank(at(X), precision="single"), "reference"),
    "asked for by name": (lambda at: rgfast.effective_rank(at(X), impl="reference"), "reference"),
    "fp64 block": (
        lambda at: rgfast.residual_mlp(at(W.double()), at(W.double()), None, at(W.double()), None),
        "reference",
    ),
}


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch):
    monkeypatch.setattr(dispatch.op, "_WARNED", set())
    monkeypatch.delenv("RGFAST_STRICT", raising=False)


def there(call):
    with elsewhere.MakingElsewhere():
        return call(elsewhere.Elsewhere)


@pytest.mark.parametrize("name", FALLS_BACK)
def test_the_reference_runs_and_warns_once(name):
    call, op = FALLS_BACK[name]
    with rgfast.record() as log, pytest.warns(FallbackWarning, match=f"^{op}: {ON_CPU}$") as told:
        found = there(call)
    assert len(told) == 1
    assert told[0].filename == __file__  # the caller's line, not one of ours
    assert [(r.op, r.impl) for r in dispatch.walk(log) if r.op == op] == [(op, "reference")]
    torch.testing.assert_close(found.held, call(lambda x: x), rtol=1e-5, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        there(call)


@pytest.mark.parametrize("name", FALLS_BACK)
def test_strict_makes_it_an_error_before_anything_is_computed(name, monkeypatch):
    call, op = FALLS_BACK[name]
    monkeypatch.setenv("RGFAST_STRICT", "1")
    for _ in range(2):
        with pytest.raises(ImplUnavailable, match=f"^{op}: {ON_CPU}, which RGFAST_STRICT=1 forbids$"):
            there(call)


@pytest.mark.parametrize("name", BY_THE_LIBRARY)
def test_the_library_runs_and_nothing_is_said(name, monkeypatch):
    call, op = BY_THE_LIBRARY[name]
    monkeypatch.setenv("RGFAST_STRICT", "1")
    with warnings.catch_warnings(), rgfast.record() as log:
        warnings.simplefilter("error")
        found = there(call)
    assert [(r.op, r.impl) for r in dispatch.walk(log) if r.op == op] == [(op, "library")]
    assert "reference" not in {r.impl for r in dispatch.walk(log)}
    torch.testing.assert_close(found.held, call(lambda x: x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SAYS_NOTHING)
def test_where_nothing_faster_is_meant_to_exist_nothing_is_said(name, monkeypatch):
    call, ran = SAYS_NOTHING[name]
    monkeypatch.setenv("RGFAST_STRICT", "1")
    with warnings.catch_warnings(), rgfast.record() as log:
        warnings.simplefilter("error")
        found = there(call)
    assert [r.impl for r in log] == [ran]
    torch.testing.assert_close(found.held, call(lambda x: x), rtol=1e-5, atol=1e-5)


def test_plain_meta_tensors_warn_too():
    x, w = torch.zeros(4, 16, device="meta"), W.to("meta")
    with pytest.warns(FallbackWarning, match=ON_CPU):
        assert rgfast.residual_mlp(x, w, None, w, None).shape == (4, 16)
    told = rgfast.explain(rgfast.effective_rank, torch.zeros(4, 16, device="meta"))
    assert told.device == "meta"
    assert dict(told.candidates)["native"] == "it runs on the cpu, not on meta"
    assert told.chosen == "library"
