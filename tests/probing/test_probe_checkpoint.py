"""Resuming: same bits after any number of kills, and refusals of checkpoints that do not fit."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import rgfast
from rgfast.probing import checkpoint as checkpoints


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_killed_again_and_again_gives_the_same_bits(tmp_path):
    script = Path(__file__).parent / "resume_under_kill.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), str(tmp_path), "7"],
        capture_output=True, text=True, timeout=500, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    whole, resumed, at_spots, at_random, left = done.stdout.split()
    assert set(resumed.split(",")) == {whole}
    assert int(at_spots) == 16
    assert int(at_random) == 16
    assert int(left) == 0


def batches_of(data, size=50):
    return [{k: v[i : i + size] for k, v in data.items()} for i in range(0, 300, size)]


def run(model, batches, path, **options):
    return rgfast.probe(model, batches, mask="mask", checkpoint=path, progress=False, **options)


class Stop(Exception):
    pass


def stopping(batches, after):
    yield from batches[:after]
    raise Stop


@pytest.mark.parametrize("every", [1, 4])
def test_an_interrupted_run_goes_on(token_model, token_data, tmp_path, every):
    batches = batches_of(token_data)
    path = tmp_path / "run.checkpoint"
    whole = run(token_model, batches, None, groups=3, targets={"tokens": "tokens"})
    with pytest.raises(Stop):
        run(
            token_model,
            stopping(batches, 5),
            path,
            checkpoint_every=every,
            groups=3,
            targets={"tokens": "tokens"},
        )
    header, _ = checkpoints.read(path)
    assert header["batches"] == (5 if every == 1 else 4)
    again = run(token_model, batches, path, checkpoint_every=every, groups=3, targets={"tokens": "tokens"})
    for name in whole.dataset.data_vars:
        np.testing.assert_array_equal(again.dataset[name].values, whole.dataset[name].values)
    assert checkpoints.read(path)[0]["batches"] == 6
    third = run(token_model, iter(batches), path, groups=3, targets={"tokens": "tokens"})
    np.testing.assert_array_equal(third.dataset.effective_rank, whole.dataset.effective_rank)


def test_a_block_that_runs_again_and_again_goes_on(tmp_path):
    """Its layers are known from the first forward on, which the resumed run has not seen."""

    class Universal(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())])

        def forward(self, x):
            for _ in range(3):
                x = x + self.block[0](x)
            return x

    model, options = Universal(), {"layers": "block", "checkpoint_every": 2, "progress": False}
    batches = list(torch.randn(6, 16, 4, 8))
    whole = rgfast.probe(model, batches, **options, checkpoint=tmp_path / "whole")
    with pytest.raises(Stop):
        rgfast.probe(model, stopping(batches, 4), **options, checkpoint=tmp_path / "cut")
    resumed = rgfast.probe(model, batches, **options, checkpoint=tmp_path / "cut")
    assert resumed.layers == ("block.0:input", "block.0#1", "block.0#2", "block.0#3")
    assert resumed.dataset.equals(whole.dataset)
    with pytest.raises(ValueError, match="checkpoint is of another probe: layers was"):
        rgfast.probe(model, batches, **{**options, "layers": ["block.0"]}, checkpoint=tmp_path / "cut")


def test_labels_keep_their_number_over_a_stop(token_model, token_data, tmp_path):
    data = {**token_data, "label": (torch.arange(300) < 30).long()[:, None].expand(-1, 6).contiguous()}
    batches, path, options = batches_of(data), tmp_path / "run.checkpoint", {"targets": {"label": "label"}}
    with pytest.raises(Stop):
        run(token_model, stopping(batches, 3), path, checkpoint_every=1, **options)
    again = run(token_model, batches, path, **options)
    whole = run(token_model, batches, None, **options)
    np.testing.assert_array_equal(again.dataset.target_r2, whole.dataset.target_r2)


def test_nan_leaves_the_last_good_checkpoint(token_model, token_data, tmp_path):
    path = tmp_path / "run.checkpoint"
    batches = batches_of(token_data)
    seen = []

    def poison(module, args, output):
        seen.append(1)
        if len(seen) == 4:
            output = output.clone()
            output[3, 5, 2] = float("nan")
            output[9, 5, 0] = float("inf")
        return output

    handle = token_model.stack.blocks[1].register_forward_hook(poison)
    with pytest.raises(
        ValueError, match=r"got 2 NaN or infinite values in layer 2 at position 5 .*150 to 199"
    ):
        run(token_model, batches, path, checkpoint_every=1)
    handle.remove()
    assert checkpoints.read(path)[0]["batches"] == 3
    again = run(token_model, batches, path)
    whole = run(token_model, batches, None)
    np.testing.assert_array_equal(again.dataset.kernel_drift, whole.dataset.kernel_drift)


@pytest.mark.parametrize("change", ["pairs", "weights", "batches", "fewer", "truncated", "newer", "other"])
def test_what_does_not_fit_is_refused(token_model, token_data, tmp_path, change):
    path = tmp_path / "run.checkpoint"
    batches, options = batches_of(token_data), {}
    run(token_model, batches, path)
    before = path.read_bytes()
    if change == "pairs":
        options["pairs"] = "all"
    elif change == "weights":
        with torch.no_grad():
            token_model.token_embedding[0, 0] += 1e-3
    elif change == "batches":
        batches[-1] = {k: v.flip(0) for k, v in batches[-1].items()}
    elif change == "fewer":
        batches = batches[:3]
    elif change == "truncated":
        path.write_bytes(before[: len(before) // 2])
    elif change == "newer":
        header, arrays = checkpoints.read(path)
        arrays["header"] = np.frombuffer(
            json.dumps({**header, "format_version": 99}).encode(), dtype=np.uint8
        )
        with path.open("wb") as file:
            np.savez(file, **arrays)
    else:
        path.write_bytes(b"not a checkpoint")
    messages = {
        "pairs": "of another probe: pairs was adjacent",
        "weights": "other weights",
        "batches": "batches must be those",
        "fewer": "batches must be those",
        "truncated": "damaged or not",
        "newer": r"newer rgfast \(format 99",
        "other": "damaged or not",
    }
    with pytest.raises(ValueError, match=messages[change]):
        run(token_model, batches, path, **options)


def test_stale_temporaries_are_removed(token_model, token_data, tmp_path):
    stale = tmp_path / ".run.checkpoint.tmp-abcdefgh"
    others = [tmp_path / name for name in (".run.checkpoint.swp", ".run.checkpoint.2.tmp-abcdefgh")]
    for path in (stale, *others):
        path.write_bytes(b"half")
    run(token_model, batches_of(token_data), tmp_path / "run.checkpoint")
    assert not stale.exists()
    assert all(path.exists() for path in others)


def test_weights_are_told_apart_and_digests_of_0_1_still_count():
    """A tensor of more than one part, an empty one, and what 0.1 wrote of the same model."""
    model = torch.nn.Linear(2500, 900)
    model.register_buffer("none", torch.zeros(0, 3))
    before = hashlib.blake2b(b"Linear", digest_size=16)
    for name, value in model.state_dict().items():
        before.update(name.encode())
        before.update(f"{value.dtype}{tuple(value.shape)}".encode())
        before.update(value.numpy().tobytes())
    now = checkpoints.model_digest(model)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert checkpoints.model_digest(model) == now
    finally:
        torch.set_num_threads(threads)
    assert checkpoints.is_model(now, model)
    assert checkpoints.is_model(before.hexdigest(), model)
    with torch.no_grad():
        model.weight[-1, -1] += 1.0
    assert not checkpoints.is_model(now, model)
    assert not checkpoints.is_model(before.hexdigest(), model)
