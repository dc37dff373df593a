"""Everything that decides a ``reproduce`` run, as one frozen object and its JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rgfast.chains import MarkovChain
from rgfast.stack import (
    ACTIVATIONS,
    INITIALIZATIONS,
    MODEL_MIXINGS,
    NORMS,
    POSITIONS,
    Activation,
    Initialization,
    ModelMixing,
    Norm,
    Positions,
)
from rgfast.training import TrainingConfig
from rgfast.validation import check_choice, check_positive_int

__all__ = ["PRESETS", "ReproduceConfig", "as_recorded"]

FORMAT = "rgfast.reproduce/1"

# Fields that came after 0.1, with what it did: left out where they say that, so that its folders still fit.
_LATER = {"initialization": "normal", "positions": "learned"}


def as_recorded(document: Any) -> Any:
    """``document``, a configuration or what holds some as dictionaries, as files hold it."""
    if isinstance(document, dict):
        return {
            key: as_recorded(value)
            for key, value in document.items()
            if key not in _LATER or value != _LATER[key]
        }
    if isinstance(document, (list, tuple)):
        return type(document)(as_recorded(value) for value in document)
    return document


@dataclass(frozen=True)
class ReproduceConfig:
    """The set-up of the experiment; the defaults are the default set-up (preset ``full``).

    Two configurations that are equal give the same numbers bit for bit on the same machine and versions.
    ``chains`` are labels of :meth:`MarkovChain.from_label`; ``xi`` correlation lengths in steps. With
    ``matrix``, the rows of a transition matrix, there is one chain, its label is free, and ``states`` and
    ``xi`` are those of the matrix (:meth:`with_matrix` sets all of them). ``window`` is read by
    ``mixing="window"`` alone; ``initialization`` and ``positions`` are those of :class:`MaskedTokenModel`.
    """

    chains: tuple[str, ...] = ("two-scale",)
    xi: tuple[float, ...] = (1.0, 7.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    states: int = 16
    length: int = 12
    width: int = 16
    depth: int = 8
    hidden: int = 64
    mixing: ModelMixing = "mixer"
    norm: Norm = "layer"
    activation: Activation = "gelu"
    w2_scale: float = 0.0
    token_std: float = 1.0
    position_std: float = 0.3
    final_norm: bool = True
    training: TrainingConfig = field(default_factory=TrainingConfig)
    probe_sequences: int = 2048
    window: int = 2
    matrix: tuple[tuple[float, ...], ...] | None = None
    initialization: Initialization = "normal"
    positions: Positions = "learned"

    def __post_init__(self) -> None:
        for name in ("states", "length", "width", "depth", "hidden", "probe_sequences", "window"):
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
            if seed >= 2**63:
                raise ValueError(f"seeds must be below 2^63, as result files hold them, got {seed}")
        check_choice(self.mixing, "mixing", MODEL_MIXINGS)
        check_choice(self.norm, "norm", NORMS)
        check_choice(self.activation, "activation", ACTIVATIONS)
        check_choice(self.initialization, "initialization", INITIALIZATIONS)
        check_choice(self.positions, "positions", POSITIONS)
        if self.matrix is not None:
            self._check_matrix(self.matrix)
        for label in self.chains:
            for xi in self.xi:
                self.chain(label, xi)
        hidden_rows, least = self.probe_sequences * self.training.mask_rate, 16 * self.stream_width
        if hidden_rows < least:
            need = math.ceil(least / self.training.mask_rate)
            raise ValueError(
                f"probe_sequences must give at least 16 * width = {least} hidden rows a position "
                f"(so {need} or more at mask_rate {self.training.mask_rate:g}), got {self.probe_sequences}"
            )

    def _check_matrix(self, matrix: tuple[tuple[float, ...], ...]) -> None:
        chain = MarkovChain(matrix)
        xi = chain.correlation_length
        if len(self.chains) != 1 or len(self.xi) != 1 or not math.isclose(self.xi[0], xi, rel_tol=1e-9):
            raise ValueError(
                f"matrix must come with one chain and its correlation length {xi:.12g} as xi, "
                f"got chains {list(self.chains)} and xi {list(self.xi)}"
            )
        if self.states != chain.states:
            raise ValueError(f"states must be the matrix's {chain.states}, got {self.states}")

    @property
    def stream_width(self) -> int:
        """Features of the residual stream: ``width``, or that of a window's tokens side by side."""
        return self.width * (2 * self.window + 1) if self.mixing == "window" else self.width

    def chain(self, label: str, xi: float) -> MarkovChain:
        """The chain of one cell; ``iid`` is the control of any chain."""
        if self.matrix is not None and label in self.chains:
            return MarkovChain(self.matrix, label)
        return MarkovChain.from_label(label, xi, self.states)

    def with_matrix(self, path: str | Path) -> ReproduceConfig:
        """This configuration on the chain whose transition matrix the ``.npy`` file ``path`` holds.

        The matrix itself goes into the configuration, so that its JSON repeats the run without the file.
        Raises what :meth:`MarkovChain.from_npy` raises, and ValueError for a chain without a finite ξ > 0.
        """
        chain = MarkovChain.from_npy(path)
        rows = tuple(tuple(float(p) for p in row) for row in chain.transition.tolist())
        return replace(
            self,
            chains=(Path(path).stem,),
            xi=(chain.correlation_length,),
            states=chain.states,
            matrix=rows,
        )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ReproduceConfig:
        """The preset ``name`` (``quick``, ``full`` or ``sequel``) with ``changes`` to its fields."""
        check_choice(name, "preset", PRESETS)
        return replace(PRESETS[name], **changes)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **as_recorded(asdict(self))}, indent=2) + "\n"

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
        if data.get("matrix") is not None:
            data["matrix"] = _as_rows(data["matrix"], f"{source}: matrix")
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
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        return cls.from_json(text, str(path))


def as_floats(values: Sequence[Any], name: str) -> tuple[float, ...]:
    """``values`` as floats; ValueError naming ``name`` where one is no number."""
    try:
        return tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be numbers, got {list(values)!r}") from error


def _as_rows(value: Any, name: str) -> tuple[tuple[float, ...], ...]:
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        raise ValueError(f"{name} must be a list of rows, got {value!r}")
    return tuple(as_floats(row, name) for row in value)


# What is known of arXiv 2607.15449; the rest (mixing, norm placement, embeddings, zero W2) is ours. A one-hot
# input followed by a learned linear map is what the token embedding is. A final_lr_fraction of 1 without
# warm-up is a constant rate, and AdamW without decay is Adam.
SEQUEL = ReproduceConfig(
    xi=(1.2, 6.7),
    length=64,
    width=64,
    depth=6,
    hidden=256,
    training=TrainingConfig(
        steps=10_000,
        batch=32,
        lr=3e-4,
        warmup=0,
        final_lr_fraction=1.0,
        mask_rate=0.15,
        replacement="bert",
        log_every=500,
    ),
    probe_sequences=8192,
)

PRESETS = {
    "full": ReproduceConfig(seeds=(0, 1, 2, 3, 4)),
    "quick": ReproduceConfig(depth=6, hidden=32, training=TrainingConfig(lr=5e-3)),
    "sequel": SEQUEL,
}
