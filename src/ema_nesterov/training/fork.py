"""A new run that begins with a checkpoint of another: `fork_from=RUN_FOLDER@STEP`.

Schedule, length and lookahead may be others: one plateau serves many decays, and many wrappers. Model,
data, batch, seed and base optimizer must be the same, for their state is what carries over. So does a
wrapper's, where its settings but alpha and its schedule are the same; another one begins anew at x_t.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigError
from ..lookahead import Wrapper, wrapper_in
from ..optim.build import build_optimizer
from .checkpoint import list_checkpoints, load_checkpoint, step_of, whole
from .distributed import Ranks
from .evaluate import copy_iterate, parameters
from .folder import differences, load_config
from .logs import read_lines

MAY_DIFFER = ("steps", "schedule", "lookahead", "probe_ema_decay", "trainer")
SCHEDULED = ("alpha", "warmup_steps", "rest_steps")  # of a lookahead: no state depends on them


@dataclass(frozen=True)
class Fork:
    checkpoint: Path
    step: int
    cfg: DictConfig  # of the run that it comes from

    def metrics(self) -> list[dict[str, Any]]:
        """What the other run logged up to there."""
        return [m for m in read_lines(self.checkpoint.parent.parent / "metrics.jsonl") if m["step"] <= self.step]

    def restore(self, cfg: DictConfig, model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> dict[str, Any]:
        """Put the checkpoint's weights and state into model and optimizer; returns all that was saved."""
        state = load_checkpoint(self.checkpoint)
        model.load_state_dict(state["model"])
        if _shape(cfg) == _shape(self.cfg) and wrapper_in(state["optimizer"]) == _wrapper(optimizer):
            optimizer.load_state_dict(state["optimizer"])
            return state
        before = build_optimizer(model, self.cfg, ranks.group)
        before.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for p, x in zip(parameters(before), copy_iterate(before), strict=True):
                p.copy_(x)
        base(optimizer).load_state_dict(base(before).state_dict())
        if isinstance(optimizer, Wrapper):
            optimizer.skip(self.step)  # taken by the other one
        return state


def open_fork(cfg: DictConfig) -> Fork:
    """The checkpoint that `cfg.fork_from` names. Raises ConfigError where there is none, or it cannot carry over."""
    name, _, number = cfg.fork_from.rpartition("@")
    folder, step = Path(name), int(number)
    held = list_checkpoints(folder / "checkpoints")
    if not (folder / "config.yaml").exists():
        raise ConfigError(f"fork_from: {folder} is no run folder; type fork_from=RUN_FOLDER@STEP")
    checkpoint = next((path for path in held if step_of(path) == step), None)
    if checkpoint is None:
        steps = ", ".join(str(step_of(path)) for path in held) or "none"
        raise ConfigError(
            f"fork_from: {folder} has no checkpoint of step {step}, but of {steps}; trainer.keep_every=N keeps more"
        )
    if not whole(checkpoint):
        raise ConfigError(f"fork_from: {checkpoint} is damaged; choose another step")
    parent = load_config(folder)
    for key, was, new in (*differences(cfg, folder), ("seed", parent.seed, cfg.seed)):
        if key.partition(".")[0] not in MAY_DIFFER and was != new:
            raise ConfigError(f"{key}={new} cannot carry over from {folder}, which has {was}; type {key}={was}")
    return Fork(checkpoint, step, parent)


def base(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside all wrappers."""
    while isinstance(optimizer, Wrapper):
        optimizer = optimizer.base
    return optimizer


def _wrapper(optimizer: Optimizer) -> str | None:
    return optimizer.NAME if isinstance(optimizer, Wrapper) else None


def _shape(cfg: DictConfig) -> str:
    """What the state of the lookahead depends on."""
    look: Any = OmegaConf.to_container(cfg.lookahead)
    shape = {k: v for k, v in look.items() if k not in SCHEDULED}
    return json.dumps([shape, bool(cfg.probe_every), cfg.probe_ema_decay], sort_keys=True)
