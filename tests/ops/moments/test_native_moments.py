"""The compiled products: the same bits however the work is cut, on every instruction set."""

import pytest
import torch

from rgfast.ops.moments import add_products
from rgfast.runtime import native

F64 = torch.float64


def run(positions, rows, widths, mask=None):
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(positions, rows, d, generator=generator) for d in widths]
    shifts = [torch.randn(positions, d, generator=generator, dtype=F64) for d in widths]
    pairs = [(i, j) for i in range(len(widths)) for j in range(i, len(widths))]
    sums = {(i, j): torch.ones(positions, widths[i] + 2, widths[j] + 2, dtype=F64) for i, j in pairs}
    add_products(sums, layers, shifts, keep=mask, impl="native")
    return list(sums.values())


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize(("positions", "widths"), [(1, (200, 65, 3)), (3, (64, 130)), (12, (17, 33))])
def test_bits_do_not_depend_on_how_the_work_is_cut(isa, positions, widths):
    """Positions are whole tasks or cut into tiles, depending on the threads."""
    before = torch.get_num_threads()
    try:
        with native.use_isa(isa):
            seen = []
            for threads in (1, 2, 3, 4, 7):
                torch.set_num_threads(threads)
                seen.append(run(positions, 300, widths))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("isa", native.available_isas())
def test_a_position_is_summed_as_if_alone(isa):
    with native.use_isa(isa):
        whole = run(6, 140, (20, 20))
        generator = torch.Generator().manual_seed(0)
        layers = [torch.randn(6, 140, 20, generator=generator) for _ in range(2)]
        shifts = [torch.randn(6, 20, generator=generator, dtype=F64) for _ in range(2)]
        for p in range(6):
            sums = {key: torch.ones(1, 22, 22, dtype=F64) for key in ((0, 0), (0, 1), (1, 1))}
            add_products(sums, [x[p : p + 1] for x in layers], [s[p : p + 1] for s in shifts], impl="native")
            assert all(torch.equal(a[p], b[0]) for a, b in zip(whole, sums.values(), strict=True))


def test_rows_that_are_not_kept_might_as_well_be_zero():
    mask = torch.ones(4, 260, dtype=torch.bool)
    mask[0, :128] = mask[1, 5:200] = mask[2] = False
    found = run(4, 260, (9, 30), mask)
    assert all((total[2] == 1).all() for total in found)
    assert float(found[0][1, -1, -1]) == 1 + int(mask[1].sum())


def test_bad_arguments_of_the_binding():
    module = native.load()
    x = native.tensor(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="rows, shifts and units must be as many, got 1, 0 and 1"):
        module.moments_add([x], [], [1.0], (0, 0, 0), [], 1)
    with pytest.raises(ValueError, match=r"pairs must be \(i, j\) with 0 <= i <= j < 1, got \(0, 1\)"):
        module.moments_add([x], [0], [1.0], (0, 0, 0), [(0, 1, 0)], 1)
    with pytest.raises(ValueError, match="rows must be"):
        module.moments_add([native.tensor(torch.zeros(1, 2, 3, 4))], [0], [1.0], (0, 0, 0), [], 1)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        module.moments_add([x], [0], [1.0], (0, 0, 0), [], 0)
