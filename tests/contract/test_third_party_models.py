"""What programs written for PyPI effdet do with models: each test is such a program in small."""

from __future__ import annotations

import copy

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

import effdet
from effdet import (
    DetBenchPredict,
    DetBenchTrain,
    EfficientDet,
    create_model_from_config,
    get_efficientdet_config,
    unwrap_bench,
)
from effdet.anchors import Anchors
from effdet.bench import _batch_detection, _post_process
from effdet.config.model_config import efficientdet_model_param_dict
from effdet.efficientdet import HeadNet

SIZE = 128
BOXES = [torch.tensor([[10.0, 20, 90, 100], [64, 64, 120, 127]]), torch.zeros(0, 4)]
CLASSES = [torch.tensor([1.0, 2]), torch.zeros(0)]


def _images(batch: int = 2, size: int = SIZE) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def _config(num_classes: int = 2):
    config = get_efficientdet_config("efficientdet_nano")
    config.update({"num_classes": num_classes})
    config.update({"image_size": (SIZE, SIZE)})
    return config


def _with_own_head(**legacy) -> tuple[EfficientDet, object]:
    """A network of 90 classes that has run already, with its class head replaced by one of 2."""
    torch.manual_seed(0)
    config = _config()
    net = EfficientDet(config, pretrained_backbone=False)
    with torch.no_grad():
        net.eval()(_images())
    net.class_net = HeadNet(config, num_outputs=config.num_classes, **legacy)
    return net.train(), config


@pytest.mark.parametrize("legacy", [{}, {"norm_kwargs": {"eps": 0.001, "momentum": 0.01}}], ids=str)
def test_a_head_of_their_own_is_trained_and_used(legacy):
    net, config = _with_own_head(**legacy)
    bench = DetBenchTrain(net, config)  # old programs pass the config, which makes a labeler
    before = [p.detach().clone() for p in net.class_net.parameters()]
    optimizer = torch.optim.AdamW(bench.parameters(), lr=0.002)
    losses = []
    for _ in range(4):
        target = {"bbox": BOXES, "cls": CLASSES, "img_scale": None, "img_size": None}
        output = bench(_images(), target)
        assert set(output) == {"loss", "class_loss", "box_loss"}
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        losses.append(output["loss"].item())
    assert losses[-1] < losses[0]
    after = list(net.class_net.parameters())
    assert all((p.detach() != old).any() for p, old in zip(after, before, strict=True))

    rows = DetBenchPredict(net).eval()(_images())
    assert rows.shape == (2, 100, 6) and set(rows[..., 5].unique().tolist()) <= {1, 2}
    bench.eval()
    target = {"bbox": BOXES, "cls": CLASSES, "img_scale": None, "img_size": None}
    with torch.no_grad():
        torch.testing.assert_close(bench(_images(), target)["detections"], rows)


class _Ensemble(nn.Module):
    """Mean of the maps of several networks, then the parts of the bench called by position."""

    def __init__(self, nets: list[EfficientDet]):
        super().__init__()
        self.nets = nn.ModuleList(nets)
        self.config = nets[0].config
        keys = ("min_level", "max_level", "num_scales", "aspect_ratios", "anchor_scale")
        self.anchors = Anchors(*(self.config[key] for key in keys), self.config.image_size)

    def forward(self, x: Tensor, img_scale: Tensor, img_size: Tensor) -> Tensor:
        outputs = zip(*(net(x) for net in self.nets), strict=True)
        maps = [
            [torch.stack(levels).mean(0) for levels in zip(*kind, strict=True)] for kind in outputs
        ]
        found = _post_process(*maps, self.config.num_levels, self.config.num_classes, 1000)
        class_out, box_out, indices, classes = found
        return _batch_detection(
            x.shape[0],
            class_out.cpu(),
            box_out.cpu(),
            self.anchors.boxes.cpu(),
            indices.cpu(),
            classes.cpu(),
            img_scale.cpu(),
            img_size.cpu(),
            30,
            False,
        )


def test_parts_of_the_bench_in_an_ensemble():
    torch.manual_seed(0)
    net = EfficientDet(_config(), pretrained_backbone=False)
    info = {"img_scale": torch.tensor([2.0, 1.5]), "img_size": torch.tensor([[250, 200]] * 2)}
    with torch.no_grad():
        rows = _Ensemble([net, net]).eval()(_images(), **info)
        bench = DetBenchPredict(net).eval()
        bench.max_detection_points, bench.max_det_per_image = 1000, 30
        torch.testing.assert_close(rows, bench(_images(), info))


def test_everything_from_bench():
    """Programs that take everything use its torch too, before they import torch."""
    names: dict = {}
    exec("from effdet.bench import *", names)
    needed = {"Anchors", "AnchorLabeler", "DetBenchPredict", "DetBenchTrain", "DetectionLoss"}
    assert needed | {"generate_detections", "unwrap_bench"} <= set(names)
    assert names["torch"] is torch and names["nn"] is nn


class _Wrapper(nn.Module):
    """As timm's ModelEma, and as what trainers put around a model."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = copy.deepcopy(module)

    def forward(self, *args):
        return self.module(*args)


def test_weights_of_a_wrapped_bench_fit_the_bare_model(tmp_path):
    bench = create_model_from_config(_config(), "train", pretrained_backbone=False)
    for wrapped in (_Wrapper(bench), nn.DataParallel(bench), _Wrapper(nn.DataParallel(bench))):
        inner = unwrap_bench(wrapped)
        assert type(inner) is EfficientDet
        torch.save({"state_dict": inner.state_dict()}, tmp_path / "weights.pth")
        bare = create_model_from_config(
            _config(), checkpoint_path=str(tmp_path / "weights.pth"), pretrained_backbone=False
        )
        with torch.no_grad():
            ours, theirs = bare.eval()(_images()), inner.eval()(_images())
        assert all(map(torch.equal, [*ours[0], *ours[1]], [*theirs[0], *theirs[1]]))


@pytest.mark.filterwarnings("ignore:Grad strides do not match")
def test_distributed_data_parallel(tmp_path):
    """One process: the loss is that of the bench alone, and gradients arrive in the model."""
    bench = create_model_from_config(
        _config(), "train", pretrained_backbone=False, bench_labeler=True
    )
    target = {"bbox": BOXES, "cls": CLASSES}
    alone = copy.deepcopy(bench)(_images(), target)["loss"]
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(bench)
        loss = wrapped(_images(), target)["loss"]
        loss.backward()
        missing = [n for n, p in unwrap_bench(wrapped).named_parameters() if p.grad is None]
        # The wrapper must not be what ends the group: it would hold the interpreter's lock while it waits for gloo's
        # threads, and they may need the lock to end.
        del wrapped
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(loss, alone)
    assert not missing


@pytest.fixture
def own_entry():
    """A model of their own in the table that names are looked up in."""
    efficientdet_model_param_dict["mine"] = {
        "name": "mine",
        "backbone_name": "tf_efficientnet_b0",
        "backbone_args": {"drop_path_rate": 0.1},
        "num_classes": 3,
        "fpn_channels": 32,
        "fpn_cell_repeats": 1,
        "box_class_repeats": 1,
        "url": "",
    }
    yield "mine"
    del efficientdet_model_param_dict["mine"]


def test_a_model_of_their_own_in_the_table(own_entry):
    config = get_efficientdet_config(own_entry)
    assert config.name == "mine" and tuple(config.image_size) == (640, 640)
    bench = effdet.create_model(
        own_entry,
        bench_task="train",
        num_classes=5,
        pretrained=False,
        pretrained_backbone=False,
        bench_labeler=True,
        image_size=(SIZE, SIZE),
        max_det_per_image=7,
        soft_nms=True,
        label_smoothing=0.1,
        legacy_focal=True,
        redundant_bias=None,
        jit_loss=None,
    )
    assert (bench.num_classes, bench.max_det_per_image, bench.soft_nms) == (5, 7, True)
    assert tuple(bench.config.image_size) == (SIZE, SIZE) and bench.config.redundant_bias
    assert (bench.loss_fn.label_smoothing, bench.loss_fn.legacy_focal) == (0.1, True)
    target = {"bbox": BOXES, "cls": CLASSES, "img_scale": None, "img_size": None}
    output = bench.eval()(_images(), target)
    assert output["loss"].isfinite() and output["detections"].shape == (2, 7, 6)


def test_a_config_is_a_container_of_omegaconf():
    """Written out, read back, merged with a file's and command line's, changed after a build."""
    config = get_efficientdet_config("efficientdet_nano")
    again = OmegaConf.create(OmegaConf.to_yaml(config))
    merged = OmegaConf.merge(again, {"num_classes": 4}, OmegaConf.from_dotlist(["soft_nms=true"]))
    assert OmegaConf.is_config(merged) and not OmegaConf.is_readonly(merged)
    bench = create_model_from_config(merged, "predict", pretrained_backbone=False)
    assert OmegaConf.is_readonly(bench.config) and bench.config.num_classes == 4
    assert bench.soft_nms
    merged.num_classes = 6
    assert create_model_from_config(merged, pretrained_backbone=False).config.num_classes == 6
    assert bench.num_classes == 4
