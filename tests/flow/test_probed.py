"""The flow of a probe in words: what counts as a fall, which view, what a control says."""

import numpy as np
import pytest
import torch
from torch import nn

import rgfast
from rgfast.report import write_report


class Block(nn.Module):
    """A residual block of random weights, of a chosen size."""

    def __init__(self, width, scale):
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )
        nn.init.normal_(self.up.weight, std=0.1)
        nn.init.normal_(self.down.weight, std=scale)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def stack(width=32, depth=6, scale=0.02, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*[Block(width, scale) for _ in range(depth)]).eval()


def probed(ranks, drifts=None, *, n=4000, groups=1, se=0.05, control=None, view="position"):
    """A probe's result whose order parameters are made up."""
    layers = len(ranks)
    x = torch.randn(n, 2, 4)
    model = rgfast.ResidualStack(4, layers - 1, mixing="none")
    found = rgfast.probe(model, x, groups=groups, progress=False)
    data = found.dataset
    drifts = np.full(layers - 1, 0.02) if drifts is None else drifts
    where = {"view": view, "position": found.positions(view)}
    data.effective_rank.loc[where] = np.asarray(ranks, float)[:, None]
    data.kernel_drift.loc[where] = np.asarray(drifts, float)[:, None]
    if groups > 1:
        data.effective_rank_se.loc[where] = se
    if control:
        data.attrs["control"] = control
    return found


@pytest.mark.parametrize("width", [8, 32])
@pytest.mark.parametrize("depth", [6, 12])
@pytest.mark.parametrize("seed", range(3))
def test_random_weights_that_change_little_are_flat_in_every_view(width, depth, seed, tmp_path):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1200, 3, width, generator=generator)
    result = rgfast.probe(stack(width, depth, seed=seed), x, progress=False)
    for view in result.views:
        flow = result.flow(view)
        assert flow.word == "flat"
        assert "falls" not in str(flow)
        assert "geometric" not in str(flow)
        assert "step" not in str(flow)
    if seed:
        return
    write_report(result, tmp_path / "page.html")
    assert 'class="verdict' not in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("ranks", "word"),
    [
        ([4, 3.8, 3.6], "falls"),
        ([4, 3.8, 3.61], "flat"),
        ([4, 4.2, 4.45], "rises"),
        ([4, 4.2, 4.43], "flat"),
        ([4, 4, 4], "flat"),
        ([0, 0, 0], "not measured"),
    ],
)
def test_a_fall_takes_a_tenth(ranks, word):
    assert probed(ranks).flow("position").word == word


def test_a_fall_takes_more_than_its_error_bar():
    assert probed([4, 3.8, 3.5], groups=4, se=0.05).flow("position").word == "falls"
    noisy = probed([4, 3.8, 3.5], groups=4, se=0.2).flow("position")
    assert noisy.word == "flat"
    assert noisy.error == pytest.approx(0.2 * 2**0.5)
    assert "drop 0.5 ± 0.28: flat" in str(noisy)
    assert np.isnan(probed([4, 3.8, 3.5]).flow("position").error)


def test_a_fall_with_a_rise_in_it_says_so():
    text = str(probed([4, 3, 3.5, 3]).flow("position"))
    assert "falls, not monotonically (largest rise 50% of the drop)" in text


def test_shapes_are_those_of_the_verdicts():
    step = [0.3, 0.2, 0.01, 0.011, 0.012, 0.01]
    decay = 0.3 * 0.5 ** np.arange(6)
    ranks = np.full(7, 4.0)
    assert "drift: step + plateau; largest two 0.92 of it" in str(probed(ranks, step).flow("position"))
    assert "drift: geometric decay, rate 0.5 per transition" in str(probed(ranks, decay).flow("position"))
    assert "growing, rate 2 per transition" in str(probed(ranks, decay[::-1]).flow("position"))
    assert "drift: flat\n" in str(probed(ranks).flow("position"))
    few = probed(ranks[:4]).flow("position")
    assert few.shape == "shape not judged: 3 transitions, and it takes 6"
    still = probed(ranks, np.zeros(6)).flow("position")
    assert still.shape == "shape not judged: a transition does not move"


def test_the_first_view_with_enough_rows_is_taken():
    few = probed([4, 3.8, 3.6], n=40)
    assert few.sample_limited("position")
    assert few.flow().view == "pooled"
    assert probed([4, 3.8, 3.6]).flow().view == "position"
    none = probed([4, 3.8, 3.6], n=10)
    assert none.flow().view == none.views[0]


def test_without_a_control_the_reading_is_undecided():
    flow = probed([4, 3.8, 3]).flow("position")
    assert flow.reading.status == flow.drift_reading.status == "undecided"
    assert "reading: undecided: no control" in str(flow)


@pytest.mark.parametrize(
    ("own", "other", "options", "status"),
    [
        ([4, 3, 2], [4, 4, 4], {}, "supported"),
        ([4, 3, 2], [4, 3, 1.9], {}, "not supported"),
        ([4, 3, 2], [4, 3, 2.3], {}, "undecided"),  # by less than a tenth, without error bars
        ([4, 3, 2], [4, 3, 2.3], {"groups": 4, "se": 0.01}, "supported"),
        ([4, 3, 2], [4, 3, 2.3], {"groups": 4, "se": 0.2}, "undecided"),
        ([4, 4, 4], [4, 4, 4], {}, "not supported"),
    ],
)
def test_a_control_decides_the_reading_of_the_rank(own, other, options, status):
    control = probed(other, control="random_weights", **options)
    flow = probed(own, **options).flow("position", control=control)
    assert flow.reading.status == status
    assert "with random weights" in flow.reading.summary
    assert f"reading of the rank: {status}" in str(flow)
    assert flow.control.kind == "random weights"


@pytest.mark.parametrize(
    ("own", "other", "status"),
    [
        ([0.3, 0.2, 0.01, 0.011, 0.012, 0.01], [0.02] * 6, "supported"),
        ([0.3, 0.2, 0.01, 0.011, 0.012, 0.01], [1, 0.01, 0.01, 0.01, 0.01, 0.01], "not supported"),
        ([0.32, 0.16, 0.08, 0.04, 0.02, 0.01], [0.02] * 6, "not supported"),
        ([0.03, 0.02, 0.021, 0.02, 0.02, 0.02], [0.02] * 6, "not supported"),
    ],
)
def test_a_control_decides_the_reading_of_the_drift(own, other, status):
    ranks = np.full(7, 4.0)
    control = probed(ranks, other, control="shuffled_tokens")
    flow = probed(ranks, own).flow("position", control=control)
    assert flow.drift_reading.status == status
    assert "shuffled tokens" in flow.drift_reading.summary


def test_a_twin_that_the_probe_makes_is_taken():
    model, x = stack(8, 6, scale=1.0), torch.randn(600, 2, 8)
    result = rgfast.probe(model, x, progress=False)
    twin = rgfast.probe(model, x, control="random_weights", progress=False)
    flow = result.flow("position", control=twin)
    assert flow.control.kind == "random weights"
    assert flow.control.ratio == twin.flow("position").rank.ratio != flow.rank.ratio


def test_a_control_that_does_not_fit_is_refused():
    result = probed([4, 3, 2])
    with pytest.raises(TypeError, match="control must be a ProbeResult, got str"):
        result.flow(control="random_weights")
    with pytest.raises(ValueError, match="control must have the same 3 layers, got 4 layers"):
        result.flow(control=probed([4, 3, 2, 1]))
    one = rgfast.probe(
        rgfast.ResidualStack(4, 2, mixing="none"), torch.randn(90, 2, 4), views=["pooled"], progress=False
    )
    with pytest.raises(ValueError, match="control must have the view 'position', got pooled"):
        result.flow("position", control=one)
