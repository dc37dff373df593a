"""Configurations that train and are probed in a moment, for tests: they learn next to nothing."""

from rgfast.experiments.config import ReproduceConfig
from rgfast.training import TrainingConfig

TRAINING = TrainingConfig(steps=4, batch=16, warmup=1, log_every=4, log_sequences=32)

REPRODUCED = ReproduceConfig(
    seeds=(0, 1),
    states=8,
    length=4,
    width=4,
    depth=5,
    hidden=8,
    training=TrainingConfig(steps=60, batch=32, lr=1e-2, warmup=2, log_every=20, log_sequences=64),
    probe_sequences=320,
)


def tiny_config(**options):
    """8 states, 4 positions, 2 blocks of width 4; with ``options`` in place of its own."""
    sizes = {"states": 8, "length": 4, "depth": 2, "width": 4, "hidden": 8}
    return ReproduceConfig(**{**sizes, "training": TRAINING, "probe_sequences": 320, **options})
