"""torch.compile and torch.export see models and benches as one graph, and change no number."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

import effdet

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
