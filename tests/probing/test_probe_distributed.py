"""Several ranks: the same numbers as one process, and no endless waiting for one that died."""

import importlib.util
import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from launch import HERE, SHORT, SINGLE, needs_gloo, printed_by

import rgfast
from rgfast.probing.distributed import rank_path


@pytest.fixture(scope="module")
def found():
    return printed_by("ranks_in_forks.py")


@needs_gloo
def test_ranks_agree_with_one_process(found):
    assert set(found["agreement"]) == {"1", "2", "4"}
    for furthest, digests in found["agreement"].values():
        assert furthest <= 1e-12
        assert digests == 1  # the same bits on every rank


@needs_gloo
def test_ranks_agree_on_layers_of_other_widths_and_of_small_singular_values(found):
    assert set(found["widths"]) == {"1", "2", "4"}
    for furthest, digests in found["widths"].values():
        assert furthest <= 1e-12
        assert digests == 1


@needs_gloo
def test_a_wrapped_model_with_uneven_batches(found):
    furthest, layers = found["wrapped"]
    assert furthest <= 1e-12
    assert layers == ["blocks.0:input", "blocks.0", "blocks.1", "blocks.2"]


@needs_gloo
def test_a_loop_of_ones_own_in_a_group_of_ranks(found):
    first, second = found["own_loop"]
    assert first == second
    assert first[:2] == [120, 125]


@needs_gloo
def test_a_dead_rank_is_noticed_and_the_checkpoint_is_good(found):
    (alive, dead), digests = found["death"]["killed"], found["death"]["digests"]
    assert dead[3] == 9
    value, error, seconds, status = alive
    assert (value, status) == (None, 0)
    assert error.startswith("RankError: rank 1 of 2 has given no sign of life for timeout=3 s")
    assert seconds < 10 * SHORT
    assert len({digest for ranks in digests for digest in ranks}) == 1
    assert found["death"]["files"] == ["run.checkpoint.rank0of2", "run.checkpoint.rank1of2"]
    assert "must be of a probe by one process" in found["death"]["other"]


@needs_gloo
@pytest.mark.parametrize(
    ("case", "messages"),
    [
        (
            "poisoned",
            ["rank 1 of 2 failed: ValueError: activations must be finite", "activations must be finite"],
        ),
        ("absent", ["rank 1 of 2 has not begun this probe within timeout=3 s", None]),
        (
            "other",
            ["ValueError: layers must be the same on all ranks: rank 0 has ['stack.blocks.0:input'"] * 2,
        ),
        (
            "unknown",
            ["rank 1 of 2 failed: ValueError: layers: there is no module 'no.such.layer'", "no module"],
        ),
        ("weights", ["ValueError: weights must be the same on all ranks"] * 2),
        ("owner", ["owner must be the same on all ranks: rank 0 has ranks, rank 1 has auto"] * 2),
        ("nothing", ["ValueError: batches must hold at least 2 sequences in all, got n = 0"] * 2),
    ],
)
def test_every_rank_says_what_is_wrong(found, case, messages):
    for (value, error, seconds, status), message in zip(found["telling"][case], messages, strict=True):
        assert (value, status) == (None, 0)
        assert error is None if message is None else message in error
        assert seconds < 10 * SHORT


@needs_gloo
def test_one_rank_may_probe_by_itself(found):
    (layers, error, _, _), _ = found["telling"]["alone"]
    assert (layers, error) == (3, None)


@needs_gloo
def test_lengths_that_differ_between_ranks(found):
    furthest, same, written = found["lengths"]
    assert furthest <= 1e-12
    assert same == [True, True, True]
    assert written == ["report0.html", "saved0.nc"]  # by rank 0 alone


@needs_gloo
def test_torchrun(tmp_path):
    script = HERE / "under_torchrun.py"
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), str(tmp_path)],
        capture_output=True, text=True, timeout=200, check=False, env=SINGLE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 200
    assert done.stdout.splitlines().count("130") == 2
    spec = importlib.util.spec_from_file_location("under_torchrun", script)
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    found = rgfast.ProbeResult.load(tmp_path / "run.nc").dataset
    parts = own.data().split(50)
    alone = rgfast.probe(own.build(), [parts[0], parts[2], parts[1]], groups=2, progress=False).dataset
    for name in ("effective_rank", "effective_rank_se", "kernel_drift", "cka", "n"):
        np.testing.assert_allclose(found[name], alone[name], rtol=1e-12, atol=1e-12)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["report0.html", "run.checkpoint.rank0of2", "run.checkpoint.rank1of2", "run.nc"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"distributed": True}, ValueError, "distributed=True needs torch.distributed to be initialised"),
        ({"distributed": "yes"}, TypeError, "distributed must be 'auto', True, False or a process group"),
        ({"distributed": 2}, TypeError, "distributed must be .* got int"),
        ({"timeout": 0}, ValueError, "timeout must be a finite number of seconds > 0, got 0"),
        ({"timeout": math.inf}, ValueError, "timeout must be a finite number"),
        ({"timeout": "1 s"}, TypeError, "timeout must be a number of seconds"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        rgfast.probe(torch.nn.Linear(2, 2), [torch.zeros(2, 2)], layers=[""], **options)


def test_a_checkpoint_of_another_number_of_ranks(tmp_path):
    path = tmp_path / "run.checkpoint"
    assert rank_path(path, 1, 2) == tmp_path / "run.checkpoint.rank1of2"
    assert rank_path(path, 0, 1) == path
    (tmp_path / "run.checkpoint.rank0of2").touch()
    assert rank_path(path, 1, 2) == tmp_path / "run.checkpoint.rank1of2"
    for rank, size in ((0, 1), (3, 4), (0, 12)):
        with pytest.raises(ValueError, match=r"rank0of2 is of another number; delete it"):
            rank_path(path, rank, size)
    (tmp_path / "run.checkpoint.rank0of2").rename(path)
    with pytest.raises(ValueError, match=r"by 2 ranks, and .*run.checkpoint is of another"):
        rank_path(path, 0, 2)
    assert rank_path(path, 0, 1) == path
