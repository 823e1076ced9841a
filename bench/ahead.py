"""``python -m bench compile``: compiles Triton kernels before anything launches them, on all cores.

Triton compiles a kernel where it is first launched, one after the other, half a second to some seconds each; verify
alone launches 12,000. This finds what will be launched and has processes fill Triton's cache (TRITON_CACHE_DIR), so
that the parts of `bench gpu` find it there. It needs no GPU: then it says whether all of that compiles.

What is launched is found without a guess: the checks of verify run with launches noted in place of made, as do the real
cases of the ops and the forwards of the models. What of it the cache has already takes no time. Exit status 1 if
something does not compile.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import itertools
import multiprocessing
import os
import time
import unittest.mock
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from tqdm import tqdm

from bench import launches, network
from bench.model import default_size
from bench.parts import MODELS
from bench.sass import ARCHITECTURES
from bench.trials import first_line
from effdet_kernels import _dispatch, _triton
from effdet_kernels.spec import OpSpec, iter_specs
from effdet_kernels.suite import CHECKS, NotRun, Subject, large_case
from effdet_kernels.verify import DTYPES, LARGE

BATCHES = (1, 128)
_ALIGNED = 16  # bytes: what Triton wants to know of a pointer


@dataclasses.dataclass(frozen=True)
class Pointer:
    """Stands for a tensor: what a compiler sees of it."""

    dtype: torch.dtype
    offset: int  # of its address, modulo _ALIGNED

    def data_ptr(self) -> int:
        return self.offset


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kernel with arguments of certain types and constants: one compilation."""

    module: str
    kernel: str
    arguments: tuple[Any, ...]  # Pointers and numbers, tuples of them
    options: tuple[tuple[str, Any], ...]

    @property
    def key(self) -> str:
        """The same for launches that Triton compiles once."""
        seen = (self.module, self.kernel, _specialised(self.arguments), self.options)
        return hashlib.sha256(repr(seen).encode()).hexdigest()


def variant(launch: _triton.Launch) -> Variant:
    """Of a noted launch."""
    kernel = launch.kernel
    return Variant(
        kernel.__module__,
        kernel.__name__,
        _without_memory(launch.arguments),
        tuple(sorted(launch.options.items())),
    )


def _without_memory(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Pointer(value.dtype, value.data_ptr() % _ALIGNED)
    if isinstance(value, tuple):
        return tuple(_without_memory(v) for v in value)
    return value


def _specialised(value: Any) -> Any:
    """What Triton compiles an argument for: of numbers whether they are 1, multiples of 16, wider than 32 bits."""
    if isinstance(value, tuple):
        return tuple(_specialised(v) for v in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return "int", value == 1, value % _ALIGNED == 0, abs(value) >= 2**31
    if isinstance(value, Pointer):
        return "pointer", value.dtype, value.offset == 0
    return value if value is None else type(value)


# What is launched --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Source:
    """Calls that are made together, to see what they launch."""

    of: str  # verify, kernels, model
    name: str  # an op or a model
    dtype: str
    what: str  # a check, a direction, a batch

    def variants(self, shared_kb: int) -> dict[str, Variant]:
        """By key, on a GPU with ``shared_kb`` of shared memory a block."""
        found = {}
        for noted in _SOURCES[self.of](self, shared_kb):
            found.update({v.key: v for launch in noted if (v := variant(launch))})
        return found


Noted = Iterator[list[_triton.Launch]]


def _of_check(source: Source, shared_kb: int) -> Noted:
    """A check of verify on tensors that no kernel fills: what it finds wrong says nothing."""
    spec, dtype = _spec(source.name), DTYPES[source.dtype]
    if source.what == LARGE:
        if spec.batched:
            case = large_case(spec, dtype, "triton")[0]
            yield launches.of_call(spec, case, dtype, shared_kb, backward=False)
        return
    with _cpu_tensors_taken(), _triton.recorded(shared_kb) as noted, contextlib.suppress(NotRun):
        for what, call in CHECKS[source.what](Subject(spec, "triton", dtype, "cpu")):
            if not what.endswith("gradcheck"):  # hundreds of calls that launch the same
                with contextlib.suppress(Exception):
                    call()
            yield noted
            noted.clear()  # with the tensors


def _of_cases(source: Source, shared_kb: int) -> Noted:
    spec, dtype = _spec(source.name), DTYPES[source.dtype]
    for case in launches.real_cases(spec):
        yield launches.of_call(spec, case, dtype, shared_kb, source.what == "backward")


def _of_forward(source: Source, shared_kb: int) -> Noted:
    size, dtype = default_size(source.name), DTYPES[source.dtype]
    yield network.of_model(source.name, size, int(source.what), dtype, shared_kb)


_SOURCES = {"verify": _of_check, "kernels": _of_cases, "model": _of_forward}


@contextlib.contextmanager
def _cpu_tensors_taken() -> Iterator[None]:
    """Inside, Triton kernels are asked to serve tensors on the CPU, as if they could."""
    devices = unittest.mock.patch.dict(_dispatch._DEVICES, triton=("cpu", "cuda"))
    with devices, unittest.mock.patch.object(_triton, "REASON", None):
        yield


def _spec(name: str) -> OpSpec:
    return next(spec for spec in iter_specs() if spec.name == name)


# Compiling ---------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--of", action="append", choices=_SOURCES, help="may be repeated; default: all")
    add("--op", action="append", help="of verify and kernels: only this op (may be repeated)")
    add("--check", action="append", choices=CHECKS, help="of verify: only this check")
    add("--dtype", action="append", choices=DTYPES, help="may be repeated; default: bf16")
    add("--model", action="append", help="of model; default: D0, D2, D4 and D7")
    add("--batch", action="append", type=int, help="of model; default: 1 and 128")
    add("--arch", type=int, choices=ARCHITECTURES, help="default: the GPU's, 90 without one")
    add("--jobs", type=int, default=os.cpu_count(), help="processes; default: one per core")
    add("--deadline", type=float, metavar="SECONDS", help="begin nothing after this time")
    add("--count", action="store_true", help="only say how many there are")


def run(args: argparse.Namespace) -> int:
    """0, or 1 if something did not compile.

    Raises:
        ValueError: kernels are interpreted; there is no such op or model; a number that is not positive.
    """
    if _triton.INTERPRET:
        raise ValueError("TRITON_INTERPRET is set: kernels are not compiled then")
    if args.jobs < 1:
        raise ValueError(f"--jobs: got {args.jobs}, takes at least 1")
    start, chosen = time.monotonic(), sources(args)
    architecture = args.arch or _gpu_architecture() or 90
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context, initializer=_one_thread) as pool:
        found = noted(pool, chosen, ARCHITECTURES[architecture])
        print(
            f"{len(found)} variants for sm_{architecture}, {time.monotonic() - start:.0f} s to find"
        )
        if args.count:
            return 0
        left = None if args.deadline is None else args.deadline - (time.monotonic() - start)
        made = compiled(pool, list(found.values()), architecture, left)
    wrong = [f"{v.kernel}: {problem}" for v, _, problem in made if problem]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    seconds = sum(spent for _, spent, _ in made)
    print(
        f"{len(made)} of {len(found)} compiled or found in the cache: {seconds:.0f} s of processors, {args.jobs} at a"
        f" time, {time.monotonic() - start:.0f} s in all; {len(wrong)} did not compile"
    )
    return int(bool(wrong))


def sources(args: argparse.Namespace) -> list[Source]:
    """What the options choose.

    Raises:
        ValueError: there is no such op or model, or a batch that is not positive.
    """
    specs = [spec for spec in iter_specs() if not args.op or spec.name in args.op]
    if unknown := set(args.op or ()) - {spec.name for spec in specs}:
        names = ", ".join(spec.name for spec in iter_specs())
        raise ValueError(f"--op: got {', '.join(sorted(unknown))}, takes {names}")
    models, batches = args.model or MODELS, args.batch or BATCHES
    for name in models:
        default_size(name)
    if min(batches) < 1:
        raise ValueError(f"--batch: got {min(batches)}, takes at least 1")
    found = []
    for label in args.dtype or ["bf16"]:
        for spec in specs:
            if DTYPES[label] in spec.dtypes and launches.directions(spec):
                checks, directions = args.check or CHECKS, launches.directions(spec)
                found += [Source("verify", spec.name, label, check) for check in checks]
                found += [Source("kernels", spec.name, label, what) for what in directions]
        if DTYPES[label].itemsize < 8 and not args.op:
            pairs = itertools.product(models, batches)
            found += [Source("model", name, label, str(batch)) for name, batch in pairs]
    return [source for source in found if not args.of or source.of in args.of]


def noted(
    pool: ProcessPoolExecutor, chosen: Sequence[Source], shared_kb: int
) -> dict[str, Variant]:
    """The variants of all sources by key, each once."""
    found: dict[str, Variant] = {}
    each = pool.map(_variants, chosen, itertools.repeat(shared_kb))
    for variants in tqdm(each, total=len(chosen), unit="source", disable=None):
        found.update(variants)
    return found


def compiled(
    pool: ProcessPoolExecutor, variants: Sequence[Variant], architecture: int, seconds: float | None
) -> list[tuple[Variant, float, str]]:
    """Of each variant that was begun in time: the seconds that it took, and what was wrong or nothing."""
    end = None if seconds is None else time.time() + seconds
    each = pool.map(
        _compile, variants, itertools.repeat(architecture), itertools.repeat(end), chunksize=4
    )
    progress = tqdm(each, total=len(variants), unit="kernel", disable=None)
    return [(v, *done) for v, done in zip(variants, progress, strict=True) if done is not None]


def _variants(source: Source, shared_kb: int) -> dict[str, Variant]:
    return source.variants(shared_kb)


def _compile(variant: Variant, architecture: int, end: float | None) -> tuple[float, str] | None:
    """The seconds and what was wrong; None after ``end``."""
    start = time.time()
    if end is not None and start > end:
        return None
    try:
        kernel = getattr(importlib.import_module(variant.module), variant.kernel)
        options = dict(variant.options)
        made = launches.kernel_for(kernel, variant.arguments, options, architecture)
        if _gpu_architecture() == architecture:
            _ = made.run  # loads it: triton 3.6 compiles a launcher in C for that
    except Exception as error:  # Triton's compiler raises errors of many types
        return time.time() - start, first_line(error)
    return time.time() - start, ""


def _one_thread() -> None:
    """A process per core: none needs more."""
    torch.set_num_threads(1)


def _gpu_architecture() -> int | None:
    return _dispatch._architecture(0) if torch.cuda.is_available() else None
