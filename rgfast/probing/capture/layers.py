"""Which tensors of a model are probed: names to taps, and finding the residual stream."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from rgfast.probing.capture.sublayers import points_inside
from rgfast.probing.sharding import class_of

__all__ = ["LayerSpec", "Tap", "check_model", "chosen_names", "resolve"]

LayerSpec = str | int | re.Pattern[str]

SUBLAYERS = "sublayers"
_INPUT = ":input"
_SHOWN = 6  # of what a message lists


@dataclass(frozen=True)
class Tap:
    """One probed tensor: what a module returns, or (``side="input"``) what it is given.

    ``once``: of a module that runs several times in a forward, the first run alone.
    """

    name: str
    module: str
    side: Literal["input", "output"]
    once: bool = False


@dataclass(frozen=True)
class _Stream:
    """A run of blocks of one kind in a container: a residual stream, as far as names tell.

    ``container`` is the name of the module that holds these blocks and nothing else, or empty.
    """

    blocks: tuple[str, ...]
    kind: str
    container: str

    def taps(self) -> list[Tap]:
        first = Tap(self.blocks[0] + _INPUT, self.blocks[0], "input", once=True)
        return [first, *(Tap(name, name, "output") for name in self.blocks)]

    def points(self, model: nn.Module) -> list[Tap]:
        """The stream with the points inside its blocks."""
        taps = self.taps()[:1]
        for name in self.blocks:
            taps += map(_tap, points_inside(name, model.get_submodule(name)))
            taps.append(Tap(name, name, "output"))
        return taps

    def __str__(self) -> str:
        return f"{self.blocks[0]} … {self.blocks[-1]} ({len(self.blocks)} × {self.kind})"

    def asked(self) -> str:
        """The ``layers=`` that takes this stream."""
        if self.container:
            return f"layers={self.container!r}"
        return f"layers={[tap.name for tap in self.taps()]}"


def check_model(model: Any) -> None:
    """Raise TypeError for what is no module, and for code that does not run its modules."""
    kind = type(model).__name__
    why = ""
    if isinstance(model, torch.export.ExportedProgram):
        why = "an exported program"
    elif isinstance(model, torch.jit.ScriptModule):
        why = "a traced or scripted module"
    elif isinstance(model, torch.fx.GraphModule) and not any(
        n.op == "call_module" and not str(n.target).startswith("_guards") for n in model.graph.nodes
    ):
        why = "a graph whose modules were inlined"
    if why:
        raise TypeError(
            f"model must run its modules one by one, and {why} does not; probe the model that it was made "
            f"from (got {kind})"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {kind}")


def resolve(model: nn.Module, layers: str | LayerSpec | Sequence[LayerSpec]) -> tuple[list[Tap], str]:
    """The taps that ``layers`` asks for, in the model's order for patterns, and a sentence saying which.

    ``"auto"`` is the input of the first block and the output of every block of the model's only stack of
    blocks; the name of a stack of blocks (a ModuleList, of several kinds too, or by itself a Sequential) is
    the same of that stack. Otherwise a dotted module name (``name:input`` for what it is given), an index
    into the automatic stream (0 its input, l the output of block l), ``"sublayers"`` (that stream with the
    points between attention and MLP; ``"sublayers:NAME"`` of a named stack), a glob (``*`` stays within one
    dotted part, ``**`` does not), a compiled regular expression or ``"re:..."`` matching the whole name, or
    a sequence of these.

    Raises ValueError for what matches nothing, for a repeated layer, and for ``"auto"`` if there is no stack
    of blocks or more than one; the message lists the candidates.
    """
    if isinstance(layers, str) and layers == "auto":
        stream = _only_stream(model)
        return stream.taps(), f"the stream through {stream}: its input and {len(stream.blocks)} outputs"
    taps: list[Tap] = []
    alone = isinstance(layers, str)
    for spec in _specs(layers):
        taps += _resolve_one(model, spec, alone=alone)
    names = _distinct([tap.name for tap in taps])
    return taps, f"{len(taps)} layers: {', '.join(names)}"


def _specs(layers: Any) -> list[LayerSpec]:
    """What was asked for, one by one. Raises TypeError for what is no name, index or pattern."""
    if not isinstance(layers, (str, int, re.Pattern, Sequence)):
        raise TypeError(
            f"layers must be 'auto', a name, index, pattern or a sequence of them, got {layers!r}"
        )
    specs = [layers] if isinstance(layers, (str, int, re.Pattern)) else list(layers)
    for spec in specs:
        if isinstance(spec, bool) or not isinstance(spec, (str, int, re.Pattern)):
            raise TypeError(f"layers must hold names, indices or patterns, got {spec!r}")
    return specs


def _distinct(names: list[str]) -> list[str]:
    """``names``. Raises ValueError if there are none, or one is there twice."""
    if not names:
        raise ValueError("layers must name at least one layer, got none")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"layers must not repeat a layer, got {name!r} {names.count(name)} times")
    return names


def _resolve_one(model: nn.Module, spec: LayerSpec, *, alone: bool) -> list[Tap]:
    if isinstance(spec, int):
        stream = _only_stream(model).taps()
        if not -len(stream) <= spec < len(stream):
            raise ValueError(f"layers must be an index from 0 to {len(stream) - 1}, got {spec}")
        return [stream[spec]]
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    if isinstance(spec, str) and (spec == SUBLAYERS or spec.startswith(SUBLAYERS + ":")):
        return _stream_of(model, spec.removeprefix(SUBLAYERS).removeprefix(":"), names).points(model)
    if isinstance(spec, re.Pattern) or spec.startswith("re:"):
        pattern = spec if isinstance(spec, re.Pattern) else _compiled(spec[3:])
        shown = pattern.pattern
    elif any(c in spec for c in "*?["):
        pattern, shown = re.compile(_glob(spec.removesuffix(_INPUT))), spec
    else:
        name = spec.removesuffix(_INPUT)
        if name not in names:
            raise ValueError(f"layers: there is no module {name!r}; {_candidates(name, names)}")
        # A Sequential among other layers is one of them, as the stages of a network are.
        module = model.get_submodule(name)
        if (alone or isinstance(module, nn.ModuleList)) and (whole := _named_stream(model, spec)):
            return whole.taps()
        return [_tap(spec)]
    side = _INPUT if isinstance(spec, str) and spec.endswith(_INPUT) else ""
    found = [_tap(name + side) for name in names if pattern.fullmatch(name)]
    if not found:
        raise ValueError(f"layers: no module matches {shown!r}; {_candidates(shown, names)}")
    return found


def _named_stream(model: nn.Module, name: str) -> _Stream | None:
    found = [*_streams(model, ""), *_mixed(model.get_submodule(name), name)]
    return next((stream for stream in found if stream.container == name), None)


def _stream_of(model: nn.Module, name: str, names: Sequence[str]) -> _Stream:
    """The stack of blocks ``name``, the only one if it is empty."""
    if not name:
        return _only_stream(model, SUBLAYERS)
    if name not in names:
        raise ValueError(f"layers: there is no module {name!r}; {_candidates(name, names)}")
    if (stream := _named_stream(model, name)) is None:
        raise ValueError(f"layers: {name!r} is no stack of blocks; {_looked_at(model)}")
    return stream


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"layers: {pattern!r} is no regular expression ({error})") from error


def _tap(name: str) -> Tap:
    return Tap(name, name.removesuffix(_INPUT), "input" if name.endswith(_INPUT) else "output")


def _glob(pattern: str) -> str:
    out = ""
    for part in re.findall(r"\*\*|\*|\?|\[[^\]]*\]|[^*?\[]+|\[", pattern):
        if part == "**":
            out += ".*"
        elif part == "*":
            out += r"[^.]*"
        elif part == "?":
            out += r"[^.]"
        elif part.startswith("[") and part.endswith("]"):
            out += part.replace("[!", "[^")
        else:
            out += re.escape(part)
    return out


def _candidates(asked: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(asked, names, n=6, cutoff=0.3) or list(names[:6])
    rest = f" (of {len(names)} modules)" if len(names) > len(near) else ""
    return f"near it: {', '.join(near)}{rest}" if near else "the model has no submodules"


def _only_stream(model: nn.Module, asked: str = "auto") -> _Stream:
    streams = list(_streams(model, ""))
    if len(streams) == 1:
        return streams[0]
    if not streams:
        raise ValueError(
            f"layers={asked!r} found no stack of blocks (modules of one kind in a row, which have modules "
            f"and weights of their own, in a ModuleList or Sequential) in {class_of(model).__name__}; "
            + _looked_at(model)
        )
    if asked == SUBLAYERS:
        takes = [f"layers={f'{SUBLAYERS}:{s.container}'!r}" if s.container else s.asked() for s in streams]
    else:
        takes = [s.asked() for s in streams]
    listed = "; ".join(f"{take}: {stream}" for take, stream in zip(takes, streams, strict=True))
    raise ValueError(f"layers={asked!r} is ambiguous, take one of: {listed}")


def _looked_at(model: nn.Module) -> str:
    """What there was to look at for a stack of blocks, in words."""
    looked = [
        f"{name or 'the model'} ({class_of(module).__name__} of {', '.join(_kinds(module)) or 'nothing'})"
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
    ]
    more = f" and {len(looked) - _SHOWN} more" if len(looked) > _SHOWN else ""
    seen = (
        f"looked at {'; '.join(looked[:_SHOWN])}{more}" if looked else "there is no ModuleList or Sequential"
    )
    mixed = [stream for name, module in model.named_modules() for stream in _mixed(module, name) if name]
    if mixed:
        seen += "; a stack of several kinds is taken by " + " or ".join(s.asked() for s in mixed[:_SHOWN])
    top = ", ".join(name for name, _ in model.named_children()) or "none"
    return f"{seen}. Name the layers, the top modules are: {top}"


def _kinds(module: nn.Module) -> list[str]:
    kinds = list(dict.fromkeys(class_of(child).__name__ for child in module.children()))
    return kinds[:_SHOWN] + ["…"] * (len(kinds) > _SHOWN)


def _streams(module: nn.Module, prefix: str) -> Iterator[_Stream]:
    """Outermost runs of blocks of one class. A block has submodules: a row of Linear is no stream."""
    inside: set[str] = set()
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        children = [(name, child) for name, child in module.named_children()]
        # A container that holds nothing but one block is a stack of depth 1; elsewhere one is no row.
        shortest = 1 if len(children) == 1 and isinstance(module, nn.ModuleList) else 2
        run: list[tuple[str, nn.Module]] = []
        for name, child in [*children, ("", nn.Identity())]:
            if run and class_of(child) is not class_of(run[0][1]):
                if len(run) >= shortest:
                    inside |= {n for n, _ in run}
                    blocks = tuple(f"{prefix}{n}" for n, _ in run)
                    whole = prefix.removesuffix(".") if len(run) == len(children) else ""
                    yield _Stream(blocks, class_of(run[0][1]).__name__, whole)
                run = []
            if _is_block(child):
                run.append((name, child))
    for name, child in module.named_children():
        if name not in inside:
            yield from _streams(child, f"{prefix}{name}.")


def _mixed(module: nn.Module, name: str) -> list[_Stream]:
    """The stream through a ModuleList of blocks of several kinds, which is one only if it is asked for."""
    children = list(module.named_children())
    if not isinstance(module, nn.ModuleList) or not children or not all(_is_block(c) for _, c in children):
        return []
    return [_Stream(tuple(f"{name}.{n}" for n, _ in children), " or ".join(_kinds(module)), name)]


def _is_block(module: nn.Module) -> bool:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False
    # Quantized modules have no parameters, but a state.
    return any(True for _ in module.children()) and (
        any(True for _ in module.parameters()) or bool(module.state_dict())
    )


def chosen_names(names: Sequence[str], layers: str | LayerSpec | Sequence[LayerSpec]) -> list[str]:
    """Which of ``names`` (of activations that have no model) ``layers`` asks for: all for ``"auto"``, those
    of names, indices and patterns as :func:`resolve` reads them.

    Raises TypeError or ValueError for what matches nothing, and for a repeated layer.
    """
    if isinstance(layers, str) and layers == "auto":
        return list(names)
    found: list[str] = []
    for spec in _specs(layers):
        if isinstance(spec, int):
            if not -len(names) <= spec < len(names):
                raise ValueError(f"layers must be an index from 0 to {len(names) - 1}, got {spec}")
            found.append(names[spec])
            continue
        if isinstance(spec, str) and spec in names:
            found.append(spec)
            continue
        pattern = spec if isinstance(spec, re.Pattern) else _pattern(spec)
        matching = [name for name in names if pattern.fullmatch(name)]
        if not matching:
            raise ValueError(f"layers: no layer is called {spec!r}, the layers are {', '.join(names)}")
        found += matching
    return _distinct(found)


def _pattern(spec: str) -> re.Pattern[str]:
    return _compiled(spec[3:]) if spec.startswith("re:") else re.compile(_glob(spec))
