"""Plain torch models of the zoo."""

import torch
from models import Block, Tokens
from torch import nn
from zoo import Case, N, T, cut, entry, numbered, seeded, sentences

D = 8


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fed_whole(model, whole, blocks, keep=None, **options):
    """A case that gives the probe one mapping."""
    return Case(model, whole, cut(whole), blocks, keep, **options)


def fed_array(model, x, blocks, **options):
    """A case that gives the probe one array."""
    calls = [((value,), {}) for _, kw in cut({"x": x}) for value in kw.values()]
    return Case(model, x, calls, blocks, **options)


class ConvBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(D, D, 3, padding=1)

    def forward(self, x):
        return x + torch.tanh(self.conv(x))


def blocks_of(kind, *args, depth=2, **options):
    return [kind(*args, **options) for _ in range(depth)]


@entry("Sequential of residual blocks", "[B, D]")
def residual_vectors():
    model = seeded(lambda: nn.Sequential(*blocks_of(Block, D)))
    return fed_array(model, vectors(N, D), numbered(""))


@entry("Sequential of residual blocks", "[B, T, D]")
def residual_sequences():
    model = seeded(lambda: nn.Sequential(*blocks_of(Block, D)))
    return fed_array(model, vectors(N, T, D), numbered(""))


@entry("Sequential of residual blocks", "[B, T, D] with B = T")
def residual_square():
    model = seeded(lambda: nn.Sequential(*blocks_of(Block, D)))
    return fed_array(model, vectors(32, 16, D), numbered(""))


def encoder_layer(kind=nn.TransformerEncoderLayer, **options):
    return kind(D, 2, 16, **{"batch_first": True, **options})


@entry("nn.TransformerEncoder (fast path)", "dict, True is padding")
def torch_encoder():
    _, keep = sentences()
    model = seeded(lambda: nn.TransformerEncoder(encoder_layer(), 2))
    whole = {"src": vectors(N, T, D), "src_key_padding_mask": ~keep}
    return fed_whole(model, whole, numbered("layers"), keep)


@entry("nn.TransformerEncoder, norm first", "tuples, True is padding, padding on the left")
def torch_encoder_of_tuples():
    _, keep = sentences()
    keep = keep.flip(1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoder(
                encoder_layer(norm_first=True), 2, enable_nested_tensor=False
            )
            self.head = nn.Linear(D, 3)

        def forward(self, x, key_padding_mask):
            return self.head(self.encoder(x, src_key_padding_mask=key_padding_mask))

    calls = cut({"x": vectors(N, T, D), "key_padding_mask": ~keep})
    given = [tuple(kw.values()) for _, kw in calls]
    return Case(seeded(Model), given, calls, numbered("encoder.layers"), keep)


@entry("nn.TransformerDecoder", "dict, masks of both sides")
def torch_decoder():
    _, keep = sentences()
    _, memory_keep = sentences(length=5, seed=1)
    model = seeded(lambda: nn.TransformerDecoder(encoder_layer(nn.TransformerDecoderLayer), 2))
    whole = {
        "tgt": vectors(N, T, D),
        "memory": vectors(N, 5, D, seed=1),
        "tgt_key_padding_mask": ~keep,
        "memory_key_padding_mask": ~memory_keep,
    }
    return fed_whole(model, whole, numbered("layers"), keep)


def torch_transformer(part):
    @entry(f"nn.Transformer, {part}", "dict, masks of both sides")
    def make():
        _, keep = sentences()
        _, target_keep = sentences(length=5, seed=1)
        model = seeded(nn.Transformer, D, 2, 2, 2, 16, batch_first=True)
        whole = {
            "src": vectors(N, T, D),
            "tgt": vectors(N, 5, D, seed=1),
            "src_key_padding_mask": ~keep,
            "tgt_key_padding_mask": ~target_keep,
            "memory_key_padding_mask": ~keep,
        }
        own = keep if part == "encoder" else target_keep
        return fed_whole(model, whole, numbered(f"{part}.layers"), own, layers="pasted")


torch_transformer("encoder")
torch_transformer("decoder")


class Recurrent(nn.Module):
    """A block that returns what its recurrence does: the outputs and the last states."""

    def __init__(self, kind):
        super().__init__()
        self.inner = kind(D, D, batch_first=True)

    def forward(self, x):
        y, state = self.inner(x)
        return x + y, state


class Stack(nn.Module):
    """Blocks in a row, each given what the one before it returned first."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


@entry("LSTM stack", "[B, T, D]")
def lstm():
    return fed_array(
        seeded(lambda: Stack(*blocks_of(Recurrent, nn.LSTM))), vectors(N, T, D), numbered("blocks")
    )


@entry("GRU stack", "[B, T, D]")
def gru():
    return fed_array(
        seeded(lambda: Stack(*blocks_of(Recurrent, nn.GRU))), vectors(N, T, D), numbered("blocks")
    )


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.tokens, self.channels = nn.LayerNorm(D), Block(T), Block(D)

    def forward(self, x):
        return self.channels(self.tokens(self.norm(x).mT).mT)


@entry("MLP-Mixer", "[B, T, D]")
def mixer():
    return fed_array(seeded(lambda: Stack(*blocks_of(Mixer))), vectors(N, T, D), numbered("blocks"))


def feature_maps(x):
    return x.flatten(2).mT


@entry("stack of convolutions", "[B, C, H, W]")
def convolutions():
    model = seeded(lambda: nn.Sequential(*blocks_of(ConvBlock)))
    return fed_array(model, vectors(N, D, 4, 3), numbered(""), rows=feature_maps)


@entry("stack of convolutions", "[B, C, H, W] with H = C, in channels-last memory")
def channels_last_memory():
    model = seeded(lambda: nn.Sequential(*blocks_of(ConvBlock))).to(memory_format=torch.channels_last)
    x = vectors(N, D, D, 3).to(memory_format=torch.channels_last)
    return fed_array(model, x, numbered(""), rows=feature_maps)


class Universal(nn.Module):
    """One block that runs three times."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, D)
        self.block = nn.ModuleList([encoder_layer()])

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        for _ in range(3):
            x = self.block[0](x, src_key_padding_mask=attention_mask == 0)
        return x


@entry("universal transformer (a shared block)", "dict, padding on the right")
def universal():
    ids, keep = sentences()
    whole = {"input_ids": ids, "attention_mask": keep.long()}
    return fed_whole(seeded(Universal), whole, ["block.0"], keep)


class Experts(nn.Module):
    """A block that sends tokens to one of two experts; inside, its rows are ``[B·T, D]``."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(D, 2), nn.ModuleList(blocks_of(Block, D))

    def forward(self, x):
        rows = x.flatten(0, 1)
        chosen = self.router(rows).softmax(-1)
        mixed = sum(chosen[:, k : k + 1] * expert(rows) for k, expert in enumerate(self.experts))
        return x + mixed.unflatten(0, x.shape[:2])


@entry("mixture of experts", "dict, padding on the right")
def experts():
    ids, keep = sentences(20)
    model = seeded(Tokens)
    model.layer = seeded(lambda: nn.ModuleList(blocks_of(Experts)))
    whole = {"input_ids": ids, "attention_mask": keep.float()}
    return fed_whole(model, whole, numbered("layer"), keep)


class Whole(nn.Module):
    """Takes the whole batch as one mapping."""

    def __init__(self):
        super().__init__()
        self.inner = Tokens()

    def forward(self, batch):
        return self.inner(batch["input_ids"], batch["attention_mask"])


@entry("a forward of one mapping", "list of dicts, padding on the left")
def takes_a_mapping():
    ids, keep = sentences(20)
    whole = {"input_ids": ids, "attention_mask": keep.flip(1)}
    calls = cut(whole)
    given = [kw for _, kw in calls]
    return Case(seeded(Whole), given, [((kw,), {}) for kw in given], numbered("inner.layer"), keep.flip(1))


class Keywords(nn.Module):
    """Takes the batch as keywords."""

    def __init__(self):
        super().__init__()
        self.inner = Tokens()

    def forward(self, **batch):
        return self.inner(batch["input_ids"])


@entry("a forward of keywords", "dict, scores to be added")
def takes_keywords():
    ids, keep = sentences(20)
    scores = torch.zeros(N, 1, 1, T).masked_fill(~keep[:, None, None], torch.finfo(torch.float32).min)
    whole = {"input_ids": ids, "attention_mask": scores}
    return fed_whole(seeded(Keywords), whole, numbered("inner.layer"), keep)


@entry("mixture of experts, an expert of flattened rows", "dict, padding on the right")
def one_expert():
    case = experts()
    case.blocks = ["layer.0.experts.0", "layer.1.experts.0"]
    case.layers = ["layer.0.experts.0:input", *case.blocks]
    case.rows = lambda x: x.unflatten(0, (-1, T))
    return case


@entry("nn.TransformerEncoder, batch_first=False", '[T, B, D], `axes="T N D"`')
def sequence_first():
    model = seeded(
        lambda: nn.TransformerEncoder(encoder_layer(batch_first=False), 2, enable_nested_tensor=False)
    )
    batches = list(vectors(N, T, D).split(16))
    batches = [x.transpose(0, 1).contiguous() for x in batches]
    calls = [((x,), {}) for x in batches]
    options = {"axes": "T N D"}
    return Case(model, batches, calls, numbered("layers"), rows=lambda x: x.transpose(0, 1), options=options)


class Last(nn.Module):
    """A convolution of a stream whose channels stand last, as in ConvNeXt."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(D, D, 3, padding=1), nn.LayerNorm(D)

    def forward(self, x):
        return x + self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


@entry("stack of convolutions, channels last", '[B, H, W, C], `axes="N H W D"`')
def channels_last():
    model = seeded(lambda: nn.Sequential(*blocks_of(Last)))
    options = {"axes": "N H W D"}
    return fed_array(
        model, vectors(N, 4, 3, D), numbered(""), rows=lambda x: x.flatten(1, 2), options=options
    )


@entry("blocks of several widths", "[B, T, D]")
def widths():
    class Wider(nn.Module):
        def __init__(self, into, out):
            super().__init__()
            self.inner, self.block = nn.Linear(into, out), Block(out)

        def forward(self, x):
            return self.block(self.inner(x))

    model = seeded(lambda: nn.Sequential(Wider(D, 12), Wider(12, 5)))
    return fed_array(model, vectors(N, T, D), numbered(""))
