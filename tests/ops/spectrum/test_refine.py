"""Refinement, compiled and by LAPACK: the truth within the bound, and what the bits may not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import rgfast
from rgfast.dispatch import ImplUnavailable
from rgfast.ops.spectrum.call import Again
from rgfast.ops.spectrum.rows import refine_spectra, refined_spectra_of_rows, spectra_of_rows
from rgfast.ops.spectrum.solve import PATHS, REFINE
from rgfast.runtime import native

needs_native = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason="the native module is not built"
)
IMPLS = [pytest.param("native", marks=needs_native), "library"]
SHAPES = [(96, 24), (24, 96), (33, 32), (17, 65), (300, 7), (3, 2), (5, 5), (1, 4), (400, 65), (520, 16)]


def hard(known, n, d):
    """Spectra `[b, n, d]` that a Gram matrix loses, by name."""
    m = min(n, d)
    draw = np.random.default_rng(n + d)
    made = {name: known.with_spectrum(of(m), n, d, seed=m) for name, of in known.spectra.items()}
    many = np.where(np.arange(m) < min(16, m), 1.0, 1e-7)
    made["rank 16 + 1e-7"] = known.with_spectrum(many, n, d, seed=1)
    made["deep"] = known.with_spectrum(np.logspace(0, -15, m), n, d, seed=2)
    twins = known.with_spectrum(np.ones(m), n, d, seed=3)
    twins[:, -1], twins[:, d // 2] = twins[:, 0], 0.3
    made["dead and duplicated columns"] = twins
    made["exact rank 1"] = np.outer(np.arange(n) - 3.0, np.arange(1.0, d + 1))
    made["rounded rank 1"] = np.outer(draw.standard_normal(n), draw.standard_normal(d))
    steep = known.with_spectrum(known.spectra["1/i^4"](m), n, d, seed=4)
    made |= {"offset": steep + 1e4, "large": steep * 1e18, "small": steep * 1e-18}
    made |= {"zero": np.zeros((n, d)), "constant": np.full((n, d), 0.3)}
    return list(made), np.stack(list(made.values()))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_within_the_bound_of_the_truth(known, impl, dtype, shape):
    n, d = shape
    names, made = hard(known, n, d)
    x = torch.from_numpy(made).to(dtype)
    every = torch.arange(len(x))
    for centering, most in (("mean", min(n - 1, d)), ("none", min(n, d))):
        solved = REFINE(impl, Again(x, every, centering))
        sigma, error = solved.singular_values().numpy(), solved.singular_value_error().numpy()
        bound = solved.bound().numpy()
        for i, name in enumerate(names):
            live = min(int(solved.rank_limit[i]), most)
            truth = known.truth(x[i], centering)
            assert np.all(np.diff(sigma[i]) <= 0), name
            assert not sigma[i, live:].any(), name
            assert not error[i, live:].any(), name
            lapack = 50 * 2.0**-53 * truth[0]  # what the truth itself may be off by
            assert np.all(np.abs(sigma[i] - truth)[:live] <= error[i, :live] + lapack), name
            if sigma[i].any():
                rank = known.rank_of(truth[:live])
                assert abs(known.rank_of(sigma[i]) / rank - 1) <= bound[i], name
                # What an SVD in fp64 may get wrong by itself, at the depth of its own rounding.
                assert bound[i] <= (1e-6 if name != "deep" else 1e-4), name


@pytest.mark.parametrize("impl", IMPLS)
def test_chosen_matrices_alone_are_solved(known, impl):
    _, made = hard(known, 40, 20)
    x = torch.from_numpy(made)
    at = torch.tensor([3, 0, 11, 7])
    some = REFINE(impl, Again(x, at, "mean"))
    alone = REFINE(impl, Again(x[at], torch.arange(4), "mean"))
    for name in ("sigma", "error", "exponent", "rank_limit", "path"):
        assert torch.equal(getattr(some, name), getattr(alone, name)), name
    assert REFINE(impl, Again(x, at[:0], "mean")).sigma.shape == (0, 20)


@needs_native
@pytest.mark.parametrize("isa", native.available_isas())
def test_bits_depend_on_the_matrix_alone(known, isa, monkeypatch):
    _, made = hard(known, 70, 33)
    x = torch.from_numpy(made).float().repeat(3, 1, 1)
    before = torch.get_num_threads()
    with native.use_isa(isa):
        whole = REFINE("native", Again(x, torch.arange(len(x)), "mean"))
        torch.set_num_threads(3)
        try:
            again = REFINE("native", Again(x, torch.arange(len(x)), "mean"))
        finally:
            torch.set_num_threads(before)
        monkeypatch.setattr("rgfast.ops.spectrum.solve._VECTORS", 1)
        parts = REFINE("native", Again(x, torch.arange(len(x)), "mean"))
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        mixed = REFINE("native", Again(x, order, "mean"))
    for other, at in ((again, slice(None)), (parts, slice(None)), (mixed, order)):
        assert torch.equal(other.sigma, whole.sigma[at])
        assert torch.equal(other.error, whole.error[at])


@needs_native
@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_both_agree_on_any_layout(known, isa, dtype):
    x = torch.from_numpy(known.with_spectrum(known.spectra["1/i^4"](18), 18, 70, seed=5)).to(dtype)
    views = torch.stack([x.mT, x.mT.flip(0)]).contiguous()
    views = torch.stack([views, views], -1)[..., 0]  # strides of two
    with native.use_isa(isa):
        ours = REFINE("native", Again(views, torch.arange(2), "none"))
    theirs = REFINE("library", Again(views, torch.arange(2), "none"))
    assert torch.equal(ours.rank_limit, theirs.rank_limit)
    assert bool(((ours.sigma - theirs.sigma).abs() <= ours.error + theirs.error).all())


@pytest.mark.parametrize("impl", IMPLS)
def test_a_stricter_rtol_takes_one_more_stage(known, impl):
    x = torch.from_numpy(known.with_spectrum(np.logspace(0, -9, 24), 60, 24, seed=0))[None]
    loose, strict = (REFINE(impl, Again(x, torch.tensor([0]), "mean", rtol)) for rtol in (1e-6, 1e-12))
    assert float(strict.bound()[0]) < float(loose.bound()[0]) <= 1e-6
    assert not torch.equal(loose.sigma, strict.sigma)


def test_samples_may_be_left_out(known):
    x = torch.from_numpy(known.with_spectrum(known.spectra["rank 1 + 1e-5"](9), 40, 9, seed=0)).repeat(
        3, 1, 1
    )
    x = x * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)[:, None, None]
    kept = torch.arange(40) % 4 != 1
    solved, _ = spectra_of_rows(x[:, kept], uncentred=False)
    before = solved.sigma.clone()
    refine_spectra(x, solved, torch.tensor([2]), centering="mean", kept=kept)
    assert torch.equal(solved.sigma[:2], before[:2])
    assert solved.path.tolist() == [0, 0, 1]
    np.testing.assert_allclose(solved.sigma[2], known.truth(x[2][kept]), rtol=1e-9)


@needs_native
def test_wide_matrices_are_lapacks():
    x = torch.randn(1, 300, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    call = Again(x, torch.tensor([0]), "mean")
    assert REFINE.select("auto", call).name == "library"
    with pytest.raises(ImplUnavailable, match="moments of 300 rows are too large"):
        REFINE("native", call)
    assert REFINE.select("auto", Again(x[:, :, :64].expand(40, -1, -1), torch.arange(40))).name == "native"


@needs_native
@pytest.mark.parametrize(
    ("x", "at", "stage", "said"),
    [
        (torch.zeros(2, 3), [0], 0, "x must have from 3"),
        (torch.zeros(2, 0, 3), [0], 0, "at least one sample"),
        (torch.zeros(2, 4, 3), [0, 2], 0, "at must be from 0 to 1, got 2"),
        (torch.zeros(2, 4, 3), [-1], 0, "at must be from 0 to 1, got -1"),
        (torch.zeros(2, 4, 3), [0], 3, "stage must be from 0 to 2, got 3"),
        (torch.zeros(2, 4, 3), [0], 1, "numbers of vectors must not fall and be at most 3, got 9"),
    ],
)
def test_the_binding_checks(x, at, stage, said):
    index = np.array(at, dtype=np.int64)
    room = np.full(200, 9, dtype=np.int64)
    with pytest.raises(ValueError, match=said):
        native.load().refine(
            native.tensor(x),
            index.ctypes.data,
            len(at),
            True,
            (stage, 1e-6),
            [room.ctypes.data] * 4,
            (room.ctypes.data,) * 3 + (0,),
            1,
        )
    with pytest.raises(ValueError, match="null pointers"):
        native.load().refine(
            native.tensor(torch.zeros(2, 4, 3)), index.ctypes.data, 1, True, (0, 1e-6), [0] * 4, (0,) * 4, 1
        )


def test_the_reference_refines_by_lapack(known):
    x = torch.from_numpy(known.with_spectrum(known.spectra["rank 1 + 1e-9"](12), 40, 12, seed=1))
    with rgfast.record() as log:
        rgfast.effective_rank(x, impl="reference")
    assert [(entry.op, entry.impl) for entry in log] == [("spectrum", "reference"), ("refine", "library")]


def moved(x, kind):
    """The same data about another mean: within the leading direction, or across it."""
    draw = np.random.default_rng(7)
    if kind == "within":
        return x + 3 * x[:, :1]
    return x + {"none": 0.0, "a little": 1e-4, "far": 30.0}[kind] * draw.standard_normal(x.shape[2])


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mean", ["none", "within", "a little", "far"])
@pytest.mark.parametrize("shape", [(96, 24), (33, 32), (300, 7), (400, 40), (24, 60)])
def test_a_second_stage_is_within_the_bound_of_the_truth(known, dtype, mean, shape):
    n, d = shape
    names, made = hard(known, n, d)
    x = torch.from_numpy(moved(made, mean)).to(dtype)
    found = refined_spectra_of_rows(x, uncentred=True, doubt=1e-11)
    for centering, solved in zip(("mean", "none"), found, strict=True):
        sigma, error = solved.singular_values().numpy(), solved.singular_value_error().numpy()
        bound = solved.bound().numpy()
        for i, name in enumerate(names):
            live = min(int(solved.rank_limit[i]), n - 1 if centering == "mean" else n)
            truth = known.truth(x[i], centering)
            lapack = 50 * 2.0**-53 * truth[0]
            assert np.all(np.abs(sigma[i] - truth)[:live] <= error[i, :live] + lapack), (name, centering)
            if sigma[i].any():
                off = abs(known.rank_of(sigma[i]) / known.rank_of(truth[:live]) - 1)
                assert off <= bound[i], (name, centering)
            if solved.path[i] == 1:
                assert bound[i] <= 1e-6
    again = names.index("rank 1 + 1e-9")
    assert n < d or found[0].path[again] == 1
    assert n < d or mean in ("far", "a little") or found[1].path[again] == 1


@needs_native
def test_a_second_stage_is_that_of_the_op(known):
    _, made = hard(known, 80, 24)
    x = torch.from_numpy(made).float()
    one_pass, _ = refined_spectra_of_rows(x, uncentred=False, doubt=1e-11)
    at = one_pass.path.nonzero()[:, 0]
    assert len(at) > 5
    alone = REFINE("native", Again(x, at, "mean"))
    torch.testing.assert_close(one_pass.sigma[at], alone.sigma, rtol=1e-6, atol=1e-13)
    plain, _ = spectra_of_rows(x, uncentred=False)
    rest = one_pass.path == 0
    assert torch.equal(one_pass.sigma[rest], plain.sigma[rest])


@needs_native
@pytest.mark.parametrize("isa", native.available_isas())
def test_a_second_stage_does_not_depend_on_threads_and_neighbours(known, isa):
    _, made = hard(known, 70, 33)
    x = torch.from_numpy(made).float().repeat(2, 1, 1)
    before = torch.get_num_threads()
    with native.use_isa(isa):
        whole = refined_spectra_of_rows(x, uncentred=True, doubt=1e-11)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        torch.set_num_threads(3)
        try:
            mixed = refined_spectra_of_rows(x[order], uncentred=True, doubt=1e-11)
        finally:
            torch.set_num_threads(before)
    for ours, theirs in zip(whole, mixed, strict=True):
        assert torch.equal(ours.sigma[order], theirs.sigma)
        assert torch.equal(ours.path[order], theirs.path)


@needs_native
def test_nothing_doubtful_has_one_stage():
    x = torch.randn(20, 90, 24, generator=torch.Generator().manual_seed(0))
    once, twice = spectra_of_rows(x, uncentred=True), refined_spectra_of_rows(x, uncentred=True, doubt=1e-11)
    for ours, theirs in zip(once, twice, strict=True):
        assert torch.equal(ours.sigma, theirs.sigma)
        assert not theirs.path.any()
    x[3, 4, 5] = float("nan")
    assert refined_spectra_of_rows(x, uncentred=True, doubt=1e-11) is None


@needs_native
def test_a_second_stage_leaves_a_few_small_values_to_their_own_vectors():
    draw = torch.Generator().manual_seed(0)

    def stages(n, d, lost):
        x = torch.randn(8, n, d, generator=draw, dtype=torch.float64)
        small = x if n >= d else x.mT
        small[..., :lost] = small[..., -lost:] + 1e-9 * small[..., :lost]
        found = refined_spectra_of_rows(x, uncentred=n >= d, doubt=1e-11)
        return {path for solved in found if solved is not None for path in solved.path.tolist()}

    assert stages(200, 96, 1) == stages(200, 130, 16) == {PATHS.index("gram")}
    # Many, of a narrow matrix, and of fewer samples than features.
    assert stages(200, 96, 17) == stages(200, 95, 1) == stages(100, 130, 2) == {PATHS.index("refined")}


@needs_native
def test_a_second_stage_needs_lanes():
    x = torch.randn(2, 400, 300, generator=torch.Generator().manual_seed(0))
    with rgfast.record() as log:
        once = refined_spectra_of_rows(x, uncentred=True, doubt=1e-11)
    assert torch.equal(once[0].sigma, spectra_of_rows(x, uncentred=True)[0].sigma)
    assert [(r.op, r.impl) for r in log] == [("spectrum", "native")]
    assert [r.op for r in log[0].nested] == ["spectrum"]
