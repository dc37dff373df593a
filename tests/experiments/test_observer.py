import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import TRAINING, tiny_config

import rgfast
from rgfast.experiments.observer import ObserverDesign, _slope, observe, observer_cka, ridge_radii
from rgfast.experiments.runs import build_model
from rgfast.masking import balanced_mask
from rgfast.training import seeded_generator

BASE = tiny_config(length=8, training=replace(TRAINING, mask_rate=0.2, mask_rate_max=0.9))
TINY = ObserverDesign("observer-tiny", (1, 2, 4), (7.0,), (0,), 0.8, BASE)


@pytest.fixture
def data():
    chain = BASE.chain("two-scale", 7.0)
    generator = seeded_generator(0, "probe")
    tokens = chain.sample(400, 8, generator)
    return chain, tokens, balanced_mask(400, 8, 0.8, generator)


def test_layers_that_are_observers_lie_on_the_ridge(data):
    chain, tokens, mask = data
    radii = (1, 2, 4)
    blocks = [lambda x, w=w: chain.bayes_posterior(tokens, mask, radius=w).float() for w in radii]
    ladder = SimpleNamespace(
        mask_token=8, embed=lambda shown: shown[..., None].float(), stack=SimpleNamespace(blocks=blocks)
    )
    values = observer_cka(ladder, chain, tokens, mask, radii)
    np.testing.assert_allclose(np.diag(values[1:]), 1, atol=1e-6)
    assert np.isnan(values[0]).all()
    found = ridge_radii(values, radii)
    assert math.isnan(found[0])
    assert found[1:].tolist() == [1, 2, 4]
    assert _slope(found[1:]) == pytest.approx(math.log(2))


def test_values_are_cka_by_position_averaged(data):
    chain, tokens, mask = data
    model = build_model(replace(BASE, w2_scale=1.0), 0).eval()
    values = observer_cka(model, chain, tokens, mask, (1, 3))
    layer = model.embed(tokens.masked_fill(mask, 8))
    for block in model.stack.blocks:
        layer = block(layer)
    posterior = chain.bayes_posterior(tokens, mask, radius=3)
    each = [
        float(rgfast.cka(layer[mask[:, t], t].detach().double(), posterior[mask[:, t], t])) for t in range(8)
    ]
    assert values[-1, 1] == pytest.approx(np.mean(each), abs=1e-9)


def test_ridges_and_slopes_of_known_values():
    values = [[0.2, 0.9, 0.905], [0.1, 0.2, 0.9], [-0.1, -0.2, -0.3], [math.nan] * 3]
    found = ridge_radii(values, (1, 2, 4))
    assert found[:2].tolist() == [2, 4]
    assert np.isnan(found[2:]).all()
    assert _slope(np.array([1.0, math.nan, math.e**2])) == pytest.approx(1.0)
    assert math.isnan(_slope(np.array([math.nan, 3.0])))


def test_a_run_leaves_its_files(tmp_path):
    done = observe(TINY, out=tmp_path / "run", jobs=1, progress=False)
    assert {p.name for p in done.out.iterdir()} == {
        "points", "table.csv", "ridges.csv", "slopes.csv", "summary.json", "design.json", "observer.png",
        "report.html",
    }  # fmt: skip
    assert len(done.curves) == 3 * 3 * 3
    json.loads((done.out / "summary.json").read_text(), parse_constant=pytest.fail)
    # The untrained stack is the identity: its masked rows hold nothing at all.
    assert done.curves[done.curves.stage == "untrained"].cka.isna().all()
    assert done.slopes[done.slopes.stage == "untrained"].n.tolist() == [0]
    assert set(done.slopes.stage) == {"trained", "control_iid", "untrained", "trained − control_iid"}
    before = (done.out / "table.csv").read_bytes()
    again = observe(TINY, out=tmp_path / "b", merge=[done.out], jobs=1, progress=False)
    assert (again.out / "table.csv").read_bytes() == before
    assert "no ridge" in str(done)
    assert "trained − trained on i.i.d. tokens" in str(done)


def test_designs_are_checked():
    with pytest.raises(ValueError, match="radii must be rising whole numbers"):
        replace(TINY, radii=(2, 1))
    with pytest.raises(ValueError, match="hidden_share must lie between 0 and 1"):
        replace(TINY, hidden_share=1.0)
    full = ObserverDesign()
    assert full.radii[-1] == full.base.length - 1
    assert len({p.name for p in full.points()}) == 10
    rows = full.base.probe_sequences * full.hidden_share
    assert rows >= 16 * full.base.width
