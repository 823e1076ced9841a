"""EfficientDet: backbone, feature pyramid, class head and box head (arXiv:1911.09070).

The parts live in `layers`, `bifpn` and `heads`; their names are importable from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from .backbone import create_backbone
from .bifpn import BiFpn, BiFpnLayer, Fnode, FpnCombine
from .config import set_config_readonly, set_config_writeable
from .config.config_utils import copy_config
from .config.validate import check_config
from .folding import Folds
from .heads import HeadNet, both
from .layers import (
    ConvBnAct2d,
    Interpolate2d,
    ResampleFeatureMap,
    SeparableConv2d,
    SequentialList,
)
from .padding import Size
from .plan import Plans, TrainingPlans, images_of

__all__ = [
    "BiFpn",
    "BiFpnLayer",
    "ConvBnAct2d",
    "EfficientDet",
    "Fnode",
    "FpnCombine",
    "HeadNet",
    "Interpolate2d",
    "ResampleFeatureMap",
    "SeparableConv2d",
    "SequentialList",
    "get_feature_info",
]

_DEBUG = False
_USE_SCALE = False

# The class head starts by predicting every class with this probability (arXiv:1708.02002, 4.1).
_PRIOR = 0.01


class EfficientDet(nn.Module):
    """The detector without post-processing.

    Attributes: `config` (a read-only copy of the one given), `backbone`, `fpn`, `class_net`,
    `box_net`.

    Raises:
        TypeError, ValueError: a config entry is misspelt or out of range; named in the message.
        ImportError: the backbone needs the timm package.
    """

    def __init__(
        self, config: DictConfig, pretrained_backbone: bool = True, alternate_init: bool = False
    ) -> None:
        super().__init__()
        self.config = check_config(copy_config(config))
        set_config_readonly(self.config)
        self.backbone = create_backbone(
            self.config.backbone_name,
            out_indices=self.config.backbone_indices or (2, 3, 4),
            pretrained=pretrained_backbone,
            **(self.config.backbone_args or {}),
        )
        self.fpn = BiFpn(self.config, get_feature_info(self.backbone))
        self.class_net = HeadNet(self.config, num_outputs=self.config.num_classes)
        self.box_net = HeadNet(self.config, num_outputs=4)
        self._plans = Plans()
        self._training_plans = TrainingPlans()
        self._folds = Folds()
        for name in ("fpn", "class_net", "box_net"):
            self._init_child(name, alternate_init)

    def _init_child(self, name: str, alternate_init: bool) -> None:
        init = _init_weight_alt if alternate_init else _init_weight
        for path, module in getattr(self, name).named_modules(prefix=name):
            init(module, path)

    def reset_head(
        self,
        num_classes: int | None = None,
        aspect_ratios: Sequence[Any] | None = None,
        num_scales: int | None = None,
        alternate_init: bool = False,
    ) -> None:
        """Replace the heads that a new number of classes or of anchors changes, and the config.

        A new head is freshly initialised, on the device and in the dtype of the old one: the class
        head whenever `num_classes` is given, both when the anchors change. An enclosing bench keeps
        its own copy of these numbers.
        """
        config = copy_config(self.config)
        changes = {
            "num_classes": num_classes,
            "aspect_ratios": aspect_ratios,
            "num_scales": num_scales,
        }
        config.update({key: value for key, value in changes.items() if value is not None})
        check_config(config)
        set_config_writeable(self.config)
        self.config.update({key: config[key] for key in changes})
        set_config_readonly(self.config)
        anchors_changed = aspect_ratios is not None or num_scales is not None
        like = next(self.box_net.parameters())
        if num_classes is not None or anchors_changed:
            self.class_net = HeadNet(self.config, num_outputs=self.config.num_classes).to(like)
            self.class_net.train(self.training)
            self._init_child("class_net", alternate_init)
        if anchors_changed:
            self.box_net = HeadNet(self.config, num_outputs=4).to(like)
            self.box_net.train(self.training)
            self._init_child("box_net", alternate_init)
        for head in (self.class_net, self.box_net):
            head.grad_checkpointing = self.fpn.grad_checkpointing

    def toggle_head_bn_level_first(self) -> None:
        """Swap the key layout of both heads' norms; see `HeadNet.toggle_bn_level_first`."""
        self.class_net.toggle_bn_level_first()
        self.box_net.toggle_bn_level_first()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training keep for the backward only what is between blocks, cells and head layers.

        The gradient is the same. It takes about a third more time and much less memory.

        Raises:
            ValueError: the backbone has no such switch.
        """
        switch = getattr(self.backbone, "set_grad_checkpointing", None)
        if switch is None:
            raise ValueError(
                f"set_grad_checkpointing: the backbone {type(self.backbone).__name__} has no"
                " method of that name"
            )
        switch(enable)
        for part in (self.fpn, self.class_net, self.box_net):
            part.grad_checkpointing = enable
        self._training_plans.clear()

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Normalised images -> class logits and box codes of each level, finest first.

        x: [B, 3, H, W], any H and W; `config.image_size` only matters to the anchors.
        Returns: maps [B, A * num_classes, H_l, W_l] and [B, A * 4, H_l, W_l] in channels_last
        memory, with A anchors per place, anchor-major; codes are (ty, tx, th, tw).
        """
        if x.ndim != 4:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, 3, H, W]")
        planned = self._plans_now().run(self, self._network, x)
        return self._network(x) if planned is None else planned

    def _plans_now(self) -> Plans:
        return self._training_plans if torch.is_grad_enabled() else self._plans

    def _network(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        with self._folds.ahead(self, x):
            features = self.fpn(self.backbone(x))
            return both(self.class_net, self.box_net, features)

    def warmup(
        self,
        *sizes: int | Size,
        batch: int = 1,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        """Compile kernels and make plans for images [batch, 3, H, W] before the first call that needs them.

        A plan serves images of one size, batch, dtype and memory format; eight are kept. Without `dtype`: that of the
        parameters. On a GPU call it before other threads use the device: work that they enqueue may spoil a capture.

        Args:
            sizes: (H, W), or one number for both.
            batch: images per call.
            dtype: of the images.
            memory_format: of the images.

        Raises:
            ValueError: the model is in training mode.
        """
        with torch.no_grad():
            for x in images_of(self, sizes, batch, dtype, memory_format):
                self(x)

    def plan_reason(self, x: Tensor) -> str | None:
        """Why a call with images like x, made here and now, runs module by module; None if a plan serves it."""
        return self._plans_now().reason(self, self._network, x)

    def refresh(self) -> None:
        """Drop plans, after a change of the model that cannot be seen.

        In eval mode without gradients the network runs on a CPU on packed copies of its weights. Optimizer steps,
        `load_state_dict`, `to`, in-place operations and replaced modules are seen; writing through `.data`, numpy or
        another alias is not. On a GPU weights are read in place, so that all changes of values count; settings of
        `torch.backends` remain those of the first call with a shape.
        """
        self._plans.clear()
        self._training_plans.clear()

    def train(self, mode: bool = True) -> EfficientDet:
        """``nn.Module.train``; frees what the plans of the other mode hold."""
        if mode:
            self._plans.clear()  # gradients need the memory
        else:
            self._training_plans.release()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EfficientDet:
        super()._apply(fn, recurse)
        self._plans.clear_if_changed()
        self._training_plans.clear_if_changed()
        return self


def get_feature_info(backbone: nn.Module) -> list[dict[str, int]]:
    """One dict per map that `backbone` returns: `num_chs` and `reduction` (its stride)."""
    info: Any = backbone.feature_info
    if callable(getattr(info, "get_dicts", None)):
        return info.get_dicts(keys=["num_chs", "reduction"])
    return [{"num_chs": i["num_chs"], "reduction": i["reduction"]} for i in info]


def _init_weight(m: nn.Module, n: str = "") -> None:
    """Initialise module `m` called `n` as the published TensorFlow models are.

    Convolutions: heads normal, with variance 1 / fan_in if separable and 1e-4 if dense; the
    pyramid Glorot uniform. Biases 0 but for the class prior; norms 1 and 0.
    """
    if isinstance(m, (SeparableConv2d, ConvBnAct2d)):
        is_head = "class_net" in n or "box_net" in n
        for conv in (c for c in m.children() if isinstance(c, nn.Conv2d)):
            fan_in, fan_out = _fans(conv)
            if not is_head:
                bound = math.sqrt(6.0 / (fan_in + fan_out))
                nn.init.uniform_(conv.weight, -bound, bound)
            elif isinstance(m, SeparableConv2d):
                nn.init.normal_(conv.weight, std=math.sqrt(1.0 / fan_in))
            else:
                nn.init.normal_(conv.weight, std=0.01)
            _init_bias(conv, n)
    elif isinstance(m, nn.BatchNorm2d):
        _init_norm(m)


def _init_weight_alt(m: nn.Module, n: str = "") -> None:
    """The alternative of `_init_weight`: normal with variance 2 / fan_out everywhere."""
    if isinstance(m, nn.Conv2d):
        nn.init.normal_(m.weight, std=math.sqrt(2.0 / _fans(m)[1]))
        _init_bias(m, n)
    elif isinstance(m, nn.BatchNorm2d):
        _init_norm(m)


def _fans(conv: nn.Conv2d) -> tuple[int, int]:
    area = math.prod(conv.kernel_size)
    return area * conv.in_channels // conv.groups, area * conv.out_channels // conv.groups


def _init_bias(conv: nn.Conv2d, name: str) -> None:
    if conv.bias is not None:
        is_class_output = "class_net.predict" in name
        nn.init.constant_(conv.bias, math.log(_PRIOR / (1 - _PRIOR)) if is_class_output else 0.0)


def _init_norm(norm: nn.BatchNorm2d) -> None:
    if norm.affine:
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)
