"""The model of `torch.compile` gives what was measured of it and has the kernels that inductor plans."""

from pathlib import Path

import gpu_compile as script
import pytest

README = Path(script.__file__).parents[1] / "rgfast" / "ops" / "residual_mlp" / "README.md"
SAID = "\nwrite what `python benchmarks/gpu_compile.py` prints into rgfast/ops/residual_mlp/README.md"


def test_what_was_measured_is_given_within_a_quarter():
    rows = script.validation()
    assert len(rows) == 7
    assert [f"{row.name}: {row.measured}, not {row.predicted}" for row in rows if not row.close] == []


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, at inductor's import
def test_inductor_plans_the_kernels_of_the_model():
    forward, recorded, backward = script.inductor(rows=script.FEW, d=64)
    # Weights, biases and the norm's vectors are few beside the rows.
    assert sum(forward) == pytest.approx(script.traffic_of_compile(False), rel=0.02)
    assert len(forward) == len(recorded) == len(script.FORWARD) + 2
    assert sum(recorded) + sum(backward) == pytest.approx(script.traffic_of_compile(True), rel=0.02)
    assert len(backward) == len(script.BACKWARD) + 4


@pytest.mark.parametrize("form", ["plain", "single", "split"])
def test_our_wide_blocks_move_no_more_than_compile_does(form):
    for recorded in (False, True):
        ours = script.traffic_of_ours(form, 512, recorded=recorded)
        ours /= script.gpu_block.stream(form, 512)
        less = 0.1 if form == "plain" and not recorded else -0.9
        assert ours < script.traffic_of_compile(recorded) + script._weights(512, recorded) + less


def test_a_launch_counts_what_it_reads_and_writes():
    """Norm, product, activation, product, and what is added: 22 numbers in fp32, 23 in bf16."""
    for form, numbers in (("split", 22), ("plain", 23)):
        found = script.traffic_of_ours(form, 512, recorded=False) / script.gpu_block.stream(form, 512)
        assert numbers < found < numbers + 0.2


def test_figures_are_marked_as_predicted_and_are_those_of_the_readme(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu_compile.py"])
    script.main()
    said = capsys.readouterr().out
    assert "OFF BY MORE" not in said
    assert said.count("PREDICTED, not run on a GPU") == 2
    readme = README.read_text(encoding="utf-8")
    tables = [part for part in said.split("\n\n") if part.startswith("| products")]
    assert len(tables) == 2
    for table in tables:
        assert table.strip() in readme, SAID
