"""Training against PyPI effdet with timm's optimizer: gradients of one step, losses of many and the state after them.

The network is efficientdet_nano, which has neither dropout nor stochastic depth. Labels are float32 on both sides
whatever the network's dtype is, since anchors are: classes and positives equal, codes a rounding apart. And the peer's
loss rounds the maps to float32; in float64 that cast is lifted there (``_loss_in``), for with it losses agree only to
float32's rounding.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from effdet import DetBenchTrain, create_model, get_efficientdet_config
from effdet.anchors import AnchorLabeler, Anchors
from effdet.engine.schedule import build_optimizer

from .steps import LOSSES, take_steps

CLASSES = 3
SIZE = 128
BATCH = 4
SETTINGS = {"momentum": 0.9, "weight_decay": 4e-5, "clip": 10.0}
Batch = tuple[Tensor, dict[str, Tensor]]


def config_of(**changes: Any) -> dict[str, Any]:
    config = get_efficientdet_config("efficientdet_nano")
    config.update({"num_classes": CLASSES, "image_size": (SIZE, SIZE), **changes})
    return OmegaConf.to_container(config)


def network(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model(
        "efficientdet_nano",
        num_classes=CLASSES,
        image_size=(SIZE, SIZE),
        pretrained_backbone=False,
        **changes,
    )


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def scenes(count: int, seed: int = 0) -> list[Batch]:
    """Batches of noise with up to six filled boxes an image, a colour for each class; absent boxes are rows of -1."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.tensor([[2.0, -1.0, 0.0], [-1.0, 0.0, 2.0], [0.0, 2.0, -1.0]])
    batches = []
    for _ in range(count):
        x = 0.5 * torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
        sides = SIZE * (0.1 + 0.4 * torch.rand(BATCH, 6, 2, generator=generator))
        corners = (SIZE - sides) * torch.rand(BATCH, 6, 2, generator=generator)
        boxes = torch.cat([corners, corners + sides], -1)
        classes = torch.randint(1, CLASSES + 1, (BATCH, 6), generator=generator)
        absent = torch.arange(6) >= torch.randint(0, 7, (BATCH, 1), generator=generator)
        boxes[absent], classes[absent] = -1, -1
        for image, rows, labels in zip(
            x, boxes.round().int().tolist(), classes.tolist(), strict=True
        ):
            for (top, left, bottom, right), label in zip(rows, labels, strict=True):
                if label > 0:
                    image[:, top:bottom, left:right] += colours[label - 1][:, None, None]
        batches.append((x, {"bbox": boxes, "cls": classes}))
    return batches


def labelled(batches: list[Batch]) -> list[Batch]:
    """The same images with labels in the place of boxes."""
    labeler = AnchorLabeler(Anchors.from_config(network().config), CLASSES)
    found = []
    for x, target in batches:
        classes, boxes, positives = labeler.batch_label_anchors(target["bbox"], target["cls"])
        labels = {"label_num_positives": positives}
        labels |= {f"label_cls_{level}": t for level, t in enumerate(classes)}
        labels |= {f"label_bbox_{level}": t for level, t in enumerate(boxes)}
        found.append((x, labels))
    return found


def rates(steps: int, peak: float, warmup: int) -> list[float]:
    """Learning rates: from 0 up to the peak, then a half cosine."""
    rest = steps - warmup
    cosine = [peak * (1 + math.cos(math.pi * step / rest)) / 2 for step in range(rest)]
    return [peak * step / warmup for step in range(warmup)] + cosine


def train(
    model: nn.Module,
    dtype: torch.dtype,
    batches: list[Batch],
    rates: list[float],
    momentum: float,
    weight_decay: float,
    clip: float,
) -> Tensor:
    """Trains the model as the task ``train`` does there; losses of each step."""
    labeler = "bbox" in batches[0][1]
    bench = DetBenchTrain(model.to(dtype), create_labeler=labeler).train()
    optimizer = build_optimizer(model, "sgd", 0.0, momentum, weight_decay)
    return take_steps(bench, optimizer, dtype, batches, rates, clip)


@pytest.mark.parametrize("legacy", [False, True], ids=["new_focal", "legacy_focal"])
def test_gradients_of_one_batch(oracle, legacy):
    changes = {"legacy_focal": legacy, "label_smoothing": 0.05}
    model = network(**changes).double()
    (x, target), state = scenes(1)[0], state_of(model)
    found = oracle.call(
        "train_gradients", config=config_of(**changes), state=state, x=x.double(), target=target
    )
    losses = DetBenchTrain(model).train()(x.double(), target)
    losses["loss"].backward()
    for name in LOSSES:
        assert losses[name].item() == pytest.approx(found["losses"][name].item(), rel=1e-7)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert gradients.keys() == found["gradients"].keys()
    whole = torch.cat([g.flatten() for g in found["gradients"].values()]).norm()
    for name, expected in found["gradients"].items():
        off = (gradients[name] - expected).norm()
        assert off <= 1e-6 * expected.norm() + 1e-9 * whole, name


@pytest.mark.parametrize(("labels", "peak"), [("shared", 0.01), ("own", 0.002)])
def test_twenty_steps_in_float64(oracle, labels, peak):
    """Steps multiply differences, the more the larger the rate; own labels begin a float32 rounding apart."""
    batches, steps = scenes(20), rates(20, peak, warmup=5)
    if labels == "shared":
        batches = labelled(batches)
    model = network().double()
    found = oracle.call(
        "train",
        config=config_of(),
        state=state_of(model),
        dtype=torch.float64,
        batches=batches,
        rates=steps,
        **SETTINGS,
    )
    losses = train(model, torch.float64, batches, steps, **SETTINGS)
    off = ((losses - found["losses"]) / found["losses"]).abs()
    assert off.max() <= 1e-6, off
    for name, expected in found["state"].items():
        difference = (model.state_dict()[name] - expected).double().norm()
        assert difference <= 1e-6 * expected.double().norm().clamp(min=1e-3), name


def moved(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Weights each moved by about one rounding of float32, up or down."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value * (1 + 2.0**-24 * torch.randn(value.shape, generator=generator).sign())
        if value.is_floating_point()
        else value
        for name, value in state.items()
    }


@pytest.mark.slow
def test_two_hundred_steps_in_float32(oracle):
    """Ten runs a side from weights a rounding apart, for one is a draw: after 40 steps such runs are 1 % apart.

    The means over 25 steps may differ by four standard errors, and the first ten losses from float64 by rounding.
    """
    batches, steps, runs = labelled(scenes(40)), rates(200, 0.001, warmup=20), 10
    state = state_of(network())
    settings = {"config": config_of(), "batches": batches, **SETTINGS}

    def of_oracle(start: dict[str, Tensor], dtype: torch.dtype, rates: list[float]) -> Tensor:
        return oracle.call("train", state=start, dtype=dtype, rates=rates, **settings)["losses"]

    def of_ours(start: dict[str, Tensor]) -> Tensor:
        model = network()
        model.load_state_dict(start)
        return train(model, torch.float32, batches, steps, **SETTINGS)

    exact = of_oracle(state, torch.float64, steps[:10])
    starts = [moved(state, seed) for seed in range(runs)]
    ours = torch.stack([of_ours(start) for start in starts])
    theirs = torch.stack([of_oracle(start, torch.float32, steps) for start in starts])
    early = ((of_ours(state)[:10] - exact) / exact).abs()
    assert early.max() <= 5e-6, early
    windows = [side.view(runs, 8, 25, len(LOSSES)).mean(2) for side in (ours, theirs)]
    standard_error = sum(side.var(0) / runs for side in windows).sqrt()
    off = (windows[0].mean(0) - windows[1].mean(0)).abs() / standard_error
    print(
        f"largest difference of means: {off.max():.2f} standard errors; early losses off by {early.max():.1e}"
    )
    assert off.max() <= 4, off
