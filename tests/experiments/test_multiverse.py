import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from tiny import tiny_config

from rgfast import cli
from rgfast.experiments.config import ReproduceConfig
from rgfast.experiments.multiverse import EFFECTS, Multiverse, Universe, multiverse, summary

TINY = Universe(
    name="multiverse-tiny",
    options=(("w2_scale", (0.0, 0.5)), ("lr", (1e-3, 1e-2))),
    base=tiny_config(probe_sequences=400),
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return multiverse(TINY, out=tmp_path_factory.mktemp("multiverse") / "run", jobs=1, progress=False)


def test_every_set_up_is_a_row_and_the_default_is_the_first(done):
    assert len(done.table) == 4
    assert done.table.default.tolist() == [True, False, False, False]
    assert list(zip(done.table.w2_scale, done.table.lr, strict=True)) == [
        (0.0, 1e-3), (0.0, 1e-2), (0.5, 1e-3), (0.5, 1e-2)
    ]  # fmt: skip
    assert {p.name for p in done.out.iterdir()} == {
        "points", "table.csv", "views.csv", "summary.json", "design.json", "multiverse.png", "report.html"
    }  # fmt: skip
    assert len(done.views) == 4 * 4 * 6
    json.loads((done.out / "summary.json").read_text(), parse_constant=pytest.fail)


def test_effects_are_those_of_the_stored_runs(done):
    """From the files alone, computed another way."""
    files = {
        (f["config"]["w2_scale"], f["config"]["training"]["lr"], f["config"]["xi"][0]): f["result"]
        for f in (json.loads(p.read_text()) for p in (done.out / "points").iterdir())
    }
    short, long = files[0.5, 1e-2, 1.0], files[0.5, 1e-2, 7.0]
    row = done.table.iloc[3]
    ratio = [r["effective_rank"]["masked"][-1] / r["effective_rank"]["masked"][1] for r in (short, long)]
    assert row.gap_masked == pytest.approx(ratio[1] - ratio[0], rel=1e-12)
    assert row.fall_masked == pytest.approx(1 - ratio[0], rel=1e-12)
    modes = np.array(short["survival"]["visible"])
    assert row.survival == pytest.approx(modes[0, -1] - modes[-1, -1], rel=1e-12)
    left = 1 - np.array(short["left_out"]["R_visible"])
    error = np.sqrt(4 / 5 * ((left - left.mean()) ** 2).sum())
    # t(0.975, 4)
    assert row.fall_visible_high - row.fall_visible == pytest.approx(2.7764451 * error, rel=1e-6)
    assert row.survival_low < row.survival < row.survival_high
    assert row.fall_visible_low < row.fall_visible < row.fall_visible_high


def test_an_untrained_set_up_is_counted_out(done):
    assert not done.table.trained.any()
    found = summary(done)
    assert (found["setups"], found["trained"]) == (4, 0)
    assert "0 of 4 set-ups trained" in str(done)


def test_the_summary_of_known_effects(done, tmp_path):
    table = done.table.assign(trained=[True, True, True, False], captured_short=0.95, captured_long=0.95)
    for name in EFFECTS:
        table[name] = [0.4, 0.1, 0.3, 9.0]
        table[f"{name}_low"], table[f"{name}_high"] = table[name] - 0.2, table[name] + 0.2
    found = summary(Multiverse(TINY, table, done.views, "sequences", tmp_path))
    fall = found["fall_visible"]
    assert (fall["reaches_bar"], fall["interval_above_zero"], fall["default"]) == (2, 2, 0.4)
    assert fall["option_moves_it_by"]["lr"] == {"0.01": pytest.approx(0.1 - 0.35)}
    assert fall["median"] == pytest.approx(0.3)


def test_the_full_universe_is_64_set_ups_at_two_lengths():
    full = Universe()
    assert len(full.setups()) == 64
    points = full.points()
    assert len({p.name for p in points}) == len(points) == 128
    assert full.setups()[0] == {
        "w2_scale": 0.0, "norm": "layer", "mixing": "mixer", "width": 16, "mask_rate": 0.2, "lr": 5e-3
    }  # fmt: skip
    default = points[0].config
    assert default == ReproduceConfig.preset("quick", xi=(1.0,), seeds=(0,))
    assert all(p.config.probe_sequences * p.config.training.mask_rate >= 16 * p.config.width for p in points)


def test_five_seeds_give_intervals_over_seeds():
    from rgfast.experiments.multiverse import _collected

    def result(ratio):
        rank = {"visible": [10.0, 10 * ratio], "masked": [0.0, 10.0, 10 * ratio]}
        return {
            "captured": 0.95,
            **dict.fromkeys(("effective_rank", "effective_rank_variance", "participation_ratio"), rank),
            "stable_rank": rank,
            "survival": {"visible": [[1.0, 0.9], [1.0, 0.5]]},
            "kernel_drift": {"visible": [0.3, 0.1, 0.1], "masked": [math.nan, 0.1, 0.1]},
        }

    one = replace(TINY, options=(("lr", (1e-3,)),), seeds=(0, 1, 2, 3, 4))
    ratios = [0.50, 0.52, 0.54, 0.56, 0.58]
    flat = [r for ratio in ratios for r in (result(ratio), result(1.0))]
    table = _collected(one, flat, None).table
    assert isinstance(table, pd.DataFrame)
    row = table.iloc[0]
    assert row.gap_visible == pytest.approx(0.46)
    half = 2.7764451 * np.std(ratios, ddof=1) / np.sqrt(5)
    assert row.gap_visible_low == pytest.approx(0.46 - half, rel=1e-6)
    assert row.survival == pytest.approx(0.4)


def test_options_are_checked_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="quick goes without a universe"):
        multiverse(TINY, quick=True, out=tmp_path / "x")
    with pytest.raises(ValueError, match="seeds must be whole numbers"):
        multiverse(TINY, seeds=[-1], out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_command_prints_the_summary_as_json(done, capsys, monkeypatch):
    monkeypatch.setattr("rgfast.experiments.multiverse.QUICK", TINY)
    assert cli.main(["multiverse", "--quick", "--jobs", "1", "--out", str(done.out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert document == {**json.loads((done.out / "summary.json").read_text()), "out": str(done.out)}
