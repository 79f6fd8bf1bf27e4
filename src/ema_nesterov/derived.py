"""What a composed config implies: lengths in steps, schedules, the position of the lookahead."""

from __future__ import annotations

import math
import re

from omegaconf import DictConfig

from .errors import ConfigError
from .schedules import Schedule, lookahead_alpha, lr_matched, momentum_ramp, power, wsd


def steps_of(length: float, total: int, key: str = "length") -> int:
    """A schedule length in steps: a fraction of the run below 1, else a whole number of steps."""
    if not math.isfinite(length) or length < 0 or (length >= 1 and length != int(length)):
        raise ConfigError(f"{key} must be a fraction below 1 or a whole number of steps, got {length}")
    return round(length * total) if length < 1 else int(length)


def validation_steps(cfg: DictConfig) -> set[int]:
    """The steps that are validated: the multiples of eval_every, those of eval_at, and the last."""
    steps = set(range(0, cfg.steps + 1, cfg.eval_every)) if cfg.eval_every else set()
    return steps.union({cfg.steps}, *(_steps_at(entry, cfg.steps) for entry in cfg.eval_at))


def _steps_at(entry: str, total: int) -> range:
    """Of an entry of eval_at: a step, or FROM/EVERY, the multiples of EVERY from there to the end."""
    parts = re.fullmatch(r"([0-9]{1,9}|0?\.[0-9]{1,20})(?:/([1-9][0-9]{,8}))?", str(entry))
    if parts is None:
        raise ConfigError(f"eval_at=[{entry}] must be a step, a fraction below 1, or FROM/EVERY, such as 0.9/25")
    first, every = steps_of(float(parts[1]), total), int(parts[2] or 0)
    if every:
        return range(-(-first // every) * every, total + 1, every)
    if first > total:
        raise ConfigError(f"eval_at=[{entry}] must be at most steps={total}")
    return range(first, first + 1)


def lr_schedule(cfg: DictConfig, matrix: bool = False) -> Schedule:
    """The factor on the learning rate as a function of the step; matrix: on that of the matrix optimizer."""
    s = cfg.schedule
    try:
        if s.decay == "power":
            decay = s.matrix_decay_steps if matrix and s.matrix_decay_steps is not None else s.decay_steps
            lengths = (length * cfg.steps if length < 1 else length for length in (decay, s.extra_steps))
            decay, extra = lengths
            schedule = power(cfg.steps, decay, s.exponent, extra)
        else:
            warmup = steps_of(s.warmup_steps, cfg.steps, "schedule.warmup_steps")
            decay = steps_of(s.decay_steps, cfg.steps, "schedule.decay_steps")
            schedule = wsd(cfg.steps, warmup, decay, s.min_ratio, s.decay)
        if s.matched_alpha:
            warmup = steps_of(s.matched_warmup_steps, cfg.steps, "schedule.matched_warmup_steps")
            rest = steps_of(s.matched_rest_steps, cfg.steps, "schedule.matched_rest_steps")
            schedule = lr_matched(schedule, lookahead_alpha(s.matched_alpha, schedule, cfg.steps, warmup, rest))
    except ValueError as e:
        raise ConfigError(f"schedule: {e}") from None
    return schedule


def momentum_schedule(cfg: DictConfig) -> Schedule | None:
    """The momentum of the matrix optimizer as a function of the step; None: it stays what it is."""
    s = cfg.schedule
    warmup = steps_of(s.momentum_warmup_steps, cfg.steps, "schedule.momentum_warmup_steps")
    cooldown = steps_of(s.momentum_cooldown_steps, cfg.steps, "schedule.momentum_cooldown_steps")
    if not warmup and not cooldown:
        return None
    try:
        return momentum_ramp(cfg.steps, s.momentum_low, cfg.optimizer.momentum, warmup, cooldown)
    except ValueError as e:
        raise ConfigError(f"schedule: {e}") from None


def lookahead_position(cfg: DictConfig) -> float:
    """Where on the line x + a d the gradients are taken, at the run's full alpha; 0 without a lookahead."""
    look = cfg.lookahead
    if look.name == "none":
        return 0.0
    if look.name in ("lookahead", "snoo"):
        return 1.0  # the fast weights
    return 1 - look.mu_y if look.name == "gpa" else look.alpha


def alpha_schedule(cfg: DictConfig) -> Schedule:
    """alpha_t as a function of the step; constant where the method has no schedule."""
    look = cfg.lookahead
    if "warmup_steps" not in look:
        position = lookahead_position(cfg)
        return lambda step: position
    warmup = steps_of(look.warmup_steps, cfg.steps, "lookahead.warmup_steps")
    rest = steps_of(look.rest_steps, cfg.steps, "lookahead.rest_steps")
    try:
        return lookahead_alpha(look.alpha, lr_schedule(cfg), cfg.steps, warmup, rest)
    except ValueError as e:
        raise ConfigError(f"lookahead: {e}") from None
