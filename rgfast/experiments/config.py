"""Everything that decides a ``reproduce`` run, as one frozen object and its JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rgfast.chains import MarkovChain
from rgfast.stack import ACTIVATIONS, MIXINGS, NORMS, Activation, Mixing, Norm
from rgfast.training import TrainingConfig
from rgfast.validation import check_choice, check_positive_int

__all__ = ["PRESETS", "ReproduceConfig"]

FORMAT = "rgfast.reproduce/1"


@dataclass(frozen=True)
class ReproduceConfig:
    """The set-up of the experiment; the defaults are the default set-up (preset ``full``).

    Two configurations that are equal give the same numbers bit for bit on the same machine and versions.
    ``chains`` are labels of :meth:`MarkovChain.from_label`; ``xi`` correlation lengths in steps.
    """

    chains: tuple[str, ...] = ("two-scale",)
    xi: tuple[float, ...] = (1.0, 7.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    states: int = 16
    length: int = 12
    width: int = 16
    depth: int = 8
    hidden: int = 64
    mixing: Mixing = "mixer"
    norm: Norm = "layer"
    activation: Activation = "gelu"
    w2_scale: float = 0.0
    token_std: float = 1.0
    position_std: float = 0.3
    final_norm: bool = True
    training: TrainingConfig = field(default_factory=TrainingConfig)
    probe_sequences: int = 2048

    def __post_init__(self) -> None:
        for name in ("states", "length", "width", "depth", "hidden", "probe_sequences"):
            check_positive_int(getattr(self, name), name)
        for name in ("chains", "xi", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name} must name at least one value, got none")
            if len(set(values)) != len(values):
                raise ValueError(f"{name} must not repeat a value, got {list(values)}")
        for xi in self.xi:
            if not math.isfinite(xi) or xi <= 0:
                raise ValueError(f"xi must be finite and > 0, got {xi:g}")
        for seed in self.seeds:
            if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
                raise ValueError(f"seeds must be whole numbers >= 0, got {seed!r}")
        check_choice(self.mixing, "mixing", MIXINGS)
        check_choice(self.norm, "norm", NORMS)
        check_choice(self.activation, "activation", ACTIVATIONS)
        for chain in self.chains:
            for xi in self.xi:
                MarkovChain.from_label(chain, xi, self.states)
        hidden_rows = self.probe_sequences * self.training.mask_rate
        if hidden_rows < 16 * self.width:
            need = math.ceil(16 * self.width / self.training.mask_rate)
            raise ValueError(
                f"probe_sequences must give at least 16 * width = {16 * self.width} hidden rows a position "
                f"(so {need} or more at mask_rate {self.training.mask_rate:g}), got {self.probe_sequences}"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ReproduceConfig:
        """The configuration called ``name`` (``quick`` or ``full``) with ``changes`` to its fields."""
        check_choice(name, "preset", PRESETS)
        return replace(PRESETS[name], **changes)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "config") -> ReproduceConfig:
        """The configuration that :meth:`to_json` wrote. Raises ValueError naming what does not fit."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source} is not JSON: {error}") from error
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError(f"{source} must be a JSON object with format {FORMAT!r}")
        training = data.pop("training", {})
        if not isinstance(training, dict):
            raise ValueError(f"{source}: training must be an object, got {training!r}")
        for given, known, where in (
            (data, cls, source),
            (training, TrainingConfig, f"{source}: training"),
        ):
            unknown = sorted(set(given) - {f.name for f in fields(known)})
            if unknown:
                raise ValueError(f"{where} has unknown entries: {', '.join(unknown)}")
        for name in ("chains", "xi", "seeds"):
            if name in data:
                if not isinstance(data[name], list):
                    raise ValueError(f"{source}: {name} must be a list, got {data[name]!r}")
                data[name] = tuple(data[name])
        if "xi" in data:
            data["xi"] = as_floats(data["xi"], f"{source}: xi")
        try:
            return cls(**data, training=TrainingConfig(**training))
        except TypeError as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> ReproduceConfig:
        """The configuration in the file ``path``."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"config must be a file, and {path} is none")
        return cls.from_json(path.read_text(encoding="utf-8"), str(path))


def as_floats(values: Sequence[Any], name: str) -> tuple[float, ...]:
    """``values`` as floats; ValueError naming ``name`` where one is no number."""
    try:
        return tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be numbers, got {list(values)!r}") from error


PRESETS = {
    "full": ReproduceConfig(seeds=(0, 1, 2, 3, 4)),
    "quick": ReproduceConfig(depth=6, hidden=32, training=TrainingConfig(lr=5e-3)),
}
