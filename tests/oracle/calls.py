"""All recorded calls: public API of version 0.1 only, so that every later version can run them."""

import calls_cka  # noqa: F401 (registers its calls, as the others do)
import calls_ops  # noqa: F401
import calls_probe  # noqa: F401
import calls_read  # noqa: F401
import calls_stack  # noqa: F401
from registry import CALLS

__all__ = ["CALLS"]
