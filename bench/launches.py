"""What calls of ops launch on a GPU, noted and compiled without one."""

from __future__ import annotations

import unittest.mock
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.sass import ARCHITECTURES, WARP, Code, examined
from effdet_kernels import _library, _triton, testing
from effdet_kernels.bound import flatten, map_tensors
from effdet_kernels.spec import Case, Inputs, OpSpec
from effdet_kernels.verify import DTYPES


class _Driver:
    """Stands in for a CUDA driver: says what to compile for, and runs nothing."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._architecture, WARP)

    def get_current_device(self) -> int:
        return self._architecture  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(launch: _triton.Launch, architecture: int) -> Code:
    """The code of the variant that Triton's launcher would choose for these arguments."""
    kernel = kernel_for(launch.kernel, launch.arguments, launch.options, architecture)
    metadata = kernel.metadata
    return examined(kernel.asm["cubin"], metadata.shared, metadata.num_warps)


def kernel_for(
    function: Any, arguments: Sequence[Any], options: Mapping[str, Any], architecture: int
) -> Any:
    """What Triton compiles, or finds in its cache, for these arguments; of tensors it looks at dtype and address."""
    from triton.runtime.driver import driver

    with unittest.mock.patch.object(driver, "_active", _Driver(architecture)):
        return function.warmup(*arguments, grid=(1,), **{**_triton.COMPILED, **options})


def of_call(
    spec: OpSpec, case: Case, dtype: torch.dtype, shared_kb: int, backward: bool
) -> list[_triton.Launch]:
    """What a call of the op launches on a GPU with ``shared_kb`` of shared memory a block."""
    op, args = _arguments(spec, inputs(spec, case, dtype))
    with _triton.recorded(shared_kb) as noted:
        if not backward:
            op.impls["triton"](*args)
            return noted
        outputs = flatten(op._fake(*args))
        grads = [torch.empty_like(out) for out in outputs]
        saved = [[outputs[i] for i in op.saved_positions(args)]] if op._saved_outputs else []
        variables = _library._tensors([args[i] for i in op._differentiable])
        op.backwards["triton"](grads, *args, *saved, [True] * len(variables))
        return noted


def measured(
    spec: OpSpec, case: Case, label: str, arch: int, direction: str
) -> list[tuple[_triton.Launch, Code]]:
    """The launches of a call ("bf16", 90, "forward" or "backward", say) and their code."""
    noted = of_call(spec, case, DTYPES[label], ARCHITECTURES[arch], direction == "backward")
    return [(launch, compiled(launch, arch)) for launch in noted]


def inputs(spec: OpSpec, case: Case, dtype: torch.dtype) -> Inputs:
    """The arguments on "meta", maps channels_last; nothing is drawn."""

    def placed(t: Tensor) -> Tensor:
        layout = torch.channels_last if t.dim() == 4 else torch.contiguous_format
        return torch.empty(t.shape, dtype=t.dtype, device="meta", memory_format=layout)

    with FakeTensorMode():
        drawn = spec.inputs(case, dtype)
    return {name: map_tensors(value, placed) for name, value in drawn.items()}


def _arguments(spec: OpSpec, inputs: Inputs) -> tuple[_library.Op, tuple[Any, ...]]:
    """The op and the arguments of its schema that the public function makes of ``inputs``."""
    calls: list[tuple[_library.Op, tuple[Any, ...]]] = []

    def note(op: _library.Op, *args: Any) -> Any:
        calls.append((op, args))
        return op._fake(*args)

    with unittest.mock.patch.object(_library.Op, "__call__", note):
        spec.op(**inputs)
    return calls[-1]


def directions(spec: OpSpec) -> list[str]:
    """Of "forward" and "backward" those that the op has a Triton kernel for."""
    op = testing.operator(spec)
    pairs = (("forward", op.impls), ("backward", op.backwards))
    return [name for name, kernels in pairs if "triton" in kernels]


def own_dtype(spec: OpSpec) -> str:
    """The dtype that an op is looked at in: bf16, or its first where it has no bf16."""
    dtype = torch.bfloat16 if torch.bfloat16 in spec.dtypes else spec.dtypes[0]
    return next(label for label, known in DTYPES.items() if known == dtype)


def real_cases(spec: OpSpec, prefixes: Sequence[str] | None = None) -> list[Case]:
    """Those of real shapes, whose names begin with one of ``prefixes`` if there are any."""
    real = [case for case in spec.cases if "bench" in case.tags]
    return [case for case in real if not prefixes or case.name.startswith(tuple(prefixes))]
