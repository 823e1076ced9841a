"""Turn Ctrl-C and SIGTERM into a flag that a loop looks at, so that it can stop at a safe place."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopSignal:
    """Context manager that remembers the first SIGINT or SIGTERM instead of raising.

    A second one raises ``KeyboardInterrupt`` at once, for a loop that does not come to its safe
    place. Outside the main thread (where Python allows no handlers) it never triggers.

    Attributes:
        number: the signal received, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.number or 0)

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
