"""What a probe of a large model takes on several ranks, from its numbers alone: no model, no batches."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from rgfast.probing.cluster_plan import ClusterOption, ClusterPlan, ClusterRates
from rgfast.probing.options import check_views, checked_positions, parse_memory
from rgfast.probing.partition import held_layers, transit_budget, transit_bytes
from rgfast.probing.plan import Plan, make_plan
from rgfast.probing.rank_costs import (
    handed_bytes,
    moment_bytes,
    solving_bytes,
    spectra_bytes,
    spectra_per_layer,
    sums_of,
)
from rgfast.streaming import Pairs, as_pairs
from rgfast.validation import check_choice, check_number, check_positive_int

__all__ = ["plan_cluster"]

# Rows that are summed at once on a device: every such block reads and writes all moments.
_BLOCK = 1024


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
    by the formulas of the probe itself, and seconds follow by ``rates`` (names of :class:`ClusterRates` and
    their values). Bytes agree with those that CPU ranks were measured to take within 25%; times are
    predictions.
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
    rates: ClusterRates

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


def _options(asked: _Asked, work: _Work) -> list[ClusterOption]:
    found = []
    pooled = replace(asked, views=("pooled",))
    if asked.views is None or tuple(asked.views) != ("pooled",):
        found.append(_option(asked, work, _said(asked), loss=0))
    whole = _option(pooled, work, "views=['pooled']", loss=1)
    found.append(whole)
    if work.ranks > 1 and (not asked.pairs or asked.pairs == "adjacent"):
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
    return -(-(layers - 1) // runs) + 1


def _runs(asked: _Asked) -> int | None:
    """How many runs over some layers each fit."""
    for runs in range(2, asked.layers):
        if replace(asked, layers=_with_border(asked.layers, runs)).fitting()[1]:
            return runs
    return None


def _option(asked: _Asked, work: _Work, call: str, *, loss: int, runs: int = 1) -> ClusterOption:
    plan, fits = asked.fitting()
    rates, width = work.rates, asked.width
    sequences = work.own_tokens / asked.length
    sums = sums_of(plan, work.ranks, _open_bytes(plan, round(sequences)))
    products = runs * plan.flops_per_sequence * sequences
    forward = runs * 2.0 * work.parameters * work.own_tokens
    problems = (
        runs * 2 * asked.layers * spectra_per_layer(plan) * (asked.groups + 1 if asked.groups > 1 else 1)
    )
    traffic = runs * 2.0 * moment_bytes(plan) * -(-work.own_tokens // _BLOCK)
    gathered = runs * work.gathered_bytes
    return ClusterOption(
        call=call,
        kept=_kept(plan),
        runs=runs,
        state_bytes=plan.state_bytes,
        peak_bytes=sums.peak,
        network_bytes=runs * sums.between,
        through_bytes=runs * sums.through,
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
            "network": runs * sums.through / rates.network,
        },
        fits=fits,
        loss=loss,
    )


def _kept(plan: Plan) -> str:
    """The views in words."""
    number = len(plan.positions)
    where = f", {number} of {plan.length} positions" if number else ""
    return f"{', '.join(plan.views)}{where}"


def _shared(asked: _Asked, work: _Work, call: str, *, loss: int) -> ClusterOption:
    """Ranks that share out the layers: rows travel, moments stay."""
    ranks, rates, width = work.ranks, work.rates, asked.width
    widths = [width] * asked.layers
    held = held_layers(widths, ranks, neighbors=asked.pairs == "adjacent")
    most, copies = max(map(len, held)), sum(map(len, held))
    transit = transit_budget(asked.memory)
    plan, fits = replace(asked, layers=most, memory=asked.memory - transit).fitting()
    rows = work.own_tokens * width * work.activation_bytes
    spectra = spectra_bytes(plan, widths)
    solved = asked.groups + 1 if asked.groups > 1 else 1
    state = plan.state_bytes + transit
    row = asked.length * work.activation_bytes
    largest = transit_bytes(asked.memory, widths, held, ranks, row)
    through = rows * (copies - most + (ranks - 1) * most) + (ranks - 1 + len(held)) * spectra // len(held)
    products = plan.flops_per_sequence * work.tokens / asked.length
    forward = 2.0 * work.parameters * work.own_tokens
    problems = 2 * most * spectra_per_layer(plan) * solved
    traffic = 2.0 * sum(h.moment_bytes for h in plan.accumulators) * -(-work.tokens // _BLOCK)
    return ClusterOption(
        call=call,
        kept=_kept(plan),
        runs=1,
        state_bytes=state,
        peak_bytes=plan.state_bytes + max(largest, solving_bytes(plan)),
        network_bytes=(ranks - 1)
        * (work.own_tokens * handed_bytes(widths, held, work.activation_bytes) + spectra),
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


def _rates(given: Mapping[str, float] | None) -> ClusterRates:
    names = [field.name for field in fields(ClusterRates)]
    for name, value in (given or {}).items():
        if name not in names:
            raise ValueError(f"rates must be among {', '.join(names)}, got {name!r}")
        check_number(value, f"rates[{name!r}]")
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"rates[{name!r}] must be a finite number > 0, got {value}")
    return ClusterRates(**{name: float(value) for name, value in (given or {}).items()})


def _whole(value: Any, name: str) -> int:
    """A number of things, such as 1e6, as an int."""
    check_number(value, name)
    if not (math.isfinite(value) and value >= 1 and value == int(value)):
        raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
    return int(value)
