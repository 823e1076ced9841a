"""Class and box head, one after the other and layer by layer together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effdet import fused, heads

from .networks import build


@pytest.fixture
def calls(monkeypatch):
    """The number of nets in each call of `separable_conv`."""
    noted = []
    convolve = fused.separable_conv

    def counted(x, dw_weight, *rest, **how):
        noted.append(len(dw_weight))
        return convolve(x, dw_weight, *rest, **how)

    monkeypatch.setattr(fused, "separable_conv", counted)
    return noted


def _maps(model, levels=5):
    torch.manual_seed(1)
    return [torch.randn(2, model.config.fpn_channels, s, s + 1) for s in (9, 5, 3, 2, 1)[:levels]]


def _flat(pair):
    return [*pair[0], *pair[1]]


@torch.no_grad()
def _check(model, calls, nets: int):
    """Calls have so many nets each, and the results are those of the heads by themselves."""
    x = _maps(model)
    expected = _flat((model.class_net(x), model.box_net(x)))
    calls.clear()
    found = _flat(heads.both(model.class_net, model.box_net, x))
    assert set(calls) <= {nets}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_layer_of_both_is_one_call_where_launches_count(captures, calls):
    model = build()
    _check(model, calls, nets=2)
    assert len(calls) == model.config.box_class_repeats + 1


def test_on_a_cpu_heads_go_one_after_the_other(calls):
    model = build()
    _check(model, calls, nets=1)
    assert len(calls) == 2 * (model.config.box_class_repeats + 1)


def _hooked(model):
    model.box_net.register_forward_hook(lambda *_: None)


def _activated(model):
    model.box_net.act = nn.ReLU6()
    model.class_net.act = nn.Hardswish()


def _with_own_activation(model):
    model.class_net.act = nn.GELU()
    model.box_net.act = nn.GELU()


def _normed(model):
    model.class_net.norms(0)[2].track_running_stats = False
    model.class_net.norms(0)[2].running_mean = None
    model.class_net.norms(0)[2].running_var = None


def _shortened(model):
    model.box_net.conv_rep = model.box_net.conv_rep[:-1]


def _of_a_subclass(model):
    class Other(heads.HeadNet):
        def forward(self, x):
            return super().forward(x)

    model.box_net.__class__ = Other


@pytest.mark.parametrize(
    "change", [_hooked, _activated, _with_own_activation, _normed, _shortened, _of_a_subclass]
)
def test_heads_that_are_not_alike_go_one_after_the_other(captures, calls, change):
    model = build()
    change(model)
    _check(model, calls, nets=1)


def test_one_call_with_gradients_is_of_one_head(captures, calls):
    model = build()
    heads.both(model.class_net, model.box_net, _maps(model))
    assert set(calls) == {1}


def test_both_want_one_map_per_level(captures):
    model = build()
    with torch.no_grad(), pytest.raises(ValueError, match="got 4 maps, expected 5"):
        heads.both(model.class_net, model.box_net, _maps(model, levels=4))


def test_no_maps_are_refused_as_a_head_does(captures):
    model = build()
    with torch.no_grad(), pytest.raises(ValueError, match="got 0 maps, expected 5"):
        heads.both(model.class_net, model.box_net, [])
