"""Checks of the probe on masks of every kind, batches of every form and axes of every order.

As in ``ops.py``, but a check draws a model and how it is fed. Tensors name their dtype and device, so that
PyTorch's defaults may be anything.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import truths
from judging import ILL, excess, refused
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rgfast

DTYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)
MEASURES = ("effective_rank", "participation_ratio", "kernel_drift", "cka")
LAYOUTS = ("N D", "N T D", "T N D", "N D T", "T D N", "N D H W", "N H W D", "H W N D", "N D X Y Z")
WORDS = 11


class Block(nn.Module):
    """Adds a function of each position to it; ``last`` and ``back`` permute its axes to features last."""

    def __init__(self, draw, width, dtype, last=None, back=None):
        super().__init__()
        weight = torch.from_numpy(draw.normal(width, width)).to(dtype)
        self.inner = nn.Linear(width, width, bias=False, device="cpu", dtype=dtype)
        self.inner.weight = nn.Parameter(weight * draw.choose((0.1, 1.0)))
        self.last, self.back = last, back

    def forward(self, x):
        y = x if self.last is None else x.permute(self.last)
        y = torch.tanh(self.inner(y))
        return x + (y if self.back is None else y.permute(self.back))


class Tokens(nn.Module):
    """Ids through blocks. What its forward takes is a subclass's to say."""

    def __init__(self, draw, width, dtype):
        super().__init__()
        weight = torch.from_numpy(draw.normal(WORDS, width)).to(dtype)
        self.embedding = nn.Embedding(WORDS, width, _weight=weight, device="cpu", dtype=dtype)
        self.blocks = nn.ModuleList([Block(draw, width, dtype) for _ in range(draw.choose((1, 2, 3)))])

    def stream(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return x


class TakesIds(Tokens):
    def forward(self, input_ids):
        return self.stream(input_ids)


class TakesMask(Tokens):
    def forward(self, input_ids, attention_mask=None, labels=None):
        return self.stream(input_ids)


class RequiresMask(Tokens):
    def forward(self, tokens, key_padding_mask):
        return self.stream(tokens)


class TakesBatch(Tokens):
    def forward(self, batch):
        return self.stream(batch["input_ids"])


class TakesKeywords(Tokens):
    def forward(self, **batch):
        return self.stream(batch["input_ids"])


@dataclass
class Mask:
    """An entry that says which of ``[B, T]`` positions count, and the ``padding=`` to give."""

    name: str
    value: torch.Tensor
    kind: str
    padding: str = "auto"


def kept(draw, b, t):
    """Which positions count, ``[b, t]`` bool, and where the padding is."""
    side = draw.choose(("right", "right", "left", "holes", "both ends", "none", "all of some"))
    column = np.arange(t)
    length = draw.rng.integers(1, t + 1, (b, 1))
    if side in ("right", "left"):
        keep = column < length
        keep = keep if side == "right" else keep[:, ::-1]
    elif side == "both ends":
        start = (draw.rng.random((b, 1)) * (t - length + 1)).astype(int)
        keep = (column >= start) & (column < start + length)
    elif side == "none":
        keep = np.ones((b, t), dtype=bool)
    else:
        keep = draw.rng.random((b, t)) < 0.7
        if side == "all of some":
            keep[draw.rng.random(b) < 0.3] = False
        else:
            keep[np.arange(b), draw.rng.integers(0, t, b)] = True
    return torch.from_numpy(keep.copy()), side


def added(draw, keep):
    """Scores that are added: 0 counts."""
    dtype = draw.choose((torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64))
    least = draw.choose((-1e4, -1e9, float("-inf"), torch.finfo(dtype).min))
    least = max(least, torch.finfo(dtype).min) if least != float("-inf") else least
    return torch.zeros(keep.shape, dtype=dtype, device="cpu").masked_fill(~keep, least)


def mask_of(draw, keep, side):
    """A mask of some kind that says ``keep``."""
    kinds = ["whole numbers", "bool", "scores", "true is padding", "named"]
    kinds += ["floats of 0 and 1"] if side != "all of some" else []
    kind, name, padding = draw.choose(kinds), "attention_mask", "auto"
    if kind == "whole numbers":
        value = keep.to(draw.choose((torch.int64, torch.int64, torch.int32, torch.uint8)))
    elif kind == "bool":
        value = keep
    elif kind == "floats of 0 and 1":
        value = keep.to(draw.choose((torch.float32, torch.float64, torch.bfloat16)))
    elif kind == "scores":
        value = added(draw, keep)
    elif kind == "named":
        name = padding = draw.choose(("valid", "is_real", "weights"))
        value = keep if draw.chance(0.5) else keep.to(torch.int64)
    else:
        name = draw.choose(("key_padding_mask", "src_key_padding_mask", "padding_mask", "pad_mask"))
        value = ~keep if draw.chance(0.7) else added(draw, keep)
    shape = draw.choose(("[B, T]", "[B, T]", "[B, 1, 1, T]", "[B, 1, T]", "[B, 1, T, T]"))
    if kind in ("named", "true is padding"):
        shape = "[B, T]"
    b, t = keep.shape
    if shape == "[B, 1, T]":
        value = value[:, None]
    elif shape == "[B, 1, 1, T]":
        value = value[:, None, None]
    elif shape == "[B, 1, T, T]":
        value = value[:, None, None].expand(b, 1, t, t)
    return Mask(name, value, kind, padding)


def plain(values):
    """Without the layouts and dtypes that numpy lacks."""
    return {k: v if v.dtype == torch.bfloat16 else v.numpy() for k, v in values.items()}


def parts(draw, values, size):
    """Batches of ``size`` rows, or of odd sizes, some of them of one row."""
    b = len(next(iter(values.values())))
    if draw.chance(0.5):
        cuts = list(range(size, b, size))
    else:
        cuts = sorted({int(c) for c in draw.rng.integers(1, b + 1, draw.choose((1, 2, 5)))} - {b})
    edges = [0, *cuts, b]
    return [{k: v[i:j] for k, v in values.items()} for i, j in pairwise(edges)]


def fed(draw, ids, mask, side):
    """The class of a model, what the probe is given with its batch size, the ids of every forward, and
    whether the batches go through a loop of one's own."""
    b, size = len(ids), int(draw.rng.integers(1, len(ids) + 1))
    whole = {"input_ids": ids, mask.name: mask.value}
    pieces = parts(draw, whole, size)
    by_size = list(ids.split(size))
    forms = ["mapping", "mapping of numpy", "mappings", "takes a mapping", "takes keywords", "own loop"]
    ends = side in ("right", "left", "none") and ids.shape[1] >= 2
    if mask.value.dim() == 2 and ends and mask.kind in ("whole numbers", "bool"):
        forms += ["tuples", "loader", "lists"]
    if mask.value.dim() == 2 and mask.kind == "true is padding":
        forms += ["required mask"]
    form, extra = draw.choose(forms), {"labels": torch.from_numpy(draw.rng.integers(0, 2, b))}
    model = TakesMask if mask.name == "attention_mask" or draw.chance(0.3) else TakesIds
    if form == "mapping":
        return model, {**whole, **(extra if draw.chance(0.3) else {})}, size, by_size, False
    if form == "mapping of numpy":
        return model, plain(whole), size, by_size, False
    of_pieces = [piece["input_ids"] for piece in pieces]
    if form in ("tuples", "lists"):
        kind = tuple if form == "tuples" else list
        return TakesMask, [kind(piece.values()) for piece in pieces], 1, of_pieces, False
    if form == "loader" and torch.get_default_device().type == "cpu":  # DataLoader makes its seed by default
        loader = DataLoader(TensorDataset(ids, mask.value), batch_size=size)
        return TakesMask, loader, 1, by_size, False
    if form == "required mask":
        return RequiresMask, [tuple(piece.values()) for piece in pieces], 1, of_pieces, False
    taken = {"takes a mapping": TakesBatch, "takes keywords": TakesKeywords}.get(form, model)
    return taken, pieces, 1, of_pieces, form == "own loop"


def by_hand(model, batches):
    """What goes into the first block and comes out of each, from the same batches."""
    each = []
    with torch.no_grad():
        for ids in batches:
            rows = [model.embedding(ids)]
            for block in model.blocks:
                rows.append(block(rows[-1]))
            each.append(rows)
    return [torch.cat(rows) for rows in zip(*each, strict=True)]


def judged(result, layers, keep, position):
    """The largest error of the pooled, position and mean-pooled views in units of what is allowed."""
    weight = keep.double() / keep.sum(1, keepdim=True).clamp_min(1)
    last = keep.to(torch.int64).cumsum(1).argmax(1)
    has = keep.any(1)
    at_last = [x[torch.arange(len(x), device="cpu"), last] for x in layers]
    wanted = {
        ("pooled", -1): [x[keep] for x in layers],
        ("mean_pooled", -1): [(x.double() * weight[..., None]).sum(1)[has] for x in layers],
        ("position", position): [x[:, position][keep[:, position]] for x in layers],
    }
    if keep.shape[1] - 1 != position:
        wanted["position", keep.shape[1] - 1] = [x[has] for x in at_last]
    worst = 0.0
    for (view, t), rows in wanted.items():
        found = result.dataset.sel(view=view, position=t)
        assert int(found.n) == len(rows[0]), (view, t, int(found.n), len(rows[0]))
        worst = max(worst, _cloud(found, [x.double().numpy() for x in rows], f"{view} {t}"))
    return worst


def _cloud(found, rows, what):
    n = len(rows[0])
    if n < 2:
        return 0.0
    sigmas = [truths.sigma(x) for x in rows]
    ranks = np.array([truths.rank_of(s) for s in sigmas])
    # A mean of fp64 rows is rounded on either side, so a constant may vary in its last bit.
    scale = [max(np.abs(x).max(), 1e-300) for x in rows]
    live = np.array([s[0] > 1e-12 * m * n**0.5 for s, m in zip(sigmas, scale, strict=True)])
    got = found.effective_rank.values
    worst = excess(got[live], ranks[live], 1e-6 * ranks[live], f"{what} rank")
    ratio = np.array([truths.energy_ratio(s) for s in sigmas])
    got = found.participation_ratio.values
    worst = max(worst, excess(got[live], ratio[live], 1e-9 * ratio[live], f"{what} ratio"))
    for name, debiased in (("kernel_drift", False), ("cka", True)):
        if debiased and n < 4:
            continue
        value = found[name].values
        value = value.diagonal(1) if debiased else value
        for k, (x, y) in enumerate(pairwise(rows)):
            want, magnified = (truths.cka if debiased else truths.drift)(x, y, debiased)
            if live[k] and live[k + 1] and magnified <= ILL:
                allowed = 1e-12 * magnified + 1e-12
                worst = max(worst, excess(value[k : k + 1], [want], allowed, f"{what} {name}"))
    return worst


def mask_kinds(draw):
    b, t, width = draw.count(33) + 1, draw.choose((1, 2, 3, 5, 8)), draw.choose((1, 2, 3, 5, 9, 16))
    keep, side = kept(draw, b, t)
    mask = mask_of(draw, keep, side)
    ids = torch.from_numpy(draw.rng.integers(0, WORDS, (b, t)))
    kind, given, size, batches, loop = fed(draw, ids, mask, side)
    model = kind(draw, width, draw.choose(DTYPES))
    position = int(draw.rng.integers(max(1, t - 1)))  # the last column stands for each sequence's last token
    options = {
        "padding": mask.padding, "measures": MEASURES, "pairs": "all", "progress": False,
        "positions": [position, "last"] if t > 1 else [0], "views": ["pooled", "position", "mean_pooled"],
    }  # fmt: skip

    def run():
        if not loop:
            return rgfast.probe(model, given, batch_size=size, **options)
        with rgfast.Probe(model, **options) as watched, torch.no_grad():
            for batch in given:
                watched.note(**{mask.name: batch[mask.name]})
                model(batch["input_ids"])
        return watched.result()

    result = run()
    assert not any("not read" in note for note in result.notes), result.notes
    return "right", judged(result, by_hand(model, batches), keep, position)


def refused_masks(draw):
    b, t = draw.count(17) + 1, draw.choose((2, 3, 5))
    keep, _ = kept(draw, b, t)
    ids = torch.from_numpy(draw.rng.integers(0, WORDS, (b, t)))
    model = TakesMask(draw, 3, torch.float32)
    name, value, words = draw.choose(
        (
            ("attention_mask", keep.float() * 0.5 + 0.25, "must hold 0"),
            ("attention_mask", keep.float() * -50.0 - 1.0, "must hold 0"),
            ("key_padding_mask", (~keep).long(), "must be bool"),
            ("attention_mask", torch.ones(b, t + 1, dtype=torch.int64, device="cpu"), "must be ["),
            ("attention_mask", torch.ones(b, dtype=torch.int64, device="cpu"), "must be [B, T]"),
        )
    )
    batch = {"input_ids": ids, name: value}
    given = batch if draw.chance(0.5) else [batch]
    return refused(lambda: rgfast.probe(model, given, progress=False), ValueError, f"{name} {words}")


class Laid(nn.Module):
    """Blocks on activations whose axes are in some order; ``into`` permutes what the model takes to it."""

    def __init__(self, blocks, into):
        super().__init__()
        self.blocks, self.into = nn.ModuleList(blocks), into

    def forward(self, x):
        x = x if self.into is None else x.permute(self.into)
        for block in self.blocks:
            x = block(x)
        return x


def axes(draw):
    letters = draw.choose(LAYOUTS).split()
    sizes = {letter: draw.choose((1, 2, 3, 4)) for letter in letters}
    sizes["N"], sizes["D"] = draw.count(33) + 1, draw.choose((1, 2, 3, 5, 9))
    order = ["N", *(letter for letter in letters if letter not in "ND"), "D"]
    last, back = [letters.index(a) for a in order], [order.index(a) for a in letters]
    # Inside: the model itself takes samples first. Beside: another entry has as many rows as samples.
    form = draw.choose(("inside", "inside", "beside", "alone"))
    dtype, into = draw.choose(DTYPES), back if form == "inside" else None
    model = Laid([Block(draw, sizes["D"], dtype, last, back) for _ in range(draw.choose((1, 2, 3)))], into)
    x = torch.from_numpy(draw.normal(*(sizes[a] for a in order))).to(dtype)
    streams = [[rows.permute(back)] for rows in x.split(int(draw.rng.integers(1, len(x) + 1)))]
    with torch.no_grad():
        for stream in streams:
            for block in model.blocks:
                stream.append(block(stream[-1]))
    given = [stream[0].permute(last) if into else stream[0] for stream in streams]
    numbers = [stream[0].shape[letters.index("N")] for stream in streams]
    if form == "beside":
        labels = [torch.zeros(n, dtype=torch.int64, device="cpu") for n in numbers]
        given = [{"x": a, "labels": b} for a, b in zip(given, labels, strict=True)]
    layout = " ".join(letters)
    options = {
        "axes": layout if draw.chance(0.6) else {draw.choose(("*", "blocks.*", "blocks*")): layout},
        "measures": MEASURES, "pairs": "all", "views": ["pooled", "position", "mean_pooled"],
        "positions": [0], "progress": False,
    }  # fmt: skip
    if form == "alone" and any(sizes[letters[0]] != n for n in numbers) and letters[0] != "N":
        return refused(lambda: rgfast.probe(model, given, **options), ValueError, "samples, and the batch")
    result = rgfast.probe(model, given, **options)
    layers = [
        torch.cat([y.permute(last).reshape(n, -1, sizes["D"]) for y, n in zip(rows, numbers, strict=True)])
        for rows in zip(*streams, strict=True)
    ]
    wanted = {("pooled", -1): [y.flatten(0, 1) for y in layers], ("position", 0): [y[:, 0] for y in layers]}
    wanted["mean_pooled", -1] = [y.double().mean(1) for y in layers]
    worst = 0.0
    for (view, t), rows in wanted.items():
        found = result.dataset.sel(view=view, position=t)
        assert int(found.n) == len(rows[0]), (view, int(found.n), len(rows[0]))
        worst = max(worst, _cloud(found, [y.double().numpy() for y in rows], f"{layout} {view}"))
    return "right", worst


CHECKS = [("probe_masks", mask_kinds)] * 6 + [("probe_refused", refused_masks)] + [("probe_axes", axes)] * 3
