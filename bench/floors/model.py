"""The floor of a whole model: parameters, multiply-adds, and per fusion model bytes, kernels and seconds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch import nn

import effdet
from bench.floors.decompose import decompose
from bench.floors.fusion import FUSIONS, Launch, launches
from bench.floors.trace import Tape


@dataclasses.dataclass(frozen=True)
class Floors:
    """What a forward pass of a model in eval mode costs at least, if it is cut into kernels in a given way.

    ``launches`` has the kernels of each fusion model of ``FUSIONS`` (see `bench.floors.fusion`), whose name the
    methods take; they raise ValueError where there is none of that name. What one kernel leaves to another counts as
    written and read, whatever a cache may keep: at small batches a machine can be faster than its bandwidth to memory.
    """

    params: int
    macs: int  # of all convolutions and matrix products
    element_size: int
    launches: Mapping[str, tuple[Launch, ...]]

    def bytes(self, fusion: str) -> int:
        """Bytes read and written: of each kernel, what it does not make itself and what others need."""
        return self.element_size * sum(launch.elements for launch in self._of(fusion))

    def kernels(self, fusion: str) -> int:
        return len(self._of(fusion))

    def seconds(
        self, fusion: str, bandwidth: float, matrix_rate: float, vector_rate: float | None = None
    ) -> float:
        """The sum over the kernels of the longest of moving, multiplying and convolving depthwise.

        Args:
            bandwidth: bytes per second, read plus written.
            matrix_rate: FLOP/s of matrix products (a multiply-add is two).
            vector_rate: multiply-adds per second of depthwise convolutions; None: they take no time.
        """
        return sum(
            max(
                self.element_size * launch.elements / bandwidth,
                2 * launch.matrix / matrix_rate,
                launch.vector / vector_rate if vector_rate else 0.0,
            )
            for launch in self._of(fusion)
        )

    def _of(self, fusion: str) -> tuple[Launch, ...]:
        if fusion not in self.launches:
            raise ValueError(f"fusion: got {fusion!r}, takes one of {', '.join(FUSIONS)}")
        return self.launches[fusion]


@functools.cache
def floors(name: str, batch: int, height: int, width: int, element_size: int) -> Floors:
    """The floors of the model called ``name``; ``element_size`` in bytes, of weights and maps alike.

    Raises:
        ValueError: no model of that name, or not without timm; a size that is not positive.
    """
    return floors_of(meta_model(name), batch, height, width, element_size)


def floors_of(model: nn.Module, batch: int, height: int, width: int, element_size: int) -> Floors:
    """The same of a model on the meta device, in eval mode, that takes images [batch, 3, height, width]."""
    sizes = {"batch": batch, "height": height, "width": width, "element_size": element_size}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: got {size}, takes at least 1")
    image = torch.empty(batch, 3, height, width, device="meta")
    with torch.no_grad(), Tape(image, model, decompose) as tape:
        model(image)
    return Floors(
        params=sum(p.numel() for p in model.parameters()),
        macs=sum(step.matrix + step.vector for step in tape.steps),
        element_size=element_size,
        launches={fusion: launches(tape.steps, fusion) for fusion in FUSIONS},
    )


@functools.cache
def meta_model(name: str) -> effdet.EfficientDet:
    """The bare model of that name in eval mode, without memory."""
    try:
        config = effdet.get_efficientdet_config(name)
        with torch.device("meta"):
            return effdet.EfficientDet(config, pretrained_backbone=False).eval()
    except (KeyError, ImportError) as error:  # no such model; its backbone is another package's
        raise ValueError(f"model: {error.args[0]}") from error
