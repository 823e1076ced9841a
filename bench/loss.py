"""``python -m bench loss``: what of a training step lies around the network: labels and loss.

Direction "labels": from the boxes of a batch to the class and box that each anchor is to predict, in float32. Direction
"loss": from head outputs and integer labels to the loss and its gradients in the head outputs; the dtype is that of
these. The memory of a call has what it returns in it: of a loss the gradients, too.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import effdet
from bench import peers
from bench.detect import last_images, moved, repeated
from bench.kernels import DTYPES
from bench.model import add_compile_arguments, compile_mode, default_size, has_kernels
from bench.peers.contest import Check, Engine, compete, here, peer
from bench.results import Job, Row
from bench.train import ground_truth
from effdet.anchors import AnchorLabeler, Anchors
from effdet.loss import DetectionLoss
from effdet_kernels import use_backend

_DIRECTIONS = ("labels", "loss")
_DTYPES = ("fp32", "bf16")
_BOXES = 100  # an image: as many as a batch of the package's loaders holds
_DRAWN = 4  # images; larger batches repeat them
# An anchor's code is off by a rounding of coordinates over its size, 1e-5; where two anchors overlap a box alike, or a
# box an anchor by just half, rounding decides.
_CODE, _STRAY = 1e-4, 1e-4
# Of each loss, of the norm of a head's gradient. A gradient in bf16 is rounded by up to 2^-8 of itself.
_LIMITS = {"fp32": (1e-5, 1e-5), "bf16": (1e-5, 2**-8)}
Targets = tuple[list[Tensor], list[Tensor], Tensor]  # class and box targets by level, positives


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", action="append", help="default tf_efficientdet_d0 (repeatable)")
    parser.add_argument(
        "--size", action="append", type=int, help="image side; default the model's own (repeatable)"
    )
    parser.add_argument("--batch", action="append", type=int, help="default 16 (repeatable)")
    parser.add_argument("--boxes", type=int, default=_BOXES, help=f"an image; default {_BOXES}")
    parser.add_argument(
        "--direction", action="append", choices=_DIRECTIONS, help="default: both (repeatable)"
    )
    add_compile_arguments(parser)
    peers.add_arguments(parser)


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Per model, size and batch one job of labels, and one of the loss in each dtype.

    Raises:
        ValueError: no such model; a size, batch or number of boxes that is not positive; a dtype besides fp32 and bf16.
    """
    wanted, found = args.direction or _DIRECTIONS, peers.chosen(args)
    for dtype in args.dtype:
        if dtype not in _DTYPES:
            raise ValueError(f"--dtype: got {dtype}, loss takes {', '.join(_DTYPES)}")
    for name in args.model or ["tf_efficientdet_d0"]:
        own = default_size(name)
        for size in args.size or [128 if args.smoke else own]:
            for batch in args.batch or [2 if args.smoke else 16]:
                if min(size, batch, args.boxes) < 1:
                    raise ValueError(
                        "--size, --batch and --boxes must be positive,"
                        f" got {size}, {batch} and {args.boxes}"
                    )
                common = (args, found, name, size, batch)
                case = f"{size}x{size} {args.boxes} boxes b{batch}"
                if "labels" in wanted:
                    run = functools.partial(_measure_labels, *common)
                    yield Job("loss", name, case, "labels", "fp32", args.device, run)
                if "loss" in wanted:
                    for dtype in args.dtype:
                        run = functools.partial(_measure_loss, *common, dtype)
                        yield Job("loss", name, case, "loss", dtype, args.device, run)


def _config(name: str, size: int) -> Any:
    config = effdet.get_efficientdet_config(name)
    config.image_size = (size, size)
    return config


# Labels ----------------------------------------------------------------------------------------------


def _measure_labels(
    args: argparse.Namespace, found: peers.Peers | None, name: str, size: int, batch: int
) -> list[Row]:
    config, few = _config(name, size), math.gcd(batch, _DRAWN)
    boxes, classes = ground_truth(few, size, args.boxes)
    inputs = {"boxes": repeated(boxes, batch), "classes": repeated(classes, batch).float()}
    expected = _flat(_labels(config, boxes, classes))
    check = Check(
        lambda levels: _strays(levels, expected),
        _STRAY,
        "share of the anchors whose class differs from that of our float32 reference, or whose code does by more than"
        f" {_CODE:g}; at most {_STRAY:g}",
        last_images(few, batch),
    )
    engines = _own_labelers(config, inputs, args.device)
    if found is not None:
        options = {"name": name, "size": [size, size], **inputs}
        engines.append(
            peer("effdet eager", found, "pypi_effdet:labels", device=args.device, **options)
        )
    nbytes = sum(t.nbytes for t in inputs.values()) + batch // few * sum(t.nbytes for t in expected)
    nbytes += Anchors.from_config(config).boxes.nbytes
    shape = f"{batch}x{args.boxes}x4"
    return compete(engines, check, moved(nbytes, args.device), shape, args.device, args.smoke)


def _labels(config: Any, boxes: Tensor, classes: Tensor) -> Targets:
    """Of our reference."""
    labeler = AnchorLabeler(Anchors.from_config(config), config.num_classes)
    with use_backend("reference"):
        return labeler.batch_label_anchors(boxes, classes)


def _flat(targets: Targets) -> list[Tensor]:
    return [*targets[0], *targets[1], targets[2]]


def _own_labelers(config: Any, inputs: dict[str, Tensor], device: str) -> list[Engine]:
    labeler = AnchorLabeler(Anchors.from_config(config).to(device), config.num_classes)
    boxes, classes = inputs["boxes"].to(device), inputs["classes"].to(device)

    def engine(name: str, backend: str | None) -> Engine:
        def call() -> list[Tensor]:
            with use_backend(backend):
                return _flat(labeler.batch_label_anchors(boxes, classes))

        return here(name, lambda: call, device, graph=True)

    engines = [engine("effdet_kernels", None)]
    own = has_kernels(device, ("label_anchors",))
    return engines + ([engine("reference", "reference")] if own else [])


def _strays(found: list[Tensor], expected: list[Tensor]) -> float:
    """The share of anchors whose targets are others, of the outputs that ``_flat`` gives."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return math.inf
    levels = len(expected) // 2
    strays = total = 0
    pairs = list(zip(found, expected, strict=True))
    for (label, want), (code, right) in zip(pairs[:levels], pairs[levels:-1], strict=True):
        near = ((code - right).abs() <= _CODE).unflatten(-1, (-1, 4)).all(-1)
        strays += int((~near | (label != want)).sum())
        total += want.numel()
    count, positives = pairs[-1]
    few = int((count - positives).abs().sum())
    return max(strays, few) / total


# Loss ------------------------------------------------------------------------------------------------


def _measure_loss(
    args: argparse.Namespace,
    found: peers.Peers | None,
    name: str,
    size: int,
    batch: int,
    dtype: str,
) -> list[Row]:
    config, few = _config(name, size), math.gcd(batch, _DRAWN)
    targets = _labels(config, *ground_truth(few, size, args.boxes))
    maps = _head_maps(config, targets, DTYPES[dtype])
    expected = _expected(config, maps, targets, batch // few)
    check = _loss_check(expected, dtype, last_images(few, batch))
    shared = {
        "maps": maps,
        "class_targets": targets[0],
        "box_targets": targets[1],
        "positives": targets[2],
        "times": batch // few,
    }
    mode = compile_mode(args)
    engines = _own_losses(config, shared, args.device, mode)
    if found is not None:
        engines += _effdet_losses(found, name, shared, args.device, mode)
    of_maps = sum(m.nbytes for m in maps)
    nbytes = batch // few * (2 * of_maps + sum(t.nbytes for t in _flat(targets)))
    shape = f"{batch}x{sum(m[0].numel() for m in maps[: len(maps) // 2])} logits"
    return compete(engines, check, moved(nbytes, args.device), shape, args.device, args.smoke)


def _head_maps(config: Any, targets: Targets, dtype: torch.dtype) -> list[Tensor]:
    """Class maps and then box maps, as of a network that has begun to learn: most logits low, codes small."""
    generator = torch.Generator().manual_seed(0)

    def noise(target: Tensor, per_anchor: int) -> Tensor:
        batch, height, width, anchors = target.shape
        return torch.randn(batch, anchors * per_anchor, height, width, generator=generator)

    classes = [2 * noise(target, config.num_classes) - 5 for target in targets[0]]
    return [m.to(dtype) for m in (*classes, *(0.2 * noise(target, 4) for target in targets[0]))]


def own_loss(
    config: Any,
    device: str,
    backend: str | None,
    *,
    maps: list[Tensor],
    class_targets: list[Tensor],
    box_targets: list[Tensor],
    positives: Tensor,
    times: int,
    compile_mode: str = "",
) -> Callable[[], list[Tensor]]:
    """Our loss of ``times`` times the images; returns it, its class and box part, and the gradient of each map."""
    loss: Any = DetectionLoss(config)
    if compile_mode:
        torch.compiler.reset()
        loss = torch.compile(loss, mode=compile_mode, dynamic=False)

    def on_device(tensors: list[Tensor]) -> list[Tensor]:
        return [repeated(t, times * len(t)).to(device) for t in tensors]

    layout = torch.channels_last  # as our network returns them
    leaves = [m.contiguous(memory_format=layout).requires_grad_() for m in on_device(maps)]
    levels = len(maps) // 2
    labels, codes, (count,) = map(on_device, (class_targets, box_targets, [positives]))

    def call() -> list[Tensor]:
        with use_backend(backend):
            losses = loss(leaves[:levels], leaves[levels:], labels, codes, count)
            return [*losses, *torch.autograd.grad(losses[0], leaves)]

    return call


def per_image(found: list[Tensor]) -> list[Tensor]:
    """Three losses and gradients; the losses as ``[batch, 3]``, so that all can be cut to the images compared."""
    losses, gradients = torch.stack([t.float() for t in found[:3]]), found[3:]
    return [losses.expand(len(gradients[0]), 3), *gradients]


def _expected(config: Any, maps: list[Tensor], targets: Targets, times: int) -> list[Tensor]:
    """What the loss of ``times`` times the images gives by our reference in float64, of the images once.

    Losses are sums over a batch, divided by its number of positive anchors + 1.
    """
    names = ("class_targets", "box_targets", "positives")
    shared: dict[str, Any] = dict(zip(names, targets, strict=True))
    shared["box_targets"] = [t.double() for t in targets[1]]
    shared["positives"] = targets[2].double()
    call = own_loss(config, "cpu", "reference", maps=[m.double() for m in maps], times=1, **shared)
    losses, *gradients = per_image([t.detach() for t in call()])
    positives = float(targets[2].sum())
    share = (positives + 1) / (times * positives + 1)
    return [losses * (times * share), *(g * share for g in gradients)]


def _loss_check(expected: list[Tensor], dtype: str, compared: list[int]) -> Check:
    of_losses, of_gradients = _LIMITS[dtype]
    levels = len(expected) // 2

    def error(found: list[Tensor]) -> float:
        if [t.shape for t in found] != [t.shape for t in expected]:
            return math.inf
        worst = float(((found[0] - expected[0]).abs() / expected[0].abs()).max()) / of_losses
        for part in (slice(1, levels + 1), slice(levels + 1, None)):
            pairs = zip(found[part], expected[part], strict=True)
            off = math.hypot(*(float((got.double() - want).norm()) for got, want in pairs))
            size = math.hypot(*(float(want.norm()) for want in expected[part]))
            worst = max(worst, off / size / of_gradients) if off == off else math.inf
        return worst if worst == worst else math.inf

    return Check(
        error,
        1.0,
        f"share of what is allowed against our reference in float64: {of_losses:g} of each loss, {of_gradients:.2g} of"
        " the norm of the gradient of a head's outputs; worst of all",
        compared,
    )


def _own_losses(config: Any, shared: dict[str, Any], device: str, mode: str) -> list[Engine]:
    def engine(name: str, backend: str | None, compile_mode: str = "") -> Engine:
        options = {**shared, "compile_mode": compile_mode}
        make = functools.partial(own_loss, config, device, backend, **options)
        graph = compile_mode != "max-autotune"  # that one makes its own
        return here(name, make, device, graph, bool(compile_mode), finish=per_image)

    engines = [engine("effdet_kernels", None)]
    if has_kernels(device, ("detection_loss",)):
        engines.append(engine("reference", "reference"))
    return engines + ([engine("effdet_kernels compiled", None, mode)] if mode else [])


def _effdet_losses(
    found: peers.Peers, name: str, shared: dict[str, Any], device: str, mode: str
) -> list[Engine]:
    """PyPI effdet's loss of maps in both layouts, and compiled."""

    def engine(label: str, channels_last: bool, compile_mode: str = "") -> Engine:
        return peer(
            label,
            found,
            "pypi_effdet:loss",
            device=device,
            graph=compile_mode != "max-autotune",
            compiled=bool(compile_mode),
            name=name,
            channels_last=channels_last,
            compile_mode=compile_mode,
            **shared,
        )

    engines = [engine("effdet nchw", False), engine("effdet channels_last", True)]
    return engines + ([engine("effdet compiled", True, mode)] if mode else [])
