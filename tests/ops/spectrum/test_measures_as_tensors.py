"""What NumPy computes on the CPU and torch elsewhere agrees; here torch computes it on the CPU."""

import pytest
import torch

import rgfast
from rgfast.ops.spectrum import measures
from rgfast.ops.spectrum.rows import spectra_of_rows, spectra_without_groups


@pytest.fixture
def elsewhere(monkeypatch):
    return lambda: monkeypatch.setattr(measures, "_elsewhere", lambda args: True)


def _rows(d):
    made = torch.Generator(device="cpu").manual_seed(d)
    x = torch.randn(5, 12, d, generator=made, dtype=torch.float32, device="cpu")
    x[1, :, d // 2 :] = 0.0
    x[2] = 3.0
    x[3] *= 1e-30
    return x


@pytest.mark.parametrize("d", [1, 4, 12, 20])
def test_spectra_and_their_bounds(d, elsewhere):
    x = _rows(d)

    def found():
        whole = spectra_of_rows(x, uncentred=True)
        parts = [s for pair in [whole, *spectra_without_groups(x, 3, uncentred=True)] for s in pair]
        out = [p.bound(kind) for p in parts for kind in ("singular", "variance")]
        for part in parts:
            out += [part.singular_values(), part.singular_value_error()]
            out += [f(part.sigma) for f in (measures.effective_rank_of, measures.participation_ratio_of)]
            out += [measures.stable_rank_of(part.sigma), measures.numerical_rank_of(part.sigma, 1e-3)]
        return out

    here = found()
    elsewhere()
    for a, b in zip(found(), here, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_powers_of_two_that_are_no_fp64_number(elsewhere):
    x = torch.tensor([[1.5, 1.0], [1.5, 0.0]], dtype=torch.float64, device="cpu")
    exponent = torch.tensor([[1023], [-1074]], dtype=torch.int64, device="cpu")
    here = measures.times_power(x * 2.0**-3, exponent)
    elsewhere()
    torch.testing.assert_close(measures.times_power(x * 2.0**-3, exponent), here, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"route": "moments"}, {"route": "samples", "views": ["position"]}])
def test_a_probe(options, elsewhere):
    torch.manual_seed(1)
    stack = rgfast.ResidualStack(6, 3, mixing="none")
    made = torch.Generator(device="cpu").manual_seed(4)
    x = torch.randn(48, 3, 6, generator=made, dtype=torch.float32, device="cpu")
    if options["route"] == "moments":
        options = options | {"targets": {"x": x[:, :, :2].double()}}

    def found():
        return rgfast.probe(stack, x, progress=False, groups=3, measures="all", **options).dataset

    here = found()
    elsewhere()
    there = found()
    for name in here.data_vars:
        a, b = (torch.from_numpy(data[name].values.astype(float)) for data in (there, here))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, equal_nan=True, msg=name)
