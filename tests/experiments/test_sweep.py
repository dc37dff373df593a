import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny import tiny_config

import rgfast
from rgfast import MarkovChain, cli
from rgfast.experiments.runs import Run, run_dataset
from rgfast.experiments.sweep import DESIGNS, QUICK, Design, sweep, transition_rank

GRID = Design("relevance-tiny", ("two-scale:K=2", "two-scale"), (1.0, 7.0), (4, 8), (0,), tiny_config())
NARROW = replace(GRID, widths=(4,))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return sweep(GRID, out=tmp_path_factory.mktemp("sweep") / "run", jobs=1, progress=False)


def test_every_point_is_a_row_and_a_file(done):
    assert len(done.table) == len(list((done.out / "points").iterdir())) == 8
    assert set(done.table.width) == {4, 8}
    assert {p.name for p in done.out.iterdir()} == {
        "points", "table.csv", "verdict.json", "design.json", "relevance.png", "xi.png",
        "posterior_rank.png", "report.html",
    }  # fmt: skip
    saved = pd.read_csv(done.out / "table.csv")
    np.testing.assert_allclose(saved.masked_last, done.table.masked_last, rtol=1e-12)
    document = json.loads((done.out / "verdict.json").read_text(), parse_constant=pytest.fail)
    assert document["status"] == "undecided"
    assert "too few of the 4 cells were trained" in str(done)


def test_a_point_is_the_run_that_reproduce_makes(done):
    point = next(p for p in GRID.points() if p.config.width == 8 and p.xi == 7.0 and p.chain == "two-scale")
    # 16 rows a feature of the wider stream.
    assert point.config.probe_sequences == 640
    truth = run_dataset(point.config, Run("trained", 0, (("two-scale", 7.0),))).squeeze()
    row = done.table.query("chain == 'two-scale' and xi == 7 and width == 8").iloc[0]
    assert row.visible_R == float(truth.effective_rank.sel(view="visible")[-1]) / float(
        truth.effective_rank.sel(view="visible")[0]
    )
    assert row.masked_first == float(truth.effective_rank.sel(view="masked")[1])
    assert row.log_posterior_rank == float(truth.log_posterior_rank)
    assert row.mutual_information == MarkovChain.from_label("two-scale", 7.0, 8).mutual_information(1)


def test_a_stopped_sweep_goes_on_and_points_from_elsewhere_merge(done, tmp_path):
    files = sorted((done.out / "points").iterdir())
    table = (done.out / "table.csv").read_bytes()
    half = tmp_path / "half"
    half.mkdir()
    for file in files[:5]:
        (half / file.name).write_bytes(file.read_bytes())
    rest = tmp_path / "rest" / "points"
    rest.mkdir(parents=True)
    for file in files[5:]:
        (rest / file.name).write_bytes(file.read_bytes())
    before = time.monotonic_ns()
    again = sweep(GRID, out=tmp_path / "new", merge=[half, tmp_path / "rest"], jobs=1, progress=False)
    assert (again.out / "table.csv").read_bytes() == table
    # Nothing was trained: every file is a copy.
    for file in files:
        assert (again.out / "points" / file.name).read_bytes() == file.read_bytes()
    assert time.monotonic_ns() > before
    # A lost point alone is made again, to the same bits.
    kept, lost = files[0], files[-1]
    stamp, numbers = kept.stat().st_mtime_ns, json.loads(lost.read_text())["result"]
    lost.unlink()
    sweep(GRID, out=done.out, jobs=1, progress=False)
    assert kept.stat().st_mtime_ns == stamp
    assert json.loads(lost.read_text())["result"] == numbers


def test_what_does_not_belong_is_refused(done, tmp_path):
    def run(**options):
        sweep(GRID, **{"out": tmp_path / "x", "jobs": 1, "progress": False, **options})

    with pytest.raises(ValueError, match="merge must name folders"):
        run(merge=[tmp_path / "absent"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no point of this study"):
        run(merge=[tmp_path / "empty"])
    point = GRID.points()[0]
    (tmp_path / "empty" / f"{point.name}.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        run(merge=[tmp_path / "empty"])
    (tmp_path / "empty" / f"{point.name}.json").write_text('{"format": "rgfast.point/1"}')
    with pytest.raises(ValueError, match="holds another"):
        run(merge=[tmp_path / "empty"])
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match=r"design\.json tells which"):
        sweep(replace(GRID, seeds=(1,)), out=done.out)
    with pytest.raises(ValueError, match="design must be one of 'xi', 'relevance', got 'all'"):
        sweep("all", out=tmp_path / "y")
    with pytest.raises(ValueError, match="jobs must be at least 1"):
        sweep("xi", out=tmp_path / "z", jobs=0)
    with pytest.raises(ValueError, match="seeds must be whole numbers"):
        sweep("xi", out=tmp_path / "y", seeds=[-1])
    assert not (tmp_path / "y").exists()
    assert not (tmp_path / "z").exists()


def test_a_killed_sweep_leaves_whole_points_only(tmp_path):
    """Killed without warning while it runs, the points that stand are whole and the rest is made after."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]);"
        "from test_sweep import NARROW; from rgfast.experiments.sweep import sweep;"
        "sweep(NARROW, out=sys.argv[1], jobs=1, progress=False)"
    )
    here = str(Path(__file__).parent)
    victim = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run"), here])
    points = tmp_path / "run" / "points"
    for _ in range(3000):
        if len(list(points.glob("[!.]*.json"))) >= 2 or victim.poll() is not None:
            break
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    stood = {p.name: p.stat().st_mtime_ns for p in points.glob("[!.]*.json")}
    assert len(stood) >= 2
    done = sweep(NARROW, out=tmp_path / "run", jobs=1, progress=False)
    assert len(done.table) == 4
    for name, stamp in stood.items():
        assert (points / name).stat().st_mtime_ns == stamp


def test_what_killed_sweeps_left_half_written_counts_nowhere_and_goes_in_time(done, tmp_path):
    run = tmp_path / done.out.name
    shutil.copytree(done.out, run)
    left = [
        run / "points" / f".{GRID.points()[0].name}.json.tmp-abcdefgh.json",
        run / ".xi.png.tmp-abcdefgh.png",
    ]
    for path in left:
        path.write_text("{")
    sweep(GRID, out=run, jobs=1, progress=False)
    assert (run / "report.html").read_bytes() == (done.out / "report.html").read_bytes()
    # A young one may be about to be renamed by another process.
    assert all(path.exists() for path in left)
    for path in left:
        os.utime(path, (time.time() - 3700,) * 2)
    sweep(GRID, out=run, jobs=1, progress=False)
    assert not any(path.name.startswith(".") for path in run.rglob("*"))
    assert len(list((run / "points").iterdir())) == 8


def test_the_designs_are_those_of_the_documentation():
    relevance = DESIGNS["relevance"]
    assert len(relevance.points()) == 108
    assert len({(p.chain, p.xi) for p in relevance.points()}) == 27
    assert {p.config.width for p in relevance.points()} == {16, 48}
    assert len(DESIGNS["xi"].points()) == 84
    assert all(len(design.points()) <= 16 for design in QUICK.values())
    names = [p.name for design in (*DESIGNS.values(), *QUICK.values()) for p in design.points()]
    assert len(set(names)) == len(names)


def test_transition_rank_of_known_matrices():
    assert transition_rank(MarkovChain(np.full((4, 4), 0.25))) == pytest.approx(1)
    assert transition_rank(MarkovChain(np.roll(np.eye(4), 1, axis=1))) == pytest.approx(4)


def test_sweep_is_public():
    assert rgfast.sweep is sweep


@pytest.mark.parametrize("study", ["sweep", "multiverse", "decimate", "observe"])
def test_every_study_is_a_command_that_refuses_in_one_sentence(study, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main([study, "--quick", "--out", str(out), "--jobs", "0"]) == 2
    told = capsys.readouterr()
    assert told.err == "rgfast: jobs must be at least 1, got 0\n"
    assert cli.main([study, "--quick", "--out", str(out), "--seeds", "-1"]) == 2
    assert "seeds must be whole numbers >= 0, got -1" in capsys.readouterr().err
    assert cli.main([study, "--quick", "--out", str(out), "--merge", str(tmp_path / "absent")]) == 2
    assert "merge must name folders" in capsys.readouterr().err
    assert not out.exists()


def test_a_command_prints_the_table_of_finished_points(done, tmp_path, capsys, monkeypatch):
    """The command line end to end, on points that are there already."""
    monkeypatch.setitem(QUICK, "relevance", GRID)
    words = ["sweep", "--design", "relevance", "--quick", "--jobs", "1", "--out", str(tmp_path / "run")]
    assert cli.main([*words, "--merge", str(done.out)]) == 0
    told = capsys.readouterr()
    assert "0 of 8 points trained" in told.out
    assert "UNDECIDED" in told.out
    assert told.err == ""
    assert cli.main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert len(document["points"]) == 8
    assert document["test"]["status"] == "undecided"
    assert document["out"] == str(tmp_path / "run")
