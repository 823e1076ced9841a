from __future__ import annotations

import pytest
import torch
from torch import nn

from effdet.engine import checkpoint as checkpoints
from effdet.engine import trainer as trainer_module
from effdet.engine.config import TrainConfig
from effdet.engine.log import read_log
from effdet.engine.nan_watch import BufferKeeper, first_trouble, is_finite
from effdet.engine.processes import Processes
from effdet.engine.trainer import Trainer, TrainingDiverged

ALONE = Processes(0, 1, torch.device("cpu"))


def _trainer(scenes, out, **settings) -> Trainer:
    shared = {"batch_size": 2, "size": 64, "epochs": 2, "eval_every": 0, "workers": 0}
    config = TrainConfig(str(scenes), str(out), **{**shared, "log_every": 1, **settings})
    trainer = Trainer(config, ALONE, quiet=True)
    trainer._show = lambda epoch, result: None
    return trainer


def _spoil(trainer: Trainer, steps: set[int], gradient: bool = False) -> None:
    """Make an inner output of the pyramid, or its gradient, infinite in these steps."""

    def hook(module, inputs, output):
        if trainer.step not in steps or not torch.is_grad_enabled():
            return None
        if gradient:
            output.register_hook(lambda g: g * float("inf"))
            return None
        return output * float("inf")

    trainer.learner.model.fpn.cell[0].fnode[2].register_forward_hook(hook)


def test_the_first_layer_and_the_images_are_named_and_the_checkpoint_stays(scenes, tmp_path):
    trainer = _trainer(scenes, tmp_path, save_every=2)
    _spoil(trainer, {3})
    with pytest.raises(TrainingDiverged) as caught:
        trainer.fit()
    message = str(caught.value)
    assert "step 4 is not finite, first in the output of fpn.cell.0.fnode.2;" in message
    dataset = trainer.loader.dataset
    order = list(trainer.loader.sampler)  # of the epoch from the start
    names = [dataset.parser.img_infos[i]["file_name"] for i in order[6:8]]
    assert f"images: {', '.join(names)};" in message
    content = checkpoints.read(tmp_path / "last.pth")
    assert content["step_in_epoch"] == 2
    assert all(bool(v.isfinite().all()) for v in content["state_dict"].values())


def test_a_gradient_is_named(scenes, tmp_path):
    trainer = _trainer(scenes, tmp_path)
    _spoil(trainer, {1}, gradient=True)
    with pytest.raises(TrainingDiverged, match=r"step 2 .* first in the gradient of the output of"):
        trainer.fit()


def test_a_step_left_out_leaves_no_trace(scenes, tmp_path, monkeypatch):
    trainer = _trainer(scenes, tmp_path / "spoilt", nan_watch="skip")
    _spoil(trainer, {1, 6})
    assert trainer.fit().exit_code == 0
    skipped = [r for r in read_log(tmp_path / "spoilt/log.jsonl") if r["kind"] == "skipped"]
    assert [r["step"] for r in skipped] == [2, 7]
    assert skipped[0]["where"] == "the output of fpn.cell.0.fnode.2"
    assert len(skipped[0]["images"]) == 2

    whole = trainer_module.Trainer._train_step

    def without(self, batches, window):
        if self.step not in {1, 6}:
            return whole(self, batches, window)
        next(batches)
        return self.schedule(self.step)

    monkeypatch.setattr(trainer_module.Trainer, "_train_step", without)
    _trainer(scenes, tmp_path / "plain").fit()
    spoilt, plain = (checkpoints.read(tmp_path / name / "last.pth") for name in ("spoilt", "plain"))
    for key in ("state_dict", "state_dict_ema"):
        for name, value in plain[key].items():
            assert torch.equal(spoilt[key][name], value), (key, name)
    assert spoilt["ema_updates"] == plain["ema_updates"] == 6


def test_ten_in_a_row_end_the_run(scenes, tmp_path):
    trainer = _trainer(scenes, tmp_path, nan_watch="skip", epochs=4)
    _spoil(trainer, set(range(1, 100)))
    with pytest.raises(TrainingDiverged, match="step 11 is not finite"):
        trainer.fit()


def test_without_a_watch_the_log_line_says_so(scenes, tmp_path):
    trainer = _trainer(scenes, tmp_path, nan_watch="off")
    _spoil(trainer, {1})
    with pytest.raises(TrainingDiverged, match="loss is nan at step 2"):
        trainer.fit()


@pytest.mark.parametrize("clip", [0.0, 10.0])
def test_a_scaler_goes_on_after_a_step_left_out(scenes, tmp_path, clip):
    """The scaler of float16, which a CPU runs too, though not the kernels of that dtype."""
    trainer = _trainer(scenes, tmp_path, nan_watch="skip", clip_grad=clip)
    trainer.learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    _spoil(trainer, {1})
    assert trainer.fit().exit_code == 0
    assert trainer.learner.scaler.get_scale() == 2.0**9
    assert trainer.learner.ema.updates == 7


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x):
        return [self.second(self.first(x))]


def _losses(net):
    return lambda images, target: {"loss": net(images)[0].square().sum()}


def test_where_trouble_is_looked_for():
    torch.manual_seed(0)
    net, images = _Net(), torch.randn(5, 3)
    assert first_trouble(net, _losses(net), (images, {})) is None
    spoilt = images.clone()
    spoilt[3, 1] = float("nan")
    report = first_trouble(net, _losses(net), (spoilt, {}))
    assert report == "the input, image 3 of the batch"
    boxes = {"bbox": torch.tensor([[[0.0, 1, 2, float("inf")]]])}
    assert first_trouble(net, _losses(net), (images, boxes)) == "the boxes of the batch"
    root = lambda images, target: {"loss": (net(images)[0] * 0).sum().sqrt()}  # noqa: E731
    report = first_trouble(net, root, (images, {}))
    assert report == "the gradient of the output of second.1"
    infinite = lambda images, target: {"loss": net(images)[0].sum() / 0}  # noqa: E731
    report = first_trouble(net, infinite, (images, {}))
    assert report == "loss, though the outputs of the model are finite"
    with torch.no_grad():
        net.second[0].bias[2] = float("inf")
    report = first_trouble(net, _losses(net), (images, {}))
    assert report == "the parameter second.0.bias"
    assert not net.first._forward_hooks and net.first.weight.grad is None


def test_finite_means_all_of_them():
    one, bad = torch.ones(()), torch.tensor(float("nan"))
    assert is_finite([one, one], one) and is_finite([one], None)
    assert not is_finite([one, bad], one)
    assert not is_finite([one], bad)


def test_buffers_come_back():
    net = nn.BatchNorm2d(2).train()
    keeper = BufferKeeper(net)
    net(torch.randn(2, 2, 3, 3))
    keeper.keep()
    before = [b.clone() for b in net.buffers()]
    net(torch.randn(2, 2, 3, 3))
    assert not torch.equal(before[0], net.running_mean)
    keeper.restore()
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))
    assert int(net.num_batches_tracked) == 1
