"""The convolutional ops against torch's own modules: convolution, BN, squeeze-excite, in order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effdet_kernels import (
    batch_norm_act,
    depthwise_conv,
    expand_depthwise,
    pointwise_conv,
    separable_conv,
)

ACTIVATIONS = {
    "none": nn.Identity(),
    "swish": nn.SiLU(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "hard_swish": nn.Hardswish(),
    "leaky_relu": nn.LeakyReLU(),
    "mish": nn.Mish(),
}


def trained_bn(channels: int) -> tuple[nn.BatchNorm2d, torch.Tensor, torch.Tensor]:
    """A BN in eval mode with statistics, and its fold (scale, shift); all float64."""
    bn = nn.BatchNorm2d(channels, eps=1e-3, dtype=torch.float64).eval()
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    nn.init.normal_(bn.running_mean)
    nn.init.uniform_(bn.running_var, 0.5, 2)
    scale = (bn.weight / (bn.running_var + bn.eps).sqrt()).detach()
    return bn, scale, (bn.bias - bn.running_mean * scale).detach()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_mbconv_block(act):
    """Expansion, depthwise, squeeze-excite, projection and residual, fused and as modules."""
    x, expand, project = random(2, 4, 7, 6), random(12, 4, 1, 1), random(4, 12, 1, 1)
    depthwise, squeeze, excite = random(12, 1, 3, 3), random(3, 12), random(12, 3)
    (bn1, *fold1), (bn2, *fold2), (bn3, *fold3) = trained_bn(12), trained_bn(12), trained_bn(4)
    activate = ACTIVATIONS[act]

    inner = activate(bn1(F.conv2d(x, expand)))
    inner = activate(bn2(F.conv2d(inner, depthwise, padding=1, groups=12)))
    gate = torch.sigmoid(torch.relu(inner.mean((2, 3)) @ squeeze.T) @ excite.T)
    expected = bn3(F.conv2d(inner * gate[:, :, None, None], project)) + x

    padding = (1, 1, 1, 1)
    y, sums = expand_depthwise(
        x, expand, *fold1, depthwise, *fold2, padding=padding, act=act, squeeze=True
    )
    gate = torch.sigmoid(torch.relu(sums / 42 @ squeeze.T) @ excite.T)
    got = pointwise_conv(y, project, *fold3, gate=gate, residual=x)
    torch.testing.assert_close(got, expected)

    apart = pointwise_conv(x, expand, *fold1, act=act)
    torch.testing.assert_close(
        depthwise_conv(apart, depthwise, *fold2, padding=padding, act=act), y
    )


def test_without_vectors_expand_depthwise_is_raw():
    x, expand, depthwise = random(1, 2, 4, 4), random(3, 2, 1, 1), -random(3, 1, 3, 3).abs()
    _bn, scale, shift = trained_bn(3)
    raw = expand_depthwise(x, expand, scale, shift, depthwise, act="relu")
    inner = pointwise_conv(x, expand, scale, shift, act="relu")
    torch.testing.assert_close(raw, F.conv2d(inner, depthwise, groups=3))
    assert (raw < 0).any()  # no activation behind it


def test_heads_over_levels():
    """Two nets share levels, each level has its own BN; shared maps may also be listed per net."""
    maps = [random(2, 4, 5, 3), random(2, 4, 2, 2)]
    dw, pw = [random(4, 1, 3, 3), random(4, 1, 3, 3)], [random(6, 4, 1, 1), random(3, 4, 1, 1)]
    folds = [trained_bn(6), trained_bn(6), trained_bn(3), trained_bn(3)]
    scale, shift = [f[1] for f in folds], [f[2] for f in folds]
    expected = [
        F.silu(folds[2 * n + i][0](F.conv2d(F.conv2d(x, dw[n], padding=1, groups=4), pw[n])))
        for n in range(2)
        for i, x in enumerate(maps)
    ]
    torch.testing.assert_close(separable_conv(maps, dw, pw, scale, shift, act="swish"), expected)
    listed = separable_conv(maps * 2, dw, pw, scale, shift, act="swish")
    torch.testing.assert_close(listed, expected)


def test_without_vectors_two_nets_take_a_map_each():
    maps = [random(1, 2, 3, 3).requires_grad_(), random(1, 2, 3, 3)]
    dw, pw = [random(2, 1, 3, 3)] * 2, [random(2, 2, 1, 1)] * 2
    assert len(separable_conv(maps, dw, pw)) == 2
    assert len(separable_conv(maps * 2, dw, pw)) == 4
    first, _, third, _ = separable_conv(maps * 2, dw, pw)
    (first.sum() + third.sum()).backward()
    once = maps[0].detach().requires_grad_()
    separable_conv([once, maps[1]], dw, pw)[0].sum().backward()
    torch.testing.assert_close(maps[0].grad, 2 * once.grad)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_training_batch_norm(act):
    x = random(3, 4, 5, 2).requires_grad_()
    bn = nn.BatchNorm2d(4, eps=1e-3, momentum=1.0, dtype=torch.float64)
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    weigh = random(3, 4, 5, 2)
    expected = ACTIVATIONS[act](bn(x))
    wanted = torch.autograd.grad((expected * weigh).sum(), (x, bn.weight, bn.bias))
    y, mean, var = batch_norm_act(x, bn.weight, bn.bias, eps=1e-3, act=act)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(mean, bn.running_mean)
    torch.testing.assert_close(var * 30 / 29, bn.running_var)  # torch keeps the unbiased variance
    assert not mean.requires_grad
    assert not var.requires_grad
    torch.testing.assert_close(
        torch.autograd.grad((y * weigh).sum(), (x, bn.weight, bn.bias)), wanted
    )


def test_autocast_casts_what_is_mixed():
    x, weight = torch.randn(1, 3, 4, 4, dtype=torch.bfloat16), torch.randn(5, 3, 1, 1)
    scale = torch.ones(5)
    with pytest.raises(TypeError, match=r"pointwise_conv: weight: got float32.*takes bfloat16"):
        pointwise_conv(x, weight, scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = pointwise_conv(x, weight, scale)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, pointwise_conv(x, weight.bfloat16(), scale))
