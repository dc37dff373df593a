"""The kernels of moments by name: on a GPU, and on this processor in place of one."""

import pytest
import torch

from rgfast.ops.moments import add_products
from rgfast.ops.moments.api import OP
from rgfast.ops.moments.impl import cuda as kernels

F64 = torch.float64


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def gpu(request):
    if request.param == "emulated":
        emulated = request.getfixturevalue("emulated_gpu")
        emulated.admit(OP)
        return emulated.device, (2, 40)
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU that torch finds")
    return torch.device("cuda"), (33, 3000)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_of_a_layer_and_of_two(gpu, dtype, split, monkeypatch):
    if split:  # as on a GPU whose fp64 is slow
        monkeypatch.setattr(kernels, "card", lambda device: ("sm_89", 128, 64))
    (device, (positions, b)), made = gpu, torch.Generator().manual_seed(0)
    rows, shifts, sums = [], [], {}
    for d in (64, 130):
        x = torch.randn(positions, b, d, generator=made, dtype=F64) + 30
        rows.append(x.to(device, dtype))
        shifts.append(x.mean(1).to(device))
    for i, j in ((0, 0), (0, 1), (1, 1)):
        high, wide = (rows[k].shape[2] + 2 for k in (i, j))
        sums[i, j] = torch.zeros(positions, high, wide, dtype=F64, device=device)
    keep = (torch.rand(positions, b, generator=made) < 0.7).to(device)

    def run(impl, rows, shifts, keep):
        found = {key: torch.zeros_like(total, device=rows[0].device) for key, total in sums.items()}
        precision = "single" if split else "double"
        add_products(found, rows, shifts, keep=keep, precision=precision, impl=impl)
        return {key: total.cpu() for key, total in found.items()}

    found, again = run("cuda", rows, shifts, keep), run("cuda", rows, shifts, keep)
    here = [x.cpu() for x in rows], [s.cpu() for s in shifts]
    want = run("reference", *here, keep.cpu())
    apart = [(x.to(F64) - s[:, None]).abs() for x, s in zip(*here, strict=True)]
    size = run("reference", apart, [torch.zeros_like(s) for s in here[1]], keep.cpu())
    allowed = kernels.SINGLE_ERROR if split else (b + 200) * 2.0**-53
    for key, total in found.items():
        assert torch.equal(total, again[key])
        assert bool(((total - want[key]).abs() <= allowed * size[key]).all()), key
