"""What a probe of a large model takes on several ranks, from its numbers alone: no model, no batches."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from rgfast.probing.options import check_views, checked_positions, human_bytes, parse_memory
from rgfast.probing.plan import Plan, make_plan
from rgfast.probing.sharing import buffer_bytes, held_layers
from rgfast.streaming import Pairs, as_pairs
from rgfast.streaming.sizes import at_once
from rgfast.validation import check_choice, check_number, check_positive_int

__all__ = ["ClusterPlan", "Option", "Rates", "plan_cluster"]

# Rows that are summed at once on a device: every such block reads and writes all moments.
_BLOCK = 1024
# Matrices of a layer that exist at once while its spectra are solved, as measured on the CPU.
_SOLVING = 14
_SIDE = 1024  # of the matrices whose eigenvalues were timed


@dataclass(frozen=True)
class Rates:
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
class Option:
    """One way to probe, and what it takes on a rank.

    ``call`` is what :func:`rgfast.probe` is given, ``runs`` how often, ``kept`` what it measures, in words.
    ``state_bytes`` is what moments and rows not yet summed take, and ``fits`` says that ``memory`` allows it.
    ``peak_bytes`` is the most it ever takes, on the device and in the host's memory together: to sum ranks
    (twice the state, and twice its largest part on its way), to solve spectra, or, if layers are shared out,
    to take the rows of a batch.
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
    rates: Rates
    options: tuple[Option, ...]

    @property
    def best(self) -> Option | None:
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


def plan_cluster(
    *,
    layers: int,
    width: int,
    tokens: float,
    ranks: int = 1,
    length: int = 2048,
    views: Sequence[str] | None = None,
    positions: str | Sequence[int | str] = "auto",
    pairs: Pairs = "adjacent",
    groups: int = 1,
    memory: str | int = "48GiB",
    parameters: float | None = None,
    batch: int = 16384,
    sharded: bool = False,
    activation_bytes: int = 2,
    device: str = "cuda",
    refine: bool | None = None,
    rates: Mapping[str, float] | None = None,
) -> ClusterPlan:
    """What a probe of ``layers`` points of ``width`` takes on several ranks, a :class:`ClusterPlan`.

    Nothing runs, and no model is needed: memory per rank, bytes over the network and operations are counted
    by the formulas of the probe itself, and seconds follow by ``rates`` (names of :class:`Rates` and their
    values). Bytes agree with those that CPU ranks were measured to take within 25%; times are predictions.
    The options compared: the views and positions as asked, only the pooled view, both with layers shared out
    among the ranks, the pooled view in several runs over some layers each (a layer on each border in two
    runs), and without drift or CKA.

    ``tokens`` are all tokens, in sequences of ``length``, shared evenly by the ranks. ``views``,
    ``positions``, ``pairs``, ``groups``, ``memory`` (of one rank, for the state) and ``refine`` are those of
    :func:`rgfast.probe`, ``device`` says what the ranks compute on (``"cuda"`` holds more rows back and
    refines only if asked to, ``"cpu"``). ``parameters`` of the model are 12·(layers − 1)·width² by default,
    with 2 bytes each: whole on every rank, or ``sharded`` over them (then every forward, of ``batch`` tokens,
    gathers the parts that others have). A number of the model's activations takes ``activation_bytes``.

    Raises TypeError or ValueError for options out of range.

    >>> found = plan_cluster(layers=81, width=8192, tokens=1e6, ranks=8, memory="16GiB")
    >>> found.best.call
    "views=['pooled'], owner='layers'"
    >>> round(found.best.state_bytes / 1e9)
    13
    """
    for name, value in {"layers": layers, "width": width, "ranks": ranks, "length": length}.items():
        check_positive_int(value, name)
    for name, value in {"groups": groups, "batch": batch, "activation_bytes": activation_bytes}.items():
        check_positive_int(value, name)
    check_choice(device, "device", ("cuda", "cpu"))
    tokens = _whole(tokens, "tokens")
    parameters = (
        12 * max(layers - 1, 1) * width**2 if parameters is None else _whole(parameters, "parameters")
    )
    if views is not None:
        check_views(views)
        if masked := sorted({"visible", "masked"} & {*views}):
            raise ValueError(f"views must be those of sequences without a mask, got {', '.join(masked)}")
    length = min(length, tokens)
    asked = _Asked(
        layers, width, length, views, checked_positions(positions), as_pairs(pairs), groups, refine,
        device == "cuda", parse_memory(memory),
    )  # fmt: skip
    work = _Work(ranks, tokens, parameters, batch, sharded, activation_bytes, _rates(rates))
    return ClusterPlan(
        layers=layers,
        width=width,
        tokens=tokens,
        length=length,
        ranks=ranks,
        memory=asked.memory,
        parameters=parameters,
        weight_bytes=2 * parameters // (ranks if sharded else 1),
        forwards=work.forwards,
        gathered_bytes=work.gathered_bytes,
        rows_bytes=4 * tokens * layers * width,
        rates=work.rates,
        options=tuple(_options(asked, work)),
    )


@dataclass(frozen=True)
class _Asked:
    """What is measured."""

    layers: int
    width: int
    length: int
    views: Sequence[str] | None
    positions: str | Sequence[int | str]
    pairs: Pairs
    groups: int
    refine: bool | None
    launched: bool
    memory: int

    def plan(self, memory: int) -> Plan:
        return make_plan(
            [str(layer) for layer in range(self.layers)],
            [self.width] * self.layers,
            self.length,
            positions=self.positions,
            views=self.views,
            pairs=self.pairs,
            groups=self.groups,
            memory=memory,
            masked=False,
            refine=False if self.launched and self.refine is None else self.refine,
            launched=self.launched,
        )

    def fitting(self) -> tuple[Plan, bool]:
        """The plan that fits ``memory``, or the smallest that there is; whether it fits."""
        try:
            return self.plan(self.memory), True
        except ValueError:
            least = replace(self, positions=[0]) if self.positions == "auto" else self
            # Rows not yet summed take no more than they would where the state just fits.
            return replace(least.plan(sys.maxsize), pending_bytes=self.memory // 8), False


@dataclass(frozen=True)
class _Work:
    """What it is measured of, and on what."""

    ranks: int
    tokens: int
    parameters: int
    batch: int
    sharded: bool
    activation_bytes: int
    rates: Rates

    @property
    def own_tokens(self) -> int:
        """Those of one rank."""
        return -(-self.tokens // self.ranks)

    @property
    def forwards(self) -> int:
        return -(-self.own_tokens // self.batch)

    @property
    def gathered_bytes(self) -> int:
        """Weights that come to one rank from the others, in all forwards."""
        others = self.ranks - 1 if self.sharded else 0
        return self.forwards * 2 * self.parameters * others // self.ranks


def _options(asked: _Asked, work: _Work) -> list[Option]:
    found = []
    pooled = replace(asked, views=("pooled",))
    if asked.views is None or tuple(asked.views) != ("pooled",):
        found.append(_option(asked, work, _said(asked), loss=0))
    whole = _option(pooled, work, "views=['pooled']", loss=1)
    found.append(whole)
    if work.ranks > 1 and (not asked.pairs or asked.pairs == "adjacent") and asked.groups == 1:
        asked_of = [asked, pooled] if len(found) > 1 else [pooled]
        found += [
            _shared(one, work, f"{option.call}, owner='layers'", loss=option.loss)
            for one, option in zip(asked_of, found, strict=True)
        ]
    if not whole.fits and asked.pairs == "adjacent" and (runs := _runs(pooled)) is not None:
        some = replace(pooled, layers=_with_border(asked.layers, runs))
        call = f"views=['pooled'], layers= {some.layers} at a time"
        found.append(_option(some, work, call, loss=1, runs=runs))
    if asked.pairs:
        call = "views=['pooled'], measures= of rank only"
        found.append(_option(replace(pooled, pairs=()), work, call, loss=2))
    return found


def _said(asked: _Asked) -> str:
    views = "default views" if asked.views is None else f"views={list(asked.views)}"
    return views if isinstance(asked.positions, str) else f"{views}, positions={list(asked.positions)}"


def _with_border(layers: int, runs: int) -> int:
    """Layers of a run: a share, and the first one of the next run, for the drift between them."""
    return min(layers, -(-layers // runs) + (runs > 1))


def _runs(asked: _Asked) -> int | None:
    """How many runs over some layers each fit."""
    for runs in range(2, asked.layers + 1):
        if replace(asked, layers=_with_border(asked.layers, runs)).fitting()[1]:
            return runs
    return None


def _option(asked: _Asked, work: _Work, call: str, *, loss: int, runs: int = 1) -> Option:
    plan, fits = asked.fitting()
    ranks, rates, width = work.ranks, work.rates, asked.width
    moments = plan.groups * sum(held.moment_bytes for held in plan.accumulators)
    hops = 2 * (ranks - 1).bit_length()
    state = plan.state_bytes
    largest = max(held.bytes(plan.pending_bytes) for held in plan.accumulators)
    solving = _solving_bytes(plan)
    sequences = work.own_tokens / asked.length
    # Every second rank hands over rows that it has not summed, too; whoever merges them sums them.
    pending = _open_bytes(plan, round(sequences))
    through = runs * (hops * moments + pending) if ranks > 1 else 0
    products = runs * plan.flops_per_sequence * sequences
    forward = runs * 2.0 * work.parameters * work.own_tokens
    problems = runs * 2 * asked.layers * _clouds(plan) * (asked.groups + 1 if asked.groups > 1 else 1)
    traffic = runs * 2.0 * moments * -(-work.own_tokens // _BLOCK)
    gathered = runs * work.gathered_bytes
    return Option(
        call=call,
        kept=_kept(plan),
        runs=runs,
        state_bytes=state,
        peak_bytes=max(2 * (state + largest), 2 * state + solving) if ranks > 1 else state + solving,
        network_bytes=runs * (2 * (ranks - 1) * moments + ranks // 2 * pending),
        through_bytes=through,
        operations={
            "forward": forward,
            "moments": products,
            "spectra": problems * 4 / 3 * float(width) ** 3,
        },
        seconds={
            "forward": forward / rates.forward,
            "weights": gathered / rates.weights,
            "moments": max(products / rates.products, traffic / rates.copies),
            "spectra": problems * rates.solving(width),
            "network": through / rates.network,
        },
        fits=fits,
        loss=loss,
    )


def _kept(plan: Plan) -> str:
    """The views in words."""
    number = len(plan.positions)
    where = f", {number} of {plan.length} positions" if number else ""
    return f"{', '.join(plan.views)}{where}"


def _shared(asked: _Asked, work: _Work, call: str, *, loss: int) -> Option:
    """Ranks that share out the layers: rows travel, moments stay."""
    ranks, rates, width = work.ranks, work.rates, asked.width
    held = held_layers([width] * asked.layers, ranks, neighbors=asked.pairs == "adjacent")
    most, copies = max(map(len, held)), sum(map(len, held))
    buffer = buffer_bytes(asked.memory)
    plan, fits = replace(asked, layers=most, memory=asked.memory - 2 * buffer).fitting()
    rows = work.own_tokens * width * work.activation_bytes
    spectra = 8 * _clouds(plan) * asked.layers * width
    # Rows held back, and those that come from another rank, which are of one batch at least.
    state = plan.state_bytes + 2 * buffer
    batch = min(work.batch, work.own_tokens) * most * width * work.activation_bytes
    through = rows * (copies - most + (ranks - 1) * most) + (ranks - 1 + len(held)) * spectra // len(held)
    products = plan.flops_per_sequence * work.tokens / asked.length
    forward = 2.0 * work.parameters * work.own_tokens
    problems = 2 * most * _clouds(plan)
    traffic = 2.0 * sum(h.moment_bytes for h in plan.accumulators) * -(-work.tokens // _BLOCK)
    return Option(
        call=call,
        kept=_kept(plan),
        runs=1,
        state_bytes=state,
        peak_bytes=max(state, state - buffer + batch, plan.state_bytes + _solving_bytes(plan)),
        network_bytes=(ranks - 1) * (rows * copies + spectra),
        through_bytes=through,
        operations={
            "forward": forward,
            "moments": products,
            "spectra": problems * 4 / 3 * float(width) ** 3,
        },
        seconds={
            "forward": forward / rates.forward,
            "weights": work.gathered_bytes / rates.weights,
            "moments": max(products / rates.products, traffic / rates.copies),
            "spectra": problems * rates.solving(width),
            "network": through / rates.network,
        },
        fits=fits,
        loss=loss,
    )


def _open_bytes(plan: Plan, sequences: int) -> int:
    """Rows that one rank has not summed when its sequences end."""
    rows = sequences // plan.groups
    return plan.groups * sum(
        held.open_bytes(rows * plan.rows_of(held), plan.pending_bytes) for held in plan.accumulators
    )


def _solving_bytes(plan: Plan) -> int:
    """What spectra take while they are solved: a layer at a time, or several where sums are launches."""
    width, positions = plan.widths[0], max(1, len(plan.positions))
    layers = min(len(plan.widths), at_once(width, width, positions)) if plan.launched else 1
    return _SOLVING * 8 * layers * positions * (width + 2) ** 2


def _clouds(plan: Plan) -> int:
    """How many spectra a layer has, centered or not."""
    single = sum(view in plan.views for view in ("pooled", "mean_pooled", "flattened"))
    return single + ("position" in plan.views) * len(plan.positions)


def _rates(given: Mapping[str, float] | None) -> Rates:
    names = [field.name for field in fields(Rates)]
    for name, value in (given or {}).items():
        if name not in names:
            raise ValueError(f"rates must be among {', '.join(names)}, got {name!r}")
        check_number(value, f"rates[{name!r}]")
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"rates[{name!r}] must be a finite number > 0, got {value}")
    return Rates(**{name: float(value) for name, value in (given or {}).items()})


def _whole(value: Any, name: str) -> int:
    """A number of things, such as 1e6, as an int."""
    check_number(value, name)
    if not (math.isfinite(value) and value >= 1 and value == int(value)):
        raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
    return int(value)


def _costs(option: Option) -> list[str]:
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


def _in_runs(option: Option) -> str:
    return "" if option.runs == 1 else f", in {option.runs} runs"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
