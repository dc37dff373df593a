"""What a batch is looked at for, by every implementation: numbers that are not finite, and means."""

import pytest
import torch

from rgfast import ImplUnavailable
from rgfast.dispatch import HandOff
from rgfast.ops.moments import survey, surveying
from rgfast.ops.moments.api import SURVEY
from rgfast.runtime import measured
from rgfast.runtime.known_answers import unproven

F64 = torch.float64


@pytest.fixture(params=["reference", "library", "cuda"])
def impl(request):
    if request.param == "cuda":
        request.getfixturevalue("emulated_gpu").admit(SURVEY)
    return request.param


def drawn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def mask(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def means(x, keep):
    """In fp64, zero of no rows."""
    if keep is None:
        return x.to(F64).mean(1)
    kept = torch.where(keep[..., None], x.to(F64), 0.0)
    return kept.sum(1) / keep.sum(1, keepdim=True).clamp_min(1)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("sequences", "positions", "widths"),
    [(1, 1, (1,)), (3, 2, (3, 3)), (2, 16, (65, 128)), (5, 17, (129, 2, 63)), (4, 3, (97, 300))],
)
def test_means_and_no_number_that_is_not_finite(impl, dtype, sequences, positions, widths):
    layers = [drawn(sequences, positions, d, seed=d, dtype=dtype) + 3 for d in widths]
    keep = mask(sequences, positions)
    keep[0] = False  # a sequence of which nothing counts
    for keeps in ([None] * len(layers), [keep] * len(layers), [None, *[keep] * (len(layers) - 1)]):
        x = [
            y if k is None else y.masked_fill(~k[..., None], torch.nan)
            for y, k in zip(layers, keeps, strict=True)
        ]
        found = survey(x, keeps, impl=impl)
        assert found.bad.dtype == torch.int64
        assert torch.equal(found.bad, torch.zeros(len(x), positions, dtype=torch.int64))
        for mean, y, k in zip(found.means, x, keeps, strict=True):
            torch.testing.assert_close(
                mean, means(y, k), rtol=positions * 2.0**-52, atol=positions * 2.0**-50
            )


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_not_finite_are_counted(impl, dtype):
    x = drawn(700, 5, 7, seed=1, dtype=dtype)
    keep = torch.arange(700)[:, None] % torch.arange(2, 7) != 0
    x[0] = torch.nan
    x[5:600, 2] = torch.inf
    x[7, 1, 3], x[8, 4, 0] = -torch.inf, torch.finfo(dtype).max
    x[9, :, 1] = torch.finfo(dtype).max  # of which fp64 has no sum
    bad = ~torch.isfinite(x)
    found = survey([x, x], [None, keep], means=False, impl=impl)
    assert not found.means
    assert found.bad[0].tolist() == bad.sum((0, 2)).tolist()
    assert found.bad[1].tolist() == (bad & keep[..., None]).sum((0, 2)).tolist()


def test_any_strides_give_the_same_bits(impl):
    x, keep = drawn(3, 6, 133, dtype=torch.float32), mask(3, 6)
    want = survey([x], [keep], impl=impl).means[0]
    beside = torch.empty(3, 6, 134)
    beside[..., 1:] = x  # begins at no multiple of 16 bytes
    across = x.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    apart = x.mT.contiguous().mT
    for other in (beside[..., 1:], across, apart):
        assert torch.equal(survey([other], [keep.T.contiguous().T], impl=impl).means[0], want)
    if impl == "cuda":  # nor does it matter what else is in the call
        assert torch.equal(survey([drawn(3, 6, 300), x], [None, keep], impl=impl).means[1], want)


def test_one_launch_for_layers_of_a_dtype(emulated_gpu, monkeypatch):
    emulated_gpu.admit(SURVEY)
    layers = [drawn(2, 3, d, dtype=dtype) for d, dtype in ((5, F64), (200, torch.float32), (7, F64))]
    keeps = [None] * 3
    assert SURVEY.select("auto", surveying.Batch(layers, keeps, means=True)).name == "library"
    monkeypatch.setattr(measured, "refusal", lambda op, impl, device: None)
    monkeypatch.setattr(SURVEY, "_chosen", {})
    survey(layers, keeps)  # with what is known
    emulated_gpu.reset()
    emulated_gpu.seed(3)
    survey(layers, keeps)
    launches = emulated_gpu.log("cuLaunchKernelEx")
    assert [(call["kernel"], call["grid"]) for call in launches] == [
        ("rgfast_moments_survey_float64", [1, 2, 1]),
        ("rgfast_moments_survey_float32", [1, 1, 1]),
    ]


def test_every_kernel_has_an_answer(emulated_gpu):
    emulated_gpu.admit(SURVEY)
    assert unproven(emulated_gpu.device, *surveying.SURVEYING.values()) is None


def test_what_the_kernels_refuse(emulated_gpu, monkeypatch):
    emulated_gpu.admit(SURVEY)
    x = drawn(2, 3, 4)
    with pytest.raises(ImplUnavailable, match="layers and masks must be on one device"):
        survey([x, x.to("meta")], [None, None], impl="cuda")
    with pytest.raises(ImplUnavailable, match="or float16, got float8_e5m2"):
        survey([x.to(torch.float8_e5m2)], [None], impl="cuda")
    with pytest.raises(ImplUnavailable, match="there must be sequences, positions and features"):
        survey([x[:, :0]], [None], impl="cuda")
    monkeypatch.setattr(surveying.cuda, "capturing", lambda device: True)
    with pytest.raises(HandOff, match="a CUDA graph would read the table of layers"):
        surveying.surveyed(surveying.Batch([x], [None], means=True))
    monkeypatch.setattr(surveying, "MOST_SIDE", 0)
    SURVEY._chosen.clear()
    with pytest.raises(ImplUnavailable, match="blocks at most, and 0 of layers"):
        survey([x], [None], impl="cuda")


def test_layers_and_masks_that_do_not_fit():
    x = drawn(2, 3, 4)
    with pytest.raises(ValueError, match="keeps must be one per layer, got 0 for 1 layers"):
        survey([x], [])
    with pytest.raises(ValueError, match="layers must hold at least one layer, got none"):
        survey([], [])
    with pytest.raises(ValueError, match=r"layers\[0\] must be \[B, T, d\], got shape \(2, 3\)"):
        survey([x[..., 0]], [None])
    with pytest.raises(ValueError, match=r"layers\[1\] must be \[2, 3, d\], got shape \(2, 2, 4\)"):
        survey([x, x[:, :2]], [None, None])
    with pytest.raises(ValueError, match=r"keeps\[0\] must be bool \(2, 3\), got torch.float64 \(2, 3\)"):
        survey([x], [x[..., 0]])
