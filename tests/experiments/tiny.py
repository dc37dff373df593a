"""A configuration that trains and is probed in a moment, for tests of the studies: it learns nothing."""

from rgfast.experiments.config import ReproduceConfig
from rgfast.training import TrainingConfig

TRAINING = TrainingConfig(steps=4, batch=16, warmup=1, log_every=4, log_sequences=32)


def tiny_config(**options):
    """8 states, 4 positions, 2 blocks of width 4; with ``options`` in place of its own."""
    sizes = {"states": 8, "length": 4, "depth": 2, "width": 4, "hidden": 8}
    return ReproduceConfig(**{**sizes, "training": TRAINING, "probe_sequences": 320, **options})
