"""Our networks against PyPI effdet's: one state dict, one input, both outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effdet import create_model, create_model_from_config, get_efficientdet_config
from effdet.efficientdet import FpnCombine, ResampleFeatureMap

# What the project promises for fp32 outputs, in standard deviations of the output.
OUTPUT_TOLERANCE = 1e-4
# ... and for gradients, relative to the largest gradient of the tensor.
GRADIENT_TOLERANCE = 1e-5


def give_realistic_state(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Parameters and batch norm statistics as after some training; returns the state dict.

    The statistics lie half way to those of random images, and are disturbed: where they do not fit
    the weights at all, the signal grows over the depth until any two roundings of it diverge.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("edge_weights"):
                value.copy_(uniform(value, -0.2, 1.5))
            elif value.ndim == 1 and key.endswith("weight"):
                value.copy_(uniform(value, 0.6, 1.4))
            elif value.ndim == 1 and key.endswith("bias"):
                value.copy_(uniform(value, -0.1, 0.1))
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 0.5
        model.train()(images((128, 128), batch=2, seed=seed))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.running_mean += norm.running_var.sqrt() * uniform(norm.running_mean, -0.2, 0.2)
            norm.running_var *= uniform(norm.running_var, 0.7, 1.4)
    return {key: value.clone() for key, value in model.state_dict().items()}


def build(name: str, options: dict[str, Any], seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(seed)
    model = create_model(name, pretrained_backbone=False, **options)
    return model, give_realistic_state(model, seed)


def images(size: tuple[int, int], batch: int, seed: int = 3) -> Tensor:
    return torch.randn((batch, 3, *size), generator=torch.Generator().manual_seed(seed))


def assert_close_in_deviations(ours: list[Tensor], theirs: list[Tensor]) -> None:
    deviation = torch.cat([y.flatten() for y in theirs]).std()
    for level, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.shape == other.shape
        worst = ((mine - other).abs().max() / deviation).item()
        assert worst <= OUTPUT_TOLERANCE, f"level {level}: off by {worst:.2e} deviations"


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("tf_efficientdet_d0", (512, 512)),
        ("tf_efficientdet_d0", (200, 312)),
        ("efficientdet_d0", (256, 256)),
        ("efficientdet_lite0", (256, 192)),
        ("tf_efficientdet_lite0", (128, 128)),
        ("tf_efficientdet_d7x", (128, 128)),
        ("efficientdet_q1", (128, 128)),
        ("efficientdet_q1", (216, 136)),
        ("efficientdetv2_dt", (128, 128)),
        ("efficientdetv2_ds", (128, 128)),
        ("efficientdet_w0", (128, 128)),
        ("efficientdet_es", (128, 128)),
        ("efficientdet_em", (128, 128)),
        ("mixdet_m", (128, 128)),
        ("mixdet_l", (128, 128)),
        ("mobiledetv2_110d", (128, 128)),
        ("mobiledetv2_120d", (128, 128)),
        ("mobiledetv3_large", (128, 128)),
    ],
)
def test_outputs_are_equal(oracle: Any, name: str, size: tuple[int, int]) -> None:
    options = {"image_size": size}
    model, state = build(name, options, seed=11)
    x = images(size, batch=1)
    with torch.no_grad():
        cls, box = model.eval()(x)
    theirs = oracle.call("model_outputs", name=name, options=options, state=state, x=x)
    assert_close_in_deviations(cls, theirs["cls"])
    assert_close_in_deviations(box, theirs["box"])


def test_weights_are_where_theirs_are(oracle: Any) -> None:
    theirs = oracle.call("weight_urls")
    assert len(theirs) == 47 and sum(map(bool, theirs.values())) == 32
    for name, url in theirs.items():
        assert get_efficientdet_config(name).get("url", "") == url


@pytest.mark.parametrize("fpn_name", ["bifpn_attn", "bifpn_sum", "pan_sum", "pan_fa"])
def test_outputs_of_other_pyramids_are_equal(oracle: Any, fpn_name: str) -> None:
    config = get_efficientdet_config("tf_efficientdet_d0")
    config.fpn_name = fpn_name
    config.image_size = (128, 128)
    torch.manual_seed(5)
    model = create_model_from_config(config, pretrained_backbone=False)
    state = give_realistic_state(model, 5)
    x = images((128, 128), batch=2)
    with torch.no_grad():
        cls, box = model.eval()(x)
    theirs = oracle.call("model_outputs_of_pyramid", fpn_name=fpn_name, state=state, x=x)
    assert_close_in_deviations(cls, theirs["cls"])
    assert_close_in_deviations(box, theirs["box"])


@pytest.mark.parametrize("name", ["tf_efficientdet_d0", "efficientdet_d0", "efficientdet_es"])
def test_a_training_step_is_equal(oracle: Any, name: str) -> None:
    """In float64, where the gradients of 250 layers can be told from rounding."""
    size, seed = (64, 64), 23
    options = {"image_size": size}
    model, state = build(name, options, seed=7)
    model = model.double().train()
    x = images(size, batch=3).double()
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(seed)  # the same paths are dropped on both sides
    cls, box = model(x)
    weights = {
        kind: [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in ys]
        for kind, ys in (("cls", cls), ("box", box))
    }
    maps = zip([*cls, *box], [*weights["cls"], *weights["box"]], strict=True)
    sum((y * w).sum() for y, w in maps).backward()
    theirs = oracle.call(
        "model_training_step",
        name=name,
        options=options,
        state=state,
        x=x,
        weights=weights,
        seed=seed,
    )
    assert_close_in_deviations([y.detach() for y in cls], theirs["cls"])
    gradients = dict(model.named_parameters())
    largest = max(g.abs().max() for g in theirs["gradients"].values())
    assert gradients.keys() == theirs["gradients"].keys()
    for key, other in theirs["gradients"].items():
        # A bias in front of a batch norm has gradient zero but for rounding.
        scale = max(other.abs().max(), 1e-9 * largest)
        worst = ((gradients[key].grad - other).abs().max() / scale).item()
        assert worst <= GRADIENT_TOLERANCE, f"{key}: off by {worst:.2e} of {scale:.2e}"
    for key, other in theirs["state"].items():
        torch.testing.assert_close(model.state_dict()[key], other, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("alternate_init", [False, True])
@pytest.mark.parametrize("name", ["tf_efficientdet_d0", "efficientdet_es"])
def test_initial_parameters_have_the_same_distribution(
    oracle: Any, name: str, alternate_init: bool
) -> None:
    theirs = oracle.call("parameter_statistics", name=name, alternate_init=alternate_init)
    torch.manual_seed(1)
    model = create_model(name, pretrained_backbone=False, alternate_init=alternate_init)
    for key, parameter in model.named_parameters():
        if parameter.numel() <= 1:
            continue
        mean, deviation, _largest = theirs[key]
        # Both are estimates from numel draws; six standard errors of their difference.
        margin = 6 * (2 / parameter.numel()) ** 0.5 * deviation
        assert abs(parameter.mean().item() - mean) <= margin + 1e-7, key
        assert abs(parameter.std().item() - deviation) <= margin + 1e-7, key


@pytest.mark.parametrize("pad_type", ["", "same"])
@pytest.mark.parametrize("downsample", ["max", "avg", "bilinear", "nearest"])
@pytest.mark.parametrize("sizes", [((13, 16), (7, 8)), ((12, 9), (6, 5)), ((11, 11), (4, 4))])
def test_downsampling_is_equal(oracle: Any, sizes: Any, downsample: str, pad_type: str) -> None:
    arguments = {
        "in_channels": 4,
        "out_channels": 4,
        "input_size": sizes[0],
        "output_size": sizes[1],
        "pad_type": pad_type,
        "downsample": downsample,
    }
    x = torch.randn(2, 4, *sizes[0], generator=torch.Generator().manual_seed(0))
    theirs = oracle.call("resample", arguments=arguments, x=x)["y"]
    ours = ResampleFeatureMap(**arguments)(x)
    assert_close_in_deviations([ours], [theirs])


@pytest.mark.parametrize("pad_type", ["", "same"])
@pytest.mark.parametrize("downsample", ["max", "avg"])
@pytest.mark.parametrize("size", [(1, 2), (2, 1), (1, 4)])
def test_downsampling_of_one_row_is_equal(
    oracle: Any, size: Any, downsample: str, pad_type: str
) -> None:
    """Theirs as in a model made for larger maps: one made for such maps leaves them as they are."""
    arguments = {
        "in_channels": 4,
        "out_channels": 4,
        "input_size": (4, 4),
        "output_size": (2, 2),
        "pad_type": pad_type,
        "downsample": downsample,
    }
    x = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    theirs = oracle.call("resample", arguments=arguments, x=x)["y"]
    ours = ResampleFeatureMap(**arguments)(x, theirs.shape[2:])
    assert_close_in_deviations([ours], [theirs])


@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
@pytest.mark.parametrize("method", ["fastattn", "attn", "sum"])
def test_combining_is_equal(oracle: Any, method: str, upsample: str) -> None:
    info = [{"num_chs": 4, "size": s} for s in ((7, 10), (4, 5), (13, 19))]
    arguments = {
        "feature_info": info,
        "fpn_channels": 4,
        "inputs_offsets": (0, 1, 2),
        "output_size": (7, 10),
        "pad_type": "same",
        "downsample": "max",
        "upsample": upsample,
        "weight_method": method,
    }
    generator = torch.Generator().manual_seed(2)
    x = [torch.randn(2, 4, *i["size"], generator=generator) for i in info]
    weights = None if method == "sum" else torch.tensor([0.7, -0.1, 1.2])
    theirs = oracle.call("combine", arguments=arguments, x=x, edge_weights=weights)["y"]
    module = FpnCombine(**arguments)
    if weights is not None:
        module.edge_weights.data.copy_(weights)
    with torch.no_grad():
        assert_close_in_deviations([module(x)], [theirs])
