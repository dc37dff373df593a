import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import TRAINING, tiny_config

from rgfast.experiments.decimation import (
    MEASURES,
    RANDOM_MASKS,
    DecimationDesign,
    _slopes,
    decimate,
    probe_spaced,
    shown_positions,
    spaced_data,
)
from rgfast.experiments.runs import build_model

BASE = tiny_config(
    length=9,
    xi=(6.0,),
    seeds=(0,),
    training=replace(TRAINING, mask_rate=0.2, mask_rate_max=0.9),
    probe_sequences=400,
)
TINY = DecimationDesign("decimation-tiny", (1, 3), (0,), BASE)


def test_positions_of_the_two_arms():
    assert shown_positions("grid", 3, 9) == [0, 3, 6]
    assert shown_positions("block", 3, 9) == [3, 4, 5]
    assert shown_positions("grid", 1, 9) == shown_positions("block", 1, 9) == list(range(9))
    for k in DecimationDesign().spacings:
        grid, block = (shown_positions(arm, k, 24) for arm in ("grid", "block"))
        assert len(grid) == len(block)
        assert block[0] >= 0
        assert block[-1] < 24


def test_on_the_grid_the_task_is_the_chain_at_xi_over_k():
    chain = BASE.chain("two-scale", 6.0)
    where = shown_positions("grid", 3, 9)
    tokens, mask, asked = spaced_data(chain, BASE, 0, where)
    assert bool(mask[:, [1, 2, 4, 5, 7, 8]].all())
    assert torch.equal(asked[:, where], mask[:, where])
    assert int(asked.sum()) == int(asked[:, where].sum())
    on_grid = chain.bayes_posterior(tokens, mask)[:, where]
    short = BASE.chain("two-scale", 2.0).bayes_posterior(tokens[:, where], mask[:, where])
    assert float((on_grid - short).abs().max()) < 1e-12


def test_the_identity_shows_the_same_at_every_spacing():
    chain = BASE.chain("two-scale", 6.0)
    model = build_model(replace(BASE, width=8, probe_sequences=1000), 0)
    for arm in ("grid", "block"):
        found = probe_spaced(model, chain, BASE, 0, arm, 3)
        assert found["tokens_shown"] == 3
        assert found["R_visible"] == pytest.approx(1, rel=1e-12)
        assert found["slow_visible"] == pytest.approx(1, abs=1e-9)
        assert found["fast_visible"] == pytest.approx(1, abs=1e-9)
        assert found["total_drift_visible"] == pytest.approx(0, abs=1e-12)


def test_a_run_leaves_its_files_and_goes_on(tmp_path):
    done = decimate(TINY, out=tmp_path / "run", jobs=1, progress=False)
    assert len(done.table) == 2 * 2 * 2
    assert {p.name for p in done.out.iterdir()} == {
        "points", "table.csv", "curves.csv", "summary.json", "design.json", "decimation.png", "report.html"
    }  # fmt: skip
    json.loads((done.out / "summary.json").read_text(), parse_constant=pytest.fail)
    ranks = done.curves.query("measure == 'rank_visible' and stage == 'trained' and arm == 'grid'")
    assert sorted(ranks.layer.unique()) == [0, 1, 2]
    row = done.table.query("stage == 'trained' and arm == 'grid' and spacing == 3").iloc[0]
    curve = ranks[ranks.spacing == 3].sort_values("layer").value.to_numpy()
    assert row.R_visible == pytest.approx(curve[-1] / curve[0])
    # At k = 1 both arms are the same probe.
    same = done.table.query("stage == 'trained' and spacing == 1")
    assert same.R_visible.nunique() == 1
    before = (done.out / "table.csv").read_bytes()
    (next((done.out / "points").iterdir())).unlink()
    decimate(TINY, out=done.out, jobs=1, progress=False)
    assert (done.out / "table.csv").read_bytes() == before
    assert "slope of R_visible against ln k" in str(done)


def test_slopes_of_known_tables():
    rows = [
        {"stage": "trained", "arm": arm, "spacing": k, "seed": seed}
        | {name: (0.3 if arm == "grid" else 0.1) * np.log(k) + 0.01 * seed * np.log(k) for name in MEASURES}
        for arm in ("grid", "block")
        for k in (1, 2, 5)
        for seed in range(5)
    ]
    slopes = _slopes(pd.DataFrame(rows))
    assert slopes["grid"]["R_visible"].mean == pytest.approx(0.32)
    assert slopes["difference"]["fast_visible"].mean == pytest.approx(0.2)
    assert slopes["difference"]["fast_visible"].low == pytest.approx(0.2)
    assert slopes["grid"]["R_visible"].low < 0.32 - 0.01


def test_designs_are_checked():
    with pytest.raises(ValueError, match=r"spacings must lie in 1\.\.8"):
        replace(TINY, spacings=(1, 9))
    full = DecimationDesign()
    assert full.base == RANDOM_MASKS
    assert (full.base.training.mask_rate, full.base.training.mask_rate_max) == (0.1, 0.95)
    assert full.spacings[-1] == 7
    assert len({p.name for p in full.points()}) == 5
