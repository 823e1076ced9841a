"""The command: a table of the floors of some models on a machine with given, or measured, ceilings."""

from __future__ import annotations

import argparse

import torch

from bench import machine
from bench.floors.fusion import FUSIONS
from bench.floors.model import Floors, floors, meta_model
from bench.kernels import DTYPES

MODELS = tuple(
    f"tf_efficientdet_{size}" for size in ("d0", "d1", "d2", "d3", "d4", "d5", "d6", "d7", "d7x")
)
Rates = tuple[float, float, float | None]  # bandwidth, matrix_rate, vector_rate
_UNITS = ("GB", "ms", "kernels")
_LARGE = 1 << 28  # bytes of the copy that measures the bandwidth of memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="default: tf_efficientdet_d0 to d7x")
    add("--batch", type=int, default=1)
    add("--size", help="image size, S or HxW; default: each model's own")
    add("--dtype", choices=DTYPES, default="bf16", help="of weights and maps")
    add("--bandwidth", type=float, metavar="BYTES_PER_S", help="default: measured here")
    add("--matrix-rate", type=float, metavar="FLOP_PER_S", help="default: measured here")
    add(
        "--vector-rate",
        type=float,
        metavar="FMA_PER_S",
        help="of depthwise convolutions; default: they take no time",
    )
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to measure",
    )


def run(args: argparse.Namespace) -> None:
    """Prints a line for each model.

    Raises:
        ValueError: no such model; a size or a rate that is not positive.
    """
    sizes = {name: _size(args.size, name) for name in args.models or MODELS}
    element_size = DTYPES[args.dtype].itemsize
    found = {name: floors(name, args.batch, *size, element_size) for name, size in sizes.items()}
    bandwidth, matrix_rate, vector_rate = rates = _rates(args)
    depthwise = f", {vector_rate / 1e12:.4g} TFMA/s depthwise" if vector_rate else ""
    print(
        f"batch {args.batch} (all figures are of the whole batch), {args.dtype},"
        f" {bandwidth / 1e12:.4g} TB/s, {matrix_rate / 1e12:.4g} TFLOP/s{depthwise}"
    )
    print(
        f"{'model':<21}{'size':>10}{'params M':>10}{'GMACs':>11}"
        + "".join(_columns([f"{unit}: {FUSIONS[0]}", *FUSIONS[1:]]) for unit in _UNITS)
    )
    for name, (height, width) in sizes.items():
        print(f"{name:<21}{f'{height}x{width}':>10}{_figures(found[name], rates)}")


def _figures(found: Floors, rates: Rates) -> str:
    return f"{found.params / 1e6:>10.2f}{found.macs / 1e9:>11.2f}" + "".join(
        _columns([f"{figure(fusion):.4g}" for fusion in FUSIONS])
        for figure in (
            lambda fusion: found.bytes(fusion) / 1e9,
            lambda fusion: 1e3 * found.seconds(fusion, *rates),
            found.kernels,
        )
    )


def _columns(texts: list[str]) -> str:
    first, *others = texts
    return f" {first:>11}" + "".join(f" {text:>8}" for text in others)


def _size(text: str | None, name: str) -> tuple[int, int]:
    """(H, W) of a text like "512" or "512x640"; None: the size of the model's config."""
    if text is None:
        height, width = meta_model(name).config.image_size
        return height, width
    try:
        height, width = (int(part) for part in (text.split("x") if "x" in text else (text, text)))
    except ValueError as error:
        raise ValueError(f"--size: got {text!r}, takes S or HxW, for example 512x640") from error
    return height, width


def _rates(args: argparse.Namespace) -> Rates:
    """The ceilings that `Floors.seconds` takes."""
    for name in ("bandwidth", "matrix_rate", "vector_rate"):
        rate = getattr(args, name)
        if rate is not None and not rate > 0:
            raise ValueError(f"--{name.replace('_', '-')}: got {rate}, takes a positive number")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, but no CUDA device is visible to torch")
    return (
        args.bandwidth or machine.bandwidth(args.device, _LARGE),
        args.matrix_rate or machine.matrix_rate(args.device, DTYPES[args.dtype]),
        args.vector_rate,
    )
