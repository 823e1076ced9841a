"""``python -m bench detect``: what comes after the network, in float32.

Direction "nms": candidates to picks, gaussian soft-NMS (sigma 0.5, scores above 0.001) and NMS (IoU above 0.5), at most
100 picks an image; of one image also to completion, and of one class. Direction "postprocess": head outputs to rows, by
the same two. Direction "predict": images to rows, by soft-NMS; alone it also takes bf16, that is the network in bf16
and what follows in float32, without peers.

Coordinates of candidates are multiples of 1/16 pixel and not negative. Then boxes shifted by class, as PyPI effdet has
them, and integer rectangles, as OpenCV has them, are exact, and all engines compute the same function. What an engine
picks is replayed in intervals that hold its rounding (``bench/peers/replay.py``).
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import effdet
from bench import machine, peers
from bench.detect_checks import COMPARED, STRAY, Maps, exact_candidates, rows_share, strays
from bench.kernels import DTYPES
from bench.model import build, default_size, has_kernels, images, weights
from bench.peers import candidates
from bench.peers.contest import Check, Engine, compete, here, peer, relative_to_std
from bench.peers.replay import Rule, worst_share
from bench.results import TIMED, Job, Row
from effdet_kernels import soft_nms, use_backend
from effdet_kernels.ops.soft_nms.spec import SPEC

_DIRECTIONS = ("nms", "postprocess", "predict")
SIGMA, HARD_IOU, SCORE_THRESHOLD, MAX_DET = 0.5, 0.5, 0.001, 100
# PyPI effdet shifts boxes by up to 89 x 513 pixels, where float32 has steps of 1/256 of a pixel: half of one, and a
# little for decoding.
_PIXEL = 0.0025
# Boxes of an untrained network, not clipped, reach 20,000 pixels, where float32 has steps of 1/512.
_PIXEL_UNCLIPPED = 0.02
_DRAWN = 4  # images; larger batches repeat them: drawing and checking takes seconds an image
_MAPS_OFF = 5e-2  # of a bf16 network's maps, as `bench model` has it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", action="append", type=int, help="default 1 and 8 (repeatable)")
    parser.add_argument(
        "--model", action="append", help="of the head outputs; default tf_efficientdet_d0"
    )
    parser.add_argument("--size", action="append", type=int, help="image side; default the model's")
    parser.add_argument(
        "--direction", action="append", choices=_DIRECTIONS, help="default: all (repeatable)"
    )
    parser.add_argument(
        "--data", type=Path, help="folder with detections/raw_candidates.npz: real candidates too"
    )
    peers.add_arguments(parser)


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Jobs of the directions asked for, for each batch, soft and hard.

    Raises:
        ValueError: no such model; a size or batch that is not positive; a dtype besides fp32, and bf16 of the
            direction predict alone; no candidates in --data.
    """
    wanted = args.direction or _DIRECTIONS
    taken = ["fp32", "bf16"] if set(wanted) == {"predict"} else ["fp32"]
    if not set(args.dtype) <= set(taken):
        raise ValueError(
            f"--dtype: got {', '.join(args.dtype)}, detect takes fp32, and bf16 with --direction predict alone"
        )
    return (job for job in _all_jobs(args) if job.direction in wanted)


def _all_jobs(args: argparse.Namespace) -> Iterator[Job]:
    found = peers.chosen(args)
    batches = args.batch or ([1, 2] if args.smoke else [1, 8])
    if min([*batches, *(args.size or [1])]) < 1:
        raise ValueError(f"--size and --batch must be positive, got {args.size} and {batches}")
    for batch in batches:
        for hard in (False, True):
            yield from _nms_jobs(args, found, batch, hard)
            for name in args.model or ["tf_efficientdet_d0"]:
                own = default_size(name)
                for size in args.size or [128 if args.smoke else own]:
                    run = functools.partial(_measure_rows, args, found, name, size, batch, hard)
                    case = f"{size}x{size} b{batch} {_label(hard)}"
                    yield Job("detect", name, case, "postprocess", "fp32", args.device, run)
                    for dtype in () if hard else args.dtype:
                        each = args, found, name, size, batch, dtype
                        run = functools.partial(_measure_predict, *each)
                        yield Job("detect", name, case, "predict", dtype, args.device, run)


def _nms_jobs(
    args: argparse.Namespace, found: peers.Peers | None, batch: int, hard: bool
) -> Iterator[Job]:
    count = 200 if args.smoke else 5000
    few = math.gcd(batch, _DRAWN)
    sources: dict[str, Callable[[], dict[str, Tensor]]] = {
        f"{count} of 90 classes": lambda: candidates.synthetic(few, count, 90)
    }
    if batch == 1:
        sources[f"{count} of one class"] = lambda: candidates.synthetic(1, count, 1)
    if args.data is not None:
        file = args.data / "detections" / "raw_candidates.npz"
        sources["photos"] = lambda: candidates.of_photos(file, few)
    for source, draw in sources.items():
        limits = {"": MAX_DET}
        if batch == 1 and source != "photos":
            limits[" all"] = count
        for label, max_det in limits.items():
            run = functools.partial(_measure_picks, args, found, draw, batch, hard, max_det)
            case = f"{source} b{batch} {_label(hard)}{label}"
            yield Job("detect", "soft_nms", case, "nms", "fp32", args.device, run)


def _label(hard: bool) -> str:
    return "hard" if hard else "soft"


# From candidates to picks ----------------------------------------------------------------------------


def _measure_picks(
    args: argparse.Namespace,
    found: peers.Peers | None,
    draw: Callable[[], dict[str, Tensor]],
    batch: int,
    hard: bool,
    max_det: int,
) -> list[Row]:
    drawn = draw()
    few, count = drawn["scores"].shape
    inputs = {name: repeated(t, batch) for name, t in drawn.items()}
    rule = Rule(hard, SIGMA, HARD_IOU, SCORE_THRESHOLD, max_det)

    def error(outputs: list[Tensor]) -> float:
        images = zip(drawn["boxes"], drawn["scores"], drawn["classes"], *outputs, strict=True)
        return max(worst_share(rule, *image) for image in images)

    engines = _own_pickers(inputs, hard, max_det, args.device)
    if found is not None:
        engines += _peer_pickers(found, inputs, hard, max_det, args.device)
    arguments = _own_arguments(inputs, hard, max_det)
    cost = moved(SPEC.bytes(**arguments), args.device)
    check = Check(error, 1.0, _ERROR_OF, last_images(few, batch))
    return compete(engines, check, cost, f"{batch}x{count}", args.device, args.smoke)


def repeated(tensor: Tensor, batch: int) -> Tensor:
    """The images of a tensor over and over, ``batch`` in all."""
    return tensor.repeat(batch // len(tensor), *[1] * (tensor.dim() - 1))


def last_images(few: int, batch: int) -> list[int]:
    """The last repeat of the ``few`` images that a batch repeats: the one that is compared."""
    return list(range(batch - few, batch))


_ERROR_OF = (
    "a replay of the picks in intervals that hold float32's rounding: each pick is a best candidate (else"
    " infinite), its score as a share of what the interval allows"
)


def _own_arguments(drawn: dict[str, Tensor], hard: bool, max_det: int) -> dict[str, Any]:
    return {
        **drawn,
        "num_valid": None,
        "max_det": max_det,
        "method": "hard" if hard else "gaussian",
        "sigma": SIGMA,
        "iou_threshold": HARD_IOU,
        "score_threshold": SCORE_THRESHOLD,
        "max_per_class": None,
    }


def _own_pickers(drawn: dict[str, Tensor], hard: bool, max_det: int, device: str) -> list[Engine]:
    moved = {name: t.to(device) for name, t in drawn.items()}
    arguments = _own_arguments(moved, hard, max_det)

    def engine(name: str, backend: str | None) -> Engine:
        def call() -> tuple[Tensor, ...]:
            with torch.inference_mode(), use_backend(backend):
                return soft_nms(**arguments)[:2]

        return here(name, lambda: call, device, graph=True)

    engines = [engine("effdet_kernels", None)]
    return engines + (
        [engine("reference", "reference")] if has_kernels(device, ("soft_nms",)) else []
    )


def _peer_pickers(
    found: peers.Peers, drawn: dict[str, Tensor], hard: bool, max_det: int, device: str
) -> list[Engine]:
    common = {**drawn, "max_det": max_det, "sigma": SIGMA}
    options = {**common, "iou_threshold": HARD_IOU, "hard": hard, "grid": candidates.GRID}
    engines = []
    if hard:
        engines.append(
            peer("torchvision", found, "suppression:torchvision", device=device, **options)
        )
    else:
        engines.append(peer("effdet eager", found, "pypi_effdet:soft_nms", device=device, **common))
    if device == "cpu":
        for name in ("openvino", "opencv"):
            engines.append(peer(name, found, f"suppression:{name}", device=device, **options))
    return engines


# From head outputs to rows ---------------------------------------------------------------------------


class _Maps(nn.Module):
    """Stands in for a network: returns maps that it was given."""

    def __init__(self, config: Any, maps: tuple[list[Tensor], list[Tensor]]) -> None:
        super().__init__()
        self.config, self.maps = config, maps

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return self.maps


def _measure_rows(
    args: argparse.Namespace,
    found: peers.Peers | None,
    name: str,
    size: int,
    batch: int,
    hard: bool,
) -> list[Row]:
    config = effdet.get_efficientdet_config(name)
    config.image_size, config.soft_nms = (size, size), not hard
    if args.smoke:
        config.max_detection_points = 2 * MAX_DET
    few = math.gcd(batch, _DRAWN)
    drawn = candidates.head_maps(config, few, size)
    maps = tuple([repeated(m, batch) for m in part] for part in drawn)
    engines = _own_benches(config, maps, size, args.device)
    if found is not None:
        engines.append(
            peer(
                "effdet eager",
                found,
                "pypi_effdet:postprocess",
                device=args.device,
                name=name,
                size=[size, size],
                class_maps=maps[0],
                box_maps=maps[1],
                points=config.max_detection_points,
                soft=not hard,
            )
        )
    exact = exact_candidates(config, drawn, _whole_image(few, size, "cpu")[1])
    rule = Rule(hard, SIGMA, HARD_IOU, 0.0 if hard else SCORE_THRESHOLD, MAX_DET, _PIXEL)
    images = last_images(few, batch)
    check = Check(lambda rows: rows_share(rule, rows[0], *exact), 1.0, _ERROR_OF, images)
    nbytes = sum(m.nbytes for part in maps for m in part) + batch * MAX_DET * 6 * 4
    shape = f"{batch}x{sum(m.shape[1:].numel() for m in maps[0])} scores"
    return compete(engines, check, moved(nbytes, args.device), shape, args.device, args.smoke)


def _own_benches(
    config: Any, maps: tuple[list[Tensor], list[Tensor]], size: int, device: str
) -> list[Engine]:
    layout = {"device": device, "memory_format": torch.channels_last}  # as our network returns them
    moved = tuple([m.to(**layout) for m in part] for part in maps)
    bench = effdet.DetBenchPredict(_Maps(config, moved)).to(device).eval()
    batch = len(maps[0][0])
    x = torch.zeros(batch, 3, size, size, device=device)
    scale, limits = _whole_image(batch, size, device)
    info = {"img_scale": scale, "img_size": limits}

    def engine(name: str, backend: str | None) -> Engine:
        def call() -> list[Tensor]:
            with torch.inference_mode(), use_backend(backend):
                return [bench(x, info)]

        return here(name, lambda: call, device, graph=True)

    engines = [engine("effdet_kernels", None)]
    own = has_kernels(device, ("soft_nms", "decode_topk"))
    return engines + ([engine("reference", "reference")] if own else [])


def _whole_image(batch: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """``img_scale`` and ``img_size`` of images that fill the network's input."""
    limits = torch.full((batch, 2), float(size), device=device)
    return torch.ones(batch, device=device), limits


# From images to rows ---------------------------------------------------------------------------------


def _measure_predict(
    args: argparse.Namespace,
    found: peers.Peers | None,
    name: str,
    size: int,
    batch: int,
    dtype: str,
) -> list[Row]:
    state, x = weights(name), images(math.gcd(batch, _DRAWN), size)
    times = batch // len(x)
    bench = effdet.DetBenchPredict(build(name, size, state)).to(args.device).eval()
    bench.soft_nms = True
    check_of = _check_of_rows if dtype == "fp32" else _check_of_maps_and_rows
    check = check_of(bench, x.to(args.device), last_images(len(x), batch))
    bench.model.to(DTYPES[dtype])  # not the anchors
    x_all = x.repeat(times, 1, 1, 1).to(args.device, DTYPES[dtype])
    engines = [_own_predictor("effdet_kernels", bench, x_all, None)]
    if has_kernels(args.device):
        engines.append(_own_predictor("reference", bench, x_all, "reference"))
    if found is not None and dtype == "fp32":
        task = "pypi_effdet:predict"
        shared = {"name": name, "state": state, "x": x, "times": times}
        engines.append(peer("effdet eager", found, task, device=args.device, **shared))
    cost = moved(x_all.nbytes + batch * MAX_DET * 6 * 4, args.device)
    rows = compete(engines, check, cost, f"{batch}x3x{size}x{size}", args.device, args.smoke)
    if args.device == "cpu" and rows[0]["status"] == TIMED:
        rows[0]["after_network"] = _share_after_network(bench, x_all, 3 if args.smoke else 50)
    return rows


def _own_predictor(
    label: str, bench: effdet.DetBenchPredict, x: Tensor, backend: str | None
) -> Engine:
    """The time is that of the rows; its outputs are these and, of a network in half precision, the maps behind them."""

    def call() -> list[Tensor]:
        with torch.inference_mode(), use_backend(backend):
            return [bench(x)]

    def with_maps(rows: list[Tensor]) -> list[Tensor]:
        with torch.inference_mode(), use_backend(backend):
            classes, boxes = bench.model(x)
        return [*rows, *classes, *boxes]

    finish = list if x.dtype == torch.float32 else with_maps
    return here(label, lambda: call, x.device.type, graph=True, finish=finish)


def _check_of_rows(bench: effdet.DetBenchPredict, x: Tensor, last: list[int]) -> Check:
    with torch.inference_mode(), use_backend("reference"):
        expected = bench(x).cpu()
    return Check(
        lambda rows: max(map(strays, rows[0], expected)),
        STRAY,
        f"of the {COMPARED} best rows of an image, those without a partner (class, half a pixel, score within 1e-3)"
        f" among the rows of our float32 reference, at most {STRAY}",
        last,
    )


def _check_of_maps_and_rows(bench: effdet.DetBenchPredict, x: Tensor, last: list[int]) -> Check:
    """The rounding of a network in bf16 decides which rows there are: they are compared with what its maps give."""
    with torch.inference_mode(), use_backend("reference"):
        expected = [m.cpu() for part in bench.model(x) for m in part]
    rule = Rule(False, SIGMA, HARD_IOU, SCORE_THRESHOLD, MAX_DET, _PIXEL_UNCLIPPED)

    def error(found: list[Tensor]) -> float:
        rows, *maps = found
        off = relative_to_std(maps, expected, 2) / _MAPS_OFF
        levels = len(maps) // 2
        own: Maps = maps[:levels], maps[levels:]
        return max(off, rows_share(rule, rows, *exact_candidates(bench.config, own)))

    return Check(
        error,
        1.0,
        f"share of what is allowed: of the network's maps, {_MAPS_OFF:g} of the standard deviation of our float32"
        f" reference's (RMS, worst of all maps); of the rows, from these maps on, {_ERROR_OF}",
        last,
    )


class _Timed(nn.Module):
    """A network that notes how long its last call took."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seconds = 0.0

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        start = time.perf_counter()
        outputs = self.model(x)
        self.seconds = time.perf_counter() - start
        return outputs


def _share_after_network(bench: effdet.DetBenchPredict, x: Tensor, calls: int) -> float:
    """What share of the time of ``bench(x)`` is not its network's: the median of so many calls on a CPU.

    Both times are of the same call, as the machine's speed may change between two.
    """
    network = _Timed(bench.model)
    timed = effdet.DetBenchPredict(network).eval()
    timed.soft_nms = bench.soft_nms
    shares = []
    with torch.inference_mode():
        timed(x)
        for _ in range(calls):
            start = time.perf_counter()
            timed(x)
            shares.append(1 - network.seconds / (time.perf_counter() - start))
    return statistics.median(shares)


def moved(nbytes: int, device: str) -> Row:
    """The cost of a case that moves ``nbytes`` at least; its arithmetic depends on the data and is not counted."""
    rate = machine.bandwidth(device, 1 << nbytes.bit_length())
    return {"bytes": nbytes, "flops": None, "floor_s": nbytes / rate, "bandwidth": rate}
