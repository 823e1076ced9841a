"""Networks whose backbones are timm's: ours, in the oracle's environment, which has timm, against PyPI effdet's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from effdet.backbone import SPECS
from effdet.config.model_config import efficientdet_model_param_dict

ROOT = Path(__file__).resolve().parents[2]
NAMES = [n for n, c in efficientdet_model_param_dict.items() if c["backbone_name"] not in SPECS]
TOLERANCE = 1e-9  # in standard deviations of the output, in float64


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_outputs_are_equal(oracle: Any, ours_with_timm: Any, name: str) -> None:
    draw = {"name": name, "size": (128, 128), "seed": 4}
    ours, theirs = (worker.call("drawn_outputs", **draw) for worker in (ours_with_timm, oracle))
    assert Path(ours["file"]).is_relative_to(ROOT / "effdet")
    assert not Path(theirs["file"]).is_relative_to(ROOT / "effdet")
    assert ours["keys"] == theirs["keys"]
    for part in ("cls", "box"):
        deviation = torch.cat([y.flatten() for y in theirs[part]]).std()
        assert 1e-3 < deviation < 1e6
        for mine, other in zip(ours[part], theirs[part], strict=True):
            assert (mine - other).abs().max() <= TOLERANCE * deviation


def test_which_these_are() -> None:
    assert NAMES == [
        "resdet50", "cspresdet50", "cspresdext50", "cspresdext50pan", "cspdarkdet53", "cspdarkdet53m"
    ]  # fmt: skip
