"""Every op on a device: against fp64 truth, against the CPU within their bounds, twice with the same bits."""

import warnings

import pytest
import torch
import torch.nn.functional as F

import rgfast
from rgfast import FallbackWarning, ImplUnavailable, dispatch
from rgfast.ops.cka.api import alignment
from rgfast.ops.moments import add_positions, add_products, pair_products
from rgfast.training import TrainingConfig, seeded_generator, train

F64 = torch.float64


def drawn(*shape, seed=0, dtype=torch.float32):
    made = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=made, dtype=F64, device="cpu").to(dtype)


def quietly(call):
    """What ``call`` returns; where only the reference can, it may say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        return call()


def centred(x):
    x = x.to(F64).cpu()
    return x - x.mean(-2, keepdim=True)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize(("b", "d"), [(3, 1), (5, 17), (40, 64), (9, 130), (2, 300), (1, 700)])
def test_eigenvalues(device, b, d, dtype):
    a = drawn(b, d, d, dtype=F64)
    a = (a + a.mT).to(dtype)
    found = rgfast.eigvalsh(a.to(device))
    want = torch.linalg.eigvalsh(a.double())
    assert found.device.type == device
    bound = max(50, d / 2) * torch.finfo(dtype).eps / 2 * want.abs().amax(-1, keepdim=True)
    assert ((found.cpu().double() - want).abs() <= 2 * bound).all()


@pytest.mark.parametrize("scale", [1e150, 1e-150])
def test_eigenvalues_of_huge_and_tiny_matrices(device, scale):
    a = drawn(3, 20, 20, dtype=F64)
    a = a + a.mT
    found = rgfast.eigvalsh((scale * a).to(device)).cpu() / scale
    torch.testing.assert_close(found, torch.linalg.eigvalsh(a), rtol=0, atol=1e-13)


def test_many_matrices(device):
    a = drawn(20_000, 6, 6, dtype=F64)
    a = a @ a.mT
    found = rgfast.eigvalsh(a.to(device)).cpu()
    at = torch.tensor([0, 1, 16_383, 16_384, 19_999])
    torch.testing.assert_close(found[at], torch.linalg.eigvalsh(a[at]), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.sum(1), a.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-12, atol=1e-12)


ROWS = {
    "tall": drawn(5, 300, 17),
    "offset": drawn(3, 200, 12) + 1e4,
    "wide": drawn(4, 9, 70),
    "fp64": drawn(3, 60, 33, dtype=F64),
    "bf16": drawn(3, 60, 16, dtype=torch.bfloat16),
    "fp16": drawn(3, 60, 16, dtype=torch.float16),
    "decaying": drawn(3, 100, 12, dtype=F64) * torch.arange(1.0, 13.0, dtype=F64) ** -3,
    "rank one": drawn(3, 100, 1, dtype=F64) * drawn(3, 1, 12, seed=1, dtype=F64),
    "zero": torch.zeros(2, 8, 3),
}
MEASURES = ["effective_rank", "participation_ratio", "stable_rank", "singular_values", "numerical_rank"]


@pytest.mark.parametrize("name", ROWS)
def test_ranks(device, name):
    x = ROWS[name]
    sigma = torch.linalg.svdvals(centred(x))
    sigma = torch.where(sigma > 1e-13 * sigma[:, :1], sigma, 0.0)
    p = sigma / sigma.sum(1, keepdim=True).clamp_min(1e-300)
    rank = torch.where(sigma[:, 0] > 0, torch.special.entr(p).sum(1).exp(), 0.0)
    square = sigma.square()
    truth = {
        "effective_rank": rank,
        "participation_ratio": square.sum(1) ** 2 / square.square().sum(1).clamp_min(1e-300),
        "stable_rank": square.sum(1) / square[:, 0].clamp_min(1e-300),
    }
    for measure, want in truth.items():
        found = quietly(lambda measure=measure: getattr(rgfast, measure)(x.to(device)))
        assert found.device.type == device
        torch.testing.assert_close(found.cpu(), want, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ROWS)
def test_both_devices_agree_within_their_bounds(device, name):
    x = ROWS[name]
    here, there = rgfast.rank_measures(x), quietly(lambda: rgfast.rank_measures(x.to(device)))
    bound = here.error_bound + there.error_bound.cpu()
    difference = (here.effective_rank - there.effective_rank.cpu()).abs()
    assert (difference <= bound * here.effective_rank + 1e-12).all()
    bound = here.variance_error_bound + there.variance_error_bound.cpu()
    difference = (here.effective_rank_variance - there.effective_rank_variance.cpu()).abs()
    assert (difference <= bound * here.effective_rank_variance + 1e-12).all()


SLOPES = {
    "effective_rank": lambda x: rgfast.effective_rank(x),
    "of variances": lambda x: rgfast.effective_rank(x, spectrum="variance"),
    "participation_ratio": lambda x: rgfast.participation_ratio(x),
    "stable_rank": lambda x: rgfast.stable_rank(x),
    "singular_values": lambda x: rgfast.singular_values(x),
    "eigvalsh": lambda x: rgfast.eigvalsh(x[:, : x.shape[2]] + x[:, : x.shape[2]].mT),
}


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", SLOPES)
def test_gradients_of_spectra(device, name, dtype):
    x = (drawn(6, 60, 20, dtype=F64) * torch.logspace(0, -2, 20, dtype=F64)).to(dtype)
    x[1] = drawn(60, 1, seed=1, dtype=dtype) * x[1]
    call = SLOPES[name]

    def slope(x):
        x = x.clone().requires_grad_()
        value = quietly(lambda: call(x))
        weight = torch.arange(1.0, 1 + value.numel(), dtype=value.dtype, device=x.device)
        return torch.autograd.grad(value, x, weight.reshape(value.shape))[0]

    found, want = slope(x.to(device)), slope(x.double())
    assert (found.device.type, found.dtype) == (device, dtype)
    tight = {"rtol": 1e-8, "atol": 1e-10} if dtype == F64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.cpu().double(), want, **tight)
    assert torch.equal(slope(x.to(device)), found)


@pytest.mark.parametrize("centering", ["mean", "none"])
def test_ranks_of_a_moment(device, centering):
    x = drawn(6, 90, 20, dtype=F64)
    y = centred(x) if centering == "mean" else x
    found = rgfast.rank_measures_from_moment((y.mT @ y).to(device), 90, centering=centering)
    want = rgfast.effective_rank(x, centering=centering, method="svd")
    torch.testing.assert_close(found.effective_rank.cpu(), want, rtol=1e-6, atol=0)


def _moments(device, widths=(5, 130, 5), positions=3, b=31, keep=None, exponents=None):
    rows = [drawn(positions, b, d, seed=k) + 30 for k, d in enumerate(widths)]
    shifts = [x.to(F64).mean(1) for x in rows]
    count = range(len(widths))
    sums = {
        (i, j): torch.zeros(positions, widths[i] + 2, widths[j] + 2, dtype=F64, device=device)
        for i in count
        for j in count
        if i <= j
    }
    there = [[t.to(device) for t in each] for each in (rows, shifts)]
    kept = None if keep is None else keep.to(device)
    quietly(lambda: add_products(sums, *there, keep=kept, exponents=exponents))
    return sums, rows, shifts


@pytest.mark.parametrize("masked", [True, False])
def test_products(device, masked):
    keep = drawn(3, 31, seed=7) > 0 if masked else None
    sums, rows, shifts = _moments(device, keep=keep, exponents=[0, 2, -1])
    for p in range(3):
        z = []
        for x, shift, exponent in zip(rows, shifts, (0, 2, -1), strict=True):
            y = (x[p].to(F64) - shift[p]) * 2.0**-exponent
            y = y if keep is None else y[keep[p]]
            z.append(torch.cat([y, y.square().sum(1, keepdim=True), torch.ones_like(y[:, :1])], 1))
        for (i, j), total in sums.items():
            size = z[i].abs().T @ z[j].abs()
            assert ((total[p].cpu() - z[i].T @ z[j]).abs() <= 40 * 2.0**-53 * size).all()


def test_cross_moments_and_sums_over_positions(device):
    rows = [drawn(3, 40, d, seed=d) for d in (6, 4)]
    shifts = [x.to(F64).mean(1) for x in rows]
    total = {(0, 1): torch.zeros(6, 4, dtype=F64, device=device)}
    ones = torch.ones(3, dtype=F64, device=device)
    found = quietly(
        lambda: pair_products(
            total,
            [x.to(device) for x in rows],
            [s.to(device) for s in shifts],
            owns=[None] * 2,
            moves=[None] * 2,
            units=[ones] * 2,
        )
    )
    u, v = (x.to(F64) - s[:, None] for x, s in zip(rows, shifts, strict=True))
    cross = u.mT @ v
    # Compiled kernels multiply in fp32, with sums of 32 products.
    size = (u.abs().mT @ v.abs()).sum(0)
    assert ((total[0, 1].cpu() - cross.sum(0)).abs() <= 2e-6 * size).all()
    torch.testing.assert_close(found.norm[0].cpu(), cross.square().sum((1, 2)), rtol=1e-5, atol=0)
    sums = torch.zeros(40, 6, dtype=F64, device=device)
    quietly(lambda: add_positions(rows[0].to(device), sums))
    torch.testing.assert_close(sums.cpu(), rows[0].to(F64).sum(0), rtol=1e-13, atol=1e-13)


def kernels(x, debiased):
    """CKA of every pair of ``x[L, P, n, d]`` by centred kernels."""
    k = centred(x) @ centred(x).mT
    n = k.shape[-1]
    if debiased:
        k = k - torch.diag_embed(k.diagonal(dim1=-2, dim2=-1))
        rows = k.sum(-1)
        inner = torch.einsum("apij,bpij->pab", k, k)
        inner -= 2 * torch.einsum("api,bpi->pab", rows, rows) / (n - 2)
        total = rows.sum(-1)
        inner += torch.einsum("ap,bp->pab", total, total) / ((n - 1) * (n - 2))
    else:
        inner = torch.einsum("apij,bpij->pab", k, k)
    own = inner.diagonal(dim1=1, dim2=2)
    return inner / (own[:, :, None] * own[:, None]).sqrt()


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("shape", [(4, 3, 40, 6), (3, 2, 12, 90), (2, 1, 200, 64)])
def test_cka_and_drift(device, shape, debiased):
    x = drawn(*shape).cumsum(0) + 20
    want = kernels(x, debiased)
    found = quietly(lambda: rgfast.cka_matrix(x.to(device), debiased=debiased))
    assert found.device.type == device
    torch.testing.assert_close(found.cpu(), want, rtol=0, atol=1e-6)
    drift = quietly(lambda: rgfast.kernel_drift(x.to(device), debiased=debiased, precision="double"))
    near = 1 - want.diagonal(1, -2, -1)
    torch.testing.assert_close(drift.cpu(), near if debiased else near.clamp(min=0), rtol=0, atol=1e-12)


def test_small_drifts_keep_their_digits(device):
    x = drawn(2, 60, 8, dtype=F64)
    both = [x.to(device), (x + 1e-7 * drawn(2, 60, 8, seed=1, dtype=F64)).to(device)]
    found = quietly(lambda: rgfast.kernel_drift(both))
    want = rgfast.kernel_drift([t.cpu() for t in both], impl="reference")
    torch.testing.assert_close(found.cpu(), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("groups", [1, 4])
def test_alignment_without_groups(device, groups):
    layers = [x.to(device) for x in drawn(3, 2, 41, 6).cumsum(0)]
    found = quietly(lambda: alignment(layers, adjacent=True, groups=groups))
    want = alignment([x.cpu() for x in layers], adjacent=True, groups=groups, impl="reference")
    torch.testing.assert_close(found.cpu(), want, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("width", [16, 64, 100])
def test_the_block_and_its_gradients(device, width):
    high = 4 * width
    shapes = [(50, width), (high, width), (high,), (width, high), (width,), (width,), (width,)]
    tensors = [drawn(*shape, seed=k) / max(1, shape[-1]) ** 0.5 for k, shape in enumerate(shapes)]

    def block(x, w1, b1, w2, b2, weight, bias):
        h = F.layer_norm(x, (width,), weight, bias, 1e-5)
        return x + F.linear(F.gelu(F.linear(h, w1, b1)), w2, b2)

    def ours(x, w1, b1, w2, b2, weight, bias):
        return quietly(lambda: rgfast.residual_mlp(x, w1, b1, w2, b2, norm_weight=weight, norm_bias=bias))

    def run(function, *given):
        leaves = [t.clone().requires_grad_() for t in given]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    want = run(block, *(t.double() for t in tensors))
    for got, wanted in zip(run(ours, *(t.to(device) for t in tensors)), want, strict=True):
        assert got.device.type == device
        assert float((got.cpu() - wanted).norm() / wanted.norm()) < 2e-5


CALLS = {
    "eigvalsh": lambda at: rgfast.eigvalsh(at(drawn(40, 33, 33) + drawn(40, 33, 33).mT)),
    "effective_rank": lambda at: rgfast.effective_rank(at(drawn(8, 500, 64))),
    "rank_measures": lambda at: rgfast.rank_measures(at(ROWS["decaying"])).singular_values,
    "products": lambda at: _moments(at(drawn(1)).device.type)[0][0, 1],
    "cka_matrix": lambda at: rgfast.cka_matrix(at(drawn(5, 4, 300, 32).cumsum(0))),
    "kernel_drift": lambda at: rgfast.kernel_drift(at(drawn(5, 4, 30, 64).cumsum(0))),
    "residual_mlp": lambda at: rgfast.residual_mlp(
        at(drawn(300, 64)), at(drawn(256, 64) / 8), None, at(drawn(64, 256) / 16), None
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_run_after_run(device, name):
    call = CALLS[name]
    first = quietly(lambda: call(lambda x: x.to(device)))
    kept = [torch.empty(1 << 20, device=device) for _ in range(3)]  # what comes next lies elsewhere
    again = quietly(lambda: call(lambda x: x.to(device)))
    assert len(kept) == 3
    assert torch.equal(first.nan_to_num(7.0), again.nan_to_num(7.0))


@pytest.mark.parametrize("name", ["native", "mkl", "triton", "cuda"])
def test_what_is_not_for_the_device_is_refused(device, name):
    x = drawn(3, 20, 8).to(device)
    w = drawn(16, 8).to(device)
    calls = {
        "spectrum": lambda: rgfast.effective_rank(x, impl=name),
        "cka": lambda: rgfast.cka_matrix(x, impl=name),
        "eigvalsh": lambda: rgfast.eigvalsh(x @ x.mT, impl=name),
        "residual_mlp": lambda: rgfast.residual_mlp(x, w, None, w.mT, None, impl=name),
    }
    for op, call in calls.items():
        if device in _devices(op, name):
            continue
        with pytest.raises(
            ImplUnavailable, match=rf"^{op}: .*(there is no '{name}'|runs on the \w+, not on)"
        ):
            call()


def _devices(op, name):
    return [device for device in ("cpu", "cuda") if name in dispatch.implementations(op, device)]


def test_what_the_library_refuses(device):
    x = drawn(3, 20, 8).to(device)
    with pytest.raises(ImplUnavailable, match="it computes in float64"):
        rgfast.effective_rank(x, precision="single", impl="library")
    with pytest.raises(ImplUnavailable, match="a gradient is wanted"):
        rgfast.cka_matrix(x.clone().requires_grad_(), impl="library")
    with pytest.raises(ImplUnavailable, match="not 'hsic'"):
        rgfast.hsic(x[0], x[1], impl="library")


def test_what_is_not_finite_is_named(device):
    x = drawn(3, 20, 8).to(device)
    x[1, 4, 2] = torch.nan
    with pytest.raises(ValueError, match="x must be finite, got 1 NaN or infinite values in matrix 1"):
        quietly(lambda: rgfast.effective_rank(x))
    with pytest.raises(ValueError, match="layers must be finite, got 1 NaN or Inf values in layer 1"):
        quietly(lambda: rgfast.cka_matrix(x))
    a = torch.eye(8, dtype=F64, device=device).repeat(3, 1, 1)
    a[1, 5] = torch.nan
    with pytest.raises(ValueError, match="a must be finite, got 8 NaN or infinite values in matrix 1"):
        rgfast.eigvalsh(a)


@pytest.mark.gpu
def test_on_a_gpu_the_library_is_what_auto_takes(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU that torch finds")
    monkeypatch.setenv("RGFAST_STRICT", "1")
    x = drawn(3, 2, 40, 8).cuda()
    with rgfast.record() as log:
        rgfast.effective_rank(x)
        rgfast.cka_matrix(x)
        rgfast.kernel_drift(x)
        rgfast.participation_ratio(x)
    assert {entry.impl for entry in log} == {"library"}


def test_training(device):
    """The same losses as on the CPU, of a model that is on a device."""
    chain = rgfast.MarkovChain.from_correlation_length(2.0, states=8)
    config = TrainingConfig(steps=6, batch=32, warmup=2, log_every=2, log_sequences=64)
    logs = []
    for place in ("cpu", device):
        weights = seeded_generator(0, "weights")
        model = rgfast.MaskedTokenModel(8, 5, 8, 2, generator=weights, device=place)
        logs.append(quietly(lambda model=model: train(model, chain, config, seed=0)))
    for name in ("loss", "captured", "evaluation_loss"):
        here, there = (torch.tensor(getattr(log, name)) for log in logs)
        torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-3)
