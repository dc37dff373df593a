"""The model of a training step on a GPU counts what the step does. The README has its figures."""

from pathlib import Path

import gpu_training as script
import pytest

from rgfast.ops.residual_mlp.api import OP

README = Path(script.__file__).parents[1] / "rgfast" / "ops" / "residual_mlp" / "README.md"


@pytest.fixture(scope="module")
def table():
    return script.table()


def test_the_readme_has_the_table(table):
    again = "write what `python benchmarks/gpu_training.py` prints into rgfast/ops/residual_mlp/README.md"
    assert table in README.read_text(encoding="utf-8"), again


def test_half_of_the_blocks_are_kernels(table):
    eager, ours = ([float(cell) for cell in line.split("|")[2:6]] for line in table.splitlines()[2:])
    assert eager[0] > 100
    assert ours[0] != eager[0]
    for launches, host, device, whole in (eager, ours):
        assert host >= launches * 1e3 * script.LAUNCH
        assert whole == max(host, device)
    assert "reference" in OP.impls  # nothing is left changed
    assert len(OP.impls) > 2


def test_a_step_is_timed_here(monkeypatch):
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    drawing, rest = script.timed_here(1)
    assert drawing > 0
    assert rest > 0


def test_figures_are_marked_as_predicted(monkeypatch, capsys, table):
    monkeypatch.setattr("sys.argv", ["gpu_training.py"])
    monkeypatch.setattr(script, "table", lambda: table)
    script.main()
    assert capsys.readouterr().out.startswith("PREDICTED, not run on a GPU")
