"""Arrays as they come from files and tables: the right value, or a sentence that names the argument."""

import threading

import numpy as np
import pandas as pd
import pytest
import torch

import rgfast
from rgfast import flow
from rgfast.masking import iid_mask
from rgfast.validation import as_floats, as_tensor, from_array, is_shared

X = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
Y = X + np.random.default_rng(1).normal(size=(40, 6)).astype(np.float32)
UP, DOWN = (np.random.default_rng(k).normal(size=s).astype(np.float32) for k, s in ((2, (9, 6)), (3, (6, 9))))


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def unaligned(x):
    """A field of records of 5 bytes."""
    records = np.zeros(x.shape, dtype=[("tag", "u1"), ("value", "f4")])
    records["value"] = x
    return records["value"]


LAYOUTS = {
    "reversed": lambda x: x[::-1].copy()[::-1],
    "flipped": lambda x: np.flip(np.flip(x, 1).copy(), 1),
    "big-endian": lambda x: x.astype(">f4"),
    "big-endian and reversed": lambda x: x[::-1].astype(">f4")[::-1],
    "read-only": read_only,
    "read-only big-endian": lambda x: read_only(x.astype(">f4")),
    "fields of records": unaligned,
    "Fortran order": np.asfortranarray,
    "nothing masked": lambda x: np.ma.array(x, mask=np.zeros(x.shape, dtype=bool)),
    "lazy negative": lambda x: torch.complex(torch.zeros(x.shape), torch.from_numpy(-x)).conj().imag,
}
WORDS = "must be one of float64, float32, bfloat16, float16, got "
REFUSED = {
    "masked": (lambda x: np.ma.array(x, mask=x > 1), "must have no masked values, got "),
    "longdouble": (lambda x: x.astype(np.longdouble), WORDS),
    "complex": (lambda x: x.astype(np.complex64), WORDS + "complex64"),
    "objects": (lambda x: x.astype(object), WORDS + "object"),
    "text": (lambda x: x.astype(str), WORDS + "str"),
    "whole numbers": (lambda x: x.astype(np.int32), WORDS + "int32"),
    "nested lists": (lambda x: x.tolist(), "must be a torch.Tensor or numpy array, got list"),
    "list of arrays": (list, "must be a torch.Tensor or numpy array, got list"),
    "table": (
        pd.DataFrame,
        r"must be a torch.Tensor or numpy array, got DataFrame \(take its .to_numpy\(\)\)",
    ),
    "sparse": (lambda x: torch.from_numpy(x).to_sparse(), "must be a dense"),
}
OPS = {
    "x": {
        "effective_rank": rgfast.effective_rank,
        "singular_values": rgfast.singular_values,
        "participation_ratio": rgfast.participation_ratio,
        "stable_rank": rgfast.stable_rank,
        "numerical_rank": rgfast.numerical_rank,
        "rank_measures": lambda x: rgfast.rank_measures(x).effective_rank,
        "cka": lambda x: rgfast.cka(x, Y),
        "rbf": lambda x: rgfast.cka(x, Y, kernel="rbf"),
        "hsic": lambda x: rgfast.hsic(x, Y),
        "residual_mlp": lambda x: rgfast.residual_mlp(x, UP, None, DOWN, None),
        "residual_mlp by the reference": lambda x: rgfast.residual_mlp(
            x, UP, None, DOWN, None, impl="reference"
        ),
        "residual_stack": lambda x: rgfast.residual_stack(x, [UP, UP], None, [DOWN, DOWN], None),
    },
    "y": {"cka": lambda x: rgfast.cka(Y, x), "hsic": lambda x: rgfast.hsic(Y, x)},
    r"layers\[1\]": {
        "cka_matrix": lambda x: rgfast.cka_matrix([Y, x]),
        "kernel_drift": lambda x: rgfast.kernel_drift([Y, x]),
        "kernel_change": lambda x: rgfast.kernel_change([Y, x]),
        "minibatch_cka": lambda x: rgfast.minibatch_cka([Y, x], batch_size=20),
        "CKAAccumulator": lambda x: rgfast.CKAAccumulator(pairs="all").update([Y, x]).finalize().matrix,
        "MinibatchCKA": lambda x: rgfast.MinibatchCKAAccumulator(batch_size=20).update([Y, x]).finalize(),
        "SecondMoments": lambda x: rgfast.SecondMoments().update([Y, x]).rank_measures(1).effective_rank,
    },
    r"other\[0\]": {"cka_matrix": lambda x: rgfast.cka_matrix([Y], [x])},
    "batches": {
        "moment_operator": lambda x: rgfast.moment_operator([x, Y], 6)(torch.eye(6, dtype=torch.float64)),
    },
}
CALLS = [(name, op) for name, ops in OPS.items() for op in ops]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "op"), CALLS)
def test_every_layout_gives_the_value_of_plain_memory(name, op, layout):
    run, x = OPS[name][op], LAYOUTS[layout](X)
    got, want = run(x), run(X)
    assert got.dtype == want.dtype
    rtol = 1e-9 if want.dtype == torch.float64 else 1e-5  # the library's bits depend on strides
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)
    np.testing.assert_array_equal(as_floats(x, "x"), X)


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize(("name", "op"), CALLS)
def test_what_is_not_taken_is_refused_by_name(name, op, kind):
    make, words = REFUSED[kind]
    with pytest.raises((TypeError, ValueError), match=f"^{name} {words}"):
        OPS[name][op](make(X))


def test_half_arrays_are_taken_as_they_are():
    assert rgfast.effective_rank(X.astype(np.float16)).dtype == torch.float64
    big = X.astype(">f2")
    assert torch.equal(rgfast.effective_rank(big), rgfast.effective_rank(X.astype(np.float16)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_of_blocks_in_every_layout(layout):
    up, down = (LAYOUTS[layout](w) for w in (UP, DOWN))
    for impl in ("auto", "reference"):
        want = rgfast.residual_mlp(X, UP, None, DOWN, None, impl=impl)
        torch.testing.assert_close(rgfast.residual_mlp(X, up, None, down, None, impl=impl), want)
    want = rgfast.residual_stack(X, [UP, UP], None, [DOWN, DOWN], None)
    torch.testing.assert_close(rgfast.residual_stack(X, [up, UP], None, [down, DOWN], None), want)
    with pytest.raises(ValueError, match=r"^w1\[1\] must have no masked values, got 54"):
        rgfast.residual_stack(X, [UP, np.ma.masked_all_like(UP)], None, [DOWN, DOWN], None)


def test_negation_that_waits_is_done_before_memory_is_read():
    symmetric = torch.randn(5, 5, dtype=torch.float64)
    symmetric = symmetric + symmetric.mT
    lazy = torch.complex(torch.zeros(5, 5, dtype=torch.float64), -symmetric).conj().imag
    assert lazy.is_neg()
    assert torch.equal(rgfast.eigvalsh(lazy), rgfast.eigvalsh(symmetric))


def test_masks_of_rows_may_be_arrays():
    keep = X[:, 0] > 0
    want = rgfast.CKAAccumulator().update([X[keep], Y[keep]]).finalize().drift
    for mask in (torch.from_numpy(keep), keep, keep[::-1].copy()[::-1], read_only(keep)):
        assert torch.allclose(rgfast.CKAAccumulator().update([X, Y], mask).finalize().drift, want)
        moments = rgfast.SecondMoments().update([X], mask)
        assert int(moments.count) == keep.sum()
    for mask, words in (
        (np.ma.array(keep, mask=keep), "mask must have no masked values"),
        (keep.tolist(), "mask must be a bool tensor, got list"),
        (keep.astype(int), "mask must be a bool tensor, got torch.int64"),
    ):
        for stream in (rgfast.CKAAccumulator(), rgfast.SecondMoments(), rgfast.MinibatchCKAAccumulator()):
            with pytest.raises((TypeError, ValueError), match=f"^{words}"):
                stream.update([X, Y], mask)


def test_counts_and_traces_of_moments_may_be_arrays():
    scatter = np.stack([np.diag([3.0, 2.0, 1.0]), np.diag([1.0, 1.0, 1.0])])
    want = rgfast.rank_measures_from_moment(torch.from_numpy(scatter), torch.tensor([9, 4]))
    for count in (np.array([9, 4]), np.array([4, 9])[::-1], np.array([9, 4], dtype=">i4"), [9, 4]):
        found = rgfast.rank_measures_from_moment(scatter.astype(">f8"), count, accumulated=[6.0, 3.0])
        assert torch.equal(found.effective_rank, want.effective_rank)
    for options, words in (
        ({"n": np.ma.array([9, 4], mask=[0, 1])}, "n must have no masked values, got 1"),
        ({"n": [9.0, 4.0]}, "n must be an integer"),
        ({"n": ["nine", "four"]}, "n must hold numbers or bool"),
        ({"n": 9, "accumulated": [1.0, 2.0, 3.0]}, r"accumulated must be one number or have shape \(2,\)"),
        ({"n": 9, "accumulated": "much"}, "accumulated must be an array of real numbers"),
        ({"n": 9, "tol": "small"}, "tol must be a number, got 'small'"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{words}"):
            rgfast.rank_measures_from_moment(scatter, **options)


CHAIN = np.array([[0.9, 0.1, 0.0], [0.2, 0.5, 0.3], [0.0, 0.6, 0.4]])


@pytest.mark.parametrize(
    "given",
    [
        CHAIN[::-1].copy()[::-1],
        CHAIN.astype(">f8"),
        read_only(CHAIN),
        CHAIN.tolist(),
        list(CHAIN),
        pd.DataFrame(CHAIN),
        np.ma.array(CHAIN),
        torch.complex(torch.zeros(3, 3, dtype=torch.float64), torch.from_numpy(-CHAIN)).conj().imag,
        torch.from_numpy(CHAIN).requires_grad_(),
    ],
)
def test_chains_from_every_layout(given):
    assert torch.equal(rgfast.MarkovChain(given).transition, rgfast.MarkovChain(CHAIN).transition)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.ma.array(CHAIN, mask=CHAIN == 0.3), "must have no masked values, got 1"),
        (list(np.ma.array(CHAIN, mask=CHAIN == 0.3)), "must have no masked values, got 1"),
        (CHAIN.astype(complex), r"must hold real numbers"),
        (CHAIN.astype(object), r"must hold real numbers"),
        (CHAIN.astype(">f2"), r"must hold real numbers"),
        (torch.from_numpy(CHAIN).to_sparse(), "must be a dense"),
    ],
)
def test_chains_that_are_refused(given, words):
    with pytest.raises((TypeError, ValueError), match=f"^transition {words}"):
        rgfast.MarkovChain(given)


def test_single_precision_is_recognised_in_either_byte_order():
    rows = torch.softmax(torch.randn(50, 50, generator=torch.Generator().manual_seed(0)), -1).numpy()
    assert np.abs(rows.sum(1, dtype=float) - 1).max() > 1e-9
    assert torch.equal(rgfast.MarkovChain(rows.astype(">f4")).stationary, rgfast.MarkovChain(rows).stationary)


def test_lags_and_observables_from_every_layout():
    chain, lags, seen = rgfast.MarkovChain(CHAIN), np.array([0, 3, 9]), np.array([1.0, 0.0, 2.0])
    want = chain.autocorrelation([0, 3, 9], torch.tensor([1.0, 0.0, 2.0]))
    for steps in (lags, lags[::-1].copy()[::-1], lags.astype(">i8"), lags.astype(np.uint16), read_only(lags)):
        for f in (
            seen.astype(">f8"),
            seen.tolist(),
            pd.Series(seen),
            seen.astype(np.longdouble),
            read_only(seen),
        ):
            assert torch.equal(chain.autocorrelation(steps, f), want)
    for args, words in (
        ((np.ma.array(lags, mask=lags == 3),), "lags must have no masked values"),
        ((["one"],), "lags must hold numbers"),
        (([[1], [2, 3]],), "lags must be a tensor, an array or nested lists"),
        ((1, np.ma.array(seen, mask=seen == 0)), "observable must have no masked values"),
        ((1, seen.astype(complex)), "observable must be an array of real numbers"),
        ((1, ["a", "b", "c"]), "observable must be an array of real numbers"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{words}"):
            chain.autocorrelation(*args)


@pytest.mark.parametrize("read", [flow.descent, flow.top_share, flow.effective_transitions, flow.drift_shape])
def test_curves_keep_masks_out(read):
    values = np.geomspace(1.0, 0.1, 8)
    assert read(values.astype(">f8")[::-1][::-1]) == read(values) == read(values.tolist())
    with pytest.raises(ValueError, match=r"^(values|drift) must have no masked values, got 1"):
        read(np.ma.array(values, mask=values == 1.0))
    with pytest.raises(
        TypeError, match=r"^(values|drift) must be an array of real numbers, got dtype complex128"
    ):
        read(values.astype(complex))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rgfast.cka_null("many", 2, 3), "n must be a number, got 'many'"),
        (lambda: rgfast.cka_null(8, np.array([2, 3]), 3), "p1 must be a number"),
        (lambda: rgfast.cka(X, Y, kernel="rbf", threshold="wide"), "threshold must be a number"),
        (
            lambda: rgfast.cka(X, Y, kernel="rbf", bandwidth=np.array([1.0, 2.0])),
            "bandwidth must be a number",
        ),
        (lambda: rgfast.numerical_rank(X, tol=[0.1]), "tol must be a number"),
        (lambda: rgfast.effective_rank(X, rtol="tight"), "rtol must be a number"),
        (lambda: iid_mask(3, 4, np.array([0.5, 0.1])), "rate must be a number"),
        (lambda: rgfast.isotropic_baseline(np.array([3]), 4), "n must be an integer"),
    ],
)
def test_numbers_are_numbers(call, words):
    with pytest.raises(TypeError, match=f"^{words}"):
        call()


def test_what_can_be_shared_is_shared():
    x = X.copy()
    assert from_array(x, "x").data_ptr() == x.ctypes.data
    assert is_shared(x)
    assert not is_shared(read_only(x))
    fixed = read_only(x)
    assert from_array(fixed, "x").data_ptr() == fixed.ctypes.data
    writable = from_array(fixed, "x", writable=True)
    writable.zero_()
    np.testing.assert_array_equal(fixed, X)
    shared = from_array(read_only(x), "x")  # nothing else holds the array
    threading.Event().wait(0)
    np.testing.assert_array_equal(shared.numpy(), X)
    assert from_array(np.zeros((0, 3), dtype=np.float32)[::-1], "x").shape == (0, 3)


def test_wide_unsigned_numbers_become_int64():
    for kind in (np.uint16, np.uint32, np.uint64, ">u2"):
        made = as_tensor(np.array([1, 65000], dtype=kind), "x")
        assert made.dtype == torch.int64
        assert made.tolist() == [1, 65000]
    with pytest.raises(ValueError, match=r"^x must lie in the range of int64, got 18446744073709551615"):
        as_tensor(np.array([2**64 - 1], dtype=np.uint64), "x")


def test_floats_from_tensors():
    lazy = torch.complex(torch.zeros(2), torch.tensor([-1.0, 2.0])).conj().imag
    np.testing.assert_array_equal(as_floats(lazy, "x"), [1.0, -2.0])
    np.testing.assert_array_equal(as_floats(torch.tensor([0.5], dtype=torch.bfloat16), "x"), [0.5])
    for other in (torch.ones(2, dtype=torch.cfloat), torch.eye(2).to_sparse(), None, "one"):
        with pytest.raises((TypeError, ValueError), match=r"^x must be an array of real numbers"):
            as_floats(other, "x")
