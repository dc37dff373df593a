"""One training run of the experiment and the probes of it, in a process of one thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from rgfast.chains import MarkovChain
from rgfast.experiments.config import ReproduceConfig
from rgfast.experiments.survival import PROCESSES, mode_survival, posterior_rank
from rgfast.masking import balanced_mask
from rgfast.netcdf import write_netcdf
from rgfast.probing import ProbeResult, probe
from rgfast.stack import MaskedTokenModel
from rgfast.training import TrainingLog, captured, seeded_generator, train

__all__ = ["STAGES", "VIEWS", "Run", "execute", "plan", "probe_data", "probe_run", "run_dataset", "train_run"]

Stage = Literal["trained", "control_iid", "control_permuted", "untrained"]
STAGES: tuple[Stage, ...] = ("trained", "control_iid", "control_permuted", "untrained")
VIEWS = ("visible", "masked", "position", "pooled", "mean_pooled", "flattened")
RANKS = ("effective_rank", "effective_rank_variance", "participation_ratio", "stable_rank")
# The flattened view holds moments of (T * width) squared numbers a layer; above this it is left out.
WIDEST_FLATTENED = 1024
DRIFTS = ("kernel_drift", "kernel_change")


@dataclass(frozen=True)
class Run:
    """One model, and the (chain, ξ) whose sequences it is probed on.

    ``trained`` and ``control_permuted`` learn from the chain they are probed on; ``control_iid`` learns from
    i.i.d. tokens and ``untrained`` from nothing, so that one model serves every chain and ξ of its seed. All
    stages of a (chain, ξ, seed) start from the same weights and see the same sequences and masks when probed.
    """

    stage: Stage
    seed: int
    probed: tuple[tuple[str, float], ...]

    @property
    def name(self) -> str:
        where = "all" if len(self.probed) > 1 else f"{self.probed[0][0]}-xi{self.probed[0][1]!r}"
        safe = "".join(c if c.isalnum() or c in "-._" else "_" for c in where)
        return f"{self.stage}-{safe}-seed{self.seed}"


def plan(config: ReproduceConfig) -> list[Run]:
    """Every run of a configuration, the longest first."""
    cells = tuple((chain, xi) for chain in config.chains for xi in config.xi)
    learning: tuple[Stage, ...] = ("trained", "control_permuted")
    runs = [Run(stage, seed, (cell,)) for stage in learning for seed in config.seeds for cell in cells]
    runs += [Run("control_iid", seed, cells) for seed in config.seeds]
    runs += [Run("untrained", seed, cells) for seed in config.seeds]
    return runs


def views_of(config: ReproduceConfig) -> tuple[str, ...]:
    """The views that a run of this size is probed in."""
    wide = config.length * config.stream_width > WIDEST_FLATTENED
    return tuple(view for view in VIEWS if view != "flattened" or not wide)


_LOCK, _inside, _before = threading.Lock(), 0, 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread inside, so that results do not depend on how many runs go at once.

    Runs may be threads of one process: the last one that leaves restores the number.
    """
    global _inside, _before
    with _LOCK:
        if _inside == 0:
            _before = torch.get_num_threads()
        _inside += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if _inside == 0:
                torch.set_num_threads(_before)


def build_model(config: ReproduceConfig, seed: int) -> MaskedTokenModel:
    """The untrained model of a seed."""
    return MaskedTokenModel(
        states=config.states,
        length=config.length,
        width=config.width,
        depth=config.depth,
        hidden=config.hidden,
        mixing=config.mixing,
        norm=config.norm,
        activation=config.activation,
        w2_scale=config.w2_scale,
        window=config.window,
        token_std=config.token_std,
        position_std=config.position_std,
        final_norm=config.final_norm,
        generator=seeded_generator(seed, "weights"),
        dtype=torch.float32,
        device="cpu",
        initialization=config.initialization,
        positions=config.positions,
    )


def run_dataset(config: ReproduceConfig, run: Run, *, pairs: bool = False) -> xr.Dataset:
    """Train and probe one run; its numbers. ``pairs``: with the CKA of every two layers, if it is trained."""
    with one_thread():
        model = build_model(config, run.seed)
        log = train_run(config, run, model)
        parts = [probe_run(config, run, model, log, chain, xi, pairs=pairs) for chain, xi in run.probed]
        return xr.merge(parts, join="outer", compat="no_conflicts", combine_attrs="drop")


def execute(config: ReproduceConfig, run: Run, path: Path) -> None:
    """Train and probe one run and write its numbers to ``path`` (NetCDF, atomically)."""
    write_netcdf(path, run_dataset(config, run, pairs=True))


def train_run(config: ReproduceConfig, run: Run, model: MaskedTokenModel) -> TrainingLog | None:
    """Train ``model`` as the stage of ``run`` asks; None where it is not trained at all."""
    if run.stage == "untrained":
        model.eval()
        return None
    label, xi = ("iid", 1.0) if run.stage == "control_iid" else run.probed[0]
    chain = config.chain(label, xi)
    return train(
        model, chain, config.training, seed=run.seed, permute_targets=run.stage == "control_permuted"
    )


def probe_data(config: ReproduceConfig, chain: MarkovChain, seed: int) -> tuple[Tensor, Tensor]:
    """The sequences that a seed is probed on and their balanced mask, ``[n, T]`` each."""
    generator = seeded_generator(seed, "probe")
    tokens = chain.sample(config.probe_sequences, config.length, generator)
    return tokens, balanced_mask(config.probe_sequences, config.length, config.training.mask_rate, generator)


def probe_run(
    config: ReproduceConfig,
    run: Run,
    model: MaskedTokenModel,
    log: TrainingLog | None,
    label: str,
    xi: float,
    *,
    pairs: bool = False,
) -> xr.Dataset:
    """The numbers of one model on the sequences of one (chain, ξ)."""
    chain = config.chain(label, xi)
    tokens, mask = probe_data(config, chain, run.seed)
    batch = {"tokens": tokens.masked_fill(mask, model.mask_token), "mask": mask}
    result = probe(model, batch, mask="mask", views=views_of(config), progress=False, distributed=False)
    fraction = captured(model, chain, tokens, mask)
    labelled = _labelled(config, result, fraction, log)
    if pairs and run.stage == "trained":
        # A probe of its own: the views above, of which some are wide, need neighbouring layers alone.
        labelled = labelled.assign(cka=(("process", "layer", "other_layer"), _all_pairs(model, batch)))
        labelled = labelled.assign_coords(other_layer=np.arange(config.depth + 1))
    survived = mode_survival(model, chain, tokens, mask)
    ranks = posterior_rank(chain, tokens, mask)
    labelled = labelled.assign_coords(process=list(PROCESSES), mode=np.arange(len(survived.modulus)))
    labelled = labelled.assign(survival=(("process", "mode", "layer"), survived.r2))
    labelled = labelled.expand_dims(chain=[label], xi=[xi], seed=[run.seed], stage=[run.stage])
    extended: xr.Dataset = labelled.assign(
        mode_modulus=(("chain", "xi", "mode"), survived.modulus[None, None]),
        posterior_rank=(("chain", "xi", "seed"), np.full((1, 1, 1), ranks[0])),
        log_posterior_rank=(("chain", "xi", "seed"), np.full((1, 1, 1), ranks[1])),
    )
    return extended


def _all_pairs(model: MaskedTokenModel, batch: dict[str, Tensor]) -> NDArray[np.float64]:
    """Debiased CKA ``[process, layer, other layer]`` of every two layers, the mean over positions."""
    found = probe(model, batch, mask="mask", views=PROCESSES, measures=("cka",), pairs="all", progress=False)
    return np.stack([found.order_parameter(view, "cka").values for view in PROCESSES])


def _relative_spectra(result: ProbeResult) -> NDArray[np.float64]:
    """Singular values over the largest ``[positional view, layer, component]``, the mean over positions."""
    sigma = result.dataset.singular_values.sel(view=list(VIEWS[:3]), position=result.dataset.position >= 0)
    relative = sigma / sigma.isel(component=0).where(lambda top: top > 0)
    mean = relative.mean("position", skipna=True).transpose("view", "layer", "component")
    return np.asarray(mean.values)


def _labelled(
    config: ReproduceConfig, result: ProbeResult, fraction: float, log: TrainingLog | None
) -> xr.Dataset:
    views = views_of(config)
    data: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for measures, along in ((RANKS, "layer"), (DRIFTS, "transition")):
        for measure in measures:
            values = np.stack([np.asarray(result.order_parameter(view, measure)) for view in views])
            data[measure] = (("view", along), values)
    by_position = np.stack([np.asarray(result.by_position("effective_rank", view)) for view in VIEWS[:3]])
    data["effective_rank_by_position"] = (("positional_view", "layer", "position"), by_position)
    spectra = _relative_spectra(result)
    data["relative_spectrum"] = (("positional_view", "layer", "component"), spectra)
    data["captured"] = ((), np.array(fraction))
    coords: dict[str, object] = {
        "view": list(views),
        "positional_view": list(VIEWS[:3]),
        "layer": np.arange(config.depth + 1),
        "transition": np.arange(config.depth),
        "position": np.arange(config.length),
        "component": np.arange(spectra.shape[-1]),
    }
    if log is not None:
        coords["step"] = list(log.step)
        for name in ("loss", "captured", "evaluation_loss"):
            data[f"training_{name}"] = (("step",), np.array(getattr(log, name)))
        for name in ("bayes_loss", "stationary_loss"):
            data[name] = ((), np.array(getattr(log, name)))
    return xr.Dataset(data, coords=coords)
