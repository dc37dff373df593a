"""Hugging Face models of the zoo, made from tiny configurations; nothing is downloaded."""

import re

import torch
import transformers
from torch.utils.data import DataLoader, TensorDataset
from zoo import SIZE, Case, N, cut, entry, numbered, seeded, sentences

transformers.logging.set_verbosity_error()

WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SMALL = {"vocab_size": 30, "max_position_embeddings": 16}
PLAIN = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
BART = {
    "vocab_size": 30, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 16,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
VISION = {**WIDTH, "image_size": 12, "patch_size": 4}


def made(model, config=None, dtype=torch.float32, **options):
    """``model`` (``"BertModel"``) from a configuration of the class ``config`` (``"BertConfig"``)."""
    kind = getattr(transformers, config or re.split("Model|For|LMHead", model)[0] + "Config")
    found = seeded(getattr(transformers, model), kind(**options))
    with torch.no_grad():
        for weight in found.parameters():
            if weight.dim() > 1:  # fresh weights are so small that blocks hardly change their stream
                weight.mul_(6)
    return found.to(dtype)


def text(name, blocks, model, *, side="right", fed="dict", dtype=torch.float32, layers="auto", **options):
    """Register a model of one stack of blocks that takes ids and an attention mask."""
    words = {torch.bfloat16: ", bf16", torch.float16: ", fp16"}.get(dtype, "")

    @entry(name, f"{fed}, padding on the {side}{words}")
    def make():
        ids, keep = sentences()
        keep = keep if side == "right" else keep.flip(1)
        whole = {"input_ids": ids, "attention_mask": keep.long()}
        given = {
            "dict": whole,
            "tuples": [(kw["input_ids"], kw["attention_mask"]) for _, kw in cut(whole)],
            "loader": DataLoader(TensorDataset(ids, keep.long()), batch_size=SIZE),
            "list of dicts": [kw for _, kw in cut(whole)],
        }[fed]
        names = blocks if isinstance(blocks, list) else numbered(blocks)
        return Case(made(model, dtype=dtype, **options), given, cut(whole), names, keep, layers=layers)


text("BERT", "encoder.layer", "BertModel", **WIDTH, **SMALL)
text("BERT", "encoder.layer", "BertModel", fed="loader", side="left", **WIDTH, **SMALL)
text("BERT", "bert.encoder.layer", "BertForSequenceClassification", dtype=torch.bfloat16, **WIDTH, **SMALL)
text("RoBERTa", "encoder.layer", "RobertaModel", fed="tuples", **WIDTH, **SMALL)
text(
    "DistilBERT", "transformer.layer", "DistilBertModel", fed="tuples",
    dim=16, n_layers=2, n_heads=2, hidden_dim=32, **SMALL,
)  # fmt: skip
text("ALBERT", ["encoder.albert_layer_groups.0"], "AlbertModel", embedding_size=8, **WIDTH, **SMALL)
text("ELECTRA", "encoder.layer", "ElectraModel", embedding_size=8, side="left", **WIDTH, **SMALL)
text(
    "DeBERTa-v2", "encoder.layer", "DebertaV2Model",
    relative_attention=True, pos_att_type=["p2c", "c2p"], **WIDTH, **SMALL,
)  # fmt: skip
text("MPNet", "encoder.layer", "MPNetModel", fed="list of dicts", **WIDTH, **SMALL)
text(
    "GPT-2", "transformer.h", "GPT2LMHeadModel", side="left",
    vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=16, **PLAIN,
)  # fmt: skip
text("GPT-NeoX", "layers", "GPTNeoXModel", **WIDTH, **SMALL, **PLAIN)
text(
    "OPT", "model.decoder.layers", "OPTForCausalLM", side="left",
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=16,
    pad_token_id=1, bos_token_id=None, eos_token_id=None, **SMALL,
)  # fmt: skip
text("Llama", "model.layers", "LlamaForCausalLM", dtype=torch.bfloat16, **WIDTH, **SMALL, **PLAIN)
text("Mistral", "layers", "MistralModel", side="left", sliding_window=3, **WIDTH, **SMALL, **PLAIN, **GROUPED)
text("Qwen2", "layers", "Qwen2Model", dtype=torch.float16, **WIDTH, **SMALL, **PLAIN, num_key_value_heads=1)
text("Qwen3", "model.layers", "Qwen3ForCausalLM", side="left", **WIDTH, **SMALL, **PLAIN, **GROUPED)
text("Gemma", "layers", "GemmaModel", fed="tuples", side="left", **WIDTH, **SMALL, **PLAIN, **GROUPED)
text("Gemma 2", "layers", "Gemma2Model", **WIDTH, **SMALL, **PLAIN, **GROUPED)
text("Phi", "layers", "PhiModel", **WIDTH, **SMALL, **PLAIN)
text("Falcon", "h", "FalconModel", fed="tuples", alibi=False, **WIDTH, **SMALL, **PLAIN)
text("Bloom", "h", "BloomModel", side="left", vocab_size=30, hidden_size=16, n_layer=2, n_head=2, **PLAIN)
text(
    "Mixtral", "layers", "MixtralModel", num_local_experts=3, num_experts_per_tok=2,
    **WIDTH, **SMALL, **PLAIN, **GROUPED,
)  # fmt: skip
text(
    "Mamba", "layers", "MambaModel", vocab_size=30, hidden_size=16, num_hidden_layers=2, state_size=4,
    time_step_rank=2, **PLAIN,
)  # fmt: skip


text(
    "Jamba, blocks of two kinds", "layers", "JambaModel", layers="layers", num_experts=2,
    use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
    expert_layer_offset=1, mamba_d_state=4, num_key_value_heads=1, **WIDTH, **SMALL, **PLAIN,
)  # fmt: skip


@entry("XLNet, `[T, B, D]` inside", "dict, padding on the left")
def xlnet():
    ids, keep = sentences()
    keep = keep.flip(1)
    whole = {"input_ids": ids, "attention_mask": keep.long()}
    model = made("XLNetModel", vocab_size=30, d_model=16, n_layer=2, n_head=2, d_inner=32)
    return Case(model, whole, cut(whole), numbered("layer"), keep, rows=lambda x: x.transpose(0, 1))


@entry("Mixtral's MoE blocks", "dict, padding on the right")
def mixtral_experts():
    ids, keep = sentences()
    whole = {"input_ids": ids, "attention_mask": keep.long()}
    options = {"num_local_experts": 3, "num_experts_per_tok": 2, **WIDTH, **SMALL, **PLAIN, **GROUPED}
    blocks = ["layers.0.mlp", "layers.1.mlp"]
    layers = ["layers.0.mlp:input", *blocks]
    return Case(made("MixtralModel", **options), whole, cut(whole), blocks, keep, layers=layers)


def sequences(name, model, part, container, **options):
    """Register one stream of an encoder-decoder model with a mask of its own for either side."""

    @entry(f"{name}, {part}", "dict, two masks")
    def make():
        ids, keep = sentences()
        target, target_keep = sentences(length=5, seed=1)
        whole = {
            "input_ids": ids,
            "attention_mask": keep.long(),
            "decoder_input_ids": target,
            "decoder_attention_mask": target_keep.long(),
        }
        own = keep if part == "encoder" else target_keep
        return Case(made(model, **options), whole, cut(whole), numbered(container), own, layers="pasted")


T5 = {
    "vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
for part in ("encoder", "decoder"):
    sequences("T5", "T5ForConditionalGeneration", part, f"{part}.block", **T5)
    sequences("BART", "BartForConditionalGeneration", part, f"model.{part}.layers", **BART)
    sequences("mBART", "MBartModel", part, f"{part}.layers", **BART)
    sequences("Marian", "MarianModel", part, f"{part}.layers", **BART)


def pictures(n=N, size=12):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def places(x):
    """``[N, C, H, W]`` as one row per place."""
    return x.flatten(2).mT if x.dim() == 4 else x


def vision(name, blocks, model, *, layers="auto", fed="tensor", size=12, **options):
    """Register a model that takes pictures."""

    @entry(name, fed)
    def make():
        whole = {"pixel_values": pictures(size=size)}
        given = whole["pixel_values"] if fed == "tensor" else whole
        names = blocks if isinstance(blocks, list) else numbered(blocks)
        return Case(made(model, **options), given, cut(whole), names, layers=layers, rows=places)


vision("ViT", "layers", "ViTModel", **VISION)
vision("DeiT", "layers", "DeiTModel", fed="dict", **VISION)
vision(
    "Swin", numbered("encoder.layers"), "SwinModel", size=16,
    image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2,
)  # fmt: skip
vision(
    "ConvNeXt", "encoder.stages", "ConvNextModel", size=16, fed="dict",
    hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2,
)  # fmt: skip
vision(
    "ResNet", "encoder.stages", "ResNetModel", size=16,
    embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
)  # fmt: skip


@entry("CLIP, text", "dict with pictures, padding on the right")
def clip_text():
    return _clip("text_model.encoder.layers")


@entry("CLIP, vision", "dict with text, padding on the right")
def clip_vision():
    return _clip("vision_model.encoder.layers")


def _clip(container):
    ids, keep = sentences()
    whole = {"input_ids": ids, "attention_mask": keep.long(), "pixel_values": pictures()}
    model = made(
        "CLIPModel",
        text_config={**WIDTH, **SMALL, "eos_token_id": 29, "projection_dim": 8},
        vision_config={**VISION, "projection_dim": 8},
        projection_dim=8,
    )
    own = keep if container.startswith("text") else None
    return Case(model, whole, cut(whole), numbered(container), own, layers="pasted")


@entry("Whisper, encoder", "dict")
def whisper_encoder():
    return _whisper("encoder")


@entry("Whisper, decoder", "dict, decoder mask")
def whisper_decoder():
    return _whisper("decoder")


def _whisper(part):
    ids, keep = sentences()
    sound = torch.randn(N, 4, 20, generator=torch.Generator().manual_seed(0))
    whole = {"input_features": sound, "decoder_input_ids": ids, "decoder_attention_mask": keep.long()}
    options = {k: v for k, v in BART.items() if k != "max_position_embeddings"}
    sizes = {"num_mel_bins": 4, "max_source_positions": 10, "max_target_positions": 16}
    model = made("WhisperModel", **options, **sizes)
    own = keep if part == "decoder" else None
    return Case(model, whole, cut(whole), numbered(f"{part}.layers"), own, layers="pasted")


@entry("Wav2Vec2", "tensor")
def wav2vec2():
    sound = torch.randn(N, 200, generator=torch.Generator().manual_seed(0))
    model = made(
        "Wav2Vec2Model", **WIDTH, vocab_size=30, conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 4),
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return Case(model, sound, cut({"input_values": sound}), numbered("encoder.layers"))
