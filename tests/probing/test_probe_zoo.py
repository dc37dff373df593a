"""The models of the zoo against brute force; ``python tests/probing/zoo.py`` prints them as a table."""

import importlib.util

import pytest
import torch
import zoo
import zoo_plain

import rgfast

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
if HAS_TRANSFORMERS:
    import zoo_transformers
    import zoo_ways

# Other people's models warn of what they will rename.
pytestmark = pytest.mark.filterwarnings("default")

needs_transformers = pytest.mark.skipif(not HAS_TRANSFORMERS, reason="transformers is not installed")


@pytest.mark.parametrize("entry", zoo.ENTRIES, ids=lambda e: f"{e.name}, {e.fed}")
def test_model_against_brute_force(entry):
    _, _, notes = zoo.check(entry.make())
    # What was read as padding is never said to have been left unread as well.
    assert not any("was not read" in note for note in notes)


def test_the_zoo_is_large():
    names = [entry.name for entry in zoo.ENTRIES]
    assert len(names) >= (60 if HAS_TRANSFORMERS else 20)


@needs_transformers
@pytest.mark.parametrize("wrong", ["padding", "mask", "hooks", "order"])
def test_the_zoo_fails_where_the_probe_is_wrong(wrong):
    case = zoo_ways.bert()
    if wrong == "padding":
        case.options = {"padding": None}
    elif wrong == "mask":
        case.keep = case.keep.flip(1)
    elif wrong == "hooks":
        case.layers = ["encoder.layer.0:input", "encoder.layer.0.attention", "encoder.layer.1"]
    else:
        case.given = {name: value.flip(0) for name, value in case.given.items()}
        case.given["attention_mask"] = case.given["attention_mask"].flip(1)
    with pytest.raises(AssertionError):
        zoo.check(case)


@needs_transformers
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_inside_a_probe_is_refused(beams):
    model = zoo_transformers.made("GPT2LMHeadModel", **zoo_ways.GPT2)
    ids, _ = zoo.sentences()
    with (
        rgfast.Probe(model, progress=False) as watched,
        pytest.raises(ValueError, match=r"generate\(\) cannot be probed.*run the model once"),
    ):
        model.generate(ids, max_new_tokens=2, num_beams=beams, pad_token_id=0)
    with watched, torch.no_grad():
        model(ids)
    assert watched.result().dataset.n.max() == ids.numel()


def test_positions_of_the_fast_path_are_those_of_the_mask():
    """The first batch's longest sequence is short of the mask's columns, a later one is not."""
    case = zoo_plain.torch_encoder()
    keep = torch.arange(zoo.T) < torch.tensor([3] * 16 + [zoo.T] * (zoo.N - 16))[:, None]
    case.keep, case.given = keep, {**case.given, "src_key_padding_mask": ~keep}
    case.calls = zoo.cut(case.given)
    zoo.check(case)
    result = rgfast.probe(case.model, case.given, batch_size=16, progress=False)
    n = result.variable("n", "position")
    assert n.values.tolist() == [zoo.N] * 3 + [zoo.N - 16] * 3
