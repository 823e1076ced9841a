"""``python -m bench train``: one training step, that is labels, forward, loss, backward and SGD step.

All engines get the same weights, images and boxes, and no stochastic depth, so that their losses can be compared. bf16
is autocast.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import effdet
from bench import machine, peers
from bench.floors import floors
from bench.kernels import DTYPES
from bench.model import (
    add_compile_arguments,
    build,
    compile_mode,
    default_size,
    has_kernels,
    images,
    weights,
)
from bench.peers.contest import Check, Engine, compete, here, peer
from bench.results import Job, Row
from effdet.anchors import AnchorLabeler, Anchors
from effdet.engine.schedule import build_optimizer
from effdet_kernels import use_backend

AUTOCAST = {"fp32": "", "bf16": "bfloat16"}
LEARNING_RATE = 0.0  # the optimizer does its work and every step is the same
# Of losses, of the first convolution's gradient. An unrelated gradient is off by its norm or more; bf16, through a
# hundred layers with norms on batch statistics of few pixels, moves it by a fifth.
_LIMITS = {"fp32": (1e-4, 5e-3), "bf16": (2e-2, 0.5)}
_OBJECTS = 8
Step = Callable[[], list[Tensor]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", action="append", help="default tf_efficientdet_d0 (repeatable)")
    parser.add_argument(
        "--size",
        action="append",
        type=int,
        help="image side; default 256 on a CPU, the model's own on a GPU (repeatable)",
    )
    parser.add_argument(
        "--batch", action="append", type=int, help="default 2 on a CPU, 32 on a GPU (repeatable)"
    )
    add_compile_arguments(parser)
    peers.add_arguments(parser)


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """One job per model, size, batch and dtype.

    Raises:
        ValueError: no such model; a size or batch that is not positive; a dtype besides fp32 and bf16.
    """
    found, on_gpu = peers.chosen(args), args.device == "cuda"
    for dtype in args.dtype:
        if dtype not in AUTOCAST:
            raise ValueError(f"--dtype: got {dtype}, train takes {', '.join(AUTOCAST)}")
    for name in args.model or ["tf_efficientdet_d0"]:
        own = default_size(name)
        for size in args.size or [128 if args.smoke else own if on_gpu else 256]:
            for batch in args.batch or [32 if on_gpu and not args.smoke else 2]:
                if min(size, batch) < 1:
                    raise ValueError(f"--size and --batch must be positive, got {size} and {batch}")
                for dtype in args.dtype:
                    run = functools.partial(_measure, args, found, name, size, batch, dtype)
                    case = f"{size}x{size} b{batch}"
                    yield Job("train", name, case, "train", dtype, args.device, run)


def _measure(
    args: argparse.Namespace,
    found: peers.Peers | None,
    name: str,
    size: int,
    batch: int,
    dtype: str,
) -> list[Row]:
    few = math.gcd(batch, 2)  # a step of D7 in float32 takes 26 GB an image
    boxes, classes = ground_truth(few, size)
    shared = {
        "name": name,
        "state": weights(name),
        "x": images(few, size),
        "boxes": boxes,
        "classes": classes,
        "times": batch // few,
        "autocast": AUTOCAST[dtype],
    }
    check = _check(_expected(args.device, shared), *_LIMITS[dtype])
    engines = _own_engines(shared, args.device, compile_mode(args))
    if found is not None:
        engines += _effdet_engines(found, shared, args.device, compile_mode(args))
    cost = _cost(name, batch, size, dtype, args.device)
    return compete(engines, check, cost, f"{batch}x3x{size}x{size}", args.device, args.smoke)


def _cost(name: str, batch: int, size: int, dtype: str, device: str) -> Row:
    """Operations: those of the forward, and as many again for each gradient of a product. Bytes are not counted.

    So the floor is that of arithmetic alone.
    """
    flops = 3 * 2 * floors(name, batch, size, size, DTYPES[dtype].itemsize).macs
    peak = machine.matrix_rate(device, DTYPES[dtype])
    return {"bytes": None, "flops": flops, "floor_s": flops / peak, "matrix_rate": peak}


def own_step(
    device: str,
    backend: str | None,
    *,
    name: str,
    state: dict[str, Tensor],
    x: Tensor,
    boxes: Tensor,
    classes: Tensor,
    times: int,
    autocast: str,
    compile_mode: str = "",
) -> Step:
    """A step of ours; returns the loss, its class and box part, and the gradient of the first convolution."""
    model = build(name, x.shape[-1], state)
    for module in model.modules():
        if hasattr(module, "drop_path"):
            module.drop_path = nn.Identity()
    bench = effdet.DetBenchTrain(model).to(device).train()
    step: Any = bench
    if compile_mode:
        torch.compiler.reset()
        step = torch.compile(bench, mode=compile_mode, dynamic=False)
    optimizer = build_optimizer(bench, "sgd", LEARNING_RATE, 0.9, 0.0)  # as `effdet train` does
    x = x.repeat(times, 1, 1, 1).to(device)
    target = {
        "bbox": boxes.repeat(times, 1, 1).to(device),
        "cls": classes.repeat(times, 1).to(device),
    }
    stem = next(bench.parameters())

    def call() -> list[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with use_backend(backend):
            with _autocast(device, autocast):
                result = step(x, target)
            result["loss"].backward()
        optimizer.step()
        assert stem.grad is not None
        return [result["loss"], result["class_loss"], result["box_loss"], stem.grad]

    return call


def _expected(device: str, shared: dict[str, Any]) -> list[Tensor]:
    """What a step of our reference in float32 returns, computed on the images that the batch repeats.

    Repeating a batch changes no statistics. Losses are sums over it, divided by the number of positive anchors + 1.
    """
    step = own_step(device, "reference", **{**shared, "times": 1, "autocast": ""})
    found = [t.detach().cpu() for t in step()]
    config = effdet.get_efficientdet_config(shared["name"])
    config.image_size = tuple(shared["x"].shape[2:])
    labeler = AnchorLabeler(Anchors.from_config(config), config.num_classes)
    positives = float(labeler.batch_label_anchors(shared["boxes"], shared["classes"])[2].sum())
    times = shared["times"]
    return [t * (times * (positives + 1) / (times * positives + 1)) for t in found]


def _autocast(device: str, dtype: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device, getattr(torch, dtype)) if dtype else contextlib.nullcontext()


def _own_engines(shared: dict[str, Any], device: str, mode: str) -> list[Engine]:
    def engine(name: str, backend: str | None, compile_mode: str = "") -> Engine:
        make = functools.partial(own_step, device, backend, compile_mode=compile_mode, **shared)
        return here(name, make, device, graph=False, compiled=bool(compile_mode))

    engines = [engine("effdet_kernels", None)]
    if has_kernels(device):
        engines.append(engine("reference", "reference"))
    return engines + ([engine("effdet_kernels compiled", None, mode)] if mode else [])


def _effdet_engines(
    found: peers.Peers, shared: dict[str, Any], device: str, mode: str
) -> list[Engine]:
    def engine(name: str, channels_last: bool, compile_mode: str = "") -> Engine:
        return peer(
            name,
            found,
            "pypi_effdet:training_step",
            device=device,
            compiled=bool(compile_mode),
            learning_rate=LEARNING_RATE,
            channels_last=channels_last,
            compile_mode=compile_mode,
            **shared,
        )

    engines = [engine("effdet nchw", False), engine("effdet channels_last", True)]
    return engines + ([engine("effdet compiled", True, mode)] if mode else [])


def _check(expected: list[Tensor], of_losses: float, of_gradient: float) -> Check:
    def error(found: list[Tensor]) -> float:
        *losses, gradient = zip(found, expected, strict=True)
        worst = max(float((y - want).abs() / want.abs()) for y, want in losses) / of_losses
        got, want = (t.double() for t in gradient)
        off = float((got - want).norm() / want.norm()) / of_gradient
        return max(worst, off) if worst == worst and off == off else math.inf

    return Check(
        error,
        1.0,
        f"share of what is allowed against our float32 reference: {of_losses:g} of each loss,"
        f" {of_gradient:g} of the norm of the first convolution's gradient; worst of all",
    )


def ground_truth(batch: int, size: int, objects: int = _OBJECTS) -> tuple[Tensor, Tensor]:
    """Boxes ``[batch, objects, 4]`` (y_min, x_min, y_max, x_max) in the image, classes ``[batch, objects]`` from 1."""
    generator = torch.Generator().manual_seed(2)
    sides = size * (0.1 + 0.4 * torch.rand(batch, objects, 2, generator=generator))
    corner = (size - sides) * torch.rand(batch, objects, 2, generator=generator)
    classes = torch.randint(1, 91, (batch, objects), generator=generator)
    return torch.cat([corner, corner + sides], -1), classes
