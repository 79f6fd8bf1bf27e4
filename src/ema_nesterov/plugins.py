"""A user's own classes: `_target_: module.Name` from a module listed in `plugins`, and from nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .errors import ConfigError


def instantiate(cfg: DictConfig, plugins: list[str], *args: Any, **kwargs: Any) -> Any:
    """Call the group's `_target_` with args, its other keys (but `name`) and kwargs. Raises as `find` does."""
    target, options = find(cfg, plugins, *args, **kwargs)
    return target(*args, **options)


def find(cfg: DictConfig, plugins: list[str], *args: Any, **kwargs: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What `instantiate` would call, and with which keywords.

    Raises ConfigError when the module is not listed in `plugins`, when it or the name does not exist, when it is
    not the user's own nor a class of the kind that is wanted, and when it does not take the group's keys.
    """
    path = str(cfg._target_)
    module, _, name = path.rpartition(".")
    if not module or module not in plugins:
        raise ConfigError(f"_target_={path} is not from a listed module; type plugins=[{module or 'MODULE'}]")
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise ConfigError(f"_target_={path} is Python's own; name a class of your module")
    try:
        target = getattr(import_module(module), name)
    except Exception as e:  # whatever a module raises when it is imported
        raise ConfigError(f"_target_={path} cannot be imported: {type(e).__name__}: {e}") from None
    if _installed(module) and not _is_wanted(target):
        raise ConfigError(f"_target_={path} is no model, optimizer or dataset; name a class, or a module of your own")
    options: Any = OmegaConf.to_container(cfg, resolve=True)
    kwargs |= {k: v for k, v in options.items() if k not in ("_target_", "name")}
    try:
        signature(target).bind(*args, **kwargs)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{path} does not take the group's keys: {e}") from None
    return target, kwargs


def _installed(module: str) -> bool:
    """Whether it belongs to a package that the user did not write: much in there runs whatever it is given."""
    return "site-packages" in str(getattr(sys.modules[module], "__file__", "site-packages"))


def _is_wanted(target: Any) -> bool:
    from torch import nn, optim

    return isinstance(target, type) and (issubclass(target, (nn.Module, optim.Optimizer)) or hasattr(target, "batch"))
