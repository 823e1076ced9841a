"""Writes tests/model/data/models_47.json: what PyPI effdet 0.4.1 says about each of its models.

Run with the oracle's python from outside the checkout's root (whose own effdet would be found):

    cd tests/oracle && ORACLE/bin/python make_model_table.py
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import torchvision_stub  # noqa: F401  declares the operators that a CPU torchvision lacks

from effdet import EfficientDet, get_efficientdet_config
from effdet.anchors import get_feat_sizes
from effdet.config.model_config import efficientdet_model_param_dict

TARGET = Path(__file__).resolve().parents[1] / "model" / "data" / "models_47.json"


def describe(name: str) -> dict:
    config = get_efficientdet_config(name)
    with torch.device("meta"):
        model = EfficientDet(config, pretrained_backbone=False)
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in model.state_dict().items())
    sizes = get_feat_sizes(config.image_size, config.max_level)[config.min_level :]
    anchors_per_place = len(config.aspect_ratios) * config.num_scales
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "keys": len(lines),
        "keys_sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        "anchors": sum(h * w for h, w in sizes) * anchors_per_place,
        "feature_channels": model.backbone.feature_info.channels(),
        "feature_reductions": model.backbone.feature_info.reduction(),
    }


def main() -> None:
    table = {name: describe(name) for name in efficientdet_model_param_dict}
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(json.dumps(table, indent=1) + "\n")
    print(f"{len(table)} models written to {TARGET}")


if __name__ == "__main__":
    main()
