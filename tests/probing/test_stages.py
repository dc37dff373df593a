"""Results of the stages of a pipeline as one: the numbers of the whole model, across the borders too."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import rgfast

DEPTH, WIDTH = 5, 6
X = torch.randn(60, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OPTIONS = {"route": "moments", "progress": False}


class Block(nn.Module):
    """Puts out its stream and a cache of as many features."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, width)

    def forward(self, x, caches):
        y = torch.tanh(self.inner(self.norm(x)))
        caches.append(x)
        return (x + y if y.shape == x.shape else y), caches[-1]


class Stage(nn.Module):
    """Some blocks, numbered from 0, and a cache that goes from one to the next."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks).double()

    def forward(self, x):
        caches = []
        for block in self.blocks:
            x, _ = block(x, caches)
        return x


def blocks(last=WIDTH):
    torch.manual_seed(0)
    return [Block(last if k == DEPTH - 1 else WIDTH) for k in range(DEPTH)]


NAMES = ["blocks.0:input", *(f"blocks.{k}" for k in range(DEPTH))]
ASKED = OPTIONS | {"output": 0}


def whole(*, last=WIDTH, **more):
    return rgfast.probe(Stage(blocks(last)), X, layers=[*range(DEPTH + 1)], **ASKED | more)


def staged(cuts, *, last=WIDTH, x=X, **more):
    """The results of stages of blocks from one cut to the next; ordinal 0 is what a stage is given."""
    found, every = [], blocks(last)
    for first, end in pairwise(cuts):
        stage = Stage(every[first:end])
        found.append(rgfast.probe(stage, x, layers=[*range(end - first + 1)], **ASKED | more))
        with torch.no_grad():
            x = stage(x)
    return found


def assert_same(found, wanted):
    assert found.layers == wanted.layers
    assert found.views == wanted.views
    assert {*found.dataset.data_vars} == {*wanted.dataset.data_vars}
    assert {*found.dataset.coords} == {*wanted.dataset.coords}
    for name, values in wanted.dataset.data_vars.items():
        assert found.dataset[name].dims == values.dims
        if not name.endswith("_bound"):
            np.testing.assert_allclose(found.dataset[name], values, rtol=1e-12, atol=1e-12, err_msg=name)
    np.testing.assert_array_equal(found.dataset.width, wanted.dataset.width)


@pytest.mark.parametrize("cuts", [(0, 2, 5), (0, 1, 3, 4, 5), (0, 5)])
def test_stages_give_the_numbers_of_the_whole_model(cuts):
    """Drift and adjacent CKA across the borders included, from what a stage is given."""
    first, *others = staged(cuts)
    assert_same(first.join(*others, names=NAMES), whole())


def test_layers_of_other_widths_targets_and_errors(tmp_path):
    more = {"targets": {"y": torch.arange(60) % 3}, "groups": 5}
    first, *others = staged((0, 2, 4, 5), last=9, **more)
    found = first.join(*others, names=NAMES)
    assert_same(found, whole(last=9, **more))
    assert found.dataset.width.values.tolist() == [6] * 5 + [9]
    found.save(tmp_path / "joint.nc")
    loaded = rgfast.ProbeResult.load(tmp_path / "joint.nc")
    assert loaded.dataset.equals(found.dataset)
    found.report(tmp_path / "joint.html")
    assert loaded.moments is None


def test_rows_are_joined_as_moments_are():
    first, then = staged((0, 2, 5), route="samples")
    wanted = whole(route="samples")
    found = first.join(then, names=NAMES)
    np.testing.assert_allclose(
        found.by_position("effective_rank", "pooled"),
        wanted.by_position("effective_rank", "pooled"),
        rtol=1e-6,
    )
    assert found.dataset.attrs["route"] == "samples"
    mixed = first.join(staged((0, 2, 5))[1], names=NAMES)
    assert mixed.dataset.attrs["route"] == "moments"


def test_all_pairs_within_stages_and_none_between():
    first, then = staged((0, 2, 5), pairs="all")
    cka = first.join(then, names=NAMES).by_position("cka", "pooled").values[..., 0]
    wanted = whole(pairs="all").by_position("cka", "pooled").values[..., 0]
    known = np.zeros((6, 6), dtype=bool)
    known[:3, :3] = known[2:, 2:] = True
    assert np.isnan(cka[~known]).all()
    np.testing.assert_allclose(cka[known], wanted[known], rtol=1e-12)


def test_without_what_a_stage_is_given_there_is_no_drift_across_the_border():
    every = blocks()
    first = rgfast.probe(Stage(every[:2]), X, layers=[1, 2], **ASKED)
    with torch.no_grad():
        x = Stage(every[:2])(X)
    then = rgfast.probe(Stage(every[2:]), x, layers=[1, 3], **ASKED)
    found = first.join(then, names=["0", "1", "2", "4"])
    drift = found.by_position("kernel_drift", "pooled").values[:, 0]
    assert np.isnan(drift).tolist() == [False, True, False]
    assert found.notes[-1].startswith("no drift from 1 to 2: the stage of the second has not the input")


def test_what_the_joint_result_says_of_its_model():
    first, then = staged((0, 2, 5))
    found = first.join(then, names=NAMES)
    parts = sum(r.provenance["parameters"] for r in (first, then))
    assert found.provenance["parameters"] == parts == whole().provenance["parameters"]
    assert found.provenance["layers"] == NAMES
    assert found.provenance["stages"] == [list(first.layers), list(then.layers)]
    weights = found.provenance["weights"]
    assert weights not in (None, first.provenance["weights"])
    assert weights == first.join(then, names=NAMES).provenance["weights"]
    assert "6 layers" in repr(found)


def test_stages_that_do_not_fit_together():
    first, second, third = staged((0, 2, 3, 5))
    numbers = [f"block {k}" for k in range(6)]
    with pytest.raises(
        ValueError, match=r"'blocks.0:input' is not what 'blocks.1' puts out: a stage is miss"
    ):
        first.join(third, names=numbers[:5])
    with pytest.raises(
        ValueError, match=r"'blocks.0:input' is not what 'blocks.0' puts out: .* another order"
    ):
        second.join(first, third, names=numbers)
    with pytest.raises(
        ValueError, match=r"two stages have 'blocks.0'; if these are not the same one, give the"
    ):
        first.join(second)
    with pytest.raises(ValueError, match="two stages have 'block 0'"):
        first.join(second, names=["block 0"] * 4)
    with pytest.raises(
        ValueError, match="names must be those of all 4 layers, got 3; without names= they are"
    ):
        first.join(second, names=numbers[:3])
    with pytest.raises(TypeError, match="others must be ProbeResults, got str"):
        first.join("second.nc")
    for names in ("abcd", [0, 1, 2, 3]):
        with pytest.raises(TypeError, match="names must be a list of names, got"):
            first.join(second, names=names)
    for more, message in (
        ({"x": X[:50]}, "others must have the same sequences: 60, got 50"),
        ({"views": ["pooled"]}, "others must have the same views"),
        ({"positions": [0]}, "others must have the same positions"),
        ({"measures": ["effective_rank"]}, "others must have the same measures"),
        ({"groups": 2}, "others must have the same groups: 1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            first.join(staged((0, 2, 5), **more)[1], names=numbers)


def test_one_stage_is_itself():
    (alone,) = staged((0, 5))
    joined = alone.join()
    assert_same(joined, whole())
    with pytest.raises(ValueError, match=r"no moments: it was saved with moments=False, .* or was joined"):
        joined.merge(alone)


def test_pairs_by_number_and_drawn_weights_are_refused_by_name():
    _, second = staged((0, 3, 5))
    (listed, _), (every, _) = staged((0, 3, 5), pairs=[(0, 1)]), staged((0, 3, 5), pairs="all")
    with pytest.raises(ValueError, match="others must have pairs 'adjacent' or 'all', which"):
        listed.join(second)
    with pytest.raises(ValueError, match="others must have the same pairs: all, got adjacent"):
        every.join(second)
    drawn = staged((0, 3, 5), control="random_weights")
    with pytest.raises(ValueError, match="others of control='random_weights' do not meet"):
        drawn[0].join(drawn[1], names=[str(k) for k in range(DEPTH + 1)])
