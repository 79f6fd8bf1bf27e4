"""Schedules are pure functions of the step: nothing to save, nothing to resume.

Each is a partial of a function below it, so that what holds one can be pickled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

Schedule = Callable[[int], float]


def wsd(
    total_steps: int,
    warmup_steps: int,
    decay_steps: int,
    min_ratio: float | None = None,
    decay: str = "linear",
) -> Schedule:
    """Warm-up, stable, decay: the factor on the learning rate of step 0, 1, ..., total_steps - 1.

    step / warmup_steps in the warm-up (so the first update has rate 0), 1 on the plateau, and over the
    last `decay_steps`, with u running from 0 to 1: linear 1 - (1 - min_ratio) u, exponential
    min_ratio^u. `min_ratio` defaults to 0 for linear and 0.1 for exponential.

    Raises ValueError when the parts do not fit or an exponential decay shall end at 0.
    """
    if decay not in ("linear", "exponential"):
        raise ValueError(f"decay must be linear or exponential, got {decay!r}")
    if warmup_steps < 0 or decay_steps < 0 or warmup_steps + decay_steps > total_steps:
        raise ValueError(f"warm-up {warmup_steps} + decay {decay_steps} do not fit into {total_steps} steps")
    floor = min_ratio if min_ratio is not None else {"linear": 0.0, "exponential": 0.1}[decay]
    if not 0 <= floor <= 1 or (decay == "exponential" and floor == 0):
        raise ValueError(f"min_ratio must be in [0, 1], above 0 for exponential decay, got {floor}")

    return partial(_wsd, total_steps, warmup_steps, decay_steps, floor, decay)


def _wsd(total_steps: int, warmup_steps: int, decay_steps: int, floor: float, decay: str, step: int) -> float:
    if step < warmup_steps:
        return step / warmup_steps
    u = (step - (total_steps - decay_steps)) / decay_steps if decay_steps else 0.0
    if u <= 0:
        return 1.0
    u = min(u, 1.0)
    return 1 - (1 - floor) * u if decay == "linear" else floor**u


def power(total_steps: int, decay_steps: float, exponent: float = 1.2, extra_steps: float = 0) -> Schedule:
    """Constant, then a power law: min(1, (remaining / decay_steps)^exponent) with remaining = T + extra - step.

    The schedule of modded-nanogpt's record 30, whose `extra_steps` end the run before the rate is 0.
    Raises ValueError when decay_steps or exponent is not above 0, or extra_steps below 0.
    """
    if decay_steps <= 0 or exponent <= 0 or extra_steps < 0:
        got = f"{decay_steps}, {exponent} and {extra_steps}"
        raise ValueError(f"decay_steps and exponent must be above 0 and extra_steps at least 0, got {got}")

    return partial(_power, total_steps + extra_steps, decay_steps, exponent)


def _power(end: float, decay_steps: float, exponent: float, step: int) -> float:
    return min(1.0, (max(0.0, end - step) / decay_steps) ** exponent)


def momentum_ramp(total_steps: int, low: float, high: float, warmup_steps: int, cooldown_steps: int) -> Schedule:
    """Momentum rising linearly from low to high, constant, and falling back to low over the last steps.

    Raises ValueError when the parts do not fit.
    """
    if warmup_steps < 0 or cooldown_steps < 0 or warmup_steps + cooldown_steps > total_steps:
        raise ValueError(f"momentum warm-up {warmup_steps} + cool-down {cooldown_steps} do not fit into {total_steps}")

    return partial(_momentum_ramp, total_steps, low, high, warmup_steps, cooldown_steps)


def _momentum_ramp(
    total_steps: int, low: float, high: float, warmup_steps: int, cooldown_steps: int, step: int
) -> float:
    if step < warmup_steps:
        return low + (high - low) * step / warmup_steps
    past = step - (total_steps - cooldown_steps)
    return high - (high - low) * past / cooldown_steps if past > 0 else high


def lookahead_alpha(
    alpha: float, lr_schedule: Schedule, total_steps: int, warmup_steps: int, rest_steps: int
) -> Schedule:
    """The paper's alpha schedule (section 3.3), a function of the number of completed steps t.

    0 for t < warmup_steps, alpha lr(t) / max lr between, 0 for t >= total_steps - rest_steps.

    Raises ValueError when warm-up and rest do not fit into the run.
    """
    if warmup_steps < 0 or rest_steps < 0 or warmup_steps + rest_steps > total_steps:
        raise ValueError(f"lookahead warm-up {warmup_steps} + rest {rest_steps} do not fit into {total_steps} steps")
    peak = max((lr_schedule(t) for t in range(total_steps)), default=0.0)

    return partial(_lookahead_alpha, alpha / peak if peak else 0.0, lr_schedule, warmup_steps, total_steps - rest_steps)


def _lookahead_alpha(scale: float, lr_schedule: Schedule, first: int, end: int, step: int) -> float:
    return scale * lr_schedule(step) if first <= step < end else 0.0


def lowest_alpha(ema_decay: float) -> float:
    """What alpha must be above, for gamma = ema_decay: below 0 y looks back along the average, and there it is the
    average itself, e, from which x cannot be recovered. -gamma / (1 - gamma), and -1 for gamma = 0, plain Nesterov."""
    return -ema_decay / (1 - ema_decay) if ema_decay else -1.0


def lr_matched(lr_schedule: Schedule, alpha_schedule: Schedule) -> Schedule:
    """The control of a lookahead: the base alone, with its rate times 1 / (1 - alpha_t).

    Under a steady drift EMA-Nesterov moves 1 / (1 - alpha) times as far per step as its base does.
    alpha_t must be below 1.
    """
    return partial(_lr_matched, lr_schedule, alpha_schedule)


def _lr_matched(lr_schedule: Schedule, alpha_schedule: Schedule, step: int) -> float:
    return lr_schedule(step) / (1 - alpha_schedule(step))
