"""The ``effdet`` command: one file per subcommand, each with ``add_parser`` and ``run``."""

from __future__ import annotations

from effdet import _conflict as _conflict  # effdet/__init__.py may not be ours

from .main import main

__all__ = ["main"]
