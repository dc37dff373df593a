"""Studies run on the joblib backend that the user names, with the same numbers on each."""

import os
import runpy
import threading
from pathlib import Path

import joblib
import pytest
import torch
from joblib.parallel import ThreadingBackend
from tiny import tiny_config

import rgfast
from rgfast.experiments import points
from rgfast.experiments.runs import one_thread
from rgfast.experiments.sweep import Design, sweep

EXAMPLES = Path(__file__).parents[2] / "examples"
GRID = Design("backends", ("two-scale:K=2",), (1.0, 7.0), (4,), (0, 1), tiny_config())


def written(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / "points").iterdir()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return written(sweep(GRID, out=tmp_path_factory.mktemp("alone") / "run", jobs=1, progress=False).out)


def test_threads_where_the_user_names_them(alone, tmp_path, monkeypatch):
    seen = []
    compute = points._compute

    def noting(*args):
        seen.append((os.getpid(), threading.current_thread().name, torch.get_num_threads()))
        compute(*args)

    monkeypatch.setattr(points, "_compute", noting)
    before = torch.get_num_threads()
    with joblib.parallel_config(backend="threading", n_jobs=2):
        found = sweep(GRID, out=tmp_path / "run", progress=False)
    assert written(found.out) == alone
    assert {pid for pid, _, _ in seen} == {os.getpid()}
    assert threading.main_thread().name not in {name for _, name, _ in seen}
    assert {threads for _, _, threads in seen} == {1}
    assert torch.get_num_threads() == before


def test_local_processes_by_default():
    assert points.parallel(None, 100)._backend.__class__.__name__ == "LokyBackend"
    assert points.parallel(None, 100).n_jobs == joblib.effective_n_jobs(-1)
    assert points.parallel(3, 100).n_jobs == 3
    assert points.parallel(3, 2).n_jobs == 2
    with joblib.parallel_config(backend="threading", n_jobs=5):
        assert points.parallel(None, 100).n_jobs == 5
        assert points.parallel(2, 100).n_jobs == 2
        assert points.parallel(None, 100)._backend.__class__.__name__ == "ThreadingBackend"
    with joblib.parallel_config(n_jobs=1):
        assert points.parallel(None, 100).n_jobs == 1


def test_a_backend_that_hands_over_at_the_end_only(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(ThreadingBackend, "supports_return_generator", False)
    with joblib.parallel_config(backend="threading", n_jobs=2):
        found = sweep(GRID, out=tmp_path / "run", progress=False)
    assert written(found.out) == alone


def test_a_dask_cluster(alone, tmp_path):
    distributed = pytest.importorskip("distributed", reason="needs pip install 'rgfast[dask]'")
    cluster = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "dashboard_address": None}
    with distributed.Client(**cluster), joblib.parallel_config(backend="dask"):
        found = sweep(GRID, out=tmp_path / "run", progress=False)
    assert written(found.out) == alone


def test_the_dask_example(alone, tmp_path, monkeypatch, capsys):
    pytest.importorskip("distributed", reason="needs pip install 'rgfast[dask]'")
    monkeypatch.chdir(tmp_path)

    def small(design, *, quick, out):
        assert (design, quick) == ("xi", True)
        return sweep(GRID, out=out, progress=False)

    monkeypatch.setattr(rgfast, "sweep", small)
    runpy.run_path(str(EXAMPLES / "sweep_dask.py"), run_name="__main__")
    assert "processes=2" in capsys.readouterr().out
    assert written(tmp_path / "runs" / "sweep-dask") == alone


def test_one_thread_while_any_run_is_inside():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = one_thread(), one_thread()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_num_threads() == 1
        second.__exit__(None, None, None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
