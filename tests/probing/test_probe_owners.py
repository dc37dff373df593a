"""Ranks that share out the layers: the numbers of one process, of a state that does not fit one of them."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launch import needs_gloo, printed_by
from torch.utils.data import DataLoader, TensorDataset

import rgfast
from rgfast.probing import coordinated_checkpoints
from rgfast.probing.capture.batches import sequences_of
from rgfast.probing.capture.rows import RowBatch
from rgfast.probing.coordinated_checkpoints import before
from rgfast.probing.first import FirstBatch
from rgfast.probing.packing import packed, unpacked
from rgfast.probing.partition import held_layers, transit_budget
from rgfast.probing.partitioned_plan import PartitionedPlan, partitioned_plan, plan_of_ranks
from rgfast.probing.spec import ProbeSpec

SIZES = ["2", "4"]


@pytest.fixture(scope="module")
def found():
    return printed_by("owned_in_forks.py")


@needs_gloo
@pytest.mark.parametrize("size", SIZES)
def test_ranks_agree_with_one_process(found, size):
    case = found[size]
    assert set(case["furthest"]) - {"turned"} == {
        "tokens", "sharded", "widths", "few layers", "loop", "wide", "grouped",
    }  # fmt: skip
    assert ("turned" in case["furthest"]) == (size == "2")
    assert max(case["furthest"].values()) <= 1e-12, case["furthest"]
    assert set(case["digests"].values()) == {1}  # the same bits on every rank
    assert all(case["again"])  # and again
    assert len({*case["early"]}) == 1
    assert 0 < case["early"][0] < 60


@needs_gloo
@pytest.mark.parametrize("size", SIZES)
def test_a_state_that_fits_none_fits_all(found, size):
    for alone, copies, listed in found[size]["refused"]:
        for error in (alone, copies):
            assert error.startswith(
                "ValueError: memory: the views of 12 layers need 490 KiB, and memory allows"
            )
        assert "ranks cannot share out the layers: pairs= must be 'adjacent'" in listed
    assert max(found[size]["held"]) <= 400 << 10


@needs_gloo
def test_memory_and_traffic_are_those_that_are_planned(found):
    assert found["plan"]["best"]
    assert 0.75 <= found["plan"]["state"] / max(found["4"]["held"]) <= 1.25
    assert 0.75 <= found["plan"]["network"] / found["4"]["handed"] <= 1.25


@needs_gloo
@pytest.mark.parametrize("size", SIZES)
def test_forwards_go_on_while_rows_are_on_their_way(found, size):
    beside, peaks, notes = zip(*found[size]["beside"], strict=True)
    assert beside[0] >= 2  # none of the others had taken anything by then
    stated = re.search(r"each: ([\d.]+) KiB of state and up to ([\d.]+) KiB of rows", notes[0])
    state, way = (1024 * float(number) for number in stated.groups())
    assert way == 128 << 10
    assert state < max(peaks) <= 1.01 * (state + way)


@needs_gloo
@pytest.mark.parametrize("size", SIZES)
def test_a_run_goes_on_from_checkpoints_that_all_ranks_have(found, size):
    last = int(size) - 1
    assert found[size]["saved and snapshots"] <= 1e-12
    assert len({digest for one in found[size]["saved"] for digest, _ in one["runs"]}) == 1
    # Whole, after a stop at its 14th batch, after it was done, after files of one rank were not written.
    forwards = [[number for _, number in one["runs"]] for one in found[size]["saved"]]
    whole = {"2": 22, "4": 24}[size]
    assert forwards[last] == [whole, whole - 12, 0, whole - 3]
    for rank, one in enumerate(found[size]["saved"]):
        told = "" if rank == last else f"RankError: rank {last} of {size} failed: "
        assert one["stopped"] == f"{told}ValueError: stopped"
        told = "" if rank == 1 else f"RankError: rank 1 of {size} failed: "
        assert one["failed"] == f"{told}OSError: disk full"
        assert one["missing"].startswith(
            f"ValueError: checkpoint must have files of all {size} ranks that were written together, and"
        )
        assert "checkpoint is of another owner=" in one["other"]
        straight, stopped, resumed = one["sharded"]
        assert straight == resumed
        assert "ValueError: stopped" in stopped
    assert set(found[size]["saved"][0]["files"]) >= {
        f"{name}{size}.checkpoint.rank{rank}of{size}"
        for name in ("whole", "cut", "torn")
        for rank in range(int(size))
    }
    assert not any(".before" in name for name in found[size]["saved"][0]["files"])


@needs_gloo
@pytest.mark.parametrize("size", SIZES)
def test_a_result_says_if_groups_are_others_than_those_of_one_process(found, size):
    said = "number sequences for groups before they know how many others have"
    for known, stopped, unknown, few in found[size]["error bars"]:
        assert not any(said in note for note in known)
        assert "ValueError: stopped" in stopped
        assert sum(said in note for note in unknown) == 1
        assert "ValueError: groups must hold at least 2 sequences each, got 1 in one of 5, since ranks" in few


@needs_gloo
@pytest.mark.parametrize("size", SIZES)
def test_a_loop_goes_on_from_a_snapshot(found, size):
    for same, apart in found[size]["snapshots"]:
        assert same
        assert "with 'layers' all ranks take a snapshot" in apart


@needs_gloo
@pytest.mark.parametrize("how", ["raises", "dies"])
def test_nothing_stays_on_its_way_when_a_probe_ends(found, how):
    (here, error), (there, _) = found[how]
    assert error is None
    said, threads = here
    assert threads == []
    if how == "raises":
        assert said == "RankError: rank 1 of 2 failed: ValueError: enough"
        assert there == ["ValueError: enough", []]
    else:
        assert said.startswith("RankError: ")
        assert "rank 1 of 2 has given no sign of life" in said or "so one of them has ended" in said


@needs_gloo
@pytest.mark.parametrize("size", SIZES)
def test_what_a_result_says_and_what_is_refused(found, size):
    for without, note in found[size]["kept"]:
        assert without
        assert note.startswith(
            f"layers are shared out among {min(int(size), 3)} of {size} ranks, at most 2 on each"
        )
    for rank, error in enumerate(found[size]["not finite"]):
        which = "" if rank == 1 else "RankError: rank 1 of "
        assert error.startswith(which)
        assert "activations must be finite" in error
    for rank, error in enumerate(found[size]["left out"]):
        which = "" if rank == 1 else f"RankError: rank 1 of {size} failed: "
        said = "ValueError: layers: with owner='layers' all must run in every forward, and layers.3 did not"
        assert error.startswith(f"{which}{said}")


@pytest.mark.parametrize(
    ("widths", "ranks", "neighbors", "held"),
    [
        ([8] * 5, 2, True, ((0, 1, 2), (2, 3, 4))),
        ([8] * 5, 2, False, ((0, 1), (2, 3, 4))),
        ([8] * 4, 4, True, ((0, 1), (1, 2), (2, 3), (3,))),
        ([8] * 2, 4, False, ((0,), (1,))),
        ([8] * 3, 1, True, ((0, 1, 2),)),
        ([16, 4, 4, 4, 4], 2, False, ((0,), (1, 2, 3, 4))),
        ([4, 4, 4, 4, 16], 2, True, ((0, 1, 2, 3, 4), (4,))),
    ],
)
def test_which_layers_a_rank_holds(widths, ranks, neighbors, held):
    assert held_layers(widths, ranks, neighbors=neighbors) == held


@pytest.mark.parametrize("layers", [1, 2, 7, 81])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_every_layer_and_every_neighbor_is_held(layers, ranks):
    held = held_layers([8] * layers, ranks, neighbors=True)
    assert {layer for some in held for layer in some} == {*range(layers)}
    pairs = [(i, i + 1) for some in held for i in some if i + 1 in some]
    assert sorted(pairs) == [(i, i + 1) for i in range(layers - 1)]  # each once
    assert max(map(len, held)) <= -(-layers // ranks) + 1
    assert len(held) == min(layers, ranks)


def test_all_ranks_measure_what_the_fullest_has_room_for():
    first = FirstBatch((40, 8, 8, 8), 16, True, (0, 0, 0, 0), False, False, ())
    spec = ProbeSpec(views=["position"], memory="200KiB", refine=False)
    partitioned = partitioned_plan(first, spec, list("abcd"), 2)
    assert partitioned.held == ((0, 1), (1, 2, 3))
    assert {part.positions for part in partitioned.parts} == {partitioned.plan.positions}
    assert 1 < len(partitioned.plan.positions) < 16
    assert partitioned.plan.names == ("a", "b", "c", "d")
    assert partitioned.state_bytes <= 200 << 10
    assert partitioned.transit == transit_budget(200 << 10) == 25600
    little = (
        "memory: 1 position of 2 layers need 21.2 KiB, and memory allows 17.5 KiB; .*; of 20 KiB, rows on "
        "their way between 2 ranks take 2.5 KiB, and with more ranks each has fewer layers"
    )
    with pytest.raises(ValueError, match=little):
        partitioned_plan(first, ProbeSpec(views=["position"], memory="20KiB", refine=False), list("abcd"), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": "all"}, "since pairs= must be 'adjacent', got 'all'"),
        ({"pairs": [(0, 2)]}, r"since pairs= must be 'adjacent', got \[\(0, 2\)\]"),
    ],
)
def test_what_cannot_be_shared_out(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        ProbeSpec(owner="layers", **options)
    assert ProbeSpec(owner="auto", **options).why_not_shared
    if "pairs" in options:  # no measure compares layers
        ProbeSpec(owner="layers", measures="stable_rank", **options)
    with pytest.raises(ValueError, match="owner must be one of 'auto', 'ranks', 'layers', got 'me'"):
        ProbeSpec(owner="me")


def test_targets_need_layers_at_the_same_places():
    first = FirstBatch((8, 8), 16, True, (0, 1), False, False, (("x", 2, False),))
    refused = "since targets= are read at the places of the first layer"
    spec = ProbeSpec(views=["mean_pooled"], targets={"x": "x"}, owner="layers")
    with pytest.raises(ValueError, match=f"owner: 'layers' cannot be had, {refused}"):
        plan_of_ranks(first, spec, ["a", "b"], 2)
    assert isinstance(plan_of_ranks(replace(first, places=(0, 0)), spec, ["a", "b"], 2), PartitionedPlan)
    spec = replace(spec, owner="auto", memory="4KiB")
    with pytest.raises(ValueError, match=r"memory: .* \(ranks cannot share out the layers: targets="):
        plan_of_ranks(first, spec, ["a", "b"], 2)


@pytest.mark.parametrize(
    ("batches", "number"),
    [
        (torch.zeros(7, 2), 7),
        ({"mode": "x", "tokens": torch.zeros(6, 2)}, 6),
        ([torch.zeros(4, 2), torch.zeros(3, 2)], 7),
        (DataLoader(TensorDataset(torch.zeros(9, 2)), batch_size=4), 9),
        (DataLoader(TensorDataset(torch.zeros(9, 2)), batch_size=4, drop_last=True), None),
        (iter([torch.zeros(4, 2)]), None),
    ],
)
def test_how_many_sequences_come_is_known_of_sized_batches(batches, number):
    assert sequences_of(batches) == number


def test_messages_bring_what_they_were_given():
    rows, keep = torch.randn(3, 5, 2, dtype=torch.float64), torch.rand(3, 5) < 0.5
    batch = RowBatch(
        layers=[rows, rows[..., :1].to(torch.bfloat16)], keeps=[keep, keep], masked=keep,
        targets=[torch.randn(3, 5, 1)], chosen=["last", keep], places=[0, 0], notes=("a note",),
    )  # fmt: skip
    message = packed([(4, batch), (7, batch.some(slice(1)))])
    data = torch.empty(message.nbytes, dtype=torch.uint8)
    message.write(data)
    assert message.nbytes < rows.nbytes * 2 + 1024  # what layers share goes once
    (first, whole), (then, part) = unpacked(data, torch.device("cpu"))
    assert (first, then, part.sequences, whole.notes) == (4, 7, 1, ("a note",))
    assert whole.chosen[0] == "last"
    for got, given in zip(
        (*whole.layers, *whole.keeps, whole.masked, *whole.targets, whole.chosen[1]),
        (*batch.layers, *batch.keeps, batch.masked, *batch.targets, batch.chosen[1]),
        strict=True,
    ):
        assert got.dtype == given.dtype
        assert torch.equal(got, given)


def test_one_process_owns_all_layers():
    model = rgfast.ResidualStack(width=4, depth=2, mixing="none")
    x = torch.randn(50, 2, 4)
    found, wanted = (
        rgfast.probe(model, x, owner=owner, route="moments", progress=False) for owner in ("layers", "ranks")
    )
    assert found.dataset.equals(wanted.dataset)


def test_the_last_checkpoint_but_one_goes_with_those_that_one_deletes():
    for name in ("run.checkpoint.rank0of4", "run.checkpoint"):
        one = before(Path("runs", name))
        assert one.parent == Path("runs")
        assert one.match("run.checkpoint*")
        assert one.name != name
        assert not one.match("run.checkpoint.rank*of*")  # none of another number of ranks


@pytest.mark.parametrize("saved", [([1], []), ([1, 2], [3]), ([2], [])])
def test_files_that_do_not_go_together_are_refused_and_left(monkeypatch, tmp_path, saved):
    mine, theirs = saved
    path = tmp_path / "run.checkpoint.rank0of2"
    for number, place in zip(reversed(mine), (path, before(path)), strict=False):
        place.write_text(str(number))
    files = sorted(tmp_path.iterdir())
    monkeypatch.setattr(coordinated_checkpoints, "_number", lambda place: int(place.read_text()))
    ranks = SimpleNamespace(size=2, gather=lambda name, own: [own, theirs])
    with pytest.raises(ValueError, match="checkpoint must have files of all 2 ranks"):
        coordinated_checkpoints.choose(ranks, path)
    assert sorted(tmp_path.iterdir()) == files
