"""``python -m rgfast`` is the ``rgfast`` command."""

import sys

from rgfast.cli import main

sys.exit(main())
