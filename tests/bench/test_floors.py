"""Floors of whole models: against published figures, an independent table, and counts by hand."""

from __future__ import annotations

import argparse
import dataclasses
import itertools

import pytest
import torch
from torch import nn

import effdet
from bench.floors import FUSIONS, add_arguments, floors, floors_of, run
from effdet.bifpn import FpnCombine


@dataclasses.dataclass(frozen=True)
class Model:
    """``params`` (M) and ``macs`` (G) as published: EfficientDet, arXiv:1911.09070, table 2.

    ``bytes_1`` and ``bytes_128``: GB in bf16 at that batch per fusion model, and ``kernels``, from a walk over the
    published layer formulas that knows nothing of this code.
    """

    size: int
    params: float
    macs: float
    bytes_1: tuple[float, ...]
    bytes_128: tuple[float, ...]
    kernels: tuple[int, ...]


MODELS = {
    "d0": Model(512, 3.9, 2.5, (0.580, 0.280, 0.185, 0.180, 0.109),
                (73.230, 34.801, 22.707, 22.038, 12.978), (499, 280, 109, 85, 70)),
    "d1": Model(640, 6.6, 6.1, (1.297, 0.634, 0.405, 0.390, 0.246),
                (164.236, 79.302, 50.198, 48.283, 29.881), (635, 353, 145, 113, 92)),
    "d2": Model(768, 8.1, 11, (2.059, 1.021, 0.644, 0.610, 0.393),
                (261.379, 128.525, 80.458, 76.071, 48.241), (683, 385, 161, 121, 100)),
    "d3": Model(896, 12, 25, (3.928, 1.964, 1.223, 1.143, 0.748),
                (499.402, 247.980, 153.545, 143.309, 92.712), (810, 455, 188, 140, 116)),
    "d4": Model(1024, 21, 55, (7.033, 3.569, 2.182, 2.011, 1.346),
                (894.377, 450.945, 274.024, 252.188, 167.026), (936, 523, 222, 166, 136)),
    "d5": Model(1280, 34, 135, (14.910, 7.540, 4.571, 4.228, 2.833),
                (1899.004, 955.695, 576.549, 532.681, 354.082), (1024, 564, 242, 186, 150)),
    "d6": Model(1280, 52, 226, (20.160, 10.308, 6.195, 5.673, 3.891),
                (2565.501, 1304.464, 779.847, 713.000, 484.895), (1190, 652, 278, 214, 172)),
    "d7": Model(1536, 52, 325, (28.978, 14.792, 8.875, 8.123, 5.557),
                (3694.270, 1878.376, 1122.934, 1026.674, 698.204), (1190, 652, 278, 214, 172)),
    "d7x": Model(1536, 77, 410, (36.140, 18.160, 10.933, 10.179, 6.810),
                 (4604.115, 2302.584, 1379.939, 1283.397, 852.155), (1458, 800, 340, 260, 209)),
}  # fmt: skip


@pytest.mark.parametrize("size", MODELS)
def test_published_figures(size):
    model = MODELS[size]
    found = floors(f"tf_efficientdet_{size}", 1, model.size, model.size, 2)
    assert found.macs / 1e9 == pytest.approx(model.macs, rel=0.02)
    assert found.params / 1e6 == pytest.approx(model.params, rel=0.02)


@pytest.mark.parametrize("size", MODELS)
@pytest.mark.parametrize("batch", [1, 128])
def test_bytes_and_kernels_as_in_an_independent_count(size, batch):
    """Ours has the sums and gates of squeeze-excite in addition, up to 0.04 %; the rest is the table's rounding."""
    model = MODELS[size]
    table = model.bytes_1 if batch == 1 else model.bytes_128
    found = floors(f"tf_efficientdet_{size}", batch, model.size, model.size, 2)
    for fusion, expected, kernels in zip(FUSIONS, table, model.kernels, strict=True):
        assert abs(found.bytes(fusion) / 1e9 - expected) <= 4e-4 * expected + 0.0005
        assert found.kernels(fusion) == kernels


@pytest.mark.parametrize(
    "name", ["tf_efficientdet_d0", "efficientdet_q0", "mixdet_m", "efficientdet_nano"]
)
def test_more_fusion_moves_less(name):
    found = floors(name, 1, 256, 320, 2)
    for more, less in itertools.pairwise(FUSIONS):
        assert found.bytes(more) > found.bytes(less)
        assert found.kernels(more) > found.kernels(less)
        assert found.seconds(more, 1e12, 1e14) > found.seconds(less, 1e12, 1e14)


def test_no_arithmetic_is_lost_by_fusion_and_maps_scale_with_the_batch():
    one, two, three = (floors("efficientdet_nano", batch, 65, 130, 4) for batch in (1, 2, 3))
    for fusion in FUSIONS:
        assert sum(x.matrix + x.vector for x in one.launches[fusion]) == one.macs
        step = two.bytes(fusion) - one.bytes(fusion)
        assert 0 < step < one.bytes(fusion)  # the weights are read once
        assert three.bytes(fusion) - two.bytes(fusion) == step
    assert three.macs == 3 * one.macs


def test_seconds_are_the_longest_of_three():
    found = floors("efficientdet_nano", 1, 64, 64, 2)
    for fusion in FUSIONS:
        matrix, vector = (
            sum(getattr(x, kind) for x in found.launches[fusion]) for kind in ("matrix", "vector")
        )
        moving = found.seconds(fusion, 1e9, float("inf"))
        assert moving == pytest.approx(found.bytes(fusion) / 1e9)
        assert found.seconds(fusion, float("inf"), 1e9) == pytest.approx(2 * matrix / 1e9)
        depthwise = found.seconds(fusion, float("inf"), float("inf"), 1e9)
        assert depthwise == pytest.approx(vector / 1e9)
        slow = max(moving, 2 * matrix / 1e9, depthwise)
        assert slow < found.seconds(fusion, 1e9, 1e9, 1e9) < moving + 2 * matrix / 1e9 + depthwise


def test_a_changed_config_changes_the_count():
    base, wider = (_nano(num_classes=classes) for classes in (10, 11))
    positions = sum((256 // stride) ** 2 for stride in _strides(base))
    one, other = (floors_of(model, 1, 256, 256, 2) for model in (base, wider))
    channels = base.config.fpn_channels
    assert other.macs - one.macs == 9 * channels * positions
    assert other.params - one.params == 9 * (channels + 1)
    for fusion in FUSIONS:  # more weights, and a wider map of logits
        launches = len(_strides(base)) if fusion in ("a", "a1") else 1
        more = other.bytes(fusion) - one.bytes(fusion)
        assert more == 2 * 9 * (launches * channels + positions)


def test_a_node_counts_the_same_as_one_op_and_as_two():
    one_op, two_ops = _nano(), _nano()
    for module in two_ops.modules():
        if isinstance(module, FpnCombine):  # its output is asked for, so it is an op of its own
            module.register_forward_hook(lambda *_: None)
    fused, split = (floors_of(model, 2, 96, 64, 2) for model in (one_op, two_ops))
    assert _calls(two_ops).count("weighted_fusion") > _calls(one_op).count("weighted_fusion")
    assert [fused.bytes(f) for f in FUSIONS] == [split.bytes(f) for f in FUSIONS]
    assert [fused.kernels(f) for f in FUSIONS] == [split.kernels(f) for f in FUSIONS]


@pytest.mark.parametrize("inplace", [False, True])
def test_plain_torch_layers_by_hand(inplace):
    """Conv 3x3, batch norm, ReLU, depthwise 3x3 on 8 x 6 maps, 1x1 onto an average."""
    layers = (
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1), nn.AvgPool2d(2),
    )  # fmt: skip
    found = floors_of(nn.Sequential(*layers).to("meta").eval(), 1, 8, 6, 1)
    image, wide, narrow, small = 3 * 48, 8 * 48, 4 * 48, 4 * 12
    dense = image + 9 * 3 * 8 + wide
    apart = [2 * wide + 9 * 8, wide + 8 * 4 + narrow, narrow + small]
    together = wide + 9 * 8 + 8 * 4 + narrow
    assert found.macs == wide * 27 + wide * 9 + narrow * 8
    assert [x.elements for x in found.launches["a"]] == [dense, 2 * wide, 2 * wide, *apart]
    assert [x.elements for x in found.launches["a1"]] == [dense, *apart]
    assert [x.elements for x in found.launches["b"]] == [dense, together, narrow + small]
    assert [x.vector for x in found.launches["b"]] == [0, wide * 9, 0]
    assert found.bytes("b") == found.bytes("c") == found.bytes("c2")


def test_a_block_without_squeeze_excite_is_one_launch_at_best():
    found = floors("tf_efficientdet_lite0", 1, 64, 64, 2)
    whole = [x for x in found.launches["c2"] if "expand" in x.kinds]
    assert whole and all("pointwise" in x.kinds for x in whole)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"model: .*no_such_net"):
        floors("no_such_net", 1, 64, 64, 2)
    with pytest.raises(ValueError, match="batch: got 0, takes at least 1"):
        floors("efficientdet_nano", 0, 64, 64, 2)
    with pytest.raises(ValueError, match="fusion: got 'd', takes one of a, a1, b, c, c2"):
        floors("efficientdet_nano", 1, 64, 64, 2).bytes("d")
    for words, message in (
        (["--size", "64by64"], "--size: got '64by64', takes S or HxW"),
        (["--bandwidth", "0"], "--bandwidth: got 0.0, takes a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            _run("efficientdet_nano", *words)


def test_the_command_prints_a_line_for_each_model(capsys):
    rates = "--bandwidth", "4.3e12", "--matrix-rate", "790e12"
    _run("efficientdet_nano", "tf_efficientdet_lite0", "--size", "64x96", "--batch", "2", *rates)
    head, columns, nano, lite = capsys.readouterr().out.splitlines()
    assert "batch 2" in head and "4.3 TB/s, 790 TFLOP/s" in head
    found = floors("efficientdet_nano", 2, 64, 96, 2)
    assert nano.split()[:2] == ["efficientdet_nano", "64x96"]
    assert nano.split()[-5:] == [str(found.kernels(fusion)) for fusion in FUSIONS]
    assert f"{found.bytes('c') / 1e9:.4g}" in nano.split()
    assert f"{1e3 * found.seconds('c', 4.3e12, 790e12):.4g}" in nano.split()
    assert lite.startswith("tf_efficientdet_lite0") and columns.startswith("model")


def test_the_command_measures_the_ceilings_that_are_not_given(capsys):
    _run("efficientdet_nano", "--dtype", "fp32", "--device", "cpu", "--matrix-rate", "1e10")
    head = capsys.readouterr().out.splitlines()[0]
    assert "0.01 TFLOP/s" in head and float(head.split(", ")[2].split()[0]) > 0


def _run(*words: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args(words))


def _nano(**changes: int) -> effdet.EfficientDet:
    config = effdet.get_efficientdet_config("efficientdet_nano")
    config.update(changes)
    with torch.device("meta"):
        return effdet.EfficientDet(config, pretrained_backbone=False).eval()


def _strides(model: effdet.EfficientDet) -> list[int]:
    return [2**level for level in range(model.config.min_level, model.config.max_level + 1)]


def _calls(model: nn.Module) -> list[str]:
    """Names of the ops called, in order."""
    names: list[str] = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._schema.name.split("::")[1])
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Names():
        model(torch.empty(1, 3, 64, 64, device="meta"))
    return names
