"""What ``python -m bench gpu`` runs: each part is a list of steps, each step one command."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bench.results import load
from bench.setups import timed, usable
from effdet_kernels import testing
from effdet_kernels.spec import iter_specs
from effdet_kernels.suite import CHECKS

ROOT = Path(__file__).resolve().parents[1]
MODELS = tuple(f"tf_efficientdet_{size}" for size in ("d0", "d2", "d4", "d7"))
LARGE = (128, 32, 8, 2)  # batches, of which the first that fits counts
PROFILED = (1, 32)  # batches
SANITIZER_ERRORS = (
    97  # the exit status that compute-sanitizer is told to give for an error of its own
)
_OURS = "effdet_kernels"  # the engine that decides whether a batch fits
_PROBE = "import torch; torch.ones(8, device='cuda').sum().item()"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all parts share."""

    out: Path
    device: str = "cuda"
    smoke: bool = False
    peers: tuple[str, ...] = ()  # --peer-python and --peer-path, as given

    def rows(self, part: str) -> Path:
        return self.out / f"{part}.jsonl"


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


def verify(plan: Plan) -> Iterator[Step]:
    """Every op's checks on every backend; a step and a file per op, so that an interrupted run keeps the others."""
    for spec in list(iter_specs())[: 1 if plan.smoke else None]:
        words = [*_verify(plan.device), "--op", spec.name]
        words += ["--json", str(plan.out / "verify" / f"{spec.name}.json")]
        yield Step(spec.name, words + (["--quick"] if plan.smoke else []))


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
    """All ops in bf16; those that have no bf16 in fp32."""
    specs = list(iter_specs())[: 1 if plan.smoke else None]
    half = [spec.name for spec in specs if torch.bfloat16 in spec.dtypes]
    others = [spec.name for spec in specs if spec.name not in half]
    for dtype, ops in (("bf16", half), ("fp32", others)):
        words = [word for op in ops for word in ("--op", op)]
        words += ["--no-compile"] if plan.smoke else []
        if ops:
            yield _suite(plan, "kernels", dtype, "kernels", *words, "--dtype", dtype)


def model(plan: Plan) -> Iterator[Step]:
    """Our networks at batch 1 and at the largest batch that fits."""
    for name in _models(plan):
        yield from _batches(plan, "model", "model", name, (1,), "--no-peers")
        yield from _batches(plan, "model", "model", name, _large(plan), "--no-peers")


def profile(plan: Plan) -> Iterator[Step]:
    """Where the time of D0 goes, at a batch that leaves a GPU idle and at one that fills it."""
    for batch in PROFILED[: 1 if plan.smoke else None]:
        words = ("--model", MODELS[0], "--batch", str(batch), "--dtype", "bf16")
        yield _suite(plan, "profile", f"{MODELS[0]} b{batch}", "profile", *words)


def train(plan: Plan) -> Iterator[Step]:
    """Our training steps at the largest batch that fits."""
    for name in _models(plan):
        yield from _batches(plan, "train", "train", name, _large(plan), "--no-peers")


def loss(plan: Plan) -> Iterator[Step]:
    """Our labels and loss."""
    yield _labels_and_loss(plan, "loss", "--no-peers")


def detect(plan: Plan) -> Iterator[Step]:
    """Our post-processing."""
    yield _post_processing(plan, "detect", (1, *_large(plan)[:1]), "--no-peers")


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
    for name in _models(plan):
        words = (*plan.peers, *(() if plan.smoke else ("--compile",)))
        yield from _batches(plan, "peers", "train", name, _large(plan), *words)


PARTS: dict[str, Callable[[Plan], Iterator[Step]]] = {
    "verify": verify,
    "sanitize": sanitize,
    "kernels": kernels,
    "model": model,
    "profile": profile,
    "train": train,
    "loss": loss,
    "detect": detect,
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
