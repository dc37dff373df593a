"""Small transformers made from a configuration: every layer and position against stored activations."""

import pytest
import torch

import rgfast

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("default")

LENGTH = 6
VIEWS = ("position", "pooled", "mean_pooled", "flattened")


def make(kind, width, states=30):
    torch.manual_seed(0)
    if kind == "BERT":
        config = transformers.BertConfig(
            vocab_size=states, hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=2 * width, max_position_embeddings=16,
        )  # fmt: skip
        return transformers.BertModel(config), "encoder.layer"
    if kind == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=states, n_embd=width, n_layer=2, n_head=2, n_positions=16,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config), "transformer.h"
    config = transformers.LlamaConfig(
        vocab_size=states, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), "model.layers"


def sentences(n, states=30):
    """Random tokens, and which of them are not padding: at least two in every sentence."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, states, (n, LENGTH), generator=generator)
    lengths = torch.randint(2, LENGTH + 1, (n,), generator=generator)
    return tokens, torch.arange(LENGTH) < lengths[:, None]


def stored(model, blocks, tokens, keep, size):
    """What goes into the first block and comes out of each, ``[B, T, D]``, by hooks of our own."""
    container = model.get_submodule(blocks)
    layers = [[] for _ in range(len(container) + 1)]

    def into(module, args, kwargs):
        layers[0].append((args[0] if args else kwargs["hidden_states"]).clone())

    def out_of(index):
        def hook(module, args, output):
            layers[index].append((output[0] if isinstance(output, tuple) else output).clone())

        return hook

    handles = [container[0].register_forward_pre_hook(into, with_kwargs=True)]
    handles += [block.register_forward_hook(out_of(k + 1)) for k, block in enumerate(container)]
    with torch.no_grad():
        for some, kept in zip(tokens.split(size), keep.split(size), strict=True):
            model(input_ids=some, attention_mask=kept.long())
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in layers]


@pytest.mark.parametrize("kind", ["BERT", "GPT2", "Llama"])
@pytest.mark.parametrize(
    ("width", "states", "n", "dtype"),
    [
        (8, 30, 300, torch.float32),
        (8, 30, 300, torch.bfloat16),
        (32, 12, 200, torch.float32),  # fewer tokens than features: deficient from the start
        (40, 30, 70, torch.float64),  # few rows
    ],
)
def test_every_layer_and_position(kit, kind, width, states, n, dtype):
    model, blocks = make(kind, width, states)
    model = model.to(dtype).eval()
    tokens, keep = sentences(n, states)
    batch = {"input_ids": tokens, "attention_mask": keep.long(), "extra": tokens}
    found = rgfast.probe(model, batch, batch_size=64, pairs="all", views=VIEWS, progress=False)
    assert found.layers == (f"{blocks}.0:input", f"{blocks}.0", f"{blocks}.1")
    layers = stored(model, blocks, tokens, keep, 64)
    for t in range(LENGTH):
        truth = kit.brute([x[:, t] for x in layers], keep[:, t])
        kit.assert_equal_to(truth, found.dataset, "position", t)
        assert int(found.dataset.n.sel(view="position", position=t)) == int(keep[:, t].sum())
    kit.assert_equal_to(kit.brute([x[keep] for x in layers]), found.dataset, "pooled")
    whole = kit.brute([x.flatten(1) for x in layers], keep.all(1))
    kit.assert_equal_to(whole, found.dataset, "flattened")
    weight = keep.double()[..., None] / keep.sum(1)[:, None, None]
    means = kit.brute([(x.double().nan_to_num(0.0) * weight).sum(1) for x in layers])
    kit.assert_equal_to(means, found.dataset, "mean_pooled")


def test_what_a_layer_norm_puts_out_is_refined(kit):
    model, blocks = make("BERT", 16)
    model.eval()
    tokens, keep = sentences(400)
    batch = {"input_ids": tokens, "attention_mask": keep.long()}
    layers = stored(model, blocks, tokens, keep, 256)
    refined = rgfast.probe(model, batch, progress=False).dataset
    assert refined.refined.sel(view="position", position=[0, 1]).all()
    assert refined.effective_rank_bound.sel(view="position", position=[0, 1]).max() < 1e-11
    bare = rgfast.probe(model, batch, refine=False, progress=False).dataset
    assert not bare.refined.any()
    want = torch.tensor([kit.ranks_of(x[:, 1])["effective_rank"] for x in layers])
    got = torch.from_numpy(bare.effective_rank.sel(view="position", position=1).values)
    error = (got - want).abs() / want
    assert (error > 1e-10).any()  # or there would have been no need
    bound = torch.from_numpy(bare.effective_rank_bound.sel(view="position", position=1).values)
    assert (error <= bound).all()
