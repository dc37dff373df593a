"""The compiled eigenvalue solver against truths that share nothing with it, on every ISA of the machine."""

import functools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import rgfast
from rgfast.ops.spectrum.impl import native as room
from rgfast.runtime import native

DTYPES = (torch.float64, torch.float32)
CHOOSE, LANES, SINGLE = 0, 1, 2


@pytest.fixture(params=native.available_isas() or ("the module is not built",))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.use_isa(request.param):
        yield request.param


@pytest.fixture(params=[LANES, SINGLE], ids=["lanes", "single"])
def route(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def solve(a: Tensor, route: int, threads: int = 2) -> Tensor:
    """Eigenvalues by one route, into an output full of NaN."""
    values = torch.full(a.shape[:-1], float("nan"), dtype=a.dtype)
    assert native.load().eigvalsh(native.tensor(a), native.tensor(values), threads, route) == (-1, 0)
    return values


def truth(a: Tensor) -> Tensor:
    """Eigenvalues of `a[b, d, d]` better than fp64: Rayleigh quotients of LAPACK's eigenvectors.

    Their error is the square of the vectors', in extended precision where numpy has it.
    """
    lower = a.double().tril()
    full = lower + lower.tril(-1).mT
    vectors = torch.linalg.eigh(full).eigenvectors.numpy().astype(np.longdouble)
    wide = full.numpy().astype(np.longdouble)
    products = np.stack([m @ v for m, v in zip(wide, vectors, strict=True)])
    values = (products * vectors).sum(-2) / (vectors * vectors).sum(-2)
    return torch.from_numpy(np.sort(values, -1).astype(np.float64))


def error(values: Tensor, a: Tensor, want: Tensor | None = None) -> float:
    """Worst error over the batch in units of what is promised: max(50, d/2) u ||A||."""
    want = truth(a) if want is None else want
    unit = torch.finfo(a.dtype).eps / 2
    norm = want.abs().amax(-1).clamp_min(torch.finfo(torch.float64).tiny)
    allowed = max(50, a.shape[-1] / 2) * unit * norm
    return float(((values.double() - want).abs().amax(-1) / allowed).max())


@functools.cache
def random_case(d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a = symmetric(19, d, d, dtype=dtype, seed=d)
    return a, truth(a)


@functools.cache
def family_case(family: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a = FAMILIES[family]().to(dtype)[None]
    return a, truth(a)


def symmetric(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(*shape, generator=draw, dtype=torch.float64)
    return (a + a.mT).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 97])
def test_random_matrices(isa: str, route: int, dtype: torch.dtype, d: int) -> None:
    a, want = random_case(d, dtype)
    values = solve(a, route)
    assert values.dtype == dtype
    assert bool((values.diff(dim=-1) >= 0).all())
    assert error(values, a, want) <= 1


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 0), (0, 0, 0), (0, 2, 3, 3)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    assert room.eigvalsh(torch.empty(shape)).shape == shape[:-1]


@pytest.mark.parametrize("batch", [1, 2, 7, 8, 9, 15, 16, 17, 33, 65])
def test_any_batch(isa: str, route: int, batch: int) -> None:
    a = symmetric(batch, 6, 6, seed=batch)
    assert error(solve(a, route), a) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "batch"), [(128, 9), (200, 9), (300, 3), (513, 1)])
def test_larger_matrices(d: int, batch: int, dtype: torch.dtype) -> None:
    a = symmetric(batch, d, d, dtype=dtype, seed=d)
    assert error(room.eigvalsh(a), a) <= 1


def wilkinson(half: int) -> Tensor:
    d = 2 * half + 1
    ones = torch.ones(d - 1, dtype=torch.float64)
    return torch.diag((torch.arange(d) - half).abs().double()) + torch.diag(ones, 1) + torch.diag(ones, -1)


def glued_wilkinson(blocks: int, glue: float) -> Tensor:
    a = torch.block_diag(*[wilkinson(10)] * blocks)
    for block in range(1, blocks):
        a[21 * block, 21 * block - 1] = a[21 * block - 1, 21 * block] = glue
    return a


def rotated(values: Tensor, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=draw, dtype=torch.float64))
    a = (q * values) @ q.mT
    return (a + a.mT) / 2


FAMILIES: dict[str, Callable[[], Tensor]] = {
    "zero": lambda: torch.zeros(12, 12),
    "identity": lambda: torch.eye(33),
    "diagonal": lambda: torch.diag(torch.linspace(-3, 5, 20)),
    "diagonal, graded": lambda: torch.diag(torch.logspace(0, -30, 24, dtype=torch.float64)),
    "toeplitz": lambda: torch.diag(torch.ones(39), 1) + torch.diag(torch.ones(39), -1),
    "second difference": lambda: (
        2 * torch.eye(50) - torch.diag(torch.ones(49), 1) - torch.diag(torch.ones(49), -1)
    ),
    "wilkinson": lambda: wilkinson(10),
    "wilkinson, long": lambda: wilkinson(50),
    "glued wilkinson": lambda: glued_wilkinson(5, 1e-8),
    "glued wilkinson, tight": lambda: glued_wilkinson(4, 1e-14),
    "hilbert": lambda: 1.0 / (torch.arange(1, 31)[:, None] + torch.arange(30)).double(),
    "ones": lambda: torch.ones(40, 40),
    "clustered": lambda: rotated(torch.cat([1 + 1e-14 * torch.arange(30.0).double(), -torch.ones(30)]), 1),
    "graded": lambda: rotated(torch.logspace(0, -20, 48, dtype=torch.float64), 2),
    "graded rows": lambda: (
        symmetric(40, 40)
        * torch.logspace(0, -12, 40, dtype=torch.float64).outer(
            torch.logspace(0, -12, 40, dtype=torch.float64)
        )
    ),
    "graded rows, small first": lambda: (
        symmetric(40, 40)
        * torch.logspace(-12, 0, 40, dtype=torch.float64).outer(
            torch.logspace(-12, 0, 40, dtype=torch.float64)
        )
    ),
    "low rank": lambda: rotated(torch.cat([torch.linspace(1, 2, 5), torch.zeros(60)]).double(), 3),
    "one outlier": lambda: rotated(torch.cat([torch.tensor([1e10]), torch.linspace(1, 2, 40)]).double(), 4),
    "tridiagonal": lambda: symmetric(70, 70).tril(1).triu(-1),
    "two by two": lambda: torch.tensor([[1.0, 1e-9], [1e-9, 1.0]], dtype=torch.float64),
    "opposite": lambda: torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
    "arrow": lambda: (
        torch.diag(torch.linspace(1, 2, 30))
        + torch.nn.functional.pad(torch.ones(29, 1), (0, 29, 1, 0))
        + torch.nn.functional.pad(torch.ones(1, 29), (1, 0, 0, 29))
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_hard_families(isa: str, route: int, family: str, dtype: torch.dtype, batch: int) -> None:
    a, want = family_case(family, dtype)
    values = solve(a.expand(batch, -1, -1), route)
    assert bool(torch.isfinite(values).all())
    assert error(values, a, want.expand(batch, -1)) <= 1


def drifting(kind: str, batch: int, d: int, draw: np.random.Generator) -> Tensor:
    """Symmetric matrices on which the error of an unchecked QL iteration comes near the promise, or over."""
    if kind == "gaussian":
        x = draw.standard_normal((batch, d, d))
        return torch.from_numpy(x + x.transpose(0, 2, 1))
    values = {
        "integers": lambda: draw.integers(-4, 5, d).astype(float),
        "clusters": lambda: draw.uniform(-1, 1, 4)[draw.integers(0, 4, d)] + 1e-9 * draw.standard_normal(d),
        "two values": lambda: np.where(np.arange(d) < draw.integers(1, d), draw.uniform(-1, 1), 0.7),
        "low rank": lambda: np.where(np.arange(d) < draw.integers(1, d), draw.standard_normal(d), 0.0),
    }[kind]
    q = np.linalg.qr(draw.standard_normal((d, d)))[0]
    a = (q * np.stack([values() for _ in range(batch)])[:, None]) @ q.T
    return torch.from_numpy((a + a.transpose(0, 2, 1)) / 2)


@pytest.mark.parametrize("kind", ["gaussian", "integers", "clusters", "two values", "low rank"])
@pytest.mark.parametrize(("d", "batch"), [(64, 100), (100, 60)])
def test_rounding_does_not_pile_up_over_the_sweeps(route: int, kind: str, d: int, batch: int) -> None:
    draw = np.random.default_rng(d)
    a = drifting(kind, batch, d, draw)
    single = a.float()
    assert error(solve(single, route), single, torch.linalg.eigvalsh(single.double())) <= 0.9
    values = solve(a, route)
    # The comparison errs as much in fp64: the worst few are compared with something better.
    worst = (values - torch.linalg.eigvalsh(a)).abs().amax(-1).argsort()[-3:]
    assert error(values[worst], a[worst]) <= 0.9
    # One by one, which is another path through the same steps.
    for i in worst.tolist():
        assert error(solve(a[i : i + 1], route), a[i : i + 1]) <= 0.9


def test_known_spectra(isa: str) -> None:
    d = 64
    angle = torch.arange(1, d + 1, dtype=torch.float64) * torch.pi / (d + 1)
    a = 2 * torch.eye(d, dtype=torch.float64)
    a -= torch.diag(torch.ones(d - 1, dtype=torch.float64), 1)
    a -= torch.diag(torch.ones(d - 1, dtype=torch.float64), -1)
    want = (2 - 2 * angle.cos()).sort().values
    assert error(room.eigvalsh(a[None]), a[None], want[None]) <= 1
    assert room.eigvalsh(torch.diag(torch.tensor([3.0, -1.0, 2.0]))).tolist() == [-1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float64, 1e150),
        (torch.float64, 1e-150),
        (torch.float64, 1e300),
        (torch.float64, 1e-300),
        (torch.float32, 1e18),
        (torch.float32, 1e-18),
        (torch.float32, 1e36),
        (torch.float32, 1e-36),
    ],
)
def test_scale_does_not_matter(isa: str, route: int, dtype: torch.dtype, scale: float) -> None:
    a = (symmetric(5, 20, 20, seed=3) * scale).to(dtype)
    a = torch.cat([a, symmetric(5, 20, 20, dtype=dtype, seed=4)])  # beside matrices of an ordinary scale
    assert error(solve(a, route), a) <= 1
    assert error(solve(a[:1], route), a[:1]) <= 1


def test_only_the_lower_triangle_is_read(isa: str, route: int) -> None:
    a = symmetric(9, 12, 12)
    poisoned = a.tril() + torch.full_like(a, float("nan")).triu(1)
    assert torch.equal(solve(poisoned, route), solve(a, route))


def test_any_strides(isa: str, route: int) -> None:
    base = symmetric(4, 5, 11, 11, seed=5)
    want = solve(base, route)
    assert torch.equal(solve(base.mT, route), want)
    wide = torch.full((4, 5, 22, 33), float("nan"), dtype=torch.float64)
    wide[..., ::2, ::3] = base
    assert torch.equal(solve(wide[..., ::2, ::3], route), want)
    assert torch.equal(solve(base.transpose(0, 1), route), want.transpose(0, 1))
    one = base[:1, :1]
    assert torch.equal(solve(one.expand(3, 7, 11, 11), route), want[:1, :1].expand(3, 7, 11))
    odd = torch.empty_strided((1, 1, 11, 11), (7, 3, 11, 1), dtype=torch.float64)
    odd.copy_(one)
    assert torch.equal(room.eigvalsh(odd), room.eigvalsh(one))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_short_way_for_a_plain_batch_is_the_same(dtype: torch.dtype) -> None:
    base = symmetric(6, 9, 9, dtype=dtype, seed=6)
    wide = torch.full((12, 18, 27), float("nan"), dtype=dtype)
    wide[::2, ::2, ::3] = base
    for a in (base, base.mT, wide[::2, ::2, ::3], base[:1].expand(5, 9, 9), base[:1], base[3], base[3].mT):
        assert torch.equal(room.eigvalsh(a), solve(a, CHOOSE))
        assert torch.equal(room.eigvalsh(a[None, None]), solve(a, CHOOSE)[None, None])
    for values in (0, 1):
        with pytest.raises(ValueError, match=("null pointers", "at least 1")[values]):
            native.load().eigvalsh_plain(8 * values, True, 1, 3, 9, 3, 1, 8 * values, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [6, 40, 130])
def test_bits_do_not_depend_on_threads_or_company(isa: str, route: int, dtype: torch.dtype, d: int) -> None:
    a = symmetric(37, d, d, dtype=dtype, seed=d)
    a[5] = 0
    a[6] = torch.eye(d)
    a[7] *= 2.0**40
    a[8] = a[8].tril(1).triu(-1)
    want = solve(a, route, threads=1)
    for threads in (2, 3, 8):
        assert torch.equal(solve(a, route, threads), want)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    assert torch.equal(solve(a[order], route), want[order])
    for part in (a[3:6], a[5:24], a[:36], a[30:]):
        at = int((part.data_ptr() - a.data_ptr()) / a[0].nbytes)
        assert torch.equal(solve(part, route), want[at : at + len(part)])
    if route == LANES:
        assert torch.equal(solve(a[36:], route), want[36:])


@pytest.mark.parametrize("batch", [1, 2, 3, 33])
def test_the_public_function_gives_the_same_bits_on_any_number_of_threads(batch: int) -> None:
    before = torch.get_num_threads()
    a = symmetric(batch, 70, 70)
    try:
        torch.set_num_threads(1)
        want = room.eigvalsh(a)
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            assert torch.equal(room.eigvalsh(a), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nonfinite_input_is_named_and_spoils_no_neighbour(
    isa: str, route: int, bad: float, dtype: torch.dtype
) -> None:
    a = symmetric(21, 9, 9, dtype=dtype)
    want = solve(a, route)
    a[13, 4, 2] = bad
    values = torch.zeros_like(want)
    assert native.load().eigvalsh(native.tensor(a), native.tensor(values), 2, route) == (13, 1)
    assert bool(values[13].isnan().all())
    alone = a[13:14]
    assert native.load().eigvalsh(native.tensor(alone), native.tensor(values[13:14]), 2, route) == (0, 1)
    others = [i for i in range(21) if i != 13]
    assert torch.equal(values[others], want[others])
    with pytest.raises(ValueError, match=r"a must be finite, got 1 NaN or infinite values in matrix 13"):
        rgfast.eigvalsh(a, impl="native")
    with pytest.raises(ValueError, match=r"in matrix \(4, 1\)"):
        rgfast.eigvalsh(a.reshape(7, 3, 9, 9), impl="native")


def test_no_convergence_names_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck:
        @staticmethod
        def eigvalsh(*_: object) -> tuple[int, int]:
            return 5, 2

    monkeypatch.setattr(native, "load", lambda: Stuck)
    with pytest.raises(torch.linalg.LinAlgError, match=r"did not converge on matrix \(2, 1\) of the batch"):
        room.eigvalsh(torch.zeros(3, 2, 4, 4))


def test_every_output_is_written() -> None:
    a = symmetric(13, 7, 7)
    out = torch.full((13, 7), float("nan"), dtype=torch.float64)
    assert native.load().eigvalsh(native.tensor(a), native.tensor(out), 2) == (-1, 0)
    assert bool(torch.isfinite(out).all())
    wide = torch.full((13, 14), float("nan"), dtype=torch.float64)
    assert native.load().eigvalsh(native.tensor(a), native.tensor(wide[:, ::2]), 2) == (-1, 0)
    assert torch.equal(wide[:, ::2], out)
    assert bool(wide[:, 1::2].isnan().all())


@pytest.mark.parametrize(
    ("a", "values", "threads", "said"),
    [
        (torch.zeros(2, 3, 3, dtype=torch.float16), torch.zeros(2, 3, dtype=torch.float16), 1, "float64 or"),
        (torch.zeros(2, 3, 3), torch.zeros(2, 3, dtype=torch.float64), 1, "values must have the dtype"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3), 1, "a must be square, got 3 x 4"),
        (torch.zeros(2, 3, 3), torch.zeros(3, 3), 1, "values must have the shape"),
        (torch.zeros(2, 3, 3), torch.zeros(2, 3), 0, "threads must be at least 1"),
        (torch.zeros(3), torch.zeros(2, 3), 1, "a must have from 2 to 16 dimensions, got 1"),
    ],
)
def test_the_binding_checks(a: Tensor, values: Tensor, threads: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        native.load().eigvalsh(native.tensor(a), native.tensor(values), threads)


@pytest.mark.parametrize(
    ("a", "reason"),
    [
        (torch.zeros(3, 3, device="meta"), "it runs on the cpu, not on meta"),
        (torch.zeros([1] * 15 + [3, 3]), "it takes up to 16 dimensions, a has 17"),
    ],
)
def test_what_is_not_supported_says_why(a: Tensor, reason: str) -> None:
    with pytest.raises(rgfast.ImplUnavailable, match=reason):
        rgfast.eigvalsh(a, impl="native")
    told = rgfast.explain("eigvalsh", a)
    assert told.candidates[0] == ("native", reason)
    assert told.chosen == "library"


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float64, 1144), (torch.float32, 1619)])
def test_auto_leaves_large_matrices_to_lapack_for_the_time_they_take(dtype, largest) -> None:
    for d, chosen in ((largest, "native"), (largest + 1, "library")):
        for lead in ((), (5,)):
            told = rgfast.explain(rgfast.eigvalsh, torch.zeros(1, dtype=dtype).expand(*lead, d, d))
            kernels, elsewhere = (
                (name, "it runs on the cuda, not on cpu") for name in ("cuda", "on the CPU")
            )
            here = [("native", None), kernels, ("library", None), elsewhere, ("reference", None)]
            assert list(told.candidates) == here
            assert told.chosen == chosen


def test_by_name_it_solves_large_matrices_too() -> None:
    a = symmetric(1, 1150, 1150)[0]
    with rgfast.record() as log:
        assert error(rgfast.eigvalsh(a, impl="native"), a, torch.linalg.eigvalsh(a)) <= 1
    assert [(r.impl, r.nested) for r in log] == [("native", [])]


def test_auto_takes_the_compiled_solver_and_says_so() -> None:
    a = symmetric(64, 16, 16)
    with rgfast.record() as log:
        rgfast.eigvalsh(a)
    assert [(entry.op, entry.impl, entry.isa) for entry in log] == [
        ("eigvalsh", "native", native.active_isa())
    ]
    assert rgfast.explain("eigvalsh", a).chosen == "native"


def test_it_agrees_with_the_reference() -> None:
    a = symmetric(20, 24, 24)
    assert error(rgfast.eigvalsh(a, impl="reference"), a) <= 1
    assert error(rgfast.eigvalsh(a, impl="native"), a) <= 1


def test_the_workspace_is_bounded() -> None:
    for batch in (1, 64):
        for d in (8, 200, 256, 257, 1024, 1144):
            assert native.load().eigvalsh_workspace(True, batch, d) < 64 << 20
        assert native.load().eigvalsh_workspace(False, batch, 1618) < 64 << 20


def test_several_python_threads() -> None:
    a = symmetric(40, 30, 30)
    want = room.eigvalsh(a)
    results: list[bool] = []

    def call() -> None:
        results.extend(torch.equal(room.eigvalsh(a), want) for _ in range(10))

    callers = [threading.Thread(target=call) for _ in range(5)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results == [True] * 50


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_solves_too() -> None:
    code = """
import os
import warnings

warnings.simplefilter("ignore")
import torch
from rgfast.ops.spectrum.impl import native

torch.set_num_threads(2)
a = torch.randn(64, 12, 12)
want = native.eigvalsh(a)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(native.eigvalsh(a), want) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
