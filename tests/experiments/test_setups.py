import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_config

import rgfast
from rgfast import cli
from rgfast.chains import MarkovChain
from rgfast.experiments.config import ReproduceConfig
from rgfast.experiments.runs import Run, build_model, probe_data, train_run
from rgfast.experiments.setups import ARMS, PARTS, Arm, SetupsDesign, setups

TINY = SetupsDesign(
    name="setups-tiny",
    arms=(
        Arm("a", "exact null", (("mixing", "none"), ("masking", "one")), null=True),
        Arm("d", "mixer", (("mixing", "mixer"),), seeds=1),
    ),
    seeds=(0, 1),
    base=tiny_config(probe_sequences=400),
    every=2,
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return setups(TINY, out=tmp_path_factory.mktemp("setups") / "run", jobs=1, progress=False)


def test_every_run_is_a_row_and_every_layer_is_kept(done):
    assert {p.name for p in done.out.iterdir()} == {
        "points", "table.csv", "curves.csv", "summary.json", "design.json", "setups.png", "report.html"
    }  # fmt: skip
    assert list(zip(done.table.arm, done.table.seed, done.table.xi, strict=True)) == [
        ("exact null", 0, 1.2), ("exact null", 0, 6.7), ("exact null", 1, 1.2), ("exact null", 1, 6.7),
        ("mixer", 0, 1.2), ("mixer", 0, 6.7),
    ]  # fmt: skip
    # Two stages, four views: two ranks at three layers and a drift at two transitions.
    assert len(done.curves) == 6 * 2 * 4 * (2 * 3 + 2)
    found = json.loads((done.out / "summary.json").read_text(), parse_constant=pytest.fail)
    assert [arm["missing"] for arm in found["arms"]] == [0, 0]
    assert found["arms"][0]["answers"]["null"]["status"] == "undecided"


def test_the_numbers_are_those_of_the_run(done):
    """From the model itself, one position at a time."""
    point = TINY.points()[5]
    config = point.config
    assert (config.mixing, config.xi) == ("mixer", (6.7,))
    model = build_model(config, 0)
    train_run(config, Run("trained", 0, (("two-scale", 6.7),)), model)
    tokens, mask = probe_data(config, config.chain("two-scale", 6.7), 0)
    with torch.no_grad():
        layers = [model.embed(tokens.masked_fill(mask, 8))]
        for block in model.stack.blocks:
            layers.append(block(layers[-1]))
    row = done.table.iloc[5]
    ranks = [np.mean([float(rgfast.effective_rank(x[:, t])) for t in (1, 3)]) for x in layers]
    assert row.input_rank == pytest.approx(ranks[0], rel=1e-6)
    assert row.R_position == pytest.approx(ranks[-1] / ranks[0], rel=1e-6)
    raw = [np.mean([float(rgfast.effective_rank(x[:, t], centering="none")) for t in (1, 3)]) for x in layers]
    assert row.R_uncentered_position == pytest.approx(raw[-1] / raw[0], rel=1e-6)
    pooled = [float(rgfast.effective_rank(x.mean(1))) for x in layers]
    assert row.R_mean_pooled == pytest.approx(pooled[-1] / pooled[0], rel=1e-6)
    masked = [np.mean([float(rgfast.effective_rank(x[mask[:, t], t])) for t in (1, 3)]) for x in layers]
    assert row.masked_rank == pytest.approx(max(masked[1:]), rel=1e-6)
    # W2 starts at zero: the untrained stack is the identity.
    assert row.untrained_R_position == 1


def test_without_mixing_masked_rows_are_alike(done):
    null = done.table[done.table.arm == "exact null"]
    assert (null.masked_rank == 0).all()
    assert (null.captured <= 0.01).all()
    assert (null.highest_rank <= null.states).all()
    assert (done.table[done.table.arm == "mixer"].masked_rank > 1).all()
    assert done.verdicts[0].answers["neighbors"].status == "not reproduced"


def test_an_unfinished_study_is_read_and_says_what_is_missing(done, tmp_path):
    points = tmp_path / "half" / "points"
    points.mkdir(parents=True)
    for point in TINY.points()[:3]:
        name = f"{point.name}.json"
        (points / name).write_bytes((done.out / "points" / name).read_bytes())
    part = setups(TINY, out=tmp_path / "new", merge=[tmp_path / "half"], parts=[], jobs=1, progress=False)
    assert len(part.table) == 3
    assert "exact null: no mixing, one target per sequence (1 seeds, 1 of 4 runs missing)" in str(part)
    assert "mixing across positions (0 seeds, 2 of 2 runs missing)" in str(part)
    assert (tmp_path / "new" / "setups.png").stat().st_size > 0
    # The rest of the part is run, and nothing else.
    rest = setups(TINY, out=tmp_path / "new", parts=["a"], jobs=1, progress=False)
    assert rest.table.equals(done.table.iloc[:4])
    assert rest.verdicts[1].missing == 2


def test_what_does_not_fit_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="parts must be one of 'a', 'b', 'c', 'd', got 'e'"):
        setups(TINY, out=tmp_path / "x", parts=["e"])
    with pytest.raises(ValueError, match="parts must name at least one to run"):
        setups(TINY, out=tmp_path / "x", parts=[])
    with pytest.raises(ValueError, match="quick goes without a design"):
        setups(TINY, out=tmp_path / "x", quick=True)
    assert not (tmp_path / "x").exists()


def test_the_default_design_is_the_sequels_size():
    points = SetupsDesign().points()
    assert len({point.name for point in points}) == len(points) == 48
    assert [arm.part for arm in ARMS] == sorted(arm.part for arm in ARMS)
    assert {arm.part for arm in ARMS} == set(PARTS)
    sequel = ReproduceConfig.preset("sequel")
    for point in points:
        config = point.config
        assert (config.states, config.width, config.depth) == (16, 64, 6)
        assert (config.training.steps, config.training.batch, config.length) == (10_000, 32, 64)
    mixer = next(p.config for p in points if p.config.mixing == "mixer")
    assert mixer == replace(sequel, xi=(1.2,), seeds=(0,))
    null, moving, masked, _ = (SetupsDesign().points_of(arm)[0].config for arm in ARMS[:4])
    assert (null.mixing, null.training.masking, null.chains) == ("none", "one", ("two-scale",))
    short, long = (MarkovChain.from_label(moving.chains[0], xi).stationary for xi in (1.2, 6.7))
    assert float((short - long).abs().sum()) > 0.3
    assert (masked.initialization, masked.positions, masked.training.replacement) == ("torch", "none", "mask")
    assert len(SetupsDesign(seeds=tuple(range(7))).points_of(ARMS[0])) == 14


def test_the_command_runs_a_part_and_prints_json(done, capsys, monkeypatch):
    monkeypatch.setattr("rgfast.experiments.setups.QUICK", TINY)
    options = ["setups", "--quick", "--jobs", "1", "--out", str(done.out)]
    assert cli.main([*options, "--part", "none", "--json"]) == 0
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert document == {**json.loads((done.out / "summary.json").read_text()), "out": str(done.out)}
    assert cli.main([*options, "--part", "none", "a"]) != 0
    assert "--part none goes alone, got none a" in capsys.readouterr().err
