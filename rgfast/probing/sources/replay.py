"""Activations played back to a probe: a module whose layers put out what a batch holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rgfast.probing.capture.axes import AxesSpec
from rgfast.probing.capture.layers import LayerSpec, Tap, chosen_names
from rgfast.probing.capture.outputs import OutputSpec
from rgfast.probing.capture.padding import PaddingSpec
from rgfast.probing.ranks import Ranks
from rgfast.probing.sources.activations import KEEP, Activations
from rgfast.probing.sources.dividing import divided

if TYPE_CHECKING:
    from rgfast.probing.spec import ProbeSpec

__all__ = ["LAYOUT", "SavedActivations", "as_replayed", "padding_of"]

# The entry that every batch has, so that its number of sequences is known whatever else it holds.
_NUMBER = "sequence"
# Of every layer that is played back.
LAYOUT = "N T D"


class SavedActivations(nn.Module):
    """Stands for the model in a probe of ``acts``; what it runs on are the batches of :meth:`batches`.

    Raises ValueError for ``layers`` that match nothing.
    """

    def __init__(self, acts: Activations, layers: str | LayerSpec | Sequence[LayerSpec]) -> None:
        super().__init__()
        self._acts, self.source, self.ids = acts, acts.source, acts.ids
        self.first, self._stop = 0, len(acts)
        self._chosen = chosen_names(acts.layers, layers)
        for name in self._chosen:
            # Names of saved layers have dots, which add_module refuses, and are all that says what they are.
            self._modules[name] = nn.Identity()

    def taps(self) -> list[Tap]:
        """The layers that were asked for."""
        return [Tap(name, name, "output") for name in self._chosen]

    def divide(self, ranks: Ranks) -> None:
        """Play back what is this rank's. Raises ValueError if a sequence is two ranks'."""
        share = divided(self._acts, ranks)
        self.first, self._stop, self.ids = share.first, share.stop, share.ids

    @property
    def sequences(self) -> int:
        """How many sequences are this rank's."""
        return self._stop - self.first

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """All sequences that are this rank's, as mappings of layers and entries by name."""
        for batch in self._acts.batches(size, self._chosen, first=self.first, stop=self._stop):
            number = torch.arange(batch.start, batch.start + len(batch), dtype=torch.int64, device="cpu")
            keep = {KEEP: batch.keep} if self._acts.is_ragged and batch.keep is not None else {}
            yield {_NUMBER: number, **batch.entries, **keep, **batch.layers}

    def forward(self, **entries: Any) -> None:
        """Let every layer put out what the batch holds."""
        for name, layer in self._modules.items():
            if name not in entries:
                raise ValueError(
                    f"mask, targets and rows: {name!r} is a layer of the activations; give a function of the "
                    f"entries, such as lambda entries: entries[{name!r}]"
                )
            assert layer is not None
            layer(entries[name])


def as_replayed(acts: Activations, spec: ProbeSpec) -> tuple[SavedActivations, ProbeSpec]:
    """What to probe in place of a model, and how.

    Raises ValueError for options that activations do not have.
    """
    if spec.control is not None:
        raise ValueError(
            f"control: {spec.control!r} runs a model, and these are activations; save those of the control, "
            "too"
        )
    padding = padding_of(acts, spec.padding, axes=spec.axes, output=spec.output)
    return SavedActivations(acts, spec.layers), replace(spec, axes=LAYOUT, padding=padding)


def padding_of(acts: Activations, padding: PaddingSpec, *, axes: AxesSpec, output: OutputSpec) -> PaddingSpec:
    """How the padding of what is played back is read, asked for ``padding``.

    Raises ValueError for options that activations do not have.
    """
    for name, asked, why in (
        ("axes", axes, "give axes= to Activations"),
        ("output", output, "each array is one layer's stream"),
    ):
        if asked is not None:
            raise ValueError(f"{name}: the activations are saved, so there is nothing to choose; {why}")
    clash = [name for name in (*acts.entries, _NUMBER) if name in acts.layers]
    clash += [_NUMBER] if _NUMBER in acts.entries else []
    if clash:
        raise ValueError(f"activations must not call an array {clash[0]!r}, which a probe uses; rename it")
    if acts.is_ragged:
        if padding not in ("auto", KEEP):
            raise ValueError(
                "padding: these sequences differ in length, and what was added to the shorter ones never "
                f"counts; leave out padding={padding!r}"
            )
        return KEEP
    return padding
