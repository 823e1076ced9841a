"""Functions that run inside the oracle's process; modules here register them with ``@task``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

TASKS: dict[str, Callable[..., Any]] = {}


def task(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes ``function`` callable by name through the ``oracle`` fixture."""
    TASKS[function.__name__] = function
    return function
