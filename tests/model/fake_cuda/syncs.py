"""Runs in a process of its own: prints, as JSON, what in a detection on fake CUDA tensors waits for the device.

Usage: syncs.py [the compiled guard.cpp, for a torch without CUDA]

Of each op the launchers of its Triton and CUDA kernels run too, all but the kernels.
"""

from __future__ import annotations

import ctypes
import json
import sys
import traceback

import torch
from run import BATCH, FAKE, on_cuda, subject
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effdet_kernels import _cuda, _dispatch, _library, _triton

aten = torch.ops.aten
READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index}


class Waited(Exception):
    pass


class NoWaiting(TorchDispatchMode):
    """Raises on what reads a value of the device, and on copies from and to it."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tree_leaves((args, kwargs))
        if func.overloadpacket in INDEXING:  # its tags are for masks
            if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
                raise Waited(f"{func} counts a mask")
        elif not READS.isdisjoint(func.tags) or func.overloadpacket is aten.equal:
            raise Waited(f"{func} reads a value")
        if func.namespace == "effdet_kernels":
            self._launch(func, args)
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in [*given, *tree_leaves(result)] if isinstance(t, Tensor)]
        copies = func.overloadpacket in (aten._to_copy, aten.copy_, aten.copy)
        # A number may be a tensor without dimensions on the host, where no copy of it is made.
        if len({t.device.type for t in tensors if t.dim() or copies}) > 1:
            raise Waited(f"{func} copies between host and device")
        # What is made of a list, where torch finds a CUDA device, comes to light here.
        if func.overloadpacket is aten.lift_fresh and result.is_cuda:
            raise Waited(f"{func} copies a list to the device")
        return result

    def _launch(self, func, args) -> None:
        impls = _library.OPS[func._schema.name.split("::")[1]].impls
        for backend in {"triton", "cuda"} & impls.keys():
            if not _dispatch.refusal(impls[backend], args):
                with self, _triton.recorded() as kernels, _cuda.recorded() as names:
                    impls[backend](*args)
                if kernels or names:
                    self.launched.add(f"{func._opname} {backend}")


def detection(soft: bool, with_info: bool) -> list[str] | str:
    """Which launchers ran; or where it waits."""
    bench, (x, info) = subject("predict")
    bench.soft_nms = soft
    with FAKE:
        bench.anchors.boxes_for(x.shape[2:])  # which brings them to the device, once
    with FAKE, torch.no_grad(), NoWaiting() as mode:
        try:
            rows = bench(x, info if with_info else None)
        except Waited:
            return traceback.format_exc()
    assert rows.shape == (BATCH, bench.max_det_per_image, 6) and rows.is_cuda
    return sorted(mode.launched)


PLANTED = {
    "item": lambda t: t[0, 0].item(),
    "float": lambda t: float(t.sum()),
    "bool": lambda t: bool(t.any()),
    "tolist": lambda t: t.tolist(),
    "equal": lambda t: torch.equal(t, t + 1),
    "nonzero": lambda t: t.nonzero(),
    "unique": lambda t: t.unique(),
    "mask": lambda t: t[t > 0],
    "assignment by mask": lambda t: t.index_put_((t > 0,), t.new_zeros(())),
    "masked_select": lambda t: t.masked_select(t > 0),
    "repeat_interleave": lambda t: t.repeat_interleave(t[:, 0].long(), 0),
    "cpu": lambda t: t.cpu(),
    "to the host": lambda t: t.to("cpu", non_blocking=True),
    "copy_ to the host": lambda t: torch.zeros(t.shape).copy_(t),
    "from the host": lambda t: torch.zeros(3).to(t.device),
    "list": lambda t: torch.tensor([1.0, 2.0], device="cuda"),
    "number": lambda t: torch.tensor(1.0, device="cuda"),
    "new_tensor": lambda t: t.new_tensor([1.0, 2.0]),
    "index of a list": lambda t: t[:, [1, 0]],
}
HARMLESS = {
    "where": lambda t: t.where(t > 0, 0).masked_fill(t < 0, -1.0),
    "index": lambda t: t[torch.arange(2, device=t.device)],
    "number on the host": lambda t: t * torch.tensor(2.0),
    "dtype": lambda t: t.double(),
    "full": lambda t: torch.full((2,), 1.0, device=t.device),
    "topk": lambda t: t.gather(1, t.topk(2).indices),
}


def seen(call) -> str | None:
    """What the mode says of a call."""
    rows = on_cuda(torch.zeros(3, 4))
    try:
        with FAKE, torch.no_grad(), NoWaiting():
            call(rows)
    except Waited as error:
        return str(error)
    return None


def main() -> None:
    if sys.argv[1:]:
        ctypes.CDLL(sys.argv[1])
    _cuda.device_reason = lambda index: None
    _cuda.shared_kb = lambda x: 227
    _cuda.misaligned = lambda name, x: None
    detections = {
        f"{'soft' if soft else 'hard'}{', img_info' * info}": detection(soft, info)
        for soft in (False, True)
        for info in (False, True)
    }
    found = {"detection": detections}
    for kind, calls in ("planted", PLANTED), ("harmless", HARMLESS):
        found[kind] = {name: seen(call) for name, call in calls.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
