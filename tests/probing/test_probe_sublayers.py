"""``layers="sublayers"``: the stream between attention and MLP, against sums of branches made by hand."""

import importlib.util

import pytest
import torch
import zoo
import zoo_plain  # noqa: F401 (enters its models)
from torch import nn

import rgfast
from rgfast.probing.capture.layers import resolve

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
if HAS_TRANSFORMERS:
    import zoo_transformers

pytestmark = pytest.mark.filterwarnings("default")  # other people's models warn of what they will rename

needs = pytest.mark.skipif(not HAS_TRANSFORMERS, reason="transformers is not installed")


def entries():
    return {entry.name: entry for entry in reversed(zoo.ENTRIES)}  # the first of a name


# How the stream at the point follows from the block's input x and what the named modules of the block gave.
def added(branch):
    return lambda block, x, gave: x + gave[branch]


def normed(branch, norm):
    """The norm of the sum, as post-norm blocks have it."""
    return lambda block, x, gave: block.get_submodule(norm)(x + gave[branch])


PLAIN = {
    "nn.TransformerEncoder (fast path)": ("layers", normed("self_attn", "norm1")),
    "nn.TransformerEncoder, norm first": ("encoder.layers", added("self_attn")),
    "nn.Transformer, encoder": ("encoder.layers", normed("self_attn", "norm1")),
}
FOREIGN = {
    "BERT": ("encoder.layer", normed("attention.output.dense", "attention.output.LayerNorm")),
    "RoBERTa": ("encoder.layer", normed("attention.output.dense", "attention.output.LayerNorm")),
    "MPNet": ("encoder.layer", normed("attention.attn", "attention.LayerNorm")),
    "DistilBERT": ("transformer.layer", normed("attention", "sa_layer_norm")),
    "GPT-2": ("transformer.h", added("attn")),
    "OPT": ("model.decoder.layers", added("self_attn")),
    "Llama": ("model.layers", added("self_attn")),
    "Mistral": ("layers", added("self_attn")),
    "Qwen2": ("layers", added("self_attn")),
    "Gemma": ("layers", added("self_attn")),
    "Gemma 2": ("layers", added("post_attention_layernorm")),
    "Bloom": ("h", added("self_attention.dense")),
    "ViT": ("layers", added("attention")),
    "CLIP, vision": ("vision_model.encoder.layers", added("self_attn")),
    "T5, encoder": ("encoder.block", added("layer.0.SelfAttention")),
    "BART, encoder": ("model.encoder.layers", normed("self_attn", "self_attn_layer_norm")),
    "mBART, encoder": ("encoder.layers", added("self_attn")),
    "Whisper, encoder": ("encoder.layers", added("self_attn")),
    "Wav2Vec2": ("encoder.layers", normed("attention", "layer_norm")),
}
CASES = {**PLAIN, **(FOREIGN if HAS_TRANSFORMERS else {})}


def by_hand(case, container, point):
    """The stream at the points inside the blocks, ``[rows that count, D]`` each."""
    blocks = list(case.model.get_submodule(container).children())
    found, first = [[] for _ in blocks], 0
    for args, kwargs in case.calls:
        seen = [{} for _ in blocks]
        handles = []
        for block, gave in zip(blocks, seen, strict=True):
            handles.append(block.register_forward_pre_hook(_given(gave), with_kwargs=True))
            handles += [m.register_forward_hook(_gave(gave, n)) for n, m in block.named_modules() if n]
        with torch.no_grad():
            case.model.eval()(*args, **kwargs)
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for out, block, gave in zip(found, blocks, seen, strict=True):
                x = point(block, gave[""], gave)
                if x.is_nested:  # of rows that count alone
                    out.append(torch.cat(x.unbind()))
                elif case.keep is None:
                    out.append(x.flatten(0, 1))
                else:
                    out.append(x[case.keep[first : first + len(x)]])
        first += zoo.SIZE
    return [torch.cat(out) for out in found]


def _given(gave):
    def hook(module, args, kwargs):
        gave[""] = (args[0] if args else next(iter(kwargs.values()))).clone()

    return hook


def _gave(gave, name):
    def hook(module, args, output):
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, torch.Tensor):
            gave[name] = output.clone()

    return hook


def effective_rank(x):
    s = torch.linalg.svdvals(x.double() - x.double().mean(0))
    p = s[s > 0] / s.sum()
    return float(torch.exp(-(p * p.log()).sum()))


@pytest.mark.parametrize("name", CASES)
def test_points_are_the_stream_after_attention(name):
    container, point = CASES[name]
    case = entries()[name].make()
    layers = "sublayers" if case.layers == "auto" else f"sublayers:{container}"
    result = rgfast.probe(case.model, case.given, layers=layers, batch_size=16, progress=False)
    depth = len(case.model.get_submodule(container))
    assert len(result.layers) == 2 * depth + 1
    assert result.layers[2::2] == tuple(zoo.numbered(container))[:depth]
    got = result.variable("effective_rank", "pooled").values[1::2, 0]
    truth = [effective_rank(x) for x in by_hand(case, container, point)]
    assert got == pytest.approx(truth, rel=1e-5)  # sums by hand round as the model's do, but for their order
    # Neither the block's input nor its output has these ranks.
    others = result.variable("effective_rank", "pooled").values[::2, 0]
    assert (abs(others[1:] / got - 1) > 1e-4).all()
    assert (abs(others[:-1] / got - 1) > 1e-4).all()


def of_albert(block, x):
    inner = block.albert_layers[0]
    return inner.full_layer_layer_norm(inner.ffn_output(inner.activation(inner.ffn(x))) + x)


def of_olmo(block, x):
    return x + block.post_feedforward_layernorm(block.mlp(x))


def of_gemma(block, x):
    return x + block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(x)))


def of_llama(block, x):
    return x + block.mlp(block.post_attention_layernorm(x))


@needs
@pytest.mark.parametrize(
    ("model", "config", "rest"),
    [
        ("Olmo2Model", {}, of_olmo),
        (
            "XLNetModel",
            {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
            lambda block, x: block.ff(x),
        ),
        ("AlbertModel", {"embedding_size": 8}, of_albert),
        ("DebertaV2Model", {}, lambda block, x: block.output(block.intermediate(x), x)),
        ("GPTNeoXModel", {"use_parallel_residual": False}, of_llama),
        ("Gemma3TextModel", {"head_dim": 8, "num_key_value_heads": 1}, of_gemma),
    ],
)
def test_the_rest_of_the_block_makes_the_output_of_the_point(model, config, rest):
    """Where attention's branch cannot be seen from outside."""
    shared = (
        {"vocab_size": 30} if "d_model" in config else {**zoo_transformers.WIDTH, **zoo_transformers.SMALL}
    )
    own = "Gemma3TextConfig" if "Text" in model else None
    made = zoo_transformers.made(model, own, **shared, pad_token_id=0, **config).eval()
    first, point, output = resolve(made, "sublayers")[0][:3]
    got = {}
    for tap in (first, point, output):
        module = made.get_submodule(tap.module)
        if tap.side == "input":
            module.register_forward_pre_hook(_given(got.setdefault(tap.name, {})), with_kwargs=True)
        else:
            module.register_forward_hook(_gave(got.setdefault(tap.name, {}), ""))
    with torch.no_grad():
        made(torch.randint(3, 30, (4, 6), generator=torch.Generator().manual_seed(0)))
        made_of_it = rest(made.get_submodule(output.module), got[point.name][""])
    torch.testing.assert_close(made_of_it, got[output.name][""])
    assert not torch.equal(got[point.name][""], got[first.name][""])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nn.Transformer, encoder", r"layers='sublayers:encoder.layers'.*layers='sublayers:decoder.layers'"),
        ("MLP-Mixer", r"blocks.0 \(Mixer of norm, tokens, channels\) has one norm"),
        ("LSTM stack", r"it is unknown where the stream is.*'blocks.0.<norm before the MLP>:input'"),
        pytest.param("GPT-NeoX", r"layers.0 \(GPTNeoXLayer\) are given the same stream", marks=needs),
        pytest.param("Falcon", r"h.0 \(FalconDecoderLayer\) are given the same stream", marks=needs),
        pytest.param("Phi", r"PhiDecoderLayer.*has one norm, so that it is one branch, or two", marks=needs),
        pytest.param("Mamba", r"layers.0 \(MambaBlock of norm, mixer\) has one norm", marks=needs),
    ],
)
def test_what_has_no_such_point_is_refused(name, says):
    with pytest.raises(ValueError, match=says):
        resolve(entries()[name].make().model, "sublayers")


def test_a_named_stack_that_is_none_is_refused():
    model = entries()["nn.TransformerEncoder, norm first"].make().model
    with pytest.raises(ValueError, match=r"no module 'encoder.layer'; near it: encoder.layers"):
        resolve(model, "sublayers:encoder.layer")
    with pytest.raises(ValueError, match=r"'encoder.layers.0' is no stack of blocks; looked at"):
        resolve(model, "sublayers:encoder.layers.0")


def test_a_block_of_ones_own_with_norms_of_these_names_is_unknown():
    """Norms of these names come before the branches in some models and after the sums in others."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.mlp = nn.Linear(4, 4), nn.Linear(4, 4)
            self.ln_1, self.ln_2 = nn.LayerNorm(4), nn.LayerNorm(4)

    with pytest.raises(ValueError, match="unknown where the stream is between the branches of 0"):
        resolve(nn.Sequential(Block(), Block()), "sublayers")


def test_decoders_with_cross_attention_have_two_points():
    taps, _ = resolve(entries()["nn.TransformerDecoder"].make().model, "sublayers")
    assert [tap.name for tap in taps[:4]] == [
        "layers.0:input",
        "layers.0.norm1",
        "layers.0.norm2",
        "layers.0",
    ]
    if HAS_TRANSFORMERS:
        model = entries()["Whisper, decoder"].make().model
        taps, _ = resolve(model, "sublayers:decoder.layers")
        norms = ["encoder_attn_layer_norm:input", "final_layer_norm:input"]
        assert [tap.name for tap in taps[1:3]] == [f"decoder.layers.0.{norm}" for norm in norms]


def test_points_of_our_own_stack():
    stack = rgfast.ResidualStack(width=6, depth=2, length=5, mixing="mixer", w2_scale=1.0)
    x = torch.randn(300, 5, 6)
    result = rgfast.probe(stack, x, layers="sublayers", measures="effective_rank", progress=False)
    with torch.no_grad():
        mixed = stack.blocks[0].mix(x)
    assert result.layers[1] == "blocks.0.mix"
    got = result.variable("effective_rank", "pooled").values[1, 0]
    assert got == pytest.approx(effective_rank(mixed.flatten(0, 1)), rel=1e-6)
