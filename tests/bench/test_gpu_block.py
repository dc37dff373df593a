"""The model of the Triton block's time gives what prototypes took on an H100, and counts what kernels do."""

import dataclasses
from pathlib import Path

import gpu_block
import gpu_compile
import pytest
from gpu_block import Kernel, forward, together

from rgfast.ops.residual_mlp.call import Call
from rgfast.ops.residual_mlp.gpu import launch, wide
from rgfast.ops.residual_mlp.gpu.table import Tile


def test_what_was_measured_is_given_within_a_quarter():
    rows = gpu_block.validation()
    assert len(rows) == 37
    assert [f"{row.name}: {row.measured}, not {row.predicted}" for row in rows if not row.close] == []


TILE = Tile(64, 64, 4, 2)
PLAIN = Kernel("plain", 64, TILE)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 2 * gpu_block.ROWS}, {"layers": 2}, {"activation": "erf"}, {"form": "single"},
        {"spilled": 20}, {"backward": True}, {"layers": 2, "every_layer": True},
        {"backward": True, "factors": True},
    ],
)  # fmt: skip
def test_what_does_more_takes_longer(change):
    less = {k: v for k, v in change.items() if len(change) > 1 and v is not True}
    less |= {"backward": True} if "factors" in change else {}
    assert dataclasses.replace(PLAIN, **change).seconds > 1.05 * dataclasses.replace(PLAIN, **less).seconds


def test_few_rows_take_as_long_as_rows_for_every_multiprocessor():
    few, enough = (dataclasses.replace(PLAIN, rows=rows).seconds for rows in (64, 64 * 2 * 132))
    assert few == pytest.approx(enough, rel=1e-6)
    assert dataclasses.replace(PLAIN, rows=64 * 4 * 132).seconds > 1.5 * enough


def test_how_many_thread_blocks_share_a_multiprocessor():
    assert together(TILE, 64 << 10) == 2
    assert together(TILE, 128 << 10) == 1
    assert together(Tile(128, 64, 8, 2), 64 << 10) == 1


def test_warps_without_rows_of_their_own_repeat_others():
    own, repeating = (dataclasses.replace(PLAIN, tile=Tile(64, 32, warps, 2)) for warps in (4, 8))
    assert (own.repeated, repeating.repeated) == (1, 2)
    # Measured of split products at D = 256: 1684 us by eight warps, 905 us by four.
    split = {"form": "split", "d": 256, "activation": "erf"}
    took = [dataclasses.replace(kernel, **split).seconds for kernel in (own, repeating)]
    assert took[1] / took[0] == pytest.approx(1683.5 / 904.7, rel=0.05)


def test_wide_blocks_are_the_librarys_products_between_two_passes():
    rows, d = gpu_block.ROWS, 512
    moved = rows * d * 2 * (2 + 3) + rows * 4 * d * 2 * 2
    assert forward("plain", d) == pytest.approx(434.2e-6 + moved / 2.5e12)


def test_gradients_of_wide_blocks_are_the_librarys_products_between_passes():
    moved = gpu_block.stream("plain", 512) * (12 + 4)
    least = forward("plain", 512) + 434.2e-6 + 2 * gpu_block.multiply("plain", 512, gpu_block.ROWS)
    assert gpu_block.both("plain", 512) == pytest.approx(least + moved / 2.5e12, rel=0.02)


def test_the_table_has_every_form_and_width():
    lines = gpu_block.table()
    assert [line.split("|")[1].strip() for line in lines[::5]] == ["bf16", "TF32", "fp32"]
    assert [line.split("|")[2].strip() for line in lines] == ["64", "128", "256", "512", "1024"] * 3
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    over_eager = [float(line.split("|")[4]) for line in lines]
    assert all(1.5 < each < 8 for k, each in enumerate(over_eager) if k % 5 < 3)


@pytest.mark.parametrize("form", ["plain", "split"])
@pytest.mark.parametrize(("d", "depth"), [(64, 1), (64, 3), (256, 1), (320, 1)])
def test_launches_are_those_that_run(form, d, depth):
    dtype = gpu_compile.TYPES[form]
    layers = [
        Call(*gpu_compile.given(64, d, dtype, "cpu", recorded=False), "layer", "gelu", 1.0, 1e-5, "features")
        for _ in range(depth)
    ]
    products = "bf16" if form == "plain" else "fp32"
    with gpu_compile.Traffic() as clock, gpu_compile.counted(clock):
        if d > gpu_block.WIDEST:
            wide.run(layers[0], products)
        else:
            launch.forward(layers, products)
    assert clock.cost.kernels == gpu_block.launches(form, d, depth)
    assert clock.cost.waits == 0


def test_figures_are_marked_as_predicted_and_are_those_of_the_readme(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu_block.py"])
    gpu_block.main()
    said = capsys.readouterr().out
    assert "OFF BY MORE" not in said
    assert "PREDICTED, not run on a GPU" in said
    readme = (Path(gpu_block.__file__).parents[1] / "rgfast/ops/residual_mlp/README.md").read_text("utf-8")
    again = "write what `python benchmarks/gpu_block.py` prints into rgfast/ops/residual_mlp/README.md"
    assert "\n".join(gpu_block.table()) in readme, again
