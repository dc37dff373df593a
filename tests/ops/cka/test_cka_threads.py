"""The same bits on any number of threads, by every route that ``impl="auto"`` and ``"reference"`` take."""

import pytest
import torch

import rgfast

THREADS = (1, 2, 3, 4, 8)


@pytest.fixture
def same_bits():
    before = torch.get_num_threads()

    def check(run):
        wanted = None
        for threads in THREADS:
            torch.set_num_threads(threads)
            found = run()
            wanted = found if wanted is None else wanted
            for k, (a, b) in enumerate(zip(wanted, found, strict=True)):
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), (k, threads)

    yield check
    torch.set_num_threads(before)


def layers_of(count, n, d, dtype=torch.float32, lead=()):
    generator = torch.Generator().manual_seed(n + d)
    return [torch.randn(*lead, n, d + 3 * k, generator=generator, dtype=dtype) for k in range(count)]


SHAPES = [(47, 64), (48, 1024), (100, 512), (1024, 64), (700, 300), (5, 3)]


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_values(same_bits, n, d, dtype, impl):
    layers = [x.to(dtype) for x in layers_of(3, n, d)]

    def run():
        return [
            rgfast.cka(*layers[:2], impl=impl),
            rgfast.cka(*layers[:2], debiased=False, impl=impl),
            rgfast.hsic(*layers[:2], impl=impl),
            rgfast.cka_matrix(layers, impl=impl),
            rgfast.cka_matrix(layers, sample_limit=4, impl=impl),
            rgfast.kernel_drift(layers, impl=impl),
            rgfast.minibatch_cka(layers, batch_size=40, impl=impl),
            rgfast.kernel_change(layers),
        ]

    same_bits(run)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_rbf(same_bits, n, d, impl):
    x, y = layers_of(2, n, d)

    def run():
        options = {"kernel": "rbf", "impl": impl}
        return [
            rgfast.cka(x, y, **options),
            rgfast.cka(x, y, debiased=False, bandwidth=d**0.5, **options),
            rgfast.hsic(x, y, threshold=0.5, **options),
        ]

    same_bits(run)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "d"), [(47, 64), (48, 1024), (300, 200)])
def test_gradients(same_bits, n, d, dtype, kernel):
    layers = [x.requires_grad_() for x in layers_of(3, n, d, dtype)]

    def run():
        value = rgfast.cka(*layers[:2], kernel=kernel)
        drift = rgfast.kernel_drift(layers)
        return [value.detach(), drift.detach(), *torch.autograd.grad(value + drift.sum(), layers)]

    same_bits(run)


@pytest.mark.parametrize("route", ["sample", "features"])
@pytest.mark.parametrize(("n", "d"), [(300, 40), (1024, 200)])
def test_streams(same_bits, n, d, route):
    layers = layers_of(3, n, d, lead=(2,))

    def run():
        stream = rgfast.CKAAccumulator(route=route)
        small = rgfast.MinibatchCKAAccumulator(batch_size=64)
        for start in range(0, n, 130):
            batch = [x[:, start : start + 130] for x in layers]
            stream.update(batch)
            small.update(batch)
        whole = stream.finalize()
        return [whole.matrix, whole.drift, small.finalize()]

    same_bits(run)
