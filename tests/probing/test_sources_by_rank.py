"""Saved activations on several ranks: each reads its own sequences, and the result is one process's."""

import numpy as np
import pytest
import torch
from launch import needs_gloo, printed_by

import rgfast

SIZES = [13, 9, 1, 30, 7]  # of the files of stores_in_forks


@pytest.fixture(scope="module")
def found():
    return printed_by("stores_in_forks.py")


@needs_gloo
def test_ranks_divide_what_all_of_them_open(found):
    assert set(found["divided"]) == {"1", "2", "4"}
    for furthest, digests, same_ids, _, in_memory in found["divided"].values():
        assert furthest <= 1e-12  # errors of jackknife groups and targets by number included
        assert digests == 1  # the same bits on every rank
        assert same_ids
        assert in_memory <= 1e-12


@needs_gloo
def test_each_rank_reads_its_own_sequences(found):
    for size, (_, _, _, read, _) in found["divided"].items():
        own = np.array(read)
        if int(size) > 1:  # all compare the first and the last sequence
            own[:, 0] -= 1
            own[:, -1] -= 1
        assert own.sum(0).tolist() == SIZES
        assert own.sum(1).tolist() == [60 // int(size)] * int(size)


@needs_gloo
def test_any_assignment_of_shards(found):
    assert {"1", "2", "4"} < set(found["assigned"])
    for size in ("1", "2", "4"):
        ordered, whole, digests, same_ids = found["assigned"][size]
        assert ordered <= 1e-12  # of one process that reads the shards in this order
        assert whole <= 1e-12  # of one process that reads the store as it is, but for jackknife groups
        assert digests == 1
        assert same_ids


@needs_gloo
def test_a_store_of_its_own_for_every_rank(found):
    furthest, ids = found["assigned"]["own"]
    assert furthest <= 1e-12
    assert ids == [0, 59, 1058]


@needs_gloo
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("shards", "ValueError: activations: ranks 0 and 1 both read shard 2; give all ranks the same act"),
        ("part", "ValueError: activations: ranks 0 and 1 both read shard 1; "),
        ("ids", "ValueError: ids: ranks 0 and 1 both have sequence 0"),
        ("kinds", "TypeError: ids must be all whole numbers or all text, and the ranks have both"),
        (
            "keep",
            "ValueError: keep: one process alone keeps activations, got 2 ranks; with distributed=False",
        ),
    ],
)
def test_what_two_ranks_would_read_is_refused(found, case, message):
    assert [error.startswith(message) for error in found["telling"][case]] == [True, True]


def made():
    g = torch.Generator().manual_seed(0)
    return [
        {
            "x": torch.randn(n, length, 4, generator=g),
            "attention_mask": torch.ones(n, length, dtype=torch.bool),
        }
        for n, length in ((6, 3), (5, 2), (4, 3))
    ]


def test_shards_of_one_process():
    parts = made()
    acts = rgfast.Activations(parts, "N T D", ids=range(10, 25))
    assert acts.shards == ("activations[0]", "activations[1]", "activations[2]")
    some = acts.of_shards([2, 1])
    assert (len(some), some.ids, some.numbers) == (9, (*range(21, 25), *range(16, 21)), (2, 1))
    assert some.of_shards([1]).numbers == (1,)
    assert some.of_shards([1]).whole is acts
    assert repr(some) == "Activations of 9 sequences, 1 layers, 2 to 3 positions (432 B)"
    assert repr(acts.of_shards([])) == "Activations of 0 sequences, 1 layers, 3 positions (0 B)"
    assert list(acts.of_shards([]).batches()) == []
    got = rgfast.probe(some, progress=False)
    want = rgfast.probe(rgfast.Activations([parts[2], parts[1]], "N T D"), progress=False)
    np.testing.assert_array_equal(got.dataset.effective_rank, want.dataset.effective_rank)
    assert got.ids == some.ids
    alone = next(some.of_shards([1]).batches())
    assert alone.layers["x"].shape == (5, 3, 4)  # as long as the whole's longest
    assert not alone.keep[:, 2].any()


def test_a_run_of_sequences():
    acts = rgfast.Activations(made(), "N T D")
    got = list(acts.batches(3, first=4, stop=9))
    assert [one.start for one in got] == [4, 7]
    want = torch.cat([one.layers["x"] for one in acts.batches(1)])[4:9]
    assert torch.equal(torch.cat([one.layers["x"] for one in got]), want)


@pytest.mark.parametrize(
    ("shards", "error", "message"),
    [
        ([3], ValueError, "shards must be numbers from 0 to 2, got 3"),
        ([0, 0], ValueError, "shards must not repeat a number, got 0 twice"),
        (["a"], TypeError, "shards must be whole numbers, got 'a'"),
        ([True], TypeError, "shards must be whole numbers, got True"),
    ],
)
def test_bad_shards(shards, error, message):
    with pytest.raises(error, match=message):
        rgfast.Activations(made(), "N T D").of_shards(shards)
