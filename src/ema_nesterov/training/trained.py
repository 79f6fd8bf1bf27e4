"""A run that has trained, opened again: its config, its model, and the optimizer that knows x, y and e."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigError
from ..optim.build import build_optimizer
from .checkpoint import list_checkpoints, step_of, whole
from .execution import model_on
from .folder import load_config
from .loop import restore, told


@dataclass(frozen=True)
class Trained:
    folder: Path
    cfg: DictConfig
    step: int
    model: nn.Module  # in eval mode; holds y, until the optimizer puts another point into it
    optimizer: Optimizer


def open_trained(folder: Path, step: int | None, device: torch.device) -> Trained:
    """The checkpoint of `step`, or the newest that is whole. Raises ConfigError where there is none."""
    if not (folder / "config.yaml").exists():
        raise ConfigError(f"{folder} is no run folder; type run=FOLDER, as scripts/where.py prints it")
    cfg = load_config(folder)
    held = list_checkpoints(folder / "checkpoints")
    wanted = [path for path in held if step is None or step_of(path) == step]
    checkpoint = next((path for path in reversed(wanted) if whole(path)), None)
    if checkpoint is None:
        steps = ", ".join(str(step_of(path)) for path in held) or "none"
        asked = "has no checkpoint that is whole" if step is None else f"has no whole checkpoint of step {step}"
        raise ConfigError(f"{folder} {asked}; it holds those of {steps}")
    model = model_on(cfg, device)
    optimizer = build_optimizer(model, cfg)
    with told(checkpoint):
        restore(checkpoint, model, optimizer)
    return Trained(folder, cfg, step_of(checkpoint), model.eval(), optimizer)
