"""Ranks that share out the layers: the numbers of one process, of a state that does not fit one of them."""

import pytest
import torch
from launch import needs_gloo, printed_by

import rgfast
from rgfast.probing.first import FirstBatch
from rgfast.probing.owners import shares_of
from rgfast.probing.sharing import buffer_bytes, held_layers
from rgfast.probing.spec import ProbeSpec

SIZES = ["2", "4"]


@pytest.fixture(scope="module")
def found():
    return printed_by("owned_in_forks.py")


@needs_gloo
@pytest.mark.parametrize("size", SIZES)
def test_ranks_agree_with_one_process(found, size):
    case = found[size]
    assert set(case["furthest"]) == {"tokens", "sharded", "widths", "few layers", "loop", "wide"}
    assert max(case["furthest"].values()) <= 1e-12, case["furthest"]
    assert set(case["digests"].values()) == {1}  # the same bits on every rank
    assert all(case["again"])  # and again
    assert len({*case["early"]}) == 1
    assert 0 < case["early"][0] < 60


@needs_gloo
@pytest.mark.parametrize("size", SIZES)
def test_a_state_that_fits_none_fits_all(found, size):
    for alone, copies, grouped in found[size]["refused"]:
        for error in (alone, copies):
            assert error.startswith(
                "ValueError: memory: the views of 12 layers need 490 KiB, and memory allows"
            )
        assert "ranks cannot share out the layers: groups=" in grouped
    assert max(found[size]["held"]) <= 400 << 10


@needs_gloo
def test_memory_and_traffic_are_those_that_are_planned(found):
    assert found["plan"]["best"]
    assert 0.75 <= found["plan"]["state"] / max(found["4"]["held"]) <= 1.25
    assert 0.75 <= found["plan"]["network"] / found["4"]["handed"] <= 1.25


@needs_gloo
@pytest.mark.parametrize("size", SIZES)
def test_what_a_result_says_and_what_is_refused(found, size):
    for without, note in found[size]["kept"]:
        assert without
        assert note.startswith(
            f"layers are shared out among {min(int(size), 3)} of {size} ranks, at most 2 on each"
        )
    for error in found[size]["snapshot"]:
        assert (
            error == "ValueError: owner: ranks that share out the layers have no snapshot; take owner='ranks'"
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
    shares = shares_of(first, spec, list("abcd"), 2)
    assert shares.held == ((0, 1), (1, 2, 3))
    assert {part.positions for part in shares.parts} == {shares.plan.positions}
    assert 1 < len(shares.plan.positions) < 16
    assert shares.plan.names == ("a", "b", "c", "d")
    assert shares.state_bytes <= 200 << 10
    assert shares.buffer == buffer_bytes(200 << 10) == 12800
    with pytest.raises(ValueError, match="memory: 1 position of 2 layers need"):
        shares_of(first, ProbeSpec(views=["position"], memory="20KiB", refine=False), list("abcd"), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 2}, "owner: 'layers' cannot be had, since groups="),
        ({"targets": {"x": "x"}}, "owner: 'layers' cannot be had, since groups= .or targets=."),
        ({"checkpoint": "a"}, "since a checkpoint= holds what one rank has seen"),
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


def test_one_process_owns_all_layers():
    model = rgfast.ResidualStack(width=4, depth=2, mixing="none")
    x = torch.randn(50, 2, 4)
    found, wanted = (
        rgfast.probe(model, x, owner=owner, route="moments", progress=False) for owner in ("layers", "ranks")
    )
    assert found.dataset.equals(wanted.dataset)
