"""Runs in a process of its own: prints, as JSON, what a model makes of fake CUDA tensors, or how it fails.

Usage: run.py [the compiled guard.cpp, for a torch without CUDA]
"""

from __future__ import annotations

import ctypes
import json
import sys

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_flatten_with_path, tree_map_only

import effdet

FAKE = FakeTensorMode()
BATCH, HEIGHT, WIDTH = 2, 96, 128


def on_cuda(tensor: torch.Tensor) -> torch.Tensor:
    like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return FakeTensor(FAKE, like, torch.device("cuda:0"))


def subject(task: str) -> tuple[torch.nn.Module, tuple]:
    """A network, bare or in a bench, and the arguments of its forward."""
    options = {"num_classes": 3, "pretrained_backbone": False, "bench_labeler": True}
    model = effdet.create_model("efficientdet_nano", task, **options).eval()
    model._apply(on_cuda)
    info = {"img_scale": torch.ones(BATCH), "img_size": torch.ones(BATCH, 2)}
    truth = {"bbox": torch.ones(BATCH, 5, 4), "cls": torch.ones(BATCH, 5)}
    more = {"": (), "predict": (info,), "train": ({**truth, **info},)}[task]
    arguments = torch.zeros(BATCH, 3, HEIGHT, WIDTH), *more
    return model, tree_map_only(torch.Tensor, on_cuda, arguments)


def eager(model, arguments):
    return model(*arguments)


def compiled(model, arguments):
    return torch.compile(model, backend="eager", fullgraph=True)(*arguments)


def exported(model, arguments):
    return torch.export.export(model, arguments).module()(*arguments)


def training(model, arguments):
    return model.train()(*arguments)


def described(call, task: str, gradients: bool) -> dict[str, object]:
    """Per output of a call its shape, dtype and device; or the error."""
    torch._dynamo.reset()
    model, arguments = subject(task)
    try:
        with FAKE, torch.set_grad_enabled(gradients):
            leaves = tree_flatten_with_path(call(model, arguments))[0]
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        torch.utils._pytree.keystr(path): [list(t.shape), str(t.dtype), str(t.device)]
        for path, t in leaves
    }


def main() -> None:
    if sys.argv[1:]:
        ctypes.CDLL(sys.argv[1])
    found = {}
    for task in ("", "predict", "train"):
        for call in (eager, compiled, exported):
            found[f"{call.__name__} {task or 'model'}"] = described(call, task, gradients=False)
        found[f"with gradients {task or 'model'}"] = described(eager, task, gradients=True)
    # Only the forward: torch has no backward without a device.
    found["training mode"] = described(training, "train", gradients=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
