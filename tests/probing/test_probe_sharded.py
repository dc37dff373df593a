"""Models under FSDP2: the numbers of one process, and all ranks in every forward until the last is done."""

import pytest
import torch
from launch import SHORT, needs_gloo, printed_by
from torch import nn

from rgfast.probing import in_step
from rgfast.probing.sharding import class_of, gathered, is_sharded, sharded_over, whole

pytestmark = needs_gloo


@pytest.fixture(scope="module")
def found():
    return printed_by("sharded_in_forks.py")


@pytest.mark.parametrize("size", ["2", "4"])
def test_a_sharded_model_gives_the_bits_of_a_whole_one(found, size):
    case = found["agreement"][size]
    assert case["digests"] == 1  # on every rank, with FSDP2 and without, of shards that differ in length
    assert case["furthest"] <= 1e-12  # from one process
    assert case["merged"]  # the bits of one process that merges the shards, moments included
    assert case["skipped"] == [True] * int(size)
    assert case["half"] == [True] * int(size)


@pytest.mark.parametrize(("size", "forwards", "rows"), [("2", 1, 15), ("4", 3, 105)])
@pytest.mark.parametrize("training", ["false", "true"])
def test_every_rank_takes_part_in_every_forward(found, size, forwards, rows, training):
    cases = [one[training] for one in found["agreement"][size]["in_step"]]
    for case in cases:
        assert case["calls"] == [forwards]
        assert case["buffers"]  # as after the rank's own batches, and no others
        assert case["noise"]
        assert case["n"] == [rows, rows]  # read within the block, and after it
    assert len({case["digest"] for case in cases}) == 1


@pytest.mark.parametrize("size", ["2", "4"])
def test_controls_and_fingerprints_are_those_of_one_process(found, size):
    for case in found["agreement"][size]["controls"]:
        assert case == {"same": True, "weights": True, "model": "MaskedTokenModel", "digest": True}


@pytest.mark.parametrize("size", ["2", "4"])
def test_training_steps_that_run_blocks_again_are_counted_once(found, size):
    rows = int(size) * (3 + 3) * 7 * 4  # of steps, and of the monitor's forwards of the same model
    assert found["agreement"][size]["trained"] == [[1, True, rows]] * int(size)


@pytest.mark.parametrize("size", ["2", "4"])
def test_a_model_that_draws_the_weights_of_its_parts(found, size):
    assert found["agreement"][size]["parent"] == [True] * int(size)


@pytest.mark.parametrize("size", ["2", "4"])
def test_dummies_begin_with_the_arguments_of_the_first_forward(found, size):
    assert found["agreement"][size]["cached"] == [[0, 0, 0]] * int(size)


def test_a_sharded_model_is_not_timed_on_one_rank(found):
    said = "planning times its forward, got one that is sharded over ranks [0, 1]"
    assert all(said in text for text in found["agreement"]["2"]["planned"])


def test_a_dead_rank_is_noticed_and_the_checkpoint_is_good(found):
    *alive, dead, last = found["killed"]["killed"]
    assert dead[3] == 9
    for value, error, seconds, status in (*alive, last):
        assert (value, status) == (None, 0)
        assert error.startswith("RankError: rank 2 of 4 has given no sign of life for timeout=3 s")
        assert seconds < 10 * SHORT
    assert found["killed"]["files"] == [f"run.checkpoint.rank{rank}of4" for rank in (0, 2, 3)]
    digests = {tuple(one) for one in found["killed"]["again"]}
    assert digests == {(found["agreement"]["4"]["brief"], None)}


def test_every_rank_says_what_is_wrong_and_none_is_left_in_a_forward(found):
    raised, *others = found["telling"]["raises"]
    assert raised[1] == "KeyError: 'no such shard'"
    assert {one[1] for one in others} == {"RankError: rank 0 of 4 failed: KeyError: 'no such shard'"}
    for _, _, seconds, _ in (raised, *others):
        assert seconds < 10 * SHORT


def test_a_group_without_ranks_that_hold_a_part_is_refused(found):
    for _, error, _, _ in found["telling"]["part"][:2]:
        assert error.endswith("all ranks that hold a part of the model, got [0, 1] without [2, 3]")


@pytest.mark.parametrize("size", ["2", "4"])
def test_what_mixes_ranks_is_refused_before_a_forward_begins(found, size):
    ranks, number = found["telling"]["refused"][size], int(size)
    assert [error for _, error, _, _ in ranks] == [None] * number
    said = (
        "ValueError: batches must be as many on every rank if the model has SyncBatchNorm in training mode, "
        "which would mix what ranks without a batch run on into the others' activations"
    )
    for value, *_ in ranks:
        assert value["mixed"]["refused"] == [said] * 3
        # As many batches on every rank, and in evaluation mode any number.
        assert value["mixed"]["counted"] == [number * 2 * 6, sum(range(number)) * 6]


@pytest.mark.parametrize("size", ["2", "4"])
def test_arguments_that_cannot_be_sent_are_refused_before_a_forward_begins(found, size):
    ranks = [value["unsent"] for value, *_ in found["telling"]["refused"][size]]
    said = (
        "ValueError: batches must hold at least one sequence on every rank, since what the others have "
        "cannot be sent to a rank without any ("
    )
    (without,) = {text for one in ranks for text in one["refused"]}
    assert without.startswith(said)
    assert "lambda" in without
    unread = f"{said}ValueError: invalid literal for int() with base 10: 'none')"
    assert [one["unread"] for one in ranks] == [unread] * len(ranks)
    assert {one["counted"] for one in ranks} == {5 * sum(1 + rank % 3 for rank in range(len(ranks)))}


def test_arguments_for_ranks_without_a_batch():
    model = nn.Linear(3, 3)
    tokens, large = torch.arange(6).reshape(2, 3), torch.ones(2, 1 << 19)
    given = (tokens, {"large": large, "small": large[:, :2]}), {"flag": None}
    packed, unsent = in_step._packed(given)
    assert not unsent
    (args, kwargs) = in_step._unpacked(packed, model)
    assert torch.equal(args[0], tokens)
    assert args[1]["large"].shape == large.shape
    assert not args[1]["large"].any()  # too large to send
    assert torch.equal(args[1]["small"], large[:, :2])
    assert kwargs == {"flag": None}
    packed, unsent = in_step._packed(((lambda x: x,), {}))
    assert not packed
    assert unsent.startswith("batches must hold at least one sequence on every rank, since what the others")


def test_dummies_leave_buffers_as_they_are():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    mean, noise = model[0].running_mean, torch.get_rng_state()
    with in_step._as_before(model):
        model(torch.ones(4, 3))
        model[0].running_mean = torch.ones(3)
    assert model[0].running_mean is mean
    assert not mean.any()
    assert model[0].num_batches_tracked == 0
    assert torch.equal(noise, torch.get_rng_state())


def test_a_model_of_one_process_is_not_sharded():
    model = nn.Linear(2, 2)
    assert class_of(model) is nn.Linear
    assert not is_sharded(model)
    assert sharded_over(model) == set()
    assert whole(model.weight) is model.weight
    before = model.weight
    with gathered([model]):
        assert model.weight is before
