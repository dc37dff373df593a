"""Models as people have them, fed as people feed them, with random weights: a probe against brute force.

    python tests/probing/zoo.py            # a table of all models
    python tests/probing/zoo.py BERT LoRA  # those whose name holds one of these words

Brute force keeps what plain hooks see of each block, drops the padding and computes every measure from its
formula here; nothing of rgfast is used but the probe. Rows come from the same forwards of the same batches,
so they have the same bits and only fp64 rounding is left between the two sides.
"""

import ast
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

import rgfast

N, T, SIZE = 37, 6, 16  # sequences, positions, sequences per batch: the last batch is short
TOLERANCE = 1e-9
# A rank is at least 1 and a CKA at most; 1 - CKA errs by 1e-14, so that much of 1e-5 is within the tolerance.
FLOORS = {"effective_rank": 1.0, "cka": 1.0, "kernel_drift": 1e-5}


@dataclass
class Case:
    """A model, what the probe is given, and the same by hand.

    ``calls`` are the forwards ``(args, kwargs)`` that the batches mean, ``blocks`` the names of the blocks
    whose stream is probed, ``keep`` ``[N, T]`` bool the rows that count (None: all do), ``rows`` what an
    activation is as ``[N, T, D]``. ``layers`` is the probe's, or ``"pasted"``: what the error about an
    ambiguous model says to take.
    """

    model: nn.Module
    given: Any
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    blocks: list[str]
    keep: torch.Tensor | None = None
    layers: Any = "auto"
    rows: Callable[[torch.Tensor], torch.Tensor] = lambda x: x[:, None] if x.dim() == 2 else x
    options: dict[str, Any] = field(default_factory=dict)
    loop: Callable[["Case", rgfast.Probe], None] | None = None
    by_hand: nn.Module | None = None  # what brute force runs, if not the model


@dataclass(frozen=True)
class Entry:
    name: str
    fed: str
    make: Callable[[], Case]


ENTRIES: list[Entry] = []


def entry(name: str, fed: str):
    """A decorator: the function makes the case of this name."""

    def decorate(make):
        ENTRIES.append(Entry(name, fed, make))
        return make

    return decorate


def seeded(kind, *args, **options):
    """A model in evaluation mode whose weights come from a fixed seed."""
    torch.manual_seed(0)
    return kind(*args, **options).eval()


def sentences(states=30, n=N, length=T, seed=0):
    """Random tokens ``[n, length]``, and which count if the padding is on the right: two or more of each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, states, (n, length), generator=generator)
    lengths = torch.randint(2, length + 1, (n,), generator=generator)
    return ids, torch.arange(length) < lengths[:, None]


def cut(values, size=SIZE):
    """A mapping of whole arrays as the keyword arguments of each forward."""
    whole = len(next(iter(values.values())))
    return [((), {k: v[i : i + size] for k, v in values.items()}) for i in range(0, whole, size)]


def numbered(container, depth=2):
    """The names of the blocks of a container."""
    return [f"{container}.{k}" if container else str(k) for k in range(depth)]


def pasted(model, blocks):
    """The ``layers=`` that the error about several stacks prints for this one."""
    message = "nothing was ambiguous"
    try:
        rgfast.Probe(model, progress=False)
    except ValueError as error:
        message = str(error)
    assert message.startswith("layers='auto' is ambiguous"), message
    choices = [
        (ast.literal_eval(value), first)
        for value, first in re.findall(r"layers=('[^']*'|\[[^\]]*\]): (\S+) ", message)
    ]
    return next(value for value, first in choices if first == blocks[0])


def stored(case):
    """The layers' names, and what each put out ``[N, T, D]``, by hooks of our own."""
    model = case.by_hand or case.model
    kept: dict[str, list[torch.Tensor]] = {}
    now: dict[str, list[torch.Tensor]] = {}

    def tensor_of(value):
        value = value[0] if isinstance(value, tuple) else value
        value = value.to_padded_tensor(0.0) if value.is_nested else value
        return case.rows(value.detach().clone())

    def into(module, args, kwargs):
        now.setdefault(f"{case.blocks[0]}:input", [tensor_of(args[0] if args else kwargs["hidden_states"])])

    def out_of(name):
        return lambda module, args, output: now.setdefault(name, []).append(tensor_of(output))

    handles = [model.get_submodule(case.blocks[0]).register_forward_pre_hook(into, with_kwargs=True)]
    handles += [model.get_submodule(name).register_forward_hook(out_of(name)) for name in case.blocks]
    with torch.no_grad():
        for args, kwargs in case.calls:
            now.clear()
            model(*args, **kwargs)
            for name, runs in now.items():
                for k, x in enumerate(runs):
                    kept.setdefault(f"{name}#{k + 1}" if len(runs) > 1 else name, []).append(x)
    for handle in handles:
        handle.remove()
    lengths = [max(x.shape[1] for x in parts) for parts in kept.values()]
    return list(kept), [
        torch.cat([nn.functional.pad(x, (0, 0, 0, length - x.shape[1])) for x in parts]).double()
        for parts, length in zip(kept.values(), lengths, strict=True)
    ]


def effective_rank(x):
    """exp of the entropy of the singular values of the centered rows."""
    x = x - x[:1]
    sigma = torch.linalg.svdvals(x - x.mean(0))[: len(x) - 1]
    p = sigma / sigma.sum()
    return float(torch.special.entr(p).sum().exp()) if sigma.sum() > 0 else 0.0


def centered(x):
    """The centered linear kernel, normalized; None for rows that do not vary."""
    x = x - x[:1]
    x = x - x.mean(0)
    k = x @ x.T
    return k / k.norm() if k.norm() > 0 else None


def drift(x, y):
    """1 − CKA, as half the squared distance of normalized centered kernels."""
    k, m = centered(x), centered(y)
    return float((k - m).square().sum() / 2) if k is not None and m is not None else float("nan")


def hsic(x, y):
    """n (n − 3) HSIC_1: the inner product of the U-centered kernels."""
    kernels = []
    for rows in (x - x.mean(0), y - y.mean(0)):
        k, n = rows @ rows.T, len(rows)
        k = k - torch.diag(k.diag())
        sums = k.sum(1)
        k = k - sums[:, None] / (n - 2) - sums / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
        kernels.append(k - torch.diag(k.diag()))
    return float((kernels[0] * kernels[1]).sum())


def cka(x, y):
    """Debiased CKA."""
    return hsic(x, y) / (hsic(x, x) * hsic(y, y)) ** 0.5


def data_matrices(layers, keep):
    """The rows ``[n, d_l]`` of every layer by view and position, and whether layers can be compared there."""
    aligned = len({x.shape[1] for x in layers}) == 1
    keeps = [torch.ones(x.shape[:2], dtype=torch.bool) if keep is None else keep for x in layers]
    weights = [k.double() / k.sum(1, keepdim=True) for k in keeps]
    finite = [x.masked_fill(~k[..., None], 0.0) for x, k in zip(layers, keeps, strict=True)]
    out = {
        ("pooled", -1): ([x[k] for x, k in zip(layers, keeps, strict=True)], aligned),
        ("mean_pooled", -1): (
            [(x * w[..., None]).sum(1) for x, w in zip(finite, weights, strict=True)],
            True,
        ),
    }
    length = layers[0].shape[1]
    if aligned and length > 2:
        last = (keeps[0] * torch.arange(1, length + 1)).argmax(1)
        out["position", 2] = ([x[:, 2][k[:, 2]] for x, k in zip(layers, keeps, strict=True)], True)
        out["position", length - 1] = ([x[torch.arange(len(x)), last] for x in layers], True)
    return out


def probed(case, layers, **options):
    """The probe's result for a case."""
    options = {"pairs": "all", "progress": False, "layers": layers, **options, **case.options}
    if case.loop is None:
        return rgfast.probe(case.model, case.given, batch_size=SIZE, **options)
    with rgfast.Probe(case.model, **options) as watched:
        case.loop(case, watched)
    return watched.result()


def check(case):
    """The layers that were taken, the largest error and the notes; raises AssertionError where one is wrong.

    Errors are relative to the value, or to the floor that its contract gives it.
    """
    names, layers = stored(case)
    truth = data_matrices(layers, case.keep)
    asked = pasted(case.model, case.blocks) if case.layers == "pasted" else case.layers
    views = tuple(dict.fromkeys(view for view, _ in truth))
    positions = {"positions": (2, "last")} if "position" in views else {}
    result = probed(case, asked, views=views, measures=["effective_rank", "kernel_drift", "cka"], **positions)
    assert list(result.layers) == names, (result.layers, names)
    worst = 0.0
    for (view, position), (rows, compared) in truth.items():
        found = result.dataset.sel(view=view, position=position)
        want = {"effective_rank": [effective_rank(x) for x in rows]}
        if compared:
            want["kernel_drift"] = [drift(x, y) for x, y in pairwise(rows)]
            want["cka"] = [cka(x, y) for x, y in pairwise(rows)]
            assert int(found.n) == len(rows[0]), (view, position, int(found.n), len(rows[0]))
        for name, values in want.items():
            got = torch.from_numpy(found[name].values.copy())
            got = got.diagonal(1) if name == "cka" else got
            wanted = torch.tensor(values, dtype=torch.float64)
            error = ((got - wanted).abs() / wanted.abs().clamp_min(FLOORS[name])).max().item()
            assert error <= TOLERANCE, (view, position, name, got.tolist(), values)
            worst = max(worst, error)
    return result.layers, worst, result.notes


def shown(layers):
    """Layers in words that fit a table."""
    first, last = layers[0].removesuffix(":input"), layers[-1]
    return f"`{first}` … `{last}` ({len(layers)})"


def main():
    import warnings

    import zoo as own  # so that the entries register in the module that the others import
    import zoo_plain  # noqa: F401 (registers, as the next two do)
    import zoo_transformers  # noqa: F401
    import zoo_ways  # noqa: F401

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    chosen = [
        e for e in own.ENTRIES if not sys.argv[1:] or any(word in e.name + e.fed for word in sys.argv[1:])
    ]
    failed = 0
    print("| model | fed as | layers | largest error | notes |\n|---|---|---|---|---|")
    for each in chosen:
        start = time.monotonic()
        try:
            layers, worst, notes = own.check(each.make())
        except Exception as error:
            failed += 1
            print(f"| {each.name} | {each.fed} | FAILED | {type(error).__name__} | {str(error)[:600]} |")
        else:
            said = "; ".join(note for note in notes if not note.startswith("position "))
            print(f"| {each.name} | {each.fed} | {shown(layers)} | {worst:.0e} | {said} |")
        print(f"{each.name}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    print(f"\n{len(chosen)} models, {failed} failed; torch {torch.__version__}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
