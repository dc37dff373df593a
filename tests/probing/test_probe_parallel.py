"""Tensor-parallel models: every sequence counts once, whatever its outputs' placements."""

import pytest
import torch
from launch import needs_gloo, printed_by

import rgfast
from rgfast.probing.capture.placed import _digest, _positive, _whole_shape
from rgfast.probing.distributed import first_numbers


@pytest.fixture(scope="module")
def found():
    ranks = printed_by("parallel_in_forks.py")
    for name, of_ranks in ranks.items():
        assert [(error, status) for _, error, _, status in of_ranks] == [(None, 0)] * len(of_ranks), name
    return {name: [value for value, *_ in of_ranks] for name, of_ranks in ranks.items()}


@needs_gloo
@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        *(("tensor/2", case) for case in ("whole", "positions", "owned")),
        *(("lines/4", case) for case in ("whole", "across", "owned")),
    ],
)
def test_every_sequence_counts_once(found, ranks, case):
    """Column and row parallel layers, and sequence parallel ones whose plain outputs are said to be parts of
    the positions; on a mesh of data and tensor dimensions, in either order of ranks; by owners of layers."""
    furthest = [value[case][0] for value in found[ranks]]
    assert furthest[0] <= 1e-12
    assert len({value[case][1] for value in found[ranks]}) == 1  # the same bits on every rank


@needs_gloo
@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        ("tensor/2", "inside"),  # DTensors that are replicated or sharded by positions or features
        ("tensor/2", "features"),  # plain parts of the features
        ("tensor/2", "samples"),  # batches that are DTensors, sharded by samples
        ("tensor/2", "sums"),  # a DTensor that is still to be summed
        ("tensor/2", "by itself"),  # distributed=False: every rank has the whole
        ("lines/4", "fsdp"),  # a row of the mesh runs the model together, a column shares its parameters
        ("lines/4", "four"),
    ],
)
def test_every_placement_is_read(found, ranks, case):
    assert found[ranks][0][case] <= 1e-12


@needs_gloo
def test_a_checkpoint_goes_on_to_the_same_bits(found):
    for value in found["tensor/2"]:
        assert value["checkpoint"] == value["whole"][1]


@needs_gloo
def test_the_fingerprint_is_that_of_the_whole_model(found):
    assert all(value["digest"] for value in found["tensor/2"])


@needs_gloo
def test_ranks_that_only_share_parameters_have_batches_of_their_own(found):
    assert all(value["data alone"] for value in found["lines/4"])


@needs_gloo
@pytest.mark.parametrize("ranks", ["tensor/2", "lines/4"])
def test_a_pipeline_is_measured_stage_by_stage(found, ranks):
    """Every microbatch once, and nothing of the run on empty tensors that tells the stages their shapes; the
    stages joined are the whole model, with drift across the borders."""
    for value in found[ranks]:
        alone, joint, missing = value["stages"]
        assert alone <= 1e-12
        assert joint <= 1e-12
        if ranks == "lines/4":
            assert "ValueError: others must follow in the order of the pipeline, and 'blocks.1:in" in missing


@needs_gloo
def test_a_stage_has_layers_that_other_ranks_do_not_have(found):
    first, then = found["refused/2"]
    assert "distributed must be False for a stage of a pipeline, whose layers" in first["stage"]
    assert then["stage"] is not None  # which waits for the first one's activations until that one leaves


@needs_gloo
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unsaid", "layer 'blocks.0' is a plain tensor (23, 2, 6) that differs between ranks [0, 1]"),
        ("unsaid", "placements={'blocks.*': Shard(1)} for some of the positions"),
        ("odd", "layer 'last' is placed as Shard(dim=1) (Odd), and only Shard(dim), Replicate() or"),
        ("other", "placements says Shard(dim=2) of layer 'blocks.0', which is a DTensor placed as Shard"),
        (
            "compared",
            "b must be a model that a single process runs, got one that is sharded over ranks [0, 1]",
        ),
        *(
            (
                f"whole, {way}",
                f"placements says {shown} of layer 'blocks.0', which is the same tensor (23, 4, 6)",
            )
            for way, shown in (
                ("S(1)", "Shard(dim=1)"),
                ("S(-1)", "Shard(dim=2)"),
                ("S(0)", "Shard(dim=0)"),
                ("P(sum)", "Partial(sum)"),
            )
        ),
        ("whole, S(1)", "on all ranks [0, 1], so whole on each of them; leave it out of placements="),
        ("plain", "placements must be of a model with parameters that are DTensors"),
        ("poisoned", "ValueError: activations must be finite, got 4 NaN or infinite values in layer 0"),
        ("fewer", "batches must be the same on ranks [0, 1], which run the model together, and those of [1]"),
        ("poisoned", "(last, sequences 12 to 22)"),  # those of the second rank
    ],
)
def test_every_rank_says_what_is_wrong(found, case, message):
    for value in found["refused/2"]:
        assert message in value[case]


@needs_gloo
def test_parts_that_are_zero_are_parts(found):
    assert [value["zero"] for value in found["refused/2"]] == [None, None]


@needs_gloo
def test_a_rank_that_is_left_out(found):
    message = "distributed must take in all ranks that hold a part of the model, got [0] without [1]"
    assert message in found["refused/2"][0]["left out"]


@needs_gloo
def test_what_one_rank_finds_ends_the_others_of_its_group(found):
    assert found["refused/2"][0]["poisoned"].startswith("RankError: rank 1 of 2 failed: ValueError")
    assert found["refused/2"][1]["poisoned"].startswith("ValueError")


@pytest.mark.parametrize(
    ("placements", "got"), [("blocks", "'blocks'"), (1, "1"), ({"*": None}, "None"), ([1], "1")]
)
def test_what_is_no_placement(placements, got):
    with pytest.raises(TypeError, match=rf"placements must be Shard\(dim\), .*, got {got}"):
        rgfast.probe(torch.nn.Linear(2, 2), torch.zeros(4, 2), layers=[""], placements=placements)


def test_parts_that_are_no_chunks():
    from torch.distributed.tensor import Partial, Replicate, Shard

    assert _whole_shape("x", [Shard(1)], [(2, 3, 5), (2, 2, 5)]) == [2, 5, 5]
    assert _whole_shape("x", [Shard(0)], [(2, 3), (2, 3), (1, 3), (0, 3)]) == [5, 3]
    assert _whole_shape("x", [Partial()], [(2, 3), (2, 3)]) == [2, 3]
    for placement, shapes in (
        (Shard(1), [(2, 2, 5), (2, 3, 5)]),
        (Shard(1), [(2, 3, 5), (3, 3, 5)]),
        (Replicate(), [(2, 3), (2, 2)]),
    ):
        with pytest.raises(ValueError, match=r"of layer 'x', and the ranks have parts of shapes \(2, "):
            _whole_shape("x", [placement], shapes)
    with pytest.raises(ValueError, match=r"placements says Shard\(dim=3\) of a layer of 3 dimensions"):
        _positive([Shard(3)], 3)
    assert _positive([Shard(-1)], 3) == [Shard(2)]
    with pytest.raises(ValueError, match=r"must be Replicate\(\) over a mesh of 2 dimensions"):
        _whole_shape("x", [Shard(0), Replicate()], [(2, 3)] * 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_digest_sees_every_bit_and_place(dtype):
    x = torch.arange(24.0).reshape(2, 3, 4).to(dtype)
    others = [x.flip(0), x.flip(1), x.flip(2), x.clone(), x.double().float()[:1].to(dtype)]
    others[3][1, 2, 3] = torch.nextafter(x[1, 2, 3].float(), torch.tensor(99.0)) if dtype.itemsize > 2 else 24
    assert _digest(x) == _digest(x.clone().transpose(0, 1).contiguous().transpose(0, 1))
    assert len({_digest(one) for one in [x, *others]}) == 6
    assert _digest(x[:, :0]) == _digest(x[:0])


def test_ranks_that_run_a_model_together_number_the_same_sequences():
    assert first_numbers([(5, ()), (0, ()), (7, ())]) == [0, 5, 5]
    assert first_numbers([(5, (0, 1)), (5, (0, 1)), (7, (2, 3)), (7, (2, 3))]) == [0, 0, 5, 5]
    assert first_numbers([(5, (0, 2)), (7, (1, 3)), (5, (0, 2)), (7, (1, 3))]) == [0, 5, 0, 5]
