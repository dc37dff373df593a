"""What :func:`rgfast.plan_cluster` gives: options, what each takes, and all of it as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rgfast.probing.options import human_bytes

__all__ = ["ClusterOption", "ClusterPlan", "ClusterRates"]

_SIDE = 1024  # of the matrices whose eigenvalues were timed


@dataclass(frozen=True)
class ClusterRates:
    """What one rank does per second; by default ceilings that were measured on an H100 80GB.

    ``forward``: operations of the model's forward (bf16 products). ``products``: operations of fp64 products
    (tensor cores). ``copies``: bytes of memory read or written. ``eigenvalues``: fp64 problems of 1,024 rows,
    values only (cuSOLVER's XsyevBatched; larger ones go by the cube of their size, smaller ones by its power
    of 2.65). Two are assumed rather than measured: ``network``, bytes from one rank to another (10 Gb/s, one
    connection of gloo), and ``weights``, bytes of sharded weights that a rank gathers (400 Gb/s).
    """

    forward: float = 762e12
    products: float = 60e12
    copies: float = 2.9e12
    eigenvalues: float = 1 / 2.2e-3
    network: float = 1.25e9
    weights: float = 50e9

    def solving(self, width: int) -> float:
        """Seconds of the eigenvalues of one matrix."""
        return float((width / _SIDE) ** (3.0 if width >= _SIDE else 2.65)) / self.eigenvalues


@dataclass(frozen=True)
class ClusterOption:
    """One way to probe, and what it takes on a rank.

    ``call`` is what :func:`rgfast.probe` is given, ``runs`` how often, ``kept`` what it measures, in words.
    ``state_bytes`` is what moments and rows not yet summed take, and ``fits`` says that ``memory`` allows it.
    ``peak_bytes`` is the most it ever takes, on the device and in the host's memory together: to sum ranks
    (twice the state, and twice its largest part on its way), to solve spectra, or, if layers are shared out,
    for rows on their way.
    ``network_bytes`` go between all ranks together, ``through_bytes`` through the connection of the busiest
    one, in and out. ``seconds`` are by kind: ``forward``, ``weights`` (gathered, if sharded), ``moments``,
    ``spectra``, ``network``. ``loss`` orders options by how much they leave out.
    """

    call: str
    kept: str
    runs: int
    state_bytes: int
    peak_bytes: int
    network_bytes: int
    through_bytes: int
    operations: dict[str, float]
    seconds: dict[str, float]
    fits: bool
    loss: int

    @property
    def total_seconds(self) -> float:
        """All of it, one after the other."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class ClusterPlan:
    """What :func:`plan_cluster` says; ``str()`` is a table of it, ``to_json()`` a document.

    ``best`` is the option to take: of those that fit the one that measures most, then the fastest; None if
    nothing fits.
    """

    layers: int
    width: int
    tokens: int
    length: int
    ranks: int
    memory: int
    parameters: int
    weight_bytes: int
    forwards: int
    gathered_bytes: int
    rows_bytes: int
    rates: ClusterRates
    options: tuple[ClusterOption, ...]

    @property
    def best(self) -> ClusterOption | None:
        fitting = [option for option in self.options if option.fits]
        return min(fitting, key=lambda one: (one.loss, one.total_seconds), default=None)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON holds it."""
        best = self.best
        return {
            "format": "rgfast.cluster-plan/1",
            **{name: value for name, value in asdict(self).items() if name != "options"},
            "options": [{**asdict(option), "total_seconds": option.total_seconds} for option in self.options],
            "best": None if best is None else best.call,
            "measured": False,
        }

    def __str__(self) -> str:
        sequences = -(-self.tokens // self.length)
        head = [
            f"{self.layers} layers of width {self.width:,}, {self.tokens:,} tokens in {sequences:,} "
            f"sequences of {self.length:,}; {_ranks(self.ranks)}, memory={human_bytes(self.memory)} each",
            f"model: {self.parameters:.3g} parameters, {human_bytes(self.weight_bytes)} of weights per rank "
            f"(2 bytes each), {self.forwards:,} forward{'s' * (self.forwards > 1)} per rank",
        ]
        if self.gathered_bytes:
            head.append(f"weights gathered: {human_bytes(self.gathered_bytes)} into every rank")
        lines = []
        for number, option in enumerate(self.options, start=1):
            lines += [f"{number}. {option.call}{_in_runs(option)}: {option.kept}", *_costs(option)]
        best = self.best
        if best is None:
            least = min(option.state_bytes for option in self.options)
            take = f"nothing fits: memory= must be at least {human_bytes(least)}, or layers= fewer"
        else:
            take = f"take {self.options.index(best) + 1}: {best.call}" + _in_runs(best)
        rates = ", ".join(f"{name} {value:.3g}" for name, value in asdict(self.rates).items())
        tail = [
            f"all rows (route='samples', one process) would take {human_bytes(self.rows_bytes)}",
            take,
            f"times are predictions by ceilings per second ({rates}); not run on a GPU",
        ]
        return "\n".join([*head, "", *lines, "", *tail])


def _costs(option: ClusterOption) -> list[str]:
    """The lines of one option."""
    memory = f"{human_bytes(option.state_bytes)} of state, which {'fits' if option.fits else 'does not fit'}"
    network = "none"
    memory += f"; {human_bytes(option.peak_bytes)} at the most"
    if option.network_bytes:
        network = (
            f"{human_bytes(option.network_bytes)} between all ranks, {human_bytes(option.through_bytes)} "
            "through the busiest"
        )
    operations = " + ".join(f"{value:.3g} {kind}" for kind, value in option.operations.items())
    spent = " + ".join(f"{_time(value)} {kind}" for kind, value in option.seconds.items() if value)
    return [
        f"   memory per rank   {memory}",
        f"   network           {network}",
        f"   operations        {operations}",
        f"   time (predicted)  {_time(option.total_seconds)} = {spent}",
    ]


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"


def _in_runs(option: ClusterOption) -> str:
    return "" if option.runs == 1 else f", in {option.runs} runs"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
