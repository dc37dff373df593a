"""Where the stream is inside a block: after attention (or another mixing), before the MLP."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import nn

from rgfast.probing.sharding import class_of

__all__ = ["points_inside"]

_INPUT = ":input"

# The norm between the two branches of a block that normalizes what a branch is given: it is given the stream.
# What a name means depends on whose block it is: elsewhere norms of these names come after the sums, too.
_NORMS_BETWEEN = (
    (
        r"transformers\..*",
        "pre_feedforward_layernorm",
    ),  # Gemma 2
    (r"transformers\..*", "pre_ff_layernorm"),  # Jamba
    (
        r"transformers\..*",
        "post_attention_layernorm",
    ),  # Llama, Mistral, Qwen, GPT-NeoX, Bloom
    (r"transformers\.(?!.*OpenAIGPT|.*\.openai\.).*", "ln_2"),  # GPT-2, GPT-Neo
    (r"transformers\..*", "layernorm_after"),  # ViT, DeiT, Swin
    (r"transformers\..*", "layer_norm2"),  # CLIP, SigLIP
    (r"transformers\..*Dinov2\w*Layer", "norm2"),
    (r"timm\.models\.vision_transformer\.Block", "norm2"),
    (r"torchvision\..*\.EncoderBlock", "ln_2"),
)
# One module per branch and norms of these names either before each branch or after each sum.
_NORMS_OF_BRANCHES = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
_AFTER_SUMS = (
    r"(Bart|Marian|BlenderbotSmall|FSMT|PLBart|Mvp|TrOCR|Informer|TimeSeriesTransformer)(En|De)coderLayer"
)
_BEFORE_BRANCHES = r"(MBart|Pegasus|PegasusX|Blenderbot|M2M100|Whisper|Speech2Text|XGLM)(En|De)coderLayer"
# What says in a block that attention and MLP are given the same stream.
_SIDE_BY_SIDE = ("use_parallel_residual", "parallel_attn", "new_decoder_architecture")
_IS_NORM = r"norm|^ln_"


def points_inside(name: str, block: nn.Module) -> list[str]:
    """The layers, as ``layers=`` takes them, that are the stream between the branches of a block, in order:
    one, or two where a decoder has cross-attention.

    Raises ValueError if attention and MLP are side by side, or the block is of no family that is known.
    """
    kind = class_of(block).__name__
    children = dict(block.named_children())
    sources = (block, getattr(block, "config", None))
    if any(getattr(source, flag, False) is True for source in sources for flag in _SIDE_BY_SIDE):
        raise ValueError(
            f"layers: attention and MLP of {name} ({kind}) are given the same stream, so that it is nowhere "
            "between them; take layers='auto'"
        )
    for rule in _RULES:
        if found := rule(kind, block, children):
            return [f"{name}.{point}" for point in found]
    if sum(bool(re.search(_IS_NORM, child)) for child in children) == 1:
        raise ValueError(
            f"layers: {name} ({kind} of {', '.join(children)}) has one norm, so that it is one branch, or "
            "two that are given the same stream; take layers='auto'"
        )
    raise ValueError(
        f"layers: it is unknown where the stream is between the branches of {name} ({kind} of "
        f"{', '.join(children)}); name the points, '{name}.<norm before the MLP>:input' where a norm is "
        f"given the stream, or '{name}.<norm after attention>' where it gives it"
    )


def _torch(kind: str, block: nn.Module, children: dict[str, nn.Module]) -> list[str]:
    if not isinstance(block, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return []
    norms = ["norm1", "norm2", "norm3"] if "norm3" in children else ["norm1", "norm2"]
    return [n + _INPUT for n in norms[1:]] if block.norm_first else norms[:-1]


def _ours(kind: str, block: nn.Module, children: dict[str, nn.Module]) -> list[str]:
    return ["mix"] if children.keys() >= {"mix", "mlp"} and kind == "Block" else []


def _rows_of_sublayers(kind: str, block: nn.Module, children: dict[str, nn.Module]) -> list[str]:
    """T5 and its kin: a list of modules, each of which adds its branch."""
    layer = children.get("layer")
    if not kind.endswith("T5Block") or not isinstance(layer, nn.ModuleList):
        return []
    return [f"layer.{k}" for k in range(len(layer) - 1)]


def _named_by_branches(kind: str, block: nn.Module, children: dict[str, nn.Module]) -> list[str]:
    norms = [n for n in _NORMS_OF_BRANCHES if n in children]
    before = getattr(block, "do_layer_norm_before", None)  # OPT
    if before is None:
        after = re.fullmatch(_AFTER_SUMS, kind)
        if not after and not re.fullmatch(_BEFORE_BRANCHES, kind):
            return []
        before = not after
    return [n + _INPUT for n in norms[1:]] if before else norms[:-1]


def _sums_inside(kind: str, block: nn.Module, children: dict[str, nn.Module]) -> list[str]:
    """BERT and its kin: the module of attention adds its branch and normalizes the sum."""
    if "layernorm_before" not in children and children.keys() >= {"attention", "intermediate", "output"}:
        return ["attention"]
    if children.keys() >= {"attention", "ffn", "full_layer_layer_norm"}:  # ALBERT
        return ["attention"]
    if children.keys() >= {"rel_attn", "ff"}:  # XLNet
        return ["rel_attn"]
    if "sa_layer_norm" in children:  # DistilBERT
        return ["sa_layer_norm"]
    if re.fullmatch(r"Wav2Vec2\w*EncoderLayer|HubertEncoderLayer\w*|WavLMEncoderLayer\w*", kind):
        return ["final_layer_norm:input"] if "StableLayerNorm" in kind else ["layer_norm"]
    return []


def _groups(kind: str, block: nn.Module, children: dict[str, nn.Module]) -> list[str]:
    """ALBERT's blocks, which are groups of layers."""
    layers = children.get("albert_layers")
    if not isinstance(layers, nn.ModuleList) or len(layers) != 1:
        return []
    return ["albert_layers.0." + p for p in _sums_inside("", layers[0], dict(layers[0].named_children()))]


def _normed_between(kind: str, block: nn.Module, children: dict[str, nn.Module]) -> list[str]:
    if "post_feedforward_layernorm" in children and "pre_feedforward_layernorm" not in children:
        return ["mlp:input"] if "mlp" in children else []  # OLMo 2: both norms are on the branches
    names = [f"{k.__module__}.{k.__qualname__}" for k in type(block).__mro__]
    return [
        norm + _INPUT
        for pattern, norm in _NORMS_BETWEEN
        if norm in children and any(re.fullmatch(pattern, name) for name in names)
    ][:1]


_Rule = Callable[[str, nn.Module, dict[str, nn.Module]], Sequence[str]]
_RULES: tuple[_Rule, ...] = (
    _torch, _ours, _rows_of_sublayers, _named_by_branches, _sums_inside, _groups, _normed_between,
)  # fmt: skip
