"""Every op of inference decomposes into ops of torch that compute the same, in a program of any batch and size."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim
from torch.utils._pytree import tree_leaves

import effdet
from effdet_kernels import _library
from effdet_kernels.export import decompositions
from effdet_kernels.spec import iter_specs

TABLE = {overload.name().split("::")[1] for overload in decompositions()}
SPECS = [spec for spec in iter_specs() if spec.name in TABLE]
pytestmark = pytest.mark.usefixtures("one_thread")


def custom_ops(program) -> set[str]:
    """The ops of this package in a program and its subgraphs."""
    modules = [m for m in program.graph_module.modules() if hasattr(m, "graph")]
    names = {str(node.target) for m in modules for node in m.graph.nodes}
    return {name for name in names if _library.NAMESPACE in name}


class Call(torch.nn.Module):
    """An op with all but its tensors fixed."""

    def __init__(self, op, inputs):
        super().__init__()
        self.op, self.inputs = op, inputs

    def forward(self, tensors):
        return self.op(**{**self.inputs, **tensors})


def _tensors(inputs):
    lists = {
        k: v for k, v in inputs.items() if isinstance(v, list) and isinstance(v[0], torch.Tensor)
    }
    return {**{k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}, **lists}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_each_op(spec):
    torch.manual_seed(0)
    inputs = spec.inputs(spec.cases[0], torch.float32)
    tensors = _tensors(inputs)
    with torch.no_grad():
        program = torch.export.export(Call(spec.op, inputs), (tensors,), strict=False)
        assert custom_ops(program)
        plain = program.run_decompositions(decompositions())
        got, want = tree_leaves(plain.module()(tensors)), tree_leaves(spec.op(**inputs))
    assert not custom_ops(plain)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_only_ops_of_training_are_left_out():
    left = {spec.name for spec in iter_specs()} - TABLE
    assert left == {"batch_norm_act", "batch_norm_grad", "detection_loss", "label_anchors"}


def test_bench_of_any_batch_and_size():
    torch.manual_seed(0)
    options = {"num_classes": 3, "pretrained_backbone": False}
    bench = effdet.create_model("efficientdet_nano", "predict", **options).eval()
    sides = {2: 128 * Dim("rows", min=2, max=32), 3: 128 * Dim("columns", min=2, max=32)}
    shapes = ({0: Dim("batch", min=1, max=64), **sides},)
    with torch.no_grad():
        program = torch.export.export(
            bench, (torch.randn(2, 3, 256, 384),), dynamic_shapes=shapes, strict=False
        )
        x = torch.randn(3, 3, 384, 256)
        torch.testing.assert_close(program.module()(x), bench(x), rtol=0, atol=1e-3)
        with pytest.raises(AssertionError):
            program.module()(x[..., 1:])


def test_a_size_that_no_grid_serves_is_named():
    bench = effdet.create_model("efficientdet_nano", "predict", pretrained_backbone=False).eval()
    shapes = ({3: 64 * Dim("columns", min=4, max=32)},)
    with torch.no_grad(), pytest.raises(ValueError, match="takes multiples of 128"):
        torch.export.export(
            bench, (torch.randn(1, 3, 256, 320),), dynamic_shapes=shapes, strict=False
        )


def test_an_export_leaves_nothing_in_the_model():
    bench = effdet.create_model("efficientdet_nano", "predict", pretrained_backbone=False).eval()
    with torch.no_grad():
        torch.export.export(bench, (torch.randn(1, 3, 192, 128),), strict=False)
    assert not bench.anchors._other_sizes
