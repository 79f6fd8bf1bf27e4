"""gamma, alpha and window to begin with, for a run of yours: python scripts/analysis.py advisor steps=N [KEY=VALUE ...]

For each value: where it comes from, what it means, what to type, and whether anything like your run was ever published.
Nothing is fitted or extrapolated: the values are those of the published runs, chosen by the rules that it prints.

steps          optimizer steps of the run
warmup_steps, decay_steps    of its learning rate; below 1: fractions of the run
batch_tokens   tokens of a step, over all ranks
parameters     of the model; null: those to which the run would give 20 tokens each, the paper's budget (section 4)
decay          linear (to 0) or exponential (to a tenth), for the figure
output         folder of schedule.png and .svg, schedule.csv
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, log

from ..derived import steps_of
from ..errors import ConfigError
from ..schedules import Schedule, lookahead_alpha, wsd
from .output import figure, folder_for, table
from .published import BATCH, LARGE, LONG, MIDDLE, PUBLISHED, SMALL, WINDOWS, Published


@dataclass
class Arguments:
    steps: int = 6200
    warmup_steps: float = 0.0
    decay_steps: float = 1800
    batch_tokens: float = 524288
    parameters: float | None = None
    decay: str = "linear"
    output: str = "analysis/advisor"


@dataclass(frozen=True)
class Advice:
    """steps: of the run; parameters: given or assumed; sources: by the key of the lookahead; cautions: sentences."""

    steps: int
    parameters: float
    gamma: float
    alpha: float
    warmup_steps: int  # T_w: alpha is 0 before
    rest_steps: int  # alpha is 0 over the last of them, from T_r on
    sources: dict[str, str]
    cautions: list[str]

    @property
    def effective_step(self) -> float:
        """1 / (1 - alpha): how many times as far as its base EMA-Nesterov moves per step under a steady drift."""
        return 1 / (1 - self.alpha)

    @property
    def horizon(self) -> float:
        """1 / (1 - gamma): the time constant of the average, in steps."""
        return 1 / (1 - self.gamma)

    @property
    def build_up(self) -> float:
        """1 / ((1 - gamma) (1 - alpha)): the time constant, in steps, with which the step grows to that, since m
        averages updates that hold alpha m themselves (`filter.closed_loop`)."""
        return self.horizon * self.effective_step

    def overrides(self) -> list[str]:
        window = [f"lookahead.warmup_steps={self.warmup_steps}", f"lookahead.rest_steps={self.rest_steps}"]
        values = [f"lookahead.alpha={self.alpha:g}", f"lookahead.ema_decay={self.gamma:g}"]
        return ["lookahead=ema_nesterov", *values, *window]

    def control(self) -> list[str]:
        """The base alone, its learning rate times 1 / (1 - alpha_t)."""
        window = {"alpha": f"{self.alpha:g}", "warmup_steps": self.warmup_steps, "rest_steps": self.rest_steps}
        return ["lookahead=none", *(f"schedule.matched_{key}={value}" for key, value in window.items())]


def advise(
    steps: int,
    warmup_steps: float = 0.0,
    decay_steps: float = 0.0,
    batch_tokens: float = 524288,
    parameters: float | None = None,
) -> Advice:
    """The published values nearest to a run. Raises ConfigError for one that cannot be, or leaves alpha no step."""
    if steps < 1:
        raise ConfigError(f"steps={steps} must be at least 1")
    for key, value in (("batch_tokens", batch_tokens), ("parameters", parameters)):
        if value is not None and not (isfinite(value) and value > 0):
            raise ConfigError(f"{key}={value} must be above 0")
    warmup = steps_of(warmup_steps, steps, "warmup_steps")
    decay = steps_of(decay_steps, steps, "decay_steps")
    if warmup + decay > steps:
        raise ConfigError(f"warmup_steps={warmup} and decay_steps={decay} do not fit into {steps} steps")
    size = parameters if parameters is not None else steps * batch_tokens / 20

    gamma, why_gamma = 0.99, f"below {LONG:,.0f} steps: Table 2 (2,500), result 39 (3,150)"
    if steps >= LONG:
        gamma, why_gamma = 0.995, f"from {LONG:,.0f} steps: Table 2 and Figure 10 (5,000), NanoGPT 124M (6,200)"
    if size >= LARGE:
        gamma, why_gamma = 0.995, f"from {LARGE / 1e6:.0f}M parameters: section 4's default for large models"
        if steps >= LONG:
            gamma, why_gamma = 0.999, f"from {LARGE / 1e6:.0f}M and {LONG:,.0f} steps: Table 2 (Llama 1B, 5,000)"
    alpha, why_alpha = 0.5, "the default of section 4; Table 2: Llama 130M at 5,000 steps, 350M, 1B"
    if batch_tokens >= BATCH and (size < SMALL or (size < MIDDLE and steps < LONG)):
        alpha, why_alpha = 0.7, "Table 2: Llama 60M, and Llama 130M at 2,500 steps; batches of 0.26M tokens or more"

    share = decay / steps
    window = min(WINDOWS, key=lambda w: abs(log(w.decay / max(share, 1e-3))))
    first = max(round(window.warmup * steps), warmup)
    rest = round(window.rest * (decay if window.of_decay else steps))
    if first + rest >= steps:
        raise ConfigError(
            f"warmup_steps={warmup} of {steps} leave no step to the lookahead before its rest of {rest}; type fewer"
        )
    why_window = window.source
    if first == warmup and warmup > round(window.warmup * steps):
        why_window += "; moved to the end of the learning rate's warm-up (section 3.3)"
    sources = {"ema_decay": why_gamma, "alpha": why_alpha, "warmup_steps": why_window, "rest_steps": window.source}
    cautions = list(_cautions(steps, share, batch_tokens, size, gamma, alpha, first, rest))
    if parameters is None:
        cautions.insert(0, f"parameters were not given: {size:.3g} assumed, 20 tokens each")
    return Advice(steps, size, gamma, alpha, first, rest, sources, cautions)


def _cautions(
    steps: int, decay: float, batch_tokens: float, size: float, gamma: float, alpha: float, first: int, rest: int
) -> list[str]:
    """Where the run lies outside of what was published, and what is known there."""
    lines = []
    for what, value, values in (
        ("steps", steps, [p.steps for p in PUBLISHED]),
        ("tokens a step", batch_tokens, [p.batch_tokens for p in PUBLISHED]),
        ("parameters", size, [p.parameters for p in PUBLISHED]),
    ):
        if not 0.95 * min(values) <= value <= 1.05 * max(values):
            known = f"{min(values):,.0f} to {max(values):,.0f}"
            lines.append(f"outside of what was published: {value:,.0f} {what}, against {known}")
    if batch_tokens < 0.95 * BATCH or steps < 2500:
        lines.append(
            "small batches and short runs may lose: in this project's quickstart (1.3M parameters, 250 steps of 2,048 "
            "tokens) gamma 0.99 and alpha 0.5 ended 0.014 nats behind the base (docs/LOG.md)"
        )
    if not 0.095 <= decay <= 0.71:
        lines.append(f"published runs let the learning rate fall over 10% to 70% of the run, this one over {decay:.0%}")
    held = 1 - gamma**first
    if held < 0.75:
        lines.append(
            f"m_0 = 0: when alpha begins, the average holds {held:.0%} of its weight; smaller gamma fills faster"
        )
    if (build_up := 1 / (1 - gamma) / (1 - alpha)) > (active := steps - first - rest):
        lines.append(f"alpha is on for {active:,} steps, its full effect takes some {build_up:,.0f}")
    if (horizon := 1 / (1 - gamma) / steps) > 0.2:
        lines.append(f"the average reaches over {horizon:.0%} of the run; in the published runs over 3% to 20%")
    return lines


def nearest(advice: Advice, batch_tokens: float, count: int = 3) -> list[Published]:
    """The published runs nearest in the ratios of parameters, steps and batch."""

    def distance(p: Published) -> float:
        pairs = ((p.parameters, advice.parameters), (p.steps, advice.steps), (p.batch_tokens, batch_tokens))
        return sum(log(a / b) ** 2 for a, b in pairs)

    return sorted(PUBLISHED, key=distance)[:count]


def describe(p: Published) -> str:
    setting = f"{p.name}, {p.steps:,} steps of {p.batch_tokens / 1e6:.2g}M tokens"
    return f"{setting}: gamma {p.gamma:g}, alpha {p.alpha:g}, {p.gain} ({p.source})"


def run(args: Arguments) -> str:
    if args.decay not in ("linear", "exponential"):
        raise ConfigError(f"decay={args.decay} must be linear or exponential")
    advice = advise(args.steps, args.warmup_steps, args.decay_steps, args.batch_tokens, args.parameters)
    warmup, decay = steps_of(args.warmup_steps, args.steps), steps_of(args.decay_steps, args.steps)
    lr = wsd(args.steps, warmup, decay, decay=args.decay)
    alpha = lookahead_alpha(advice.alpha, lr, args.steps, advice.warmup_steps, advice.rest_steps)
    draw(args, lr, alpha)
    why = advice.sources
    lines = [
        f"{args.steps:,} steps of {args.batch_tokens:,.0f} tokens, {advice.parameters:.3g} parameters",
        f"gamma  {advice.gamma:<6g} {why['ema_decay']}",
        f"alpha  {advice.alpha:<6g} {why['alpha']}",
        f"T_w    {advice.warmup_steps:<6} {why['warmup_steps']}",
        f"T_r    {args.steps - advice.rest_steps:<6} a rest of {advice.rest_steps} steps, from the same window",
        f"The average reaches over 1 / (1 - gamma) = {advice.horizon:,.0f} steps, {advice.horizon / args.steps:.1%} of "
        f"the run; under a steady drift a step becomes 1 / (1 - alpha) = {advice.effective_step:.3g} times the base's, "
        f"over some 1 / ((1 - gamma) (1 - alpha)) = {advice.build_up:,.0f} steps.",
        *(f"Mind: {line}." for line in advice.cautions),
        "Nearest published runs:",
        *(f"  {describe(p)}" for p in nearest(advice, args.batch_tokens)),
        "Behind the command of your base, type",
        f"  {' '.join(advice.overrides())}",
        "and beside it, to know whether it is more than a larger learning rate, the control:",
        f"  {' '.join(advice.control())}",
    ]
    return "\n".join(lines)


def draw(args: Arguments, lr: Schedule, alpha: Schedule) -> None:
    folder = folder_for(args.output)
    steps = range(0, args.steps, max(1, args.steps // 2000))
    rows = [(t, lr(t), alpha(t)) for t in steps]
    table(folder, "schedule", ("step", "lr_factor", "alpha"), rows)
    with figure(folder, "schedule") as (_, (axes,)):
        axes.plot(steps, [row[1] for row in rows], color="0.35", label="learning rate, factor")
        axes.plot(steps, [row[2] for row in rows], color="C0", label="alpha_t")
        axes.set_xlabel("step")
        axes.set_ylim(0, 1.25)
        axes.legend(ncols=2, loc="upper center")
