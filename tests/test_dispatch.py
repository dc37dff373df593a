import warnings

import pytest
import torch

from rgfast import FallbackWarning, ImplUnavailable, dispatch

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def make(name="toy", *, native_reason=None, native_broken=None):
    op = dispatch.Op(name)
    op.add(dispatch.Impl("reference", lambda x: ("reference", x), lambda x: None))
    op.add(
        dispatch.Impl(
            "native",
            lambda x: ("native", x),
            lambda x: native_reason,
            broken=lambda: native_broken,
            isa=lambda: "avx2",
        )
    )
    return op


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch):
    monkeypatch.setattr(dispatch, "_WARNED", set())
    monkeypatch.delenv("RGFAST_STRICT", raising=False)


def test_auto_takes_the_first_that_supports_the_input():
    assert make()("auto", CPU, 3) == ("native", 3)


def test_auto_passes_over_what_does_not_support_the_input_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make(native_reason="dtype is int8")("auto", CPU, 3) == ("reference", 3)


def test_auto_warns_once_where_the_module_is_broken():
    op = make(native_broken="it is not built")
    with pytest.warns(FallbackWarning, match=r"toy: native cannot run \(it is not built\); using reference"):
        op("auto", CPU, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op("auto", CPU, 3)


def test_strict_makes_the_fallback_an_error(monkeypatch):
    monkeypatch.setenv("RGFAST_STRICT", "1")
    with pytest.raises(ImplUnavailable, match="RGFAST_STRICT=1 forbids"):
        make(native_broken="it is not built")("auto", CPU, 3)


def test_falling_back_on_a_gpu_warns():
    op = make()
    op.add(dispatch.Impl("triton", lambda x: x, lambda x: "triton is not installed"))
    with pytest.warns(FallbackWarning, match="triton is not installed"):
        assert op("auto", CUDA, 3) == ("reference", 3)


@pytest.mark.parametrize("why", [{"native_reason": "too wide"}, {"native_broken": "too wide"}])
def test_a_named_implementation_never_falls_back(why):
    with pytest.raises(ImplUnavailable, match="impl='native' cannot run this input: too wide"):
        make(**why)("native", CPU, 3)


def test_a_name_that_is_not_there():
    with pytest.raises(ImplUnavailable, match="there is no 'cuda' implementation"):
        make()("cuda", CPU, 3)
    with pytest.raises(ValueError, match="impl must be one of auto, reference"):
        make()("fast", CPU, 3)


def test_what_an_implementation_raises_comes_through():
    op = dispatch.Op("toy")

    def fail(x):
        raise ZeroDivisionError("inside")

    op.add(dispatch.Impl("native", fail, lambda x: None))
    op.add(dispatch.Impl("reference", lambda x: x, lambda x: None))
    with pytest.raises(ZeroDivisionError, match="inside"):
        op("auto", CPU, 3)


def test_record_collects_what_ran_and_nests():
    op = make()
    with dispatch.record() as outer:
        op("auto", CPU, 1)
        with dispatch.record() as inner:
            op("reference", CPU, 1)
        op("reference", CPU, 1)
    assert [r.impl for r in outer] == ["native", "reference"]
    assert outer[0].isa == "avx2"
    assert [r.impl for r in inner] == ["reference"]


def test_explain_lists_every_candidate_and_computes_nothing(monkeypatch):
    monkeypatch.setattr(dispatch, "_OPS", {})

    def never(x):
        raise AssertionError("ran")

    op = dispatch.Op("toy")
    op.add(dispatch.Impl("native", never, lambda x: "too wide"))
    op.add(dispatch.Impl("reference", never, lambda x: None))
    dispatch.register(op, lambda x: (CPU, (x,), {}))
    told = dispatch.explain("toy", 3)
    assert told.candidates == (("native", "too wide"), ("reference", None))
    assert told.chosen == "reference"
    assert str(told) == "toy on cpu:\n  native     no: too wide\n  reference  chosen"
    with pytest.raises(ValueError, match="op must be one of toy, got 'other'"):
        dispatch.explain("other", 3)


def test_the_implementations_of_every_op_are_listed():
    for op in dispatch.registered():
        found = dispatch.implementations(op, "cpu")
        assert found[-1] == "reference"
        assert "native" in found
    with pytest.raises(ValueError, match=r"op must be one of .*spectrum, got 'spectra'"):
        dispatch.implementations("spectra", "cpu")
