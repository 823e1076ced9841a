"""Random erasing stays inside the picture and within its bounds."""

from __future__ import annotations

import random

import pytest
import torch

from effdet.data.random_erasing import RandomErasing


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    torch.manual_seed(0)


def _erased(batch: torch.Tensor) -> torch.Tensor:
    return (batch != 9).any(dim=1)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_modes(mode):
    batch = torch.full((16, 3, 40, 60), 9.0)
    erase = RandomErasing(1.0, min_area=0.1, max_area=0.2, mode=mode, device="cpu")
    result, target = erase(batch, {})
    assert result is batch and target == {}
    for image, mask in zip(batch, _erased(batch), strict=True):
        assert 0.07 < mask.float().mean() < 0.23
        colors = image[:, mask].unique(dim=1)
        if mode == "const":
            assert (colors == 0).all()
        elif mode == "rand":
            assert colors.shape == (3, 1) and colors.any()
        else:
            assert colors.shape[1] == mask.sum()


def test_padding_is_not_erased():
    target = {"img_size": torch.tensor([[120, 40]] * 20), "img_scale": torch.full((20,), 2.0)}
    batch = torch.full((20, 3, 64, 64), 9.0)
    RandomErasing(1.0, max_area=0.9, device="cpu")(batch, target)
    assert _erased(batch).any()
    assert not _erased(batch)[:, 20:].any() and not _erased(batch)[:, :, 60:].any()


def test_probability():
    batch = torch.full((600, 3, 16, 16), 9.0)
    RandomErasing(0.3, min_area=0.1, device="cpu")(batch, {})
    assert 130 < _erased(batch).flatten(1).any(dim=1).sum() < 230


def test_clean_part_of_the_batch():
    batch = torch.full((9, 3, 32, 32), 9.0)
    RandomErasing(1.0, min_area=0.1, num_splits=3, device="cpu")(batch, {})
    assert _erased(batch).flatten(1).any(dim=1).tolist() == [False] * 3 + [True] * 6


def test_several_rectangles_share_the_area():
    batch = torch.full((50, 3, 64, 64), 9.0)
    RandomErasing(1.0, min_area=0.2, max_area=0.2, min_count=3, device="cpu")(batch, {})
    assert _erased(batch).float().mean() < 0.21


def test_single_image():
    image = torch.full((3, 32, 32), 9.0)
    RandomErasing(1.0, min_area=0.1, device="cpu")(image, {})
    assert (image == 0).any()


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode: got 'noise'"):
        RandomErasing(mode="noise")
