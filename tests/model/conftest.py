"""A stand-in for the GPU on which plans are captured; one thread."""

from __future__ import annotations

import contextlib
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from effdet import graph

from .networks import tensors


class Recorder(TorchDispatchMode):
    """Notes the torch ops inside, with the memory that they read and write."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func._schema.name.startswith("aten::empty"):
            detached = tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))
            self.steps.append((func, detached, [t.detach() for t in tensors(result)]))
        return result


class Replayed:
    """In place of `CudaCapture`: a replay repeats the captured ops on the same memory, without the model's Python."""

    made: ClassVar[list[Replayed]] = []
    calls_capture = False

    def __init__(self, device):
        assert device.type == "cpu"
        self.replays = 0
        self.made.append(self)

    @classmethod
    def underway(cls):
        return cls.calls_capture

    def warm_up(self, work):
        work()

    def capture(self, work):
        with Recorder() as recorder:
            result = work()
        self.steps = recorder.steps
        for out in self._written():  # CUDA computes nothing in a capture
            if out.is_floating_point():
                out.fill_(torch.nan)
        return result

    def _written(self):
        for _, read, written in self.steps:
            memory = {t.untyped_storage().data_ptr() for t in tensors(read)}
            yield from (t for t in written if t.untyped_storage().data_ptr() not in memory)

    @contextlib.contextmanager
    def turn(self):
        yield self._replay

    def _replay(self):
        self.replays += 1
        for func, (args, kwargs), written in self.steps:
            memory = {t.untyped_storage().data_ptr() for t in tensors(args)}
            for old, new in zip(written, tensors(func(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() not in memory:
                    old.copy_(new)


@pytest.fixture
def captures(monkeypatch):
    """On a CPU plans are graphs; a list of the captures that were begun."""
    monkeypatch.setitem(graph.CAPTURES, "cpu", Replayed)
    monkeypatch.setattr(Replayed, "made", [])
    monkeypatch.setattr(Replayed, "calls_capture", False)
    return Replayed.made


@pytest.fixture(scope="module")
def one_thread():
    """For networks that are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
