"""torch.compile and torch.export see models and benches as one graph, in training too, and change no number."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

import effdet
from effdet.backbone.blocks import DropPath

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH, HEIGHT, WIDTH = 2, 96, 128


@pytest.fixture(scope="module", params=["", "predict", "train"], ids=["model", "predict", "train"])
def subject(request):
    """A network, bare or in a bench, and the arguments of its forward."""
    torch.manual_seed(0)
    options = {"num_classes": 3, "pretrained_backbone": False, "bench_labeler": True}
    model = effdet.create_model("efficientdet_nano", request.param, **options).eval()
    info = {"img_scale": torch.ones(BATCH), "img_size": torch.tensor([[100.0, 90.0]] * BATCH)}
    corner = torch.rand(BATCH, 5, 2) * 60
    truth = {"bbox": torch.cat([corner, corner + 30], -1), "cls": torch.ones(BATCH, 5)}
    more = {"": (), "predict": (info,), "train": ({**truth, **info},)}[request.param]
    return model, (torch.randn(BATCH, 3, HEIGHT, WIDTH), *more)


def compiled(model, arguments):
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", fullgraph=True)(*arguments)


def exported(model, arguments):
    return torch.export.export(model, arguments).module()(*arguments)


@pytest.mark.parametrize("gradients", [False, True], ids=["without", "with"])
@pytest.mark.parametrize("call", [compiled, exported], ids=["compiled", "exported"])
def test_same_numbers(subject, call, gradients):
    model, arguments = subject
    with torch.set_grad_enabled(gradients):
        got, want = tree_leaves(call(model, arguments)), tree_leaves(model(*arguments))
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b)


def training_bench():
    torch.manual_seed(0)
    options = {"num_classes": 3, "pretrained_backbone": False, "bench_labeler": True}
    bench = effdet.create_model("efficientdet_nano", "train", **options).train()
    for block in bench.model.backbone.modules():
        if getattr(block, "has_skip", False):
            block.drop_path = DropPath(0.5)
    return bench


def step(call, *arguments):
    """Losses of a step with its backward, and the bytes that were kept for that."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = call(*arguments)
    losses["loss"].backward()
    return losses, sum(kept.values())


@pytest.mark.parametrize("again", [False, True], ids=["kept", "made_again"])
def test_training_step(again):
    """Losses, gradients and running statistics of a step in training mode, as one graph."""
    bench, other = training_bench(), training_bench()
    other.model.set_grad_checkpointing(again)
    corner = torch.rand(BATCH, 5, 2) * 60
    truth = {"bbox": torch.cat([corner, corner + 30], -1), "cls": torch.ones(BATCH, 5)}
    x = torch.randn(BATCH, 3, HEIGHT, WIDTH)
    torch._dynamo.reset()
    fast = torch.compile(other, backend="aot_eager", fullgraph=True)
    got, kept = step(fast, x, truth)
    want, of_all = step(bench, x, truth)
    torch.testing.assert_close(got, want)
    assert (kept < of_all / 2) == again
    for a, b in zip(other.parameters(), bench.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    untrained = dict(training_bench().named_buffers())
    moved = 0
    for (name, a), b in zip(other.named_buffers(), bench.buffers(), strict=True):
        torch.testing.assert_close(a, b)
        moved += "running_mean" in name and not torch.equal(a, untrained[name])
    assert moved > 50


@pytest.mark.parametrize("call", [compiled, exported], ids=["compiled", "exported"])
def test_soft_nms(call):
    torch.manual_seed(0)
    options = {"num_classes": 3, "pretrained_backbone": False, "soft_nms": True}
    bench = effdet.create_model("efficientdet_nano", "predict", **options).eval()
    x = torch.randn(BATCH, 3, HEIGHT, WIDTH)
    with torch.no_grad():
        got, want = call(bench, (x,)), bench(x)
        assert (want[..., 5] > 0).any()
        torch.testing.assert_close(got, want)
        bench.soft_nms = False
        assert not torch.equal(bench(x), want)
