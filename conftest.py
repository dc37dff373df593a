"""Imports the package before pytest collects doctests, which would make a module and its classes anew."""

import rgfast.probing  # noqa: F401 (see above)
