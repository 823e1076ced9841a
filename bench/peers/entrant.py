"""What is checked and timed: a call on a device. The same class serves this process and the peers' processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import runner

Call = Callable[[], Any]
Finish = Callable[[Any], Sequence[Tensor]]


class Entrant:
    """A call of this process; a ``runner.Subject``.

    Args:
        call: what is timed; returns tensors.
        device: "cpu" or "cuda".
        graph: on a GPU, replay the call as one CUDA graph if it can be captured; ``self.graph`` says whether it was.
        finish: makes tensors of what the call returns, where that is something else; not timed.
    """

    versions: Mapping[str, str] = {}  # those of this process are the machine's

    def __init__(
        self, call: Call, device: str = "cpu", graph: bool = False, finish: Finish = list
    ) -> None:
        self.graph = False
        self._peak: int | None = None
        if graph and device == "cuda":
            call()  # compiles, where it does
            self._peak = runner.peak_memory(call, device)  # the replay of a graph takes nothing
            try:
                call, self.graph = runner.captured(call), True
            except RuntimeError:  # it waits for the device, say, or graphs itself
                torch.cuda.synchronize()
        self._call, self._finish, self._device = call, finish, device
        self._timer = runner.Local(call, device)

    def outputs(self, images: Sequence[int] | None = None) -> list[Tensor]:
        """Runs the call once; its outputs on the CPU, of ``images`` along the first dimension (all by default)."""
        found = [t.detach() for t in self._finish(self._call())]
        return [(t if images is None else t[list(images)]).cpu().contiguous() for t in found]

    def time(self, repeats: int) -> float:
        """Mean seconds per call of ``repeats`` calls."""
        return self._timer.time(repeats)

    def peak_memory(self) -> int | None:
        """As ``runner.peak_memory``, of one call; where that is replayed, of one before it was captured."""
        return self._peak if self.graph else runner.peak_memory(self._call, self._device)

    def close(self) -> None:
        """Gives back nothing that Python does not."""
