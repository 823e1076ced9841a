"""What ``python -m bench gpu`` runs: each part is a list of steps, each step one command."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bench.results import load
from bench.setups import timed, usable
from effdet.engine.log import read_log
from effdet_kernels import testing
from effdet_kernels.spec import iter_specs
from effdet_kernels.suite import CHECKS

ROOT = Path(__file__).resolve().parents[1]
MODELS = tuple(f"tf_efficientdet_{size}" for size in ("d0", "d2", "d4", "d7"))
OTHERS = tuple(f"tf_efficientdet_{size}" for size in ("d1", "d3", "d5", "d6", "d7x"))  # once
TRAINED = MODELS[:2]
LARGE = (128, 32, 8, 2)  # batches, of which the first that fits counts
PROFILED = (1, 32)  # batches
SANITIZER_ERRORS = (
    97  # the exit status that compute-sanitizer is told to give for an error of its own
)
_BY_WORTH = ("bf16", "fp32", "fp16", "fp64")  # of DTYPES, what matters most first
# The goals' ops at sizes that fill a GPU come first among the kernels.
_FIRST = ("separable_conv", "depthwise_conv", "weighted_fusion", "expand_depthwise")
# D0 on a few hundred photos, from random weights; photos are shown at 0.8 to 1.6 of its size.
_TRAINING = (
    *("--model", MODELS[0], "--epochs", "100", "--batch-size", "16", "--opt", "adamw"),
    *("--lr", "0.003", "--weight-decay", "0.01", "--warmup-epochs", "2"),
    *("--scale-min", "0.8", "--scale-max", "1.6", "--amp", "bf16"),
    *("--eval-every", "25", "--workers", "12", "--log-every", "12"),
)
_TRAINING_SMOKE = ("--epochs", "1", "--batch-size", "2", "--size", "64", "--workers", "0")
_OURS = "effdet_kernels"  # the engine that decides whether a batch fits
_PROBE = "import torch; torch.ones(8, device='cuda').sum().item()"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all parts share."""

    out: Path
    device: str = "cuda"
    smoke: bool = False
    peers: tuple[str, ...] = ()  # --peer-python and --peer-path, as given
    data: Path | None = None  # in COCO format

    def rows(self, part: str) -> Path:
        return self.out / f"{part}.jsonl"

    def folder(self, part: str) -> Path:
        """Of a part that writes more than rows."""
        return self.out / part


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of a part.

    Attributes:
        name: unique in its part; a step that ended well is not run again.
        command: a suite's gets ``--out``, ``--resume`` and ``--deadline`` besides.
        rows: where a suite writes; None for other commands.
        needed: asked right before it runs.
        environment: variables set besides.
    """

    name: str
    command: list[str]
    rows: Path | None = None
    needed: Callable[[], bool] = lambda: True
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


class DidNotRun(Exception):
    """A part cannot run on this machine; the message says why."""


def limits(plan: Plan) -> Iterator[Step]:
    """What the GPU can do at best."""
    yield _suite(plan, "limits", "limits", "limits")


def compile_(plan: Plan) -> Iterator[Step]:
    """Triton kernels compiled on all cores, for the parts that follow; without a GPU for one that is not here."""
    if importlib.util.find_spec("triton") is None:
        raise DidNotRun("triton is not installed")
    words = [sys.executable, "-m", "bench", "compile"]
    if plan.smoke:
        yield Step("kernels", [*words, "--of", "kernels", "--op", "squeeze_excite"])
        return
    for label in _BY_WORTH:
        for of in ("verify", "kernels", "model") if label == "bf16" else ("verify",):
            yield Step(f"{of} {label}", [*words, "--of", of, "--dtype", label])


def verify(plan: Plan) -> Iterator[Step]:
    """All checks of every op on every backend, as many processes as there are cores; a step and a file per dtype."""
    for label in _BY_WORTH[1:2] if plan.smoke else _BY_WORTH:
        words = [*_verify(plan.device), "--dtype", label, "--jobs", str(os.cpu_count() or 1)]
        words += ["--json", str(plan.folder("verify") / f"{label}.json")]
        yield Step(label, words + (["--quick", "--op", "soft_nms"] if plan.smoke else []))


def sanitize(plan: Plan) -> Iterator[Step]:
    """Our own kernels, not the reference, under compute-sanitizer; torch's allocator hands out every tensor by itself.

    Raises:
        DidNotRun: compute-sanitizer is not here, or does not work here; or no op has a kernel for a GPU.
    """
    if plan.device != "cuda":
        raise DidNotRun("compute-sanitizer is for CUDA devices")
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise DidNotRun("compute-sanitizer is not on PATH")
    _probe(tool)
    ops = ops_with_gpu_kernels()
    if not ops:
        raise DidNotRun("no op has a Triton or CUDA kernel that can run here")
    for check in ("memcheck", "racecheck"):
        for op in ops:
            words = [tool, "--tool", check, "--error-exitcode", str(SANITIZER_ERRORS)]
            words += [*_verify(plan.device), "--quick", "--backend", "triton", "--backend", "cuda"]
            words += [word for name in CHECKS if name != "large" for word in ("--check", name)]
            words += ["--op", op]
            environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            yield Step(f"{check} {op}", words, environment=environment)


def ops_with_gpu_kernels() -> list[str]:
    """The ops that have a Triton or CUDA kernel that can run here."""
    return [
        spec.name
        for spec in iter_specs()
        if any(testing.backends(spec).get(name, "none") is None for name in ("triton", "cuda"))
    ]


def kernels(plan: Plan) -> Iterator[Step]:
    """All ops in bf16; those that have no bf16 in fp32. torch.compile takes part among the peers."""
    specs = list(iter_specs())[: 1 if plan.smoke else None]
    half = [spec.name for spec in specs if torch.bfloat16 in spec.dtypes]
    others = [spec.name for spec in specs if spec.name not in half]
    if not plan.smoke:
        words = [word for op in _FIRST for word in ("--op", op)]
        words += ["--case", "batch", "--dtype", "bf16", "--no-compile"]
        yield _suite(plan, "kernels", "goals", "kernels", *words)
    for dtype, ops in (("bf16", half), ("fp32", others)):
        words = [word for op in ops for word in ("--op", op)]
        if ops:
            words += ["--dtype", dtype, "--no-compile"]
            yield _suite(plan, "kernels", dtype, "kernels", *words)


def model(plan: Plan) -> Iterator[Step]:
    """Our networks at batch 1 and at the largest batch that fits."""
    for name in _models(plan):
        yield from _batches(plan, "model", "model", name, (1,), "--no-peers")
        yield from _batches(plan, "model", "model", name, _large(plan), "--no-peers")
    for name in () if plan.smoke else OTHERS:
        yield from _batches(plan, "model", "model", name, (1,), "--no-peers")


def profile(plan: Plan) -> Iterator[Step]:
    """Where the time of D0 goes, at a batch that leaves a GPU idle and at one that fills it."""
    for batch in PROFILED[: 1 if plan.smoke else None]:
        words = ("--model", MODELS[0], "--batch", str(batch), "--dtype", "bf16")
        yield _suite(plan, "profile", f"{MODELS[0]} b{batch}", "profile", *words)


def counters(plan: Plan) -> Iterator[Step]:
    """Hardware counters of D0's kernels at both batches, then of every op's calls.

    Raises:
        DidNotRun: the part is for a CUDA device.
    """
    if plan.device != "cuda":
        raise DidNotRun("ncu is for CUDA devices")
    words = [sys.executable, "-m", "bench", "counters", "--out", str(plan.rows("counters"))]
    for batch in PROFILED:
        yield Step(f"{MODELS[0]} b{batch}", [*words, "--model", MODELS[0], "--batch", str(batch)])
    for op in ops_with_gpu_kernels():
        yield Step(op, [*words, "--op", op])


def train(plan: Plan) -> Iterator[Step]:
    """Our training steps at the largest batch that fits."""
    for name in _trained(plan):
        yield from _batches(plan, "train", "train", name, _large(plan), "--no-peers")


def loss(plan: Plan) -> Iterator[Step]:
    """Our labels and loss."""
    yield _labels_and_loss(plan, "loss", "--no-peers")


def detect(plan: Plan) -> Iterator[Step]:
    """Our post-processing; whole detections also with the network in bf16."""
    yield _post_processing(plan, "detect", (1, *_large(plan)[:1]), "--no-peers")
    words = ("--batch", "1", "--direction", "predict", "--dtype", "bf16", "--no-peers")
    yield _suite(plan, "detect", "predict bf16", "detect", *words)


def accuracy(plan: Plan) -> Iterator[Step]:
    """A D0 that learns the folder of --data from random weights, in bf16; goes on from its last epoch.

    Raises:
        DidNotRun: no folder was named, or pycocotools is missing.
    """
    if plan.data is None:
        raise DidNotRun("--data names no folder in COCO format")
    if importlib.util.find_spec("pycocotools") is None:
        raise DidNotRun("pycocotools is not installed: folders are read and AP is measured by it")
    words = [sys.executable, "-m", "effdet", "train", str(plan.data), "--device", plan.device]
    words += ["--out", str(plan.folder("accuracy")), "--restart"]
    yield Step("train", [*words, *(_TRAINING_SMOKE if plan.smoke else _TRAINING)])


def reached(plan: Plan) -> str:
    """What the log of accuracy says last of what it evaluated; empty before that."""
    log = plan.folder("accuracy") / "log.jsonl"
    records = read_log(log) if log.exists() else []
    found = [record for record in records if record["kind"] == "epoch" and "AP50" in record]
    return f"AP50 {found[-1]['AP50']:.3f} after {found[-1]['epoch']} epochs" if found else ""


def peers(plan: Plan) -> Iterator[Step]:
    """The same beside the peers and torch.compile; max-autotune, which takes minutes, for D0 only."""
    for name in _models(plan):
        mode = "--max-autotune" if name == MODELS[0] and not plan.smoke else "--compile"
        words = (*plan.peers, *(() if plan.smoke else (mode,)))
        yield from _batches(plan, "peers", "model", name, (1,), *words)
        yield from _batches(plan, "peers", "model", name, _large(plan), *words)
    yield _labels_and_loss(plan, "peers", *plan.peers, *(() if plan.smoke else ("--compile",)))
    # PyPI effdet's soft-NMS takes a second an image.
    yield _post_processing(plan, "peers", (1,), *plan.peers)
    for name in _trained(plan):
        words = (*plan.peers, *(() if plan.smoke else ("--compile",)))
        yield from _batches(plan, "peers", "train", name, _large(plan), *words)
    if not plan.smoke:
        words = tuple(word for op in _FIRST for word in ("--op", op))
        words += ("--case", "batch128", "--dtype", "bf16")
        yield _suite(plan, "peers", "kernels compiled", "kernels", *words)


PARTS: dict[str, Callable[[Plan], Iterator[Step]]] = {
    "limits": limits,
    "compile": compile_,
    "verify": verify,
    "sanitize": sanitize,
    "kernels": kernels,
    "model": model,
    "profile": profile,
    "counters": counters,
    "train": train,
    "loss": loss,
    "detect": detect,
    "accuracy": accuracy,
    "peers": peers,
}


def _verify(device: str) -> list[str]:
    return [sys.executable, "-m", "effdet_kernels.verify", "--device", device]


def _suite(
    plan: Plan,
    part: str,
    name: str,
    suite: str,
    *words: str,
    needed: Callable[[], bool] = lambda: True,
) -> Step:
    command = [sys.executable, "-m", "bench", suite, "--device", plan.device, *words]
    command += ["--smoke"] if plan.smoke else []
    return Step(name, command, plan.rows(part), needed)


def _batches(
    plan: Plan, part: str, suite: str, model: str, batches: tuple[int, ...], *words: str
) -> Iterator[Step]:
    """A step per batch, largest first; the others are needed only if it does not fit."""
    for index, batch in enumerate(batches):
        needed = functools.partial(_none_fits, plan.rows(part), suite, model, batches[:index])
        options = ["--model", model, "--batch", str(batch), "--dtype", "bf16", *words]
        name = f"{suite} {model} b{batch}"
        yield _suite(plan, part, name, suite, *options, needed=needed)


def _none_fits(path: Path, suite: str, model: str, batches: tuple[int, ...]) -> bool:
    return not any(fits(path, suite, model, batch) for batch in batches)


def fits(path: Path, suite: str, model: str, batch: int) -> bool:
    """Whether ours was timed at that batch, by the rows in a file."""
    rows = usable(load(path))[0] if path.exists() else []
    return any(
        timed(row)
        and (row["suite"], row["name"], row["engine"]) == (suite, model, _OURS)
        and str(row["case"]).endswith(f" b{batch}")
        for row in rows
    )


def _models(plan: Plan) -> tuple[str, ...]:
    return MODELS[:1] if plan.smoke else MODELS


def _trained(plan: Plan) -> tuple[str, ...]:
    return TRAINED[:1] if plan.smoke else TRAINED


def _large(plan: Plan) -> tuple[int, ...]:
    return (2,) if plan.smoke else LARGE


def _post_processing(plan: Plan, part: str, batches: tuple[int, ...], *words: str) -> Step:
    options = [w for batch in batches for w in ("--batch", str(batch))]
    return _suite(plan, part, "detect", "detect", *options, "--dtype", "fp32", *words)


def _labels_and_loss(plan: Plan, part: str, *words: str) -> Step:
    dtypes = [w for dtype in ("fp32", "bf16") for w in ("--dtype", dtype)]
    return _suite(plan, part, "loss", "loss", "--model", MODELS[0], *dtypes, *words)


def _probe(tool: str) -> None:
    """Raises DidNotRun unless a trivial program runs under memcheck."""
    command = [tool, "--error-exitcode", str(SANITIZER_ERRORS), sys.executable, "-c", _PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DidNotRun(f"compute-sanitizer does not work here: {error}") from error
    if done.returncode:
        printed = (done.stdout + done.stderr).strip().splitlines() or ["it printed nothing"]
        raise DidNotRun(f"compute-sanitizer does not work here: {printed[-1]}")
