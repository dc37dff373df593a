"""Which axis of an activation is which: asked for, or read off the shapes and modules of a forward."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rgfast.probing.capture.activations import Activation
from rgfast.probing.capture.evidence import Evidence, Sizes
from rgfast.probing.capture.layers import Tap
from rgfast.probing.capture.notes import Notes
from rgfast.probing.capture.patterns import beside, by_layer
from rgfast.probing.capture.placed import divided, regrouped
from rgfast.probing.capture.watcher import Seen

__all__ = ["Axes", "AxesSpec", "check_axes"]

# None, a layout such as "N T D", or layouts by pattern of layer names.
AxesSpec = str | Mapping[str, str] | None

_PLAIN = {0: "", 1: "N", 2: "N D", 3: "N T D", 4: "N D H W"}
_ALPHABET = "N (samples), D (features) and other capital letters (places), as in 'N T D' or 'N H W D'"


class Axes:
    """Lays out what layers put out as rows ``[B, T, D]``.

    Layouts that were asked for are checked against every shape. Others are decided when a layer first puts
    something out, and a later forward that contradicts them is refused.

    Raises ValueError for a pattern that no layer matches.
    """

    def __init__(self, asked: AxesSpec, model: nn.Module, taps: Sequence[Tap], notes: Notes) -> None:
        self._notes = notes
        layouts: list[str | None] = [x for _, x in by_layer("axes", asked, [tap.name for tap in taps])]
        self._asked = [None if layout is None else " ".join(layout.split()) for layout in layouts]
        modules = dict(model.named_modules(remove_duplicate=False))
        self._evidence = [Evidence(modules[tap.module]) for tap in taps]
        self._decided: dict[tuple[str, int], str] = {}

    def open(self) -> None:
        """Watch how modules inside the layers are called, from now on."""
        for evidence in self._evidence:
            evidence.open()

    def close(self) -> None:
        """Stop watching."""
        for evidence in self._evidence:
            evidence.close()

    def forget(self) -> None:
        """Forget how modules were called in a forward that is not measured."""
        for evidence in self._evidence:
            evidence.forget()

    def rows(self, seen: Sequence[Seen], entries: Mapping[str, Any]) -> list[Activation | None]:
        """What the layers put out in a forward on ``entries``, as rows; None for those that did not run.

        Raises ValueError, naming the option, if a shape contradicts what was asked for or read before, and
        if two readings are possible.
        """
        sizes = self._with_asked(seen, Sizes.of(entries))
        layouts = self._layouts(seen, sizes)
        self.forget()
        found: list[Activation | None] = []
        for layer, layout in zip(seen, layouts, strict=True):
            if layer.value is None or layout is None:
                found.append(None)
            else:
                laid = functools.partial(laid_out, layout=layout, name=layer.name)
                found.append(Activation(divided(layer.value, layout.split().index("N"), laid), layer.keep))
        return self._unflattened(seen, layouts, found, sizes)

    def _with_asked(self, seen: Sequence[Seen], sizes: Sizes) -> Sizes:
        """``sizes`` with the number of samples that layouts which were asked for give.

        Raises ValueError for a shape that does not have the layout asked for.
        """
        given = sizes
        for layer in seen:
            asked = self._asked[layer.tap]
            if asked is not None and layer.value is not None:
                _check(asked, layer, layer.value, given, self._evidence[layer.tap])
                n = layer.value.shape[asked.split().index("N")]
                if n not in sizes.firsts:
                    sizes = replace(sizes, batch=n, firsts=frozenset({n}))
        return sizes

    def _layouts(self, seen: Sequence[Seen], sizes: Sizes) -> list[str | None]:
        layouts: list[str | None] = []
        neutral: list[int] = []
        for k, layer in enumerate(seen):
            x, asked = layer.value, self._asked[layer.tap]
            if x is None:
                layouts.append(None)
            elif asked is not None:
                layouts.append(asked)
            elif layer.keep is not None:
                layouts.append("N T D")
            else:
                layouts.append(self._found(layer, x, sizes))
                if layouts[k] is None:
                    neutral.append(k)
        for k in neutral:
            layouts[k] = self._as_others(seen, k, layouts)
        return layouts

    def _found(self, layer: Seen, x: Tensor, sizes: Sizes) -> str | None:
        """The layout that evidence gives, or that was decided before; None if nothing speaks for any."""
        key = (layer.name, x.dim())
        before = self._decided.get(key)
        reading = self._evidence[layer.tap].reading(tuple(x.shape), sizes)
        if reading.why and before is None:
            raise ValueError(_refusal(layer.name, x, reading.layouts, reading.why))
        if reading.why or not reading.layouts:
            return before
        (layout,) = reading.layouts
        if before is not None and layout != before:
            why = f"it was read as {before} in an earlier batch"
            raise ValueError(_refusal(layer.name, x, (before, layout), why))
        if reading.note and before is None:
            self._notes.add(
                "feature maps that are as wide as they have channels were read as N D H W, since their "
                "blocks begin with a convolution; axes='N H W D', or by layer pattern, reads them otherwise"
            )
        self._decided[key] = layout
        return layout

    def _as_others(self, seen: Sequence[Seen], k: int, layouts: Sequence[str | None]) -> str:
        """The layout of a layer that nothing is known of: that of layers of its shape, or the usual one."""
        x = seen[k].value
        assert x is not None
        shape = x.shape
        others = {
            layout
            for layer, layout in zip(seen, layouts, strict=True)
            if layout is not None and layer.value is not None and layer.value.shape == shape
        }
        plain = _PLAIN.get(len(shape))
        if plain is None:
            if len(others) != 1:
                readings = ("N D T H W", "N T H W D") if len(shape) == 5 else ()
                raise ValueError(_refusal(seen[k].name, x, readings, "nothing tells its axes"))
            plain = others.pop()
        elif len(others) == 1 and (moved := next(iter(others))) != plain:
            if not moved.startswith("N"):
                why = "other layers of this shape have samples on another axis"
                raise ValueError(_refusal(seen[k].name, x, (plain, moved), why))
            plain = moved
        self._decided.setdefault((seen[k].name, len(shape)), plain)
        return plain

    def _unflattened(
        self,
        seen: Sequence[Seen],
        layouts: Sequence[str | None],
        found: list[Activation | None],
        sizes: Sizes,
    ) -> list[Activation | None]:
        """``found`` with ``[B·T, D]`` as ``[B, T, D]``.

        Raises ValueError if layers have rows of different numbers of samples.
        """
        batch = sizes.batch
        if batch is not None:
            lengths = {a.rows.shape[1] for a in found if a is not None and a.rows.shape[0] == batch}
            lengths = {t for t in {*sizes.lengths, *lengths} if t > 1}
            for k, a in enumerate(found):
                if a is None or layouts[k] != "N D" or self._asked[seen[k].tap] is not None:
                    continue
                n = a.rows.shape[0]
                if n in sizes.firsts or n // batch not in lengths or n % batch:
                    continue
                if any(layout is not None and not layout.startswith("N") for layout in layouts):
                    raise ValueError(
                        f"layer {seen[k].name!r} has {n} rows for {batch} sequences of {n // batch}, and "
                        "other layers have positions before samples, so it is unknown which row is whose; "
                        "leave it out of layers="
                    )
                found[k] = Activation(regrouped(a.rows, batch))
        self._check_samples(seen, found, sizes)
        return found

    def _check_samples(self, seen: Sequence[Seen], found: Sequence[Activation | None], sizes: Sizes) -> None:
        counts = {layer.name: len(a.rows) for layer, a in zip(seen, found, strict=True) if a is not None}
        if len({*counts.values()}) > 1:
            known = sizes.batch if sizes.batch in counts.values() else next(iter(counts.values()))
            odd = next(name for name, n in counts.items() if n != known)
            raise ValueError(
                f"layer {odd!r} has {counts[odd]} rows for {known} sequences, so it is unknown which row is "
                "whose (tokens that were routed to it?); leave it out of layers=, or say with axes= which "
                "axis holds the samples"
            )
        if sizes.batch is not None and not {*counts.values()} <= {0, *sizes.firsts}:
            self._notes.add(
                "layers have another number of rows than the batch has sequences: each row counts as a "
                "sequence of its own, and no mask is read"
            )


def laid_out(x: Tensor, layout: str, name: str) -> Tensor:
    """``[B, T, D]`` of an activation whose axes are ``layout``; places are flattened in their order.

    Raises ValueError if there are no positions or features, or fewer than two axes.
    """
    letters = layout.split()
    sizes = dict(zip(letters, x.shape, strict=True))
    if "D" not in sizes or 0 in [size for letter, size in sizes.items() if letter != "N"]:
        raise ValueError(
            f"layer {name!r} must be [B, D], [B, T, D] or [B, C, H, W] with none but B empty, got shape "
            f"{tuple(x.shape)}"
        )
    if letters == ["N", "D"]:
        return x[:, None]
    if len(letters) == 3 and letters[0] == "N" and letters[2] == "D":
        return x
    places = [axis for axis, letter in enumerate(letters) if letter not in "ND"]
    moved = x.permute(letters.index("N"), *places, letters.index("D"))
    return moved.flatten(1, -2) if places else moved[:, None]


def check_axes(axes: Any) -> None:
    """Raise TypeError or ValueError unless ``axes`` is an :data:`AxesSpec`."""
    if axes is None:
        return
    for layout in axes.values() if isinstance(axes, Mapping) else [axes]:
        if not isinstance(layout, str):
            raise TypeError(
                f"axes must be a layout of {_ALPHABET}, or layouts by layer pattern, got {layout!r}"
            )
        letters = layout.split()
        if not all(re.fullmatch("[A-Z]", letter) for letter in letters) or len({*letters}) < len(letters):
            raise ValueError(f"axes must be different letters with spaces between, got {layout!r}")
        if not {"N", "D"} <= {*letters}:
            raise ValueError(f"axes must hold {_ALPHABET}, got {layout!r}")


def _check(layout: str, layer: Seen, x: Tensor, sizes: Sizes, evidence: Evidence) -> None:
    letters = layout.split()
    if len(letters) != x.dim():
        raise ValueError(
            f"axes: {layout!r} has {len(letters)} axes, and layer {layer.name!r} has shape {tuple(x.shape)}"
        )
    if layer.keep is not None and (letters[0] != "N" or letters[-1] != "D"):
        raise ValueError(
            f"axes: layer {layer.name!r} is nested, samples first and features last, got {layout!r}"
        )
    axis = letters.index("N")
    # A whole batch may be positions first, if parts of the layer take it so.
    as_given = tuple(x.shape[: axis + 1]) in {shape[: axis + 1] for shape in sizes.shapes}
    counts = {*sizes.firsts, *(evidence.batches if as_given else ())}
    if sizes.batch is not None and x.shape[axis] not in counts:
        raise ValueError(
            f"axes: {layout!r} gives layer {layer.name!r} of shape {tuple(x.shape)} {x.shape[axis]} samples, "
            f"and the batch has {sizes.batch}"
        )


def _refusal(name: str, x: Tensor, layouts: Sequence[str], why: str) -> str:
    shown = layouts[-1] if layouts else " ".join(["N", *"ABCEFGHIJK"[: x.dim() - 2], "D"])
    readings = f" may be {' or '.join(layouts)}" if layouts else ""
    return (
        f"axes: layer {name!r} of shape {tuple(x.shape)}{readings}, {why}; say which axis is which, as in "
        f"axes={{{beside(name)!r}: {shown!r}}}"
    )
