from __future__ import annotations

import copy

import pytest
import torch

from effdet import create_model
from effdet.bench import DetBenchTrain


def _bench(name: str, **settings):
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, image_size=64, pretrained_backbone=False, **settings)
    return DetBenchTrain(model.double()).train()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    boxes = torch.tensor([[[4.0, 4, 40, 44]], [[20.0, 10, 60, 50]]], dtype=torch.float64)
    return torch.randn(2, 3, 64, 64, dtype=torch.float64), {
        "bbox": boxes,
        "cls": torch.tensor([[1], [3]]),
    }


def _kept(call) -> int:
    """Bytes that the graph keeps for the backward, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(storages.values())


# The first has stochastic depth, which must be drawn again as it was.
@pytest.mark.parametrize("name", ["tf_efficientdet_d0", "efficientdet_nano"])
def test_gradients_and_running_statistics_are_those_without(name, batch):
    plain = _bench(name)
    again = copy.deepcopy(plain)
    again.model.set_grad_checkpointing()
    for bench in (plain, again):
        torch.manual_seed(2)
        bench(*batch)["loss"].backward()
    for (key, want), got in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-9, atol=1e-12, msg=key)
    for (key, want), got in zip(plain.named_buffers(), again.buffers(), strict=True):
        assert torch.equal(got, want), key


def test_less_is_kept(batch):
    bench = _bench("tf_efficientdet_d0")
    whole = _kept(lambda: bench(*batch))
    bench.model.set_grad_checkpointing()
    assert _kept(lambda: bench(*batch)) < whole / 3
    bench.model.reset_head(num_classes=4)
    assert bench.model.class_net.grad_checkpointing
    bench.model.set_grad_checkpointing(False)
    assert _kept(lambda: bench(*batch)) == pytest.approx(whole, rel=0.05)


def test_a_backbone_without_the_switch_is_named():
    bench = _bench("efficientdet_nano")
    bench.model.backbone = torch.nn.Identity()
    with pytest.raises(ValueError, match="backbone Identity"):
        bench.model.set_grad_checkpointing()
