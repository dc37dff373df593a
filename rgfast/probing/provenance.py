"""Where numbers come from: versions, machine, model."""

from __future__ import annotations

import datetime
import platform
import sys
from typing import Any

import numpy as np
import torch
from torch import nn

from rgfast.probing.sharding import class_of
from rgfast.version import __version__

__all__ = ["provenance"]


def provenance(model: nn.Module, **options: Any) -> dict[str, Any]:
    """Model, options, versions and machine, as JSON-ready values."""
    first = next(iter(model.parameters()), None)
    return {
        "model": class_of(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": None if first is None else str(first.dtype).removeprefix("torch."),
        "device": None if first is None else str(first.device),
        **options,
        "rgfast": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": sys.version.split()[0],
        "machine": f"{platform.system()} {platform.machine()}",
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
