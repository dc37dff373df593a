"""CKA of all samples and of all but each group, from products made once, against the reference."""

import itertools

import pytest
import torch

import rgfast
from rgfast.ops.cka import reference
from rgfast.ops.cka.api import alignment
from rgfast.ops.cka.impl import native as kernels
from rgfast.runtime import native

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason="the native module is not built"
)


def walk(n, d, step=0.7, layers=4, seed=0):
    """Layers that drift by about ``step`` of what they are."""
    generator = torch.Generator().manual_seed(seed)
    moves = torch.randn(layers, 2, n, d, generator=generator)
    return (moves * torch.tensor([1.0, *[step] * (layers - 1)]).reshape(-1, 1, 1, 1)).cumsum(0)


def outliers(n, d):
    x = walk(n, d)
    x[2, :, 0::8] += 1e6
    return x


def one_group_differs(n, d):
    x = walk(n, d)
    x[1] = 3.0
    x[1, :, 1::8] += walk(n, d)[0, :, 1::8]
    return x


def rank_one(n, d):
    x = walk(n, d)
    x[1:] = x[1:, ..., :1] * x[1:, :, :1] + 1e-4 * x[1:]
    return x


# Whether products are shared at n = 300, d = 40 and 8 groups.
KINDS = {
    "a walk": (walk, True),
    "far off": (lambda n, d: walk(n, d) + 1e3, True),
    "a plateau": (lambda n, d: walk(n, d, 1e-5), True),
    "rank one and noise": (rank_one, True),
    "a constant layer": (lambda n, d: torch.cat([walk(n, d)[:2], torch.ones(1, 2, n, d)]), True),
    "one group of outliers": (outliers, False),
    "constant but for a group": (one_group_differs, False),
}


def compare(layers, groups, adjacent, bound):
    found = alignment(layers, adjacent=adjacent, groups=groups, impl="native")
    want = reference.alignment([x.double() for x in layers], adjacent=adjacent, groups=groups)
    assert found.shape == want.shape == (1 + groups, 2, 2, len(layers), len(layers))
    assert torch.equal(found.isnan(), want.isnan())
    assert (found - want).abs().nan_to_num(0.0).max() <= bound


@pytest.mark.parametrize("adjacent", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_variant_is_that_of_the_reference(kind, adjacent):
    made, shared = KINDS[kind]
    layers = list(made(300, 40))
    compare(layers, 8, adjacent, 1e-6)
    if not adjacent:
        assert kernels._worth_sharing(layers, adjacent, 8)
        assert (kernels._aligned(layers, adjacent, 8) is not None) == shared


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize(("n", "groups"), [(16, 2), (40, 3), (131, 8), (300, 2), (301, 7), (640, 10)])
def test_sizes_and_widths(isa, n, groups):
    with native.use_isa(isa):
        if n < 300:  # few wide rows; the reference takes long for more
            compare([walk(n, 400, layers=3)[0], walk(n, 333, layers=3)[1]], groups, False, 1e-6)
        compare([walk(n, d)[k] for k, d in enumerate((33, 5, 60))], groups, False, 1e-6)
        compare(list(walk(n, 12).double()), groups, True, 1e-10)


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize(("n", "groups"), [(5000, 2), (301, 7), (333, 5)])
def test_few_features_are_multiplied_by_features(isa, n, groups):
    layers = [walk(n, d, layers=3)[k] for k, d in enumerate((9, 3, 17))]
    wanted = kernels._wanted("matrix", (9, 3, 17), None)
    by_samples, by_features = kernels._costs(n, wanted, 4096, groups)
    assert by_features < by_samples
    with native.use_isa(isa):
        compare(layers, groups, False, 1e-6)
        compare([x.double() for x in layers], groups, True, 1e-10)


def test_neighbours_that_all_but_agree_keep_their_drift():
    layers = list(walk(300, 40, 1e-3))
    found = alignment(layers, adjacent=False, groups=6, impl="native")
    group = torch.arange(300) % 6
    for variant in range(7):
        rest = [x[:, group != variant - 1] for x in layers]
        for matrix, debiased in zip(found[variant], (True, False), strict=True):
            want = reference.drift([x.double() for x in rest], debiased=debiased)
            assert want.min() < 1e-5
            torch.testing.assert_close(1 - matrix.diagonal(1, -2, -1), want, rtol=1e-4, atol=0)


def test_all_samples_are_as_without_groups_to_rounding_and_bits_do_not_depend_on_threads():
    layers = list(walk(500, 48))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(alignment(layers, adjacent=False, groups=8, impl="native"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    torch.testing.assert_close(
        found[0][:1], alignment(layers, adjacent=False, impl="native"), rtol=0, atol=1e-7
    )


def test_infinite_numbers_are_refused():
    layers = list(walk(300, 40))
    layers[1][0, 7, 3] = torch.inf
    with pytest.raises(ValueError, match="layers"):
        alignment(layers, adjacent=False, groups=8)


def test_groups_that_cannot_be_are_refused_by_the_module():
    x = native.tensor(torch.randn(1, 9, 3))
    for groups, features in ((0, False), (10, False), (0, True), (10, True)):
        with pytest.raises(ValueError, match="groups must be from 1 to the number of samples"):
            native.load().cka_workspace([x], [(0, 0)], features, True, groups, 1)


@pytest.mark.parametrize("lead", [(), (2, 3), (1, 2, 2)])
@pytest.mark.parametrize("impl", ["reference", "library", "native", "auto"])
def test_a_jackknife_of_layers_that_are_not_flat(impl, lead):
    """Debiased and biased CKA without each group, of every index of the leading dimensions by itself."""
    made = torch.Generator().manual_seed(1)
    layers = [torch.randn(*lead, 25, d, generator=made) for d in (5, 9, 30)]
    found = alignment(layers, adjacent=False, groups=3, impl=impl)
    assert found.shape == (1 + 3, 2, *lead, 3, 3)
    group = torch.arange(25) % 3
    for at in itertools.product(*map(range, lead)):
        for g in range(-1, 3):
            some = [x[at][group != g].double() for x in layers]
            for k, debiased in enumerate((True, False)):
                want = rgfast.cka_matrix(some, debiased=debiased, impl="reference")
                assert (found[1 + g, k][at] - want).abs().max() < 1e-6
