"""A user's own classes: `_target_: module.Name` from a module listed in `plugins`, and from nowhere else."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .errors import ConfigError


def instantiate(cfg: DictConfig, plugins: list[str], *args: Any, **kwargs: Any) -> Any:
    """Call the group's `_target_` with args, its other keys (but `name`) and kwargs.

    Raises ConfigError when the module is not listed in `plugins`, or it or the name does not exist.
    """
    module, _, name = cfg._target_.rpartition(".")
    if module not in plugins:
        raise ConfigError(f"_target_={cfg._target_} is not from a listed module; type plugins=[{module}]")
    try:
        target = getattr(import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"_target_={cfg._target_} cannot be imported: {e}") from None
    options: Any = OmegaConf.to_container(cfg, resolve=True)
    kwargs |= {k: v for k, v in options.items() if k not in ("_target_", "name")}
    try:
        signature(target).bind(*args, **kwargs)
    except TypeError as e:
        raise ConfigError(f"{cfg._target_} does not take the group's keys: {e}") from None
    return target(*args, **kwargs)
