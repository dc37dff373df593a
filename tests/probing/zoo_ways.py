"""Ways in which people change a model or feed it, each on one small model of the zoo."""

import warnings

import torch
import transformers
from models import Tokens
from torch import nn
from torch.utils.data import DataLoader
from zoo import SIZE, Case, cut, entry, numbered, seeded, sentences
from zoo_transformers import PLAIN, SMALL, WIDTH, made

GPT2 = {"vocab_size": 30, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, **PLAIN}


def whole(side="right"):
    ids, keep = sentences()
    keep = keep if side == "right" else keep.flip(1)
    return {"input_ids": ids, "attention_mask": keep.long()}, keep


def bert(**changes):
    """BERT fed with one mapping."""
    batch, keep = whole()
    case = Case(made("BertModel", **WIDTH, **SMALL), batch, cut(batch), numbered("encoder.layer"), keep)
    for name, value in changes.items():
        setattr(case, name, value)
    return case


@entry("BERT", "own loop, keywords")
def own_loop():
    def loop(case, watched):
        with torch.no_grad():
            for args, kwargs in case.calls:
                case.model(*args, **kwargs)

    return bert(loop=loop)


@entry("BERT", "own loop, inference mode, positional arguments")
def own_loop_of_positions():
    def loop(case, watched):
        with torch.inference_mode():
            for _, kwargs in case.calls:
                case.model(kwargs["input_ids"], kwargs["attention_mask"])

    return bert(loop=loop)


@entry("BERT", "own loop, `run(batch)`")
def own_loop_of_batches():
    def loop(case, watched):
        for _, kwargs in case.calls:
            watched.run({**kwargs, "labels": torch.ones(len(kwargs["input_ids"]))})

    return bert(loop=loop)


@entry("BERT", "dict of numpy arrays with token types")
def numpy_arrays():
    case = bert()
    case.given = {
        k: v.numpy() for k, v in {**case.given, "token_type_ids": 0 * case.given["input_ids"]}.items()
    }
    return case


@entry("BERT", "`BatchEncoding`")
def batch_encoding():
    case = bert()
    case.given = transformers.BatchEncoding(case.given)
    return case


@entry("BERT", "ids alone, no mask")
def ids_alone():
    case = bert(keep=None)
    case.given = case.given["input_ids"]
    case.calls = cut({"input_ids": case.given})
    return case


@entry("BERT", "loader of examples, each batch padded to its own length")
def dynamic_padding():
    case = bert()
    examples = [row[kept] for row, kept in zip(case.given["input_ids"], case.keep, strict=True)]
    examples.sort(key=len, reverse=True)

    def collate(rows):
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        keep = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return {"input_ids": ids, "attention_mask": keep}

    case.given = DataLoader(examples, batch_size=SIZE, collate_fn=collate)
    case.calls = [((), batch) for batch in case.given]
    lengths = torch.tensor([len(row) for row in examples])
    case.keep = torch.arange(case.keep.shape[1]) < lengths[:, None]
    return case


@entry("BERT", "dict, scores [B, 1, 1, T] to be added")
def scores():
    case = bert()
    masked = torch.zeros(case.keep.shape).masked_fill(~case.keep, float("-1e9"))[:, None, None]
    case.given["attention_mask"] = masked
    case.calls = cut(case.given)
    return case


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter beside it, as LoRA has."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + 2.0 * self.lora_B(self.lora_A(x))


class Wrapper(nn.Module):
    """What adapters make of a model: it hides two levels down, and its forward names no argument."""

    def __init__(self, model):
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})

    def forward(self, *args, **kwargs):
        return self.base_model["model"](*args, **kwargs)


@entry("LoRA on a Llama", "dict, padding on the left")
def lora():
    batch, keep = whole("left")
    model = made("LlamaForCausalLM", **WIDTH, **SMALL, **PLAIN)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
        layer.self_attn.v_proj = Adapted(layer.self_attn.v_proj)
    return Case(Wrapper(model).eval(), batch, cut(batch), numbered("base_model.model.model.layers"), keep)


@entry("LoRA on a BERT", "tuples, padding on the right")
def lora_of_tuples():
    case = bert()
    for layer in case.model.encoder.layer:
        layer.attention.self.query = Adapted(layer.attention.self.query)
    case.model = Wrapper(case.model).eval()
    case.given = [tuple(kwargs.values()) for _, kwargs in case.calls]
    case.blocks = numbered("base_model.model.encoder.layer")
    return case


@entry("GPT-2, compiled", "dict, padding on the right")
def compiled():
    batch, keep = whole()
    model = made("GPT2Model", **GPT2)
    return Case(torch.compile(model, backend="eager"), batch, cut(batch), numbered("h"), keep, by_hand=model)


@entry("GPT-2, its blocks compiled", "dict, padding on the right")
def compiled_blocks():
    batch, keep = whole()
    model, by_hand = made("GPT2Model", **GPT2), made("GPT2Model", **GPT2)
    for block in model.h:
        block.compile(backend="eager")
    return Case(model, batch, cut(batch), numbered("h"), keep, by_hand=by_hand)


@entry("BERT, quantized dynamically", "dict, padding on the right")
def quantized():
    case = bert()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case.model = torch.ao.quantization.quantize_dynamic(case.model, {nn.Linear}, dtype=torch.qint8)
    return case


@entry("BERT in training mode", "dict, padding on the right")
def in_training_mode():
    case = bert(by_hand=made("BertModel", **WIDTH, **SMALL))
    case.model.train()
    return case


@entry("a model in fp64", "dict, padding in the middle")
def holes():
    ids, keep = sentences(20)
    keep = keep | (torch.arange(keep.shape[1]) == keep.shape[1] - 1)
    batch = {"input_ids": ids, "attention_mask": keep}
    return Case(seeded(Tokens).double(), batch, cut(batch), numbered("layer"), keep)
