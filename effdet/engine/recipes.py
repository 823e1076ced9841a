"""Named sets of training settings: where they come from and what they hold."""

from __future__ import annotations

from typing import Any

# "lr_per_image": the peak rate divided by the batch that it was published for. "warmup_share": of
# the whole run. The other names are those of `TrainConfig`.
_PAPER = {
    "epochs": 300,
    "batch_size": 128,
    "optimizer": "sgd",
    "lr_per_image": 0.08 / 128,
    "momentum": 0.9,
    "weight_decay": 4e-5,
    "warmup_share": 0.05,
    "warmup_start": 0.0,
    "clip_grad": 0.0,
    "ema_decay": 0.9998,
    "bn_momentum": 0.003,
    "bn_eps": 1e-4,
    "scale_min": 0.1,
    "scale_max": 2.0,
}
_PEER = {
    "epochs": 300,
    "batch_size": 64,
    "optimizer": "sgd",
    "lr_per_image": 0.09 / 64,
    "momentum": 0.9,
    "weight_decay": 4e-5,
    "warmup_epochs": 5.0,
    "warmup_start": 1e-4 / 0.09,
    "clip_grad": 10.0,
    "ema_decay": 0.9998,
    "scale_min": 0.1,
    "scale_max": 2.0,
}
_FINETUNE = {
    "epochs": 150,
    "batch_size": 64,
    "optimizer": "sgd",
    "lr_per_image": 0.008 / 64,
    "momentum": 0.9,
    "weight_decay": 4e-5,
    "warmup_epochs": 3.0,
    "warmup_start": 1e-4 / 0.008,
    "clip_grad": 10.0,
    "ema_decay": 0.9966,
    "scale_min": 0.1,
    "scale_max": 2.0,
}
RECIPES: dict[str, dict[str, Any]] = {"paper": _PAPER, "peer": _PEER, "finetune": _FINETUNE}


def settings(recipe: str, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``TrainConfig``: those of the recipe, except where ``given`` says otherwise.

    The peak rate follows the batch size, and a warm-up that is a share of the run its epochs.

    Args:
        recipe: "paper": EfficientDet, arXiv:1911.09070v1, section 5; its COCO models. "peer":
            tf_efficientdet_d0 from scratch on COCO, as the README of PyPI's effdet trains it.
            "finetune": from COCO weights to Pascal VOC, from the same README.
        given: settings that win.

    Raises:
        ValueError: no such recipe; the message lists them.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe: got {recipe!r}, takes {', '.join(RECIPES)}")
    values = {**RECIPES[recipe], **given}
    per_image, share = values.pop("lr_per_image"), values.pop("warmup_share", None)
    if values["optimizer"] == RECIPES[recipe]["optimizer"]:  # a rate is one optimizer's
        values.setdefault("lr", per_image * values["batch_size"])
    if share is not None:
        values.setdefault("warmup_epochs", share * values["epochs"])
    return {**values, "recipe": recipe}
