"""What the layers of a model put out in one forward, kept as it was however the model goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rgfast.probing.capture.activations import as_rows, find_tensor
from rgfast.probing.capture.layers import Tap
from rgfast.stack import ResidualStack

__all__ = ["Captures", "stack_of"]


@dataclass(frozen=True)
class _Captured:
    """An activation, the tensor it came as, and how often that had been written to."""

    value: Tensor
    original: Tensor
    version: int


class Captures:
    """The activations of ``taps`` in the forward that is running."""

    def __init__(self, taps: Sequence[Tap]) -> None:
        self._taps = taps
        self._held: dict[int, _Captured] = {}
        self._copied, self._first = set(range(len(taps))), True

    def clear(self) -> None:
        """Forget them, before a forward and where one failed."""
        self._held.clear()

    def hook(self, index: int, module: nn.Module) -> Any:
        """The handle of the hook that captures tap ``index`` of ``module``."""
        if self._taps[index].side == "output":
            return module.register_forward_hook(self._on_output(index))
        return module.register_forward_pre_hook(self._on_input(index), with_kwargs=True)

    def take(self) -> list[Tensor]:
        """The rows ``[B, T, D]`` of every tap. Raises ValueError where one did not run."""
        missing = [tap.name for k, tap in enumerate(self._taps) if k not in self._held]
        if missing:
            raise ValueError(f"layers: {', '.join(missing)} did not run in this forward")
        kept = [self._held[k] for k in range(len(self._taps))]
        self._held = {}
        self._check_unchanged(kept)
        return [as_rows(x.value, tap.name) for x, tap in zip(kept, self._taps, strict=True)]

    def _on_output(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._capture(index, output)

        return hook

    def _on_input(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._capture(index, [*args, *kwargs.values()])

        return hook

    def _capture(self, index: int, value: Any) -> None:
        tap = self._taps[index]
        if index in self._held:
            raise ValueError(
                f"layers: {tap.module!r} ran twice in one forward (shared weights?), so its output is "
                "ambiguous; name modules that run once"
            )
        x = find_tensor(value, tap.name).detach()
        self._held[index] = _Captured(x.clone() if index in self._copied else x, x, _version(x))

    def _check_unchanged(self, kept: list[_Captured]) -> None:
        """Copies are made in the first forward, later of those layers only that the model then wrote to."""
        written = {k for k, x in enumerate(kept) if _version(x.original) != x.version}
        if self._first:
            # Tensors of inference mode do not tell, nor do any that are written to through .data or numpy.
            silent = {
                k
                for k, x in enumerate(kept)
                if x.original.is_inference() or not torch.equal(x.value, x.original)
            }
            self._copied, self._first = written | silent, False
        elif written - self._copied:
            names = ", ".join(self._taps[k].name for k in sorted(written - self._copied))
            raise RuntimeError(
                f"the model wrote to the output of {names}, which it left alone in its first forward"
            )


def stack_of(modules: Mapping[str, nn.Module], taps: Sequence[Tap]) -> ResidualStack | None:
    """The stack of which ``taps`` are the input and all outputs: it hands them over a tile at a time."""
    for name, module in modules.items():
        if isinstance(module, ResidualStack) and not name.startswith("_orig_mod"):
            blocks = [f"{name}.blocks.{k}".lstrip(".") for k in range(len(module.blocks))]
            if [tap.name for tap in taps] == [f"{blocks[0]}:input", *blocks]:
                return module
    return None


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
