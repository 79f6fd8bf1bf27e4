"""Schedules are pure functions of the step: nothing to save, nothing to resume."""

from __future__ import annotations

from collections.abc import Callable

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

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        u = (step - (total_steps - decay_steps)) / decay_steps if decay_steps else 0.0
        if u <= 0:
            return 1.0
        u = min(u, 1.0)
        return 1 - (1 - floor) * u if decay == "linear" else floor**u

    return factor


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

    def alpha_t(step: int) -> float:
        if step < warmup_steps or step >= total_steps - rest_steps or peak == 0:
            return 0.0
        return alpha * lr_schedule(step) / peak

    return alpha_t
