"""The read-only flag of a config, and copying one without it."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf


def set_config_readonly(conf: DictConfig) -> None:
    """Make any later assignment to `conf` raise `omegaconf.ReadonlyConfigError`."""
    OmegaConf.set_readonly(conf, True)


def set_config_writeable(conf: DictConfig) -> None:
    """Allow assignments to `conf` again."""
    OmegaConf.set_readonly(conf, False)


def copy_config(conf: DictConfig | dict[str, Any]) -> DictConfig:
    """A writable copy of `conf` that shares nothing with it, whatever flags `conf` carries.

    Raises:
        TypeError: `conf` is neither an OmegaConf mapping nor a dict.
    """
    if isinstance(conf, dict):
        return OmegaConf.create(conf)
    if not isinstance(conf, DictConfig):
        raise TypeError(
            f"config: got {type(conf).__name__}, expected the DictConfig that"
            " get_efficientdet_config(name) returns, or a dict of the same keys"
        )
    copied = conf.copy()
    OmegaConf.set_readonly(copied, None)
    return copied
