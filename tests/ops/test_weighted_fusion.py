"""weighted_fusion: published values, borders and ties of the max-pool, sizes."""

from __future__ import annotations

import pytest
import torch

from effdet_kernels import weighted_fusion

PAIR = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)


@pytest.mark.parametrize(
    ("method", "expected"),
    [("sum", [2.0, 6.0]), ("attn", [1.0, 3.0]), ("fastattn", [0.99995, 2.99985])],
)
def test_published_values(method, expected):
    weight = None if method == "sum" else torch.ones(2)
    fused = weighted_fusion([PAIR, PAIR], weight, method=method)
    torch.testing.assert_close(fused.flatten(), torch.tensor(expected))


def pool(x, size, padding):
    return weighted_fusion(
        [x], None, method="sum", resample=["max"], size=size, pool_padding=padding
    )


def test_the_border_of_the_max_pool_never_wins():
    x = -torch.ones(1, 1, 5, 5)
    torch.testing.assert_close(pool(x, (3, 3), (1, 1, 1, 1)), -torch.ones(1, 1, 3, 3))


def test_the_gradient_of_a_tie_goes_to_the_first_maximum():
    x = torch.zeros(1, 1, 3, 3, requires_grad=True)
    pool(x, (1, 1), (0, 0, 0, 0)).backward()
    assert x.grad.flatten().tolist() == [1] + [0] * 8


def test_negative_weights_get_no_gradient_and_no_share():
    weight = torch.tensor([1.0, -2.0], requires_grad=True)
    fused = weighted_fusion([PAIR, 100 * PAIR], weight)
    fused.sum().backward()
    torch.testing.assert_close(fused.detach(), PAIR / 1.0001)
    assert weight.grad[1] == 0


def test_weights_in_float32_with_maps_in_half_precision():
    weight = torch.tensor([0.3, 0.7])
    fused = weighted_fusion([PAIR.bfloat16(), PAIR.bfloat16()], weight)
    assert fused.dtype == torch.bfloat16
    assert torch.equal(fused, PAIR.bfloat16())  # 0.9999 rounds to 1


@pytest.mark.parametrize("size", [(6, 10), (5, 9), (2, 3)])
def test_nearest_takes_the_pixel_below_the_scaled_coordinate(size):
    x = torch.rand(2, 3, 3, 5)
    fused = weighted_fusion([x], None, method="sum", resample=["nearest"], size=size)
    rows = torch.arange(size[0]) * 3 // size[0]
    columns = torch.arange(size[1]) * 5 // size[1]
    assert torch.equal(fused, x[:, :, rows][..., columns])


def test_bilinear_has_half_pixel_centres():
    ramp = torch.arange(4.0).reshape(1, 1, 1, 4)
    fused = weighted_fusion([ramp], None, method="sum", resample=["bilinear"], size=(1, 8))
    expected = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    torch.testing.assert_close(fused.flatten(), expected)


def test_a_map_of_another_size_needs_a_resampling():
    small, large = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"weighted_fusion: x\[1\]: .*identity.*\(2, 2\)"):
        weighted_fusion([small, large], None, method="sum")
    with pytest.raises(ValueError, match=r"weighted_fusion: x\[1\]: .*max.*\(1, 1\)"):
        weighted_fusion([small, large], None, method="sum", resample=["identity", "max"])
