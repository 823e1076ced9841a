"""Batch norm in eval mode as (scale, shift): of one norm, or of all the norms of a model together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeGuard, cast, overload

import torch
from torch import Tensor, nn

from . import graph

BatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm
_Fold = tuple[Tensor, Tensor]  # scale and shift, [C]


def is_batch_norm(norm: nn.Module) -> TypeGuard[BatchNorm]:
    """Whether `norm` computes exactly what `nn.BatchNorm2d` or `nn.SyncBatchNorm` computes."""
    if isinstance(norm, nn.BatchNorm2d):
        return type(norm).forward is nn.BatchNorm2d.forward
    return isinstance(norm, nn.SyncBatchNorm) and type(norm).forward is nn.SyncBatchNorm.forward


@overload
def is_folded(norm: nn.Module) -> TypeGuard[BatchNorm]: ...
@overload
def is_folded(norm: nn.Module | None) -> TypeGuard[BatchNorm | None]: ...
def is_folded(norm: nn.Module | None) -> TypeGuard[BatchNorm | None]:
    """Whether `norm` is an affine map with constants: nothing, or batch norm in eval mode."""
    if norm is None:
        return True
    return is_batch_norm(norm) and not norm.training and norm.running_mean is not None


def fold(norm: BatchNorm | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """`norm(y + bias)` as `y * scale + shift`, both [C] in fp32 (fp64 for an fp64 model).

    `None` stands for a scale of one or a shift of zero.
    """
    if norm is None:
        return None, None if bias is None else stable(bias)
    return fold_norm(norm, bias)


def fold_norm(norm: BatchNorm, bias: Tensor | None) -> _Fold:
    """`fold` of a norm that is there."""
    ahead = None if torch.compiler.is_compiling() else _ahead.get()
    if ahead is not None:
        return ahead.of(norm, bias)
    return _fold(_vectors(norm, bias), norm.eps)


def _fold(vectors: Sequence[Tensor | None], eps: float) -> _Fold:
    mean, var, weight, beta, bias = vectors  # of a folded norm the first two are there
    scale = torch.rsqrt(stable(cast(Tensor, var)) + eps)
    if weight is not None:
        scale = scale * stable(weight)
    mean = stable(cast(Tensor, mean))
    if bias is not None:
        mean = mean - stable(bias)
    if beta is None:
        return scale, -mean * scale
    return scale, torch.addcmul(stable(beta), mean, scale, value=-1)


def stable(vector: Tensor) -> Tensor:
    """A vector in fp32, or in fp64 if it is so."""
    return vector if vector.dtype == torch.float64 else vector.float()


class Folds:
    """Folds of a model's norms, all computed together when a forward begins.

    One by one they take ten small kernels for each norm, together 14 for D0. What a forward asked for is
    computed ahead in the next, of the values that the norms then have. A copy or an unpickled one knows nothing.
    """

    def __init__(self) -> None:
        self._asked: dict[BatchNorm, Tensor | None] = {}

    def __deepcopy__(self, memo: Any) -> Folds:
        return Folds()

    def __reduce__(self) -> Any:
        return Folds, ()

    @contextlib.contextmanager
    def ahead(self, model: nn.Module, x: Tensor) -> Iterator[None]:
        """Inside, for a forward of `x`, `fold` serves what is computed here: on a GPU, without gradients.

        Not for a compiled or traced forward, nor for one of `nn.DataParallel`'s copies of `model`, which live for one.
        """
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        passing = traced or "_is_replica" in vars(model)
        if passing or not graph.counts_launches(x):
            yield
            return
        ahead = _Ahead(self._asked)
        token = _ahead.set(ahead)
        try:
            yield
        finally:
            _ahead.reset(token)
        self._asked = ahead.asked


class _Ahead:
    """What is computed ahead of one forward, and what that forward asks for."""

    def __init__(self, asked: dict[BatchNorm, Tensor | None]) -> None:
        self.asked: dict[BatchNorm, Tensor | None] = {}
        self._made = _fold_together(asked)

    def of(self, norm: BatchNorm, bias: Tensor | None) -> _Fold:
        self.asked[norm] = bias
        known, fold = self._made.get(norm, (None, None))
        return _fold(_vectors(norm, bias), norm.eps) if fold is None or known is not bias else fold


_ahead: ContextVar[_Ahead | None] = ContextVar("effdet_folds", default=None)


def _fold_together(
    asked: dict[BatchNorm, Tensor | None],
) -> dict[BatchNorm, tuple[Tensor | None, _Fold]]:
    """By norm, the bias before it and the fold; without those that have tensors of several dtypes or devices."""
    # By dtype and device; by epsilon and the vectors that are there.
    alike: dict[Any, dict[Any, list[BatchNorm]]] = {}
    for norm, bias in asked.items():
        given = [v for v in _vectors(norm, bias) if v is not None]
        if is_folded(norm) and len({(v.dtype, v.device) for v in given}) == 1:
            there = tuple(v is not None for v in _vectors(norm, bias))
            groups = alike.setdefault((given[0].dtype, given[0].device), {})
            groups.setdefault((norm.eps, there), []).append(norm)
    made: dict[BatchNorm, tuple[Tensor | None, _Fold]] = {}
    for groups in alike.values():
        columns = [
            cast("tuple[Tensor, ...]", column)
            for norms in groups.values()
            for column in zip(*(_vectors(norm, asked[norm]) for norm in norms), strict=True)
            if column[0] is not None
        ]
        joined = stable(torch.cat([v for column in columns for v in column]))
        vectors = iter(joined.split([sum(map(len, column)) for column in columns]))
        for (eps, there), norms in groups.items():
            own = [next(vectors) if is_there else None for is_there in there]
            sizes = [len(cast(Tensor, norm.running_mean)) for norm in norms]
            folds = zip(*(v.split(sizes) for v in _fold(own, eps)), strict=True)
            made.update({n: (asked[n], f) for n, f in zip(norms, folds, strict=True)})
    return made


def _vectors(norm: BatchNorm, bias: Tensor | None) -> list[Tensor | None]:
    return [norm.running_mean, norm.running_var, norm.weight, norm.bias, bias]
