"""The ``effdet`` command: one file per subcommand, each with ``add_parser`` and ``run``."""

from __future__ import annotations

from .main import main

__all__ = ["main"]
