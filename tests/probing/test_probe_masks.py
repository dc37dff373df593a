"""Every kind of padding mask leaves out exactly the padding, or is refused, or the result says so."""

import numpy as np
import pytest
import torch
from models import Block, Tokens, seeded
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rgfast

B, T = 60, 7
GENERATOR = torch.Generator().manual_seed(1)
IDS = torch.randint(20, (B, T), generator=GENERATOR)
LENGTHS = torch.randint(1, T + 1, (B,), generator=GENERATOR)
KEEP = torch.arange(T) < LENGTHS[:, None]
LEFT = KEEP.flip(1)


def rank_of(rows):
    """The effective rank of rows by LAPACK."""
    sigma = torch.linalg.svdvals((rows - rows.mean(0)).double())
    p = sigma / sigma.sum()
    return float(torch.special.entr(p).sum().exp())


def stream(model, ids=IDS):
    """The rows of every layer ``[L, B, T, D]``."""
    with torch.no_grad():
        x = model.embedding(ids)
        rows = [x]
        for block in model.layer:
            rows.append(block(rows[-1]))
    return torch.stack(rows)


def assert_pooled(result, rows, keep):
    """The pooled ranks and numbers of rows are those of the rows that are kept."""
    assert int(result.dataset.n.sel(view="pooled").max()) == int(keep.sum())
    want = [rank_of(x[keep]) for x in rows]
    assert result.order_parameter("pooled").values == pytest.approx(want, rel=1e-6)


def probe(model, batches, **options):
    return rgfast.probe(model, batches, progress=False, **options)


def added(keep, value):
    return torch.zeros(keep.shape).masked_fill(~keep, value)


KINDS = {
    "long": lambda keep: keep.long(),
    "bool": lambda keep: keep,
    "uint8": lambda keep: keep.to(torch.uint8),
    "float of 0 and 1": lambda keep: keep.float(),
    "-1e9": lambda keep: added(keep, -1e9),
    "-1e4": lambda keep: added(keep, -1e4),
    "-inf": lambda keep: added(keep, float("-inf")),
    "fp32 least": lambda keep: added(keep, torch.finfo(torch.float32).min),
    "fp16": lambda keep: added(keep, -65504.0).half(),
    "bf16": lambda keep: added(keep, torch.finfo(torch.bfloat16).min).bfloat16(),
    "[B, 1, 1, T]": lambda keep: added(keep, -1e9)[:, None, None],
    "[B, 1, 1, T] bool": lambda keep: keep[:, None, None],
    "[B, 1, T]": lambda keep: keep[:, None],
    "[B, 1, T, T] causal": lambda keep: (keep[:, None] & torch.ones(T, T, dtype=torch.bool).tril())[:, None],
    "numpy": lambda keep: keep.numpy(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [KEEP, LEFT], ids=["right", "left"])
def test_kinds_of_attention_mask(kind, side):
    model = seeded(Tokens)
    mask = KINDS[kind](side)
    for batches in ({"input_ids": IDS, "attention_mask": mask}, [{"input_ids": IDS, "attention_mask": mask}]):
        assert_pooled(probe(model, batches), stream(model), side)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.full((B, T), 0.3), r"attention_mask must hold 0 \(counts\) and -10000 or less .* got 0\.3"),
        (added(KEEP, -5.0), r"attention_mask must hold 0 .* got -5"),
        (torch.zeros(B, T).fill_(float("nan")), "attention_mask must hold 0 .* got nan"),
        (
            KEEP.long()[:, :5],
            r"attention_mask must be \[60, 7\], as layer 'layer.0:input' is, got shape \[60, 5\]",
        ),
        (KEEP.long()[:, :, None, None, None], "attention_mask must be"),
    ],
)
def test_masks_that_say_nothing_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        probe(seeded(Tokens), [{"input_ids": IDS, "attention_mask": mask}])


def test_float_masks_without_padding_count_everything():
    batches = [
        {"input_ids": IDS[:20], "attention_mask": torch.zeros(20, T)},
        {"input_ids": IDS[20:], "attention_mask": added(KEEP[20:], -1e9)},
    ]
    keep = KEEP.clone()
    keep[:20] = True
    model = seeded(Tokens)
    assert_pooled(probe(model, batches), stream(model), keep)


@pytest.mark.parametrize("name", ["src_key_padding_mask", "key_padding_mask", "padding_mask"])
def test_true_is_padding_in_torch_nn(name):
    class Net(Tokens):
        def forward(self, input_ids, **masks):
            return self.stream(input_ids)

    model = seeded(Net)
    assert_pooled(probe(model, [{"input_ids": IDS, name: ~KEEP}]), stream(model), KEEP)
    assert_pooled(probe(model, [{"input_ids": IDS, name: added(KEEP, float("-inf"))}]), stream(model), KEEP)
    with pytest.raises(ValueError, match=f"{name} must be bool .* got int64"):
        probe(model, [{"input_ids": IDS, name: (~KEEP).long()}])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformer_encoder_and_its_nested_fast_path():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
            self.enc = nn.TransformerEncoder(layer, 3)

        def forward(self, x, src_key_padding_mask=None):
            return self.enc(x, src_key_padding_mask=src_key_padding_mask)

    model = seeded(Net)
    x = torch.randn(B, T, 16, generator=GENERATOR)
    order = LENGTHS.argsort(descending=True)
    keep, x = KEEP[order], x[order]
    rows = []
    handles = [
        layer.register_forward_hook(lambda module, args, out: rows.append(out)) for layer in model.enc.layers
    ]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            model(x, ~keep)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
        for handle in handles:
            handle.remove()
    # The second batch is shorter than its mask once padding is gone.
    short = int((keep.sum(1) < T).nonzero()[0])
    parts = [slice(0, short), slice(short, B)]
    batches = [{"x": x[part], "src_key_padding_mask": ~keep[part]} for part in parts]
    result = probe(model, batches)
    assert int(result.dataset.n.sel(view="pooled").max()) == int(keep.sum())
    want = [rank_of(y[keep]) for y in (x, *rows)]
    assert result.order_parameter("pooled").values == pytest.approx(want, rel=1e-5)
    assert model.training is False


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_batches(layout):
    model = seeded(lambda: nn.Sequential(Block(), Block()))
    sequences = [torch.randn(int(n), 8, generator=GENERATOR) for n in LENGTHS]
    batches = [torch.nested.nested_tensor(sequences[at : at + 20], layout=layout) for at in (0, 20, 40)]
    flat = torch.cat(sequences)
    with torch.no_grad():
        rows = [flat, model[0](flat), model(flat)]
    result = probe(model, batches)
    assert result.dataset.attrs["sequences"] == B
    assert result.order_parameter("pooled").values == pytest.approx([rank_of(x) for x in rows], rel=1e-6)
    padded = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    want = probe(model, {"input": padded, "attention_mask": KEEP})
    for view in result.views:
        np.testing.assert_allclose(
            result.order_parameter(view).values, want.order_parameter(view).values, rtol=1e-6
        )


class Dict(Tokens):
    def forward(self, features):
        return {**features, "token_embeddings": self.stream(features["input_ids"])}


class Keywords(Tokens):
    def forward(self, **batch):
        return self.stream(batch["input_ids"])


class Other(Tokens):
    """Its keywords have another name."""

    def forward(self, input_ids, **rest):
        return self.stream(input_ids)


FEATURES = {"input_ids": IDS, "attention_mask": KEEP.long()}


@pytest.mark.parametrize("kind", [Dict, Keywords, Other])
@pytest.mark.parametrize("form", ["mapping", "in a list", "in a tuple", "with labels", "own loop"])
def test_models_that_take_a_whole_batch(kind, form):
    model = seeded(kind)
    if form == "own loop":
        with torch.no_grad(), rgfast.Probe(model, progress=False) as p:
            model(FEATURES) if kind is Dict else model(**FEATURES)
        result = p.result()
    else:
        batch = {
            "mapping": FEATURES,
            "in a list": [FEATURES],
            "in a tuple": [(FEATURES,)],
            "with labels": [(FEATURES, torch.zeros(B))],
        }[form]
        result = probe(model, batch)
    assert_pooled(result, stream(model), KEEP)


def test_a_second_item_that_is_a_mask_is_passed_and_read():
    model = seeded(Tokens)
    loader = DataLoader(TensorDataset(IDS, KEEP.long()), batch_size=16)
    result = probe(model, loader)
    assert_pooled(result, stream(model), KEEP)
    assert model.mask is not None
    assert result.notes == ()


def test_a_second_item_of_a_model_without_masks_is_read_and_said():
    model = seeded(lambda: nn.Sequential(Block(), Block()))
    x = torch.randn(B, T, 8, generator=GENERATOR)
    result = probe(model, DataLoader(TensorDataset(x, KEEP.long()), batch_size=16))
    assert int(result.dataset.n.sel(view="pooled").max()) == int(KEEP.sum())
    assert len(result.notes) == 1
    assert "item 1 of a batch was read as a padding mask (1 counts)" in result.notes[0]
    everything = probe(model, DataLoader(TensorDataset(x, KEEP.long()), batch_size=16), padding=None)
    assert int(everything.dataset.n.sel(view="pooled").max()) == B * T
    assert everything.notes == ()


@pytest.mark.parametrize("labels", [torch.arange(B) % 2, (IDS > 9).long(), IDS, torch.rand(B, T)])
def test_a_second_item_that_is_no_mask_is_left_alone(labels):
    model = seeded(Tokens)
    result = probe(model, [(IDS, labels)])
    assert_pooled(result, stream(model), torch.ones_like(KEEP))
    assert result.notes == ()


def test_entries_that_look_like_masks_are_not_dropped_in_silence():
    model = seeded(Other)
    result = probe(model, [{"input_ids": IDS, "mask": KEEP}] * 2)
    assert_pooled(result, stream(model, torch.cat([IDS, IDS])), torch.ones_like(torch.cat([KEEP, KEEP])))
    assert len(result.notes) == 1
    assert "the entry 'mask' was not read as padding" in result.notes[0]
    assert_pooled(probe(model, [{"input_ids": IDS, "mask": KEEP}], padding="mask"), stream(model), KEEP)
    assert probe(model, [{"input_ids": IDS, "mask": KEEP}], padding=None).notes == ()
    labels = {"labels": (IDS > 9), "token_type_ids": KEEP, "special_tokens_mask": KEEP, "text": ["a"] * B}
    assert probe(model, [{"input_ids": IDS, **labels}]).notes == ()


class Required(Tokens):
    """Requires its mask, so that of a tuple it is passed by position."""

    def forward(self, tokens, key_padding_mask):
        return self.stream(tokens)


def test_a_mask_that_was_read_is_not_said_to_be_unread():
    result = probe(seeded(Required), [(IDS, ~KEEP)])
    assert_pooled(result, stream(seeded(Required)), KEEP)
    assert result.notes == ()


class HandsOn(nn.Module):
    """What adapters make of a model: a forward that names no argument, of a model one or two levels down."""

    def __init__(self, model, name):
        super().__init__()
        self.add_module(name, model)
        self.name = name

    def forward(self, *args, **kwargs):
        return getattr(self, self.name)(*args, **kwargs)


WRAPPED = {
    "adapter": lambda model: HandsOn(HandsOn(model, "model"), "base_model"),
    "data parallel": nn.DataParallel,
    "of another name": lambda model: HandsOn(model, "its_own"),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("side", [KEEP, LEFT], ids=["right", "left"])
def test_masks_by_position_through_a_wrapper(wrapper, side):
    model = WRAPPED[wrapper](seeded(Tokens)).eval()
    rows = stream(seeded(Tokens))
    result = probe(model, [(IDS, side.long())])
    assert_pooled(result, rows, side)
    said = ["item 1 of a batch was read as a padding mask" in note for note in result.notes]
    assert said == ([True] if wrapper == "of another name" else [])
    with rgfast.Probe(model, progress=False) as watched, torch.no_grad():
        model(IDS, side.long())
    assert_pooled(watched.result(), rows, side)
    assert_pooled(probe(model, [(IDS,)]), rows, torch.ones_like(KEEP))
    assert_pooled(probe(model, {"input_ids": IDS, "attention_mask": side}), rows, side)


@pytest.mark.parametrize("name", ["memory_key_padding_mask", "cross_attention_mask", "global_attention_mask"])
def test_a_mask_of_no_layers_rows_is_left_alone(name):
    for mask in (KEEP, KEEP.long()):
        result = probe(seeded(Tokens), [{"input_ids": IDS, name: mask, "attention_mask": KEEP}])
        assert_pooled(result, stream(seeded(Tokens)), KEEP)
        assert result.notes == ()


class Seq2Seq(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.encoder = nn.ModuleList([Block(), Block()])
        self.decoder = nn.ModuleList([Block(), Block()])

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None):
        x, y = self.embedding(input_ids), self.embedding(decoder_input_ids)
        for block in self.encoder:
            x = block(x)
        for block in self.decoder:
            y = block(y)
        return x.sum() + y.sum()


@pytest.mark.parametrize("length", [T, 4])
def test_encoders_and_decoders_have_their_own_masks(length):
    model = seeded(Seq2Seq)
    own = torch.arange(length) < torch.randint(1, length + 1, (B, 1), generator=GENERATOR)
    ids = torch.randint(20, (B, length), generator=GENERATOR)
    batch = {
        "input_ids": IDS,
        "attention_mask": KEEP,
        "decoder_input_ids": ids,
        "decoder_attention_mask": own,
    }
    for layers, keep in (("encoder", KEEP), ("decoder", own), ("decoder.*", own)):
        found = probe(model, [batch], layers=layers)
        assert int(found.dataset.n.sel(view="pooled").max()) == int(keep.sum())
    both = probe(model, [batch], layers=["encoder.*", "decoder.*"], pairs="all")
    data = both.dataset.sel(view="pooled")
    assert [int(n) for n in data.n_by_layer.sel(position=-1)] == [int(KEEP.sum())] * 2 + [int(own.sum())] * 2
    cka = data.cka.sel(position=-1).values
    assert np.isfinite([cka[0, 1], cka[2, 3]]).all()
    assert np.isnan(cka[1, 2])
    # Sequences are the same in both, so their means can be compared.
    assert np.isfinite(both.dataset.cka.sel(view="mean_pooled", position=-1).values).all()
    del batch["decoder_attention_mask"]
    alone = probe(model, [batch], layers="decoder")
    assert int(alone.dataset.n.sel(view="pooled").max()) == B * length
    assert "attention_mask is of the encoder" in alone.notes[0]
    named = probe(model, [{**batch, "mine": own}], layers="decoder", padding={"decoder.*": "mine"})
    assert int(named.dataset.n.sel(view="pooled").max()) == int(own.sum())


def test_a_text_mask_never_touches_pictures():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(20, 8)
            self.text_model = nn.ModuleList([Block(), Block()])
            self.vision_model = nn.ModuleList([Block(), Block()])

        def forward(self, input_ids, pixel_values, attention_mask=None):
            x, y = self.embedding(input_ids), pixel_values
            for text, vision in zip(self.text_model, self.vision_model, strict=True):
                x, y = text(x), vision(y)
            return x.mean(1) + y.mean(1)

    model = seeded(Towers)
    for places in (T, 9):
        patches = torch.randn(B, places, 8, generator=GENERATOR)
        batch = {"input_ids": IDS, "pixel_values": patches, "attention_mask": KEEP.long()}
        result = probe(model, [batch], layers=["text_model.*", "vision_model.*"])
        number = result.dataset.n_by_layer.sel(view="pooled", position=-1).values.tolist()
        assert number == [int(KEEP.sum())] * 2 + [B * places] * 2


def test_padding_options_are_checked():
    model = seeded(Tokens)
    with pytest.raises(TypeError, match="padding must be 'auto', the name of a batch entry, None"):
        probe(model, [FEATURES], padding=3)
    with pytest.raises(
        TypeError, match="got Tensor; let the batches hold the mask and give its entry's name"
    ):
        probe(model, [FEATURES], padding=torch.ones(B, 3))
    with pytest.raises(
        ValueError, match=r"padding: no layer matches 'decoder\.\*', the layers are layer.0:input"
    ):
        probe(model, [FEATURES], padding={"decoder.*": None})
    with pytest.raises(ValueError, match="padding: there is no entry 'mine' in the batch"):
        probe(model, [FEATURES], padding="mine")
    assert_pooled(probe(model, [FEATURES], padding=None), stream(model), torch.ones_like(KEEP))
    assert_pooled(probe(model, [FEATURES], padding={"layer.*": None}), stream(model), torch.ones_like(KEEP))


def test_what_forward_takes_is_said():
    class Strange(Tokens):
        def forward(self, a, b=None):
            return self.stream(a)

    with pytest.raises(ValueError, match=r"Strange\.forward takes a, b, and the batch holds ids, keep"):
        probe(seeded(Strange), [{"ids": IDS, "keep": KEEP}])
    with pytest.raises(
        ValueError, match=r"Dict\.forward takes features, and the batch holds ids; given the whole"
    ):
        probe(seeded(Dict), [{"ids": IDS}])


def test_masks_and_targets_are_no_padding():
    model = seeded(Other)
    hidden = torch.rand(B, T, generator=GENERATOR) < 0.3
    result = probe(model, [{"input_ids": IDS, "attention_mask": KEEP, "pad_mask": hidden}], mask="pad_mask")
    assert int(result.dataset.n.sel(view="visible").sum()) == int((KEEP & ~hidden).sum())
    assert result.notes == ()


def test_shuffled_batches_and_targets_in_order():
    model = seeded(lambda: nn.Sequential(Block(), Block()))
    x = torch.randn(400, 3, 8, generator=GENERATOR)
    y = x.mean(1)
    with pytest.raises(
        ValueError, match=r"targets\['y'\] must be in the order .* shuffles them \(RandomSampler\)"
    ):
        probe(model, DataLoader(x, batch_size=50, shuffle=True), targets={"y": y})
    options = {"views": ["mean_pooled"], "progress": False}
    want = rgfast.probe(model, DataLoader(x, batch_size=50), targets={"y": y}, **options)
    pairs = DataLoader(TensorDataset(x, y), batch_size=50, shuffle=True)
    batches = [{"input": a, "y": b} for a, b in pairs]
    got = rgfast.probe(model, batches, targets={"y": "y"}, **options)
    np.testing.assert_allclose(got.target_r2("y"), want.target_r2("y"), atol=0.05)
    assert float(want.target_r2("y")[0]) > 0.99
