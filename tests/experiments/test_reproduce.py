import csv
import json
import math
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from tiny import REPRODUCED as TINY

import rgfast
from rgfast import cli
from rgfast.experiments.config import ReproduceConfig
from rgfast.experiments.runs import plan


@pytest.fixture(scope="module")
def tiny(finished, tmp_path_factory):
    """The small reproduction, with a folder of its own."""
    out = tmp_path_factory.mktemp("tiny") / "run"
    shutil.copytree(finished.out, out)
    return replace(finished, out=out)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_file_is_there(tiny):
    names = {p.name for p in tiny.out.iterdir()}
    assert names == {
        "verdict.json",
        "result.nc",
        "summary.csv",
        "config.json",
        "order_parameter.png",
        "drift.png",
        "survival.png",
        "heat_map.png",
        "training.png",
        "cka.png",
        "spectra.png",
        "report.html",
        "runs",
    }


def test_summary_is_long_form_and_complete(tiny):
    table = rows(tiny.out / "summary.csv")
    assert list(table[0]) == ["chain", "xi", "seed", "stage", "view", "measure", "layer", "value"]
    per_view = 4 * (TINY.depth + 1) + TINY.depth
    assert len(table) == 2 * 2 * 4 * (6 * per_view + 1)
    assert {r["stage"] for r in table} == {"trained", "control_iid", "control_permuted", "untrained"}
    assert {r["measure"] for r in table} == {
        "effective_rank",
        "effective_rank_variance",
        "participation_ratio",
        "stable_rank",
        "kernel_drift",
        "captured",
    }
    assert all(r["layer"] == "-1" for r in table if r["measure"] == "captured")
    masked = [r for r in table if r["view"] == "masked" and r["measure"] == "effective_rank"]
    assert all(float(r["value"]) == 0 for r in masked if r["layer"] == "0")
    drift = [
        r for r in table if r["view"] == "masked" and r["measure"] == "kernel_drift" and r["layer"] == "0"
    ]
    assert {r["value"] for r in drift} == {"nan"}


def test_the_untrained_stack_is_the_identity(tiny):
    untrained = tiny.dataset.sel(stage="untrained", view="visible")
    rank = untrained.effective_rank.values
    np.testing.assert_allclose(rank, rank[..., :1].repeat(TINY.depth + 1, -1), rtol=1e-12)
    assert np.all(np.abs(untrained.kernel_drift.values) <= 1e-14)


def test_correlation_lengths_are_paired_by_seed(tiny):
    """The same weights at the same seed: the untrained, i.i.d.-trained input embeddings agree."""
    first = tiny.dataset.sel(stage="untrained", view="position", layer=0).effective_rank
    assert first.sel(seed=0, xi=1.0).item() != first.sel(seed=1, xi=1.0).item()
    curves = tiny.dataset.training_loss.sel(stage="control_iid", chain="two-scale")
    np.testing.assert_array_equal(curves.sel(xi=1.0), curves.sel(xi=7.0))


def test_result_file_holds_the_dataset_and_judges_the_same(tiny):
    with xr.open_dataset(tiny.out / "result.nc", engine="h5netcdf") as saved:
        saved = saved.load()
    xr.testing.assert_identical(saved.effective_rank, tiny.dataset.effective_rank)
    assert repr(rgfast.flow.judge(saved, "two-scale")) == repr(tiny.verdicts["two-scale"])
    assert repr(rgfast.flow.judge(tiny.out / "result.nc")) == repr(tiny.verdicts["two-scale"])
    assert ReproduceConfig.from_json(saved.attrs["config"]) == TINY


def test_verdict_file_is_strict_json_with_the_numbers(tiny):
    document = json.loads((tiny.out / "verdict.json").read_text(), parse_constant=pytest.fail)
    verdicts = {v["key"]: v for v in document["verdicts"]["two-scale"]}
    assert document["format"] == "rgfast.verdict/2"
    assert set(verdicts) == {"valid", "i", "ii", "iii", "iii-long", "concentration"}
    assert verdicts["valid"]["as_stated"]["status"] == "undertrained"
    assert len(verdicts["valid"]["as_stated"]["checks"]) == 4
    assert verdicts["i"]["reading"]["claim"] == "integration of irrelevant degrees of freedom"
    assert verdicts["i"]["reading"]["status"] == "undecided"
    ratio = next(q for q in verdicts["i"]["quantities"] if q["name"] == "R")
    rank = tiny.dataset.effective_rank.sel(xi=1.0, stage="trained", view="position", chain="two-scale")
    for seed, value in ratio["by_seed"].items():
        assert value == pytest.approx(float(rank.sel(seed=int(seed))[-1] / rank.sel(seed=int(seed))[0]))
    assert ReproduceConfig.from_json(json.dumps(document["config"])) == TINY


def test_the_table_has_both_answers_and_the_controls_on_their_line(tiny):
    text = str(tiny)
    assert max(map(len, text.splitlines())) <= 110
    table = " ".join(text.split())
    assert "as stated NOT REPRODUCED: R = " in table
    assert (
        "its reading UNDECIDED, “integration of irrelevant degrees of freedom”: all 2 seeds did not" in table
    )
    assert "; controls: i.i.d. " in table
    assert "beside it R: visible " in table
    assert table.count("as stated") == table.count("its reading") == 5


def test_any_number_of_jobs_gives_the_same_bytes(tiny, tmp_path):
    again = rgfast.reproduce(config=tiny.out / "config.json", out=tmp_path / "b", jobs=2, progress=False)
    for name in ("summary.csv", "verdict.json", "config.json"):
        assert (again.out / name).read_bytes() == (tiny.out / name).read_bytes(), name


def test_a_finished_run_is_kept_and_a_missing_one_made(tiny):
    files = sorted((tiny.out / "runs").iterdir())
    assert len(files) == len(plan(TINY))
    before = (tiny.out / "summary.csv").read_bytes()
    kept, lost = files[0], files[-1]
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    time.sleep(0.01)
    rgfast.reproduce(config=TINY, out=tiny.out, jobs=1, progress=False)
    assert kept.stat().st_mtime_ns == stamp
    assert lost.exists()
    assert (tiny.out / "summary.csv").read_bytes() == before


def test_the_command_prints_the_verdicts_as_json(tiny, capsys):
    words = ["reproduce", "--config", str(tiny.out / "config.json"), "--out", str(tiny.out), "--jobs", "1"]
    assert cli.main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert document == {**json.loads((tiny.out / "verdict.json").read_text()), "out": str(tiny.out)}


def test_another_configurations_folder_is_refused_and_left_alone(tiny):
    before = sorted((p, p.stat().st_mtime_ns) for p in tiny.out.rglob("*"))
    with pytest.raises(ValueError, match="holds another configuration's run"):
        rgfast.reproduce(config=replace(TINY, seeds=(7,)), out=tiny.out, jobs=1)
    assert sorted((p, p.stat().st_mtime_ns) for p in tiny.out.rglob("*")) == before


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"xi": [0.0]}, "xi must be finite and > 0, got 0"),
        ({"xi": [math.nan]}, "xi must be finite and > 0, got nan"),
        ({"xi": [math.inf]}, "xi must be finite and > 0, got inf"),
        ({"xi": ["one"]}, "xi must be numbers"),
        ({"xi": []}, "xi must name at least one value"),
        ({"seeds": [1, 1]}, "seeds must not repeat"),
        ({"seeds": [-1]}, "seeds must be whole numbers >= 0, got -1"),
        ({"chains": ["two-scale:K=3"]}, "divi"),
        ({"chains": ["nonsense"]}, "nonsense"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
        ({"preset": "slow"}, "preset must be one of"),
        ({"preset": "quick", "config": TINY}, "exclude each other"),
        ({"config": "no-such-file.json"}, "config must be a file"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, kwargs, words):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=words):
        rgfast.reproduce(out=out, **kwargs)
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a JSON object"),
        ('{"format": "rgfast.reproduce/1", "wdith": 3}', "unknown entries: wdith"),
        ('{"format": "rgfast.reproduce/1", "training": {"stepz": 3}}', "unknown entries: stepz"),
        ('{"format": "rgfast.reproduce/1", "seeds": 3}', "seeds must be a list"),
        ('{"format": "rgfast.reproduce/1", "depth": 0}', "depth must be at least 1, got 0"),
        ('{"format": "rgfast.reproduce/1", "probe_sequences": 10}', "probe_sequences must give at least"),
    ],
)
def test_a_bad_config_file_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        ReproduceConfig.from_json(text)


def test_a_config_survives_json():
    assert ReproduceConfig.from_json(TINY.to_json()) == TINY
    for name in ("quick", "full"):
        assert ReproduceConfig.from_json(ReproduceConfig.preset(name).to_json()) == ReproduceConfig.preset(
            name
        )


def test_one_length_two_chains_one_layer_one_seed(tmp_path):
    """The smallest shapes go through verdicts and figures too."""
    small = replace(TINY, chains=("two-scale", "lazy"), xi=(3.0,), seeds=(5,), depth=1)
    done = rgfast.reproduce(config=small, out=tmp_path / "run", jobs=1, progress=False)
    assert set(done.verdicts) == {"two-scale", "lazy"}
    figures = ("order_parameter", "heat_map", "drift", "survival", "training", "cka", "spectra")
    assert {p.name for p in done.out.glob("*.png")} == {
        f"{figure}-{chain}.png" for figure in figures for chain in ("two_scale", "lazy")
    }
    assert "two-scale, 1 seed, ξ = 3" in str(done)
