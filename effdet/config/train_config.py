"""The training hyper-parameters of the EfficientDet paper (arXiv:1911.09070, section 5.1)."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf


def default_detection_train_config() -> DictConfig:
    """The published recipe: SGD with momentum, warm-up, cosine decay, weight EMA.

    `learning_rate` is for a batch of 64 images; `lr_*_epoch` and `num_epochs` count epochs.
    """
    return OmegaConf.create(
        {
            "skip_crowd_during_training": True,
            "input_rand_hflip": True,
            "train_scale_min": 0.1,
            "train_scale_max": 2.0,
            "autoaugment_policy": None,
            "momentum": 0.9,
            "learning_rate": 0.08,
            "lr_warmup_init": 0.008,
            "lr_warmup_epoch": 1.0,
            "first_lr_drop_epoch": 200.0,
            "second_lr_drop_epoch": 250.0,
            "clip_gradients_norm": 10.0,
            "num_epochs": 300,
            "weight_decay": 4e-5,
            "lr_decay_method": "cosine",
            "moving_average_decay": 0.9998,
            "ckpt_var_scope": None,
        }
    )
