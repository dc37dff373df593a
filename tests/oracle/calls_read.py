"""Recorded calls of what reads results: texts, verdicts, the flow's numbers, and which implementation ran."""

import numpy as np
import torch
import xarray as xr
from calls_probe import Encoder, pieces, probed, sequential, tokens
from registry import call, filled, normal

import rgfast
from rgfast import flow


@call("text/probe")
def texts():
    result = probed(sequential(depth=5), pieces(4, 6), positions=[0, 2])
    few = probed(filled(Encoder().double()), [tokens(6, 9)])
    return [str(r) for r in (result, few)] + [str(result.flow(v)) for v in result.views] + [few.notes]


def tiny_study():
    """A saved study in which every view of a run has the same curve."""
    stages, views = (
        ["trained", "control_iid", "control_permuted", "untrained"],
        ["visible", "masked", "position"],
    )
    fall, flat = (
        np.array([12, 10, 8.5, 7.8, 7.4, 7.2, 7.1]),
        np.array([12, 12.3, 12.5, 12.5, 12.6, 12.6, 12.6]),
    )
    rank = np.tile(flat, (1, 2, 3, 4, 3, 1))
    rank[0, 0, :, 0] = fall
    rank *= 1 + 0.001 * np.arange(3)[:, None, None, None]
    rank[..., 1, 0] = 0
    step = np.array([0.3, 0.012, 0.011, 0.012, 0.011, 0.012])
    drift = step * (1 + 0.02 * np.random.default_rng(0).random((1, 2, 3, 4, 3, 6)))
    drift[..., 1, 0] = np.nan
    dims = ("chain", "xi", "seed", "stage", "view")
    data = {
        "effective_rank": ((*dims, "layer"), rank),
        "kernel_drift": ((*dims, "transition"), drift),
        "kernel_change": ((*dims, "transition"), 2 * drift),
        "captured": (dims[:4], np.full((1, 2, 3, 4), 0.97)),
    }
    coords = {"chain": ["two-scale"], "xi": [1.0, 7.0], "seed": [0, 1, 2], "stage": stages, "view": views}
    return xr.Dataset(data, coords)


@call("verdicts", 1e-9)
def verdicts():
    found = flow.judge(tiny_study())
    return {verdict.key: verdict.to_dict() for verdict in found}


@call("text/verdicts")
def verdict_texts():
    found = flow.judge(tiny_study())
    return [f"{verdict.title}: {answer.summary}" for verdict in found for answer in verdict.answers]


@call("flow", 1e-9)
def flow_numbers():
    decay, step = 0.3 * 0.6 ** np.arange(6), np.array([0.3, 0.012, 0.011, 0.012, 0.011, 0.013])
    values = np.random.default_rng(1).random(9)
    return {
        "shapes": [flow.drift_shape(decay), flow.drift_shape(step), flow.drift_shape(values[:3])],
        "descent": [flow.descent(decay), flow.descent(values), flow.descent([1.0, np.nan])],
        "interval": [flow.paired_interval(values), flow.paired_interval(values[:3])],
        "shares": [flow.top_share(step), flow.effective_transitions(step), flow.broken_stick_share(6)],
    }


def ran(run):
    with rgfast.record() as log:
        run()
    return [f"{entry.op}: {entry.impl}" for entry in log]


@call("dispatch/record")
def records():
    x, single = normal(130, 30, 8), normal(131, 30, 8, dtype=torch.float32)
    block = normal(132, 16, 8, dtype=torch.float32), None, normal(133, 8, 16, dtype=torch.float32), None
    return {
        "rank": ran(lambda: rgfast.effective_rank(x)),
        "single": ran(lambda: rgfast.effective_rank(single, precision="single")),
        "gradient": ran(lambda: rgfast.effective_rank(x.clone().requires_grad_())),
        "eigenvalues": ran(lambda: rgfast.eigvalsh(x.T @ x)),
        "cka": ran(lambda: rgfast.cka(x, single.double())),
        "rbf": ran(lambda: rgfast.cka(x, single.double(), kernel="rbf")),
        "drift": ran(lambda: rgfast.kernel_drift([x, x + 1])),
        "block": ran(lambda: rgfast.residual_mlp(single, *block)),
        "block.fp64": ran(lambda: rgfast.residual_mlp(x, *(t if t is None else t.double() for t in block))),
    }


@call("dispatch/explain")
def explanations():
    x = normal(134, 30, 8)
    questions = {
        "spectrum": rgfast.explain("spectrum", x),
        "cka": rgfast.explain("cka", x, x),
        "rbf": rgfast.explain("cka", x, x, kernel="rbf"),
        "block": rgfast.explain("residual_mlp", x, normal(135, 16, 8), None, normal(136, 8, 16), None),
    }
    later = ("cuda", "triton")  # of which the recording does not know
    return {
        name: [e.chosen, [impl for impl, _ in e.candidates if impl not in later]]
        for name, e in questions.items()
    }
