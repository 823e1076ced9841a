"""``python -m effdet`` is the ``effdet`` command."""

from __future__ import annotations

import sys

from effdet.cli import main

sys.exit(main())
