import warnings
from typing import NamedTuple

import pytest
import torch

import rgfast
from rgfast import FallbackWarning, ImplUnavailable, dispatch
from rgfast.dispatch import HandOff, Impl, Op, Unproven
from rgfast.runtime import native


class Call(NamedTuple):
    x: object
    device: torch.device = torch.device("cpu")

    def shape_class(self):
        return self.device.type, type(self.x)


def make(name="toy", *, reason=None, missing=None, cost=1.0, only=None, **more):
    native = Impl(
        "native",
        lambda call: ("native", call.x),
        can_run=lambda call: reason,
        cost=lambda call: cost,
        devices=("cpu",),
        missing=lambda: missing,
        by_name_only=lambda call: only,
        isa=lambda: "avx2",
    )
    reference = Impl("reference", lambda call: ("reference", call.x), cost=lambda call: 2.0)
    return Op(name, [native, reference], **more)


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch):
    monkeypatch.setattr(dispatch.op, "_WARNED", set())
    monkeypatch.delenv("RGFAST_STRICT", raising=False)


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, "native"),
        ({"cost": 3.0}, "reference"),
        ({"cost": 2.0}, "native"),  # the one registered first, at equal cost
        ({"reason": "too wide"}, "reference"),
        ({"only": "too narrow"}, "reference"),
    ],
)
def test_auto_takes_the_cheapest_that_can_without_a_word(options, taken):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make(**options)("auto", Call(3)) == (taken, 3)


def doubted(reasons, devices=("cpu",)):
    """An op whose fastest implementation is trusted or not as ``reasons`` says, one after another."""
    fast = Impl("cuda", lambda call: "cuda", unproven=lambda call: reasons.pop(0), devices=devices)
    library = Impl("library", lambda call: "library", cost=lambda call: 1.0)
    return Op("toy", [fast, library, Impl("reference", lambda call: "reference", cost=lambda call: 2.0)])


def test_auto_warns_of_one_that_is_not_trusted_whatever_it_takes_instead(monkeypatch):
    reasons = [Unproven("it is wrong here"), Unproven("it is wrong here")]
    op = doubted(reasons)
    with pytest.warns(FallbackWarning, match=r"^toy: cuda cannot run \(it is wrong here\); using library$"):
        assert op("auto", Call(3)) == "library"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op("auto", Call(3)) == "library"
    assert len(reasons) == 1  # the choice was kept
    with pytest.raises(ImplUnavailable, match="impl='cuda' cannot run this input: it is wrong here"):
        op("cuda", Call(3))
    monkeypatch.setenv("RGFAST_STRICT", "1")
    with pytest.raises(
        ImplUnavailable, match=r"it is wrong here\); using library, which RGFAST_STRICT=1 forbids"
    ):
        op("auto", Call(3))


def test_a_choice_that_may_be_another_the_next_time_is_not_kept():
    op = doubted([Unproven("not now", passing=True), None])
    with pytest.warns(FallbackWarning, match="not now"):
        assert op("auto", Call(3)) == "library"
    assert op("auto", Call(3)) == "cuda"
    assert op("auto", Call(3)) == "cuda"


def test_one_that_auto_leaves_alone_is_not_tried_out():
    tried = []
    fast = Impl("cuda", lambda call: "cuda", by_name_only=lambda call: "slow", unproven=tried.append)
    op = Op("toy", [fast, Impl("reference", lambda call: "reference")])
    assert op("auto", Call(3)) == "reference"
    assert tried == []
    assert op("cuda", Call(3)) == "cuda"
    assert len(tried) == 1


def test_a_choice_is_made_for_each_device():
    op = doubted([None, Unproven("it is wrong there")], devices=("cuda",))
    first, second = (Call(3, torch.device("cuda", k)) for k in range(2))
    assert op("auto", first) == "cuda"
    with pytest.warns(FallbackWarning, match="it is wrong there"):
        assert op("auto", second) == "library"
    assert op("auto", first) == "cuda"


def test_a_named_implementation_runs_what_auto_leaves_alone():
    for options in ({"cost": 3.0}, {"only": "too narrow"}):
        assert make(**options)("native", Call(3)) == ("native", 3)


def test_auto_warns_once_where_the_module_is_missing():
    op = make(missing="it is not built")
    with pytest.warns(FallbackWarning, match=r"toy: native cannot run \(it is not built\); using reference"):
        op("auto", Call(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op("auto", Call(3))


def test_strict_makes_the_fallback_an_error_also_after_it_was_selected_once(monkeypatch):
    op = make(missing="it is not built")
    with pytest.warns(FallbackWarning):
        op("auto", Call(3))
    monkeypatch.setenv("RGFAST_STRICT", "1")
    with pytest.raises(ImplUnavailable, match="RGFAST_STRICT=1 forbids"):
        op("auto", Call(3))


def test_the_library_warns_of_nothing():
    op = make(missing="it is not built")
    op.add(Impl("library", lambda call: "library", cost=lambda call: 1.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op("auto", Call(3)) == "library"


@pytest.mark.parametrize("why", [{"reason": "too wide"}, {"missing": "too wide"}])
def test_a_named_implementation_never_falls_back(why):
    with pytest.raises(ImplUnavailable, match="impl='native' cannot run this input: too wide"):
        make(**why)("native", Call(3))
    with pytest.raises(ImplUnavailable, match="it runs on the cpu, not on meta"):
        make()("native", Call(3, torch.device("meta")))


def test_a_name_that_is_not_there():
    with pytest.raises(ImplUnavailable, match=r"there is no 'cuda' implementation \(there are: native, ref"):
        make()("cuda", Call(3))
    with pytest.raises(ValueError, match="impl must be one of auto, reference"):
        make()("fast", Call(3))


def test_a_name_of_an_earlier_version_still_works():
    assert make(also={"library": "native"})("library", Call(3)) == ("native", 3)


def test_no_name_calls_a_route_of_auto():
    op = make(cost=5.0)
    op.add(Impl("mkl", lambda call: "both", cost=lambda call: 1.0, route=True))
    assert op("auto", Call(3)) == "both"
    with pytest.raises(ImplUnavailable, match="there is no 'mkl' implementation"):
        op("mkl", Call(3))


def test_what_an_implementation_raises_comes_through():
    def fail(call):
        raise ZeroDivisionError("inside")

    op = Op("toy", [Impl("native", fail), Impl("reference", lambda call: call.x, cost=lambda call: 1.0)])
    with pytest.raises(ZeroDivisionError, match="inside"):
        op("auto", Call(3))


def handing_off():
    def half(call):
        if call.x > 10:
            raise HandOff("x is above 10", lambda others: ("half", others(call._replace(x=call.x - 10))))
        return call.x

    reference = Impl("reference", lambda call: call.x, cost=lambda call: 1.0)
    return Op("toy", [Impl("native", half), reference])


def test_auto_hands_off_what_an_implementation_cannot_do_and_record_shows_it_nested():
    op = handing_off()
    assert op("auto", Call(3)) == 3
    assert op("auto", Call(13)) == ("half", 3)
    with dispatch.record() as log:
        op("auto", Call(13))
        op("auto", Call(3))
    assert [(r.impl, [n.impl for n in r.nested]) for r in log] == [("native", ["reference"]), ("native", [])]
    assert [r.impl for r in dispatch.walk(log)] == ["native", "reference", "native"]


def test_a_named_implementation_hands_nothing_off():
    with dispatch.record() as log, pytest.raises(ImplUnavailable, match="input: x is above 10"):
        handing_off()("native", Call(13))
    assert [r.nested for r in log] == [[]]


def test_record_collects_what_ran_and_nests():
    op = make()
    with dispatch.record() as outer:
        op("auto", Call(1))
        with dispatch.record() as inner:
            op("reference", Call(1))
        op("reference", Call(1))
    assert [r.impl for r in outer] == ["native", "reference"]
    assert outer[0].isa == "avx2"
    assert [r.impl for r in inner] == ["reference"]


def test_a_fused_variant_is_found_or_not():
    op = Op("toy, all at once", [make().impls["native"]], part_of="toy")
    call = Call(3)
    with dispatch.record() as log:
        assert op.run(op.find("auto", call), call, named=False) == ("native", 3)
    assert log[0].op == "toy"
    assert op.find("reference", call) is None
    assert op.find("auto", Call(3, torch.device("meta"))) is None


def test_a_selection_is_made_once_for_a_shape_class():
    asked = []
    op = Op("toy", [Impl("reference", lambda call: call.x, can_run=lambda call: asked.append(call.x))])
    for x in (1, 2, 3.5):
        op("auto", Call(x))
    op("reference", Call(1))
    assert asked == [1, 3.5, 1]


def test_explain_lists_every_candidate_with_its_cost_and_computes_nothing(monkeypatch):
    monkeypatch.setattr(dispatch.explaining, "_OPS", {})
    monkeypatch.setattr(dispatch.explaining, "_FUNCTIONS", {})

    def never(call):
        raise AssertionError("ran")

    impls = [
        Impl("native", never, lambda call: "too wide", lambda call: 1.0),
        Impl("mkl", never, cost=lambda call: 3.0),
        Impl("reference", never, cost=lambda call: 2.0),
    ]
    op = Op("toy", impls)

    def public(x, impl="auto"):
        return op(impl, Call(x))

    dispatch.register(op, public)
    for what in ("toy", "public", public):
        told = dispatch.explain(what, 3)
        assert told.candidates == (("native", "too wide"), ("mkl", None), ("reference", None))
        assert told.costs == (1.0, 3.0, 2.0)
        assert told.chosen == "reference"
        assert str(told) == (
            "toy on cpu:\n"
            "  native     no: too wide\n"
            "  mkl        yes     3.0e+00 s\n"
            "  reference  chosen  2.0e+00 s"
        )
    for other in ("other", len):
        with pytest.raises(ValueError, match="op must be a public function or one of public, toy, got"):
            dispatch.explain(other, 3)


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
W = torch.eye(16)
PUBLIC = {
    "effective_rank": ((X,), "spectrum"),
    "singular_values": ((X,), "spectrum"),
    "numerical_rank": ((X,), "spectrum"),
    "rank_measures": ((X,), "spectrum"),
    "participation_ratio": ((X,), "gram"),
    "stable_rank": ((X,), "gram"),
    "eigvalsh": ((torch.eye(3),), "eigvalsh"),
    "cka": ((X, X), "cka"),
    "hsic": ((X, X), "cka"),
    "cka_matrix": (([X, X],), "cka"),
    "kernel_drift": (([X, X],), "cka"),
    "kernel_change": (([X, X],), "cka"),
    "minibatch_cka": (([X, X],), "cka"),
    "residual_mlp": ((torch.zeros(2, 16), W, None, W, None), "residual_mlp"),
    "residual_stack": ((torch.zeros(2, 16), W[None], None, W[None], None), "residual_stack"),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_explain_takes_public_functions_and_their_names(name):
    args, op = PUBLIC[name]
    function = getattr(rgfast, name)
    told = rgfast.explain(function, *args)
    assert told.op == op
    if name != op:
        assert str(rgfast.explain(name, *args)) == str(told)
    with rgfast.record() as log:
        function(*args)
    assert log[0].op == op
    if name != "kernel_change":  # which is always the reference's
        assert log[0].impl == told.chosen


def test_explain_validates():
    with pytest.raises(ValueError, match="x must have at least 2 dimensions"):
        rgfast.explain(rgfast.effective_rank, X[0])
    with pytest.raises(ValueError, match="kernel must be one of"):
        rgfast.explain("cka", X, X, kernel="cosine")


def test_explain_sees_gradients():
    x = X.clone().requires_grad_()
    assert rgfast.explain("effective_rank", x).op == "spectrum"
    told = rgfast.explain("cka", x, X)
    assert told.chosen == "reference"
    if native.unavailable_reason() is None:
        assert dict(told.candidates)["native"] == "a gradient is wanted"


def test_the_implementations_of_every_op_are_listed():
    for op in dispatch.registered():
        found = dispatch.implementations(op, "cpu")
        assert found[-1] == "reference"
        assert ("native" in found) == (op not in ("intrinsic_dimension", "similarity"))  # torch's products do
    with pytest.raises(ValueError, match=r"op must be one of .*spectrum, got 'spectra'"):
        dispatch.implementations("spectra", "cpu")
