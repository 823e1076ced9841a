"""``python -m bench model``: the network alone, from an image to class and box maps, against other implementations.

All engines get the same weights and image. The ONNX file that ONNX Runtime and OpenVINO read is exported from PyPI
effdet's model, in its own process. In bf16 and fp16 weights, image and arithmetic are of that dtype, without autocast.
"""

from __future__ import annotations

import argparse
import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effdet
from bench import machine, peers
from bench.floors import FUSIONS, floors
from bench.kernels import DTYPES
from bench.peers import Remote
from bench.peers.contest import Check, Engine, compete, here, peer, relative_to_std
from bench.results import Job, Row
from effdet_kernels import _dispatch, testing, use_backend
from effdet_kernels.spec import iter_specs

NETWORK_OPS = (
    "batch_norm_act",
    "dense_conv",
    "depthwise_conv",
    "expand_depthwise",
    "mbconv",
    "pointwise_conv",
    "separable_conv",
    "squeeze_excite",
    "weighted_fusion",
)
_FUSION = "c2"  # the fusion model whose floor a row is compared with
_LIMITS = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", action="append", help="default tf_efficientdet_d0 (repeatable)")
    parser.add_argument(
        "--size", action="append", type=int, help="image side; default the model's own (repeatable)"
    )
    parser.add_argument("--batch", action="append", type=int, help="default 1 (repeatable)")
    add_compile_arguments(parser)
    peers.add_arguments(parser)


def add_compile_arguments(parser: argparse.ArgumentParser) -> None:
    """The options by which torch.compile takes part."""
    parser.add_argument("--compile", action="store_true", help="also under torch.compile")
    parser.add_argument(
        "--max-autotune", action="store_true", help='--compile with mode="max-autotune"'
    )


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """One job per model, size, batch and dtype.

    Raises:
        ValueError: no such model, or a size or batch that is not positive.
    """
    found = peers.chosen(args)
    for name in args.model or ["tf_efficientdet_d0"]:
        own = default_size(name)
        for size in args.size or [64 if args.smoke else own]:
            for batch in args.batch or [1]:
                if min(size, batch) < 1:
                    raise ValueError(f"--size and --batch must be positive, got {size} and {batch}")
                for dtype in args.dtype:
                    run = functools.partial(_measure, args, found, name, size, batch, dtype)
                    case = f"{size}x{size} b{batch}"
                    yield Job("model", name, case, "forward", dtype, args.device, run)


def default_size(name: str) -> int:
    """The image side of a model's config.

    Raises:
        ValueError: no such model.
    """
    try:
        return int(effdet.get_efficientdet_config(name).image_size[0])
    except KeyError as error:
        raise ValueError(f"--model: {error.args[0]}") from error


def _measure(
    args: argparse.Namespace,
    found: peers.Peers | None,
    name: str,
    size: int,
    batch: int,
    dtype: str,
) -> list[Row]:
    state, x = weights(name), images(math.gcd(batch, 4), size)
    own = build(name, size, state).to(args.device).eval()
    with torch.inference_mode(), use_backend("reference"):
        expected = [y.cpu() for y in _flat(own(x[_ends(x)].to(args.device)))]
    power = torch.inf if dtype == "fp32" else 2
    check = Check(
        lambda maps: relative_to_std(maps, expected, power),
        _LIMITS[dtype],
        f"{'largest' if dtype == 'fp32' else 'RMS'} difference of a map from our float32 reference, over the map's"
        f" standard deviation, worst of all maps, at most {_LIMITS[dtype]:g}",
        _ends(x),
    )
    mode = compile_mode(args)
    times = batch // len(x)
    repeated = x.repeat(times, 1, 1, 1)
    engines = _own_engines(own.to(DTYPES[dtype]), repeated.to(DTYPES[dtype]), args.device, mode)
    shared = {"name": name, "state": state, "x": x, "times": times}
    with tempfile.TemporaryDirectory() as folder:
        if found is not None:
            engines += _effdet_engines(found, shared, dtype, args.device, mode)
        if found is not None and args.device == "cpu":
            engines += _runtime_engines(found, Path(folder) / "network.onnx", shared, dtype)
        cost = {**_cost(name, batch, size, dtype, args.device), "compile_mode": mode}
        return compete(engines, check, cost, f"{batch}x3x{size}x{size}", args.device, args.smoke)


def compile_mode(args: argparse.Namespace) -> str:
    """torch.compile's mode that the options ask for; "" for none."""
    return "max-autotune" if args.max_autotune else "default" if args.compile else ""


def has_kernels(device: str, ops: Sequence[str] = NETWORK_OPS) -> bool:
    """Whether one of the ops has an implementation for ``device`` besides the reference."""
    return any(
        backend != "reference" and reason is None and _dispatch.serves(backend, device)
        for spec in iter_specs()
        if spec.name in ops
        for backend, reason in testing.backends(spec).items()
    )


def _own_engines(model: nn.Module, x: Tensor, device: str, mode: str) -> list[Engine]:
    x = x.to(device)

    def engine(
        name: str,
        network: Callable,
        backend: str | None,
        graph: bool = True,
        compiled: bool = False,
    ) -> Engine:
        def call() -> list[Tensor]:
            with torch.inference_mode(), use_backend(backend):
                return _flat(network(x))

        return here(name, lambda: call, device, graph, compiled)

    engines = [engine("effdet_kernels", model, None)]
    if has_kernels(device):
        engines.append(engine("reference", model, "reference"))
    if mode:
        graph = mode != "max-autotune"  # that one makes its own
        torch.compiler.reset()
        network = torch.compile(model, mode=mode, dynamic=False)
        engines.append(engine("effdet_kernels compiled", network, None, graph, compiled=True))
    return engines


def _effdet_engines(
    found: peers.Peers, shared: dict[str, Any], dtype: str, device: str, mode: str
) -> list[Engine]:
    """PyPI effdet in both layouts, and compiled."""

    def engine(name: str, channels_last: bool, compile_mode: str = "") -> Engine:
        return peer(
            name,
            found,
            "pypi_effdet:network",
            device=device,
            graph=compile_mode != "max-autotune",
            compiled=bool(compile_mode),
            dtype=str(DTYPES[dtype]).removeprefix("torch."),
            channels_last=channels_last,
            compile_mode=compile_mode,
            **shared,
        )

    engines = [engine("effdet nchw", False), engine("effdet channels_last", True)]
    return engines + ([engine("effdet compiled", True, mode)] if mode else [])


def _runtime_engines(
    found: peers.Peers, path: Path, shared: dict[str, Any], dtype: str
) -> list[Engine]:
    """ONNX Runtime (fp32) and OpenVINO (fp32, bf16); the first to start has the file exported."""

    def engine(name: str, task: str, **options: str) -> Engine:
        image = {key: shared[key] for key in ("x", "times")}
        runtime = peer(name, found, task, device="cpu", path=str(path), **image, **options)

        def start() -> Remote:
            if not path.exists():
                with Remote(found) as exporter:
                    exporter.load("pypi_effdet:onnx_file", path=str(path), **shared)
            return runtime.start()

        return Engine(name, start)

    onnxruntime = engine("onnxruntime fp32", "runtimes:onnxruntime")
    return {
        "fp32": [onnxruntime, engine("openvino fp32", "runtimes:openvino", precision="f32")],
        "bf16": [engine("openvino bf16", "runtimes:openvino", precision="bf16")],
        "fp16": [],
    }[dtype]


def _cost(name: str, batch: int, size: int, dtype: str, device: str) -> Row:
    """Bytes, operations and the floor of the fusion model, and all fusion models' floors."""
    found = floors(name, batch, size, size, DTYPES[dtype].itemsize)
    cost = {"bytes": found.bytes(_FUSION), "flops": 2 * found.macs}
    ceilings = machine.floor(device, DTYPES[dtype], cost["bytes"], cost["flops"])
    rate, peak = ceilings["bandwidth"], ceilings["matrix_rate"]
    seconds = {fusion: found.seconds(fusion, rate, peak) for fusion in FUSIONS}
    return {**cost, **ceilings, "floor_s": seconds[_FUSION], "floors": seconds}


# Weights and images ----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def weights(name: str) -> dict[str, Tensor]:
    """Seeded weights of a network as steady as a trained one; its norms have the statistics of ``images``.

    With norms of weight 1 and bias 0 random networks of this depth amplify rounding: bf16 changes their maps by a
    third. Smaller weights and positive biases keep activations where they are nearly linear; then it is 2 %.
    """
    torch.manual_seed(0)
    model = effdet.create_model(name, pretrained_backbone=False).eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.25, 0.75)
        nn.init.uniform_(norm.bias, 1.0, 2.0)
        norm.momentum = 1.0  # running statistics become those of the batch
        norm.train()
    with torch.no_grad(), use_backend("reference"):
        model(images(4, 256, seed=1))
    return model.state_dict()


def images(batch: int, size: int, seed: int = 0) -> Tensor:
    """``[batch, 3, size, size]`` as of photos: large shapes, smaller ones and noise, mean 0, deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(batch, 3, size, size)
    for cells in (4, 16, 64, size):
        coarse = torch.randn(batch, 3, min(cells, size), min(cells, size), generator=generator)
        total += F.interpolate(coarse, (size, size), mode="bilinear") * min(1.0, 8 / cells)
    return (total - total.mean()) / total.std()


def build(name: str, size: int, state: dict[str, Tensor]) -> nn.Module:
    """Our model with these weights, for images of that side."""
    model = effdet.create_model(name, pretrained_backbone=False, image_size=size)
    model.load_state_dict(state)
    return model


def _ends(x: Tensor) -> list[int]:
    return [0, -1] if len(x) > 1 else [0]


def _flat(maps: tuple[list[Tensor], list[Tensor]]) -> list[Tensor]:
    return [*maps[0], *maps[1]]
