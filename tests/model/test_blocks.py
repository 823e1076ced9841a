"""Blocks of the backbone as one op, where launches count, and as three."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effdet import fused
from effdet.backbone import create_backbone
from effdet.backbone.blocks import DepthwiseSeparableConv, InvertedResidual, SqueezeExcite


@pytest.fixture
def calls(monkeypatch):
    """What `mbconv` was called with."""
    noted = []
    whole = fused.mbconv

    def counted(*args, **how):
        noted.append(args)
        return whole(*args, **how)

    monkeypatch.setattr(fused, "mbconv", counted)
    return noted


@pytest.fixture
def blocks():
    """One of each kind of block of EfficientNet-B0: without an expansion, of stride 2, with a residual."""
    torch.manual_seed(0)
    backbone = create_backbone("tf_efficientnet_b0", pretrained=False).eval()
    for norm in backbone.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    found = [
        m for m in backbone.modules() if isinstance(m, (DepthwiseSeparableConv, InvertedResidual))
    ]
    return found[:3]


@torch.no_grad()
def _same_in_parts(block):
    conv = block.conv_pw if isinstance(block, InvertedResidual) else block.conv_dw
    x = torch.randn(2, conv.in_channels, 9, 12)
    wide = block.expand(x)
    torch.testing.assert_close(block(x), block.project(*wide, x), rtol=1e-5, atol=1e-5)


def test_blocks_are_one_op_where_launches_count(captures, calls, blocks):
    for block in blocks:
        _same_in_parts(block)
    assert len(calls) == len(blocks)
    assert [args[1] is None for args in calls] == [True, False, False]  # expansions
    assert [block.has_skip for block in blocks] == [False, False, True]


def test_on_a_cpu_they_are_three(calls, blocks):
    for block in blocks:
        _same_in_parts(block)
    assert not calls


def _hooked(block):
    block.se.register_forward_hook(lambda *_: None)


def _ungated(block):
    block.se = nn.Identity()


def _with_own_gate(block):
    block.se.gate = nn.Softplus()


def _with_own_activation(block):
    block.act = nn.GELU()


def _with_own_norm(block):
    block.bn1 = nn.GroupNorm(1, block.bn1.num_features)


def _training_norm(block):
    block.bn2.train()


def _of_a_subclass(block):
    class Other(SqueezeExcite):
        def forward(self, sums, count):
            return super().forward(sums, count) * 0.5

    block.se.__class__ = Other


CHANGES = [
    _hooked, _ungated, _with_own_gate, _with_own_activation, _with_own_norm,
    _training_norm, _of_a_subclass,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_blocks_that_the_op_is_not_are_three(captures, calls, blocks, change):
    change(blocks[2])
    _same_in_parts(blocks[2])
    assert not calls


def test_with_gradients_they_are_three(captures, calls, blocks):
    x = torch.randn(1, blocks[2].conv_pw.in_channels, 5, 6, requires_grad=True)
    blocks[2](x).sum().backward()
    assert x.grad is not None and not calls
