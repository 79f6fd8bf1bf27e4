"""A few runs in three panels: loss curves, the difference to the base, and the loss along the lookahead line."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from .runs import Run, base_of


def draw_comparison(runs: list[Run]) -> tuple[Drawing, str]:
    drawing, (losses, gains, line) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    palette = {id(run): f"C{i}" for i, run in enumerate(runs)}
    draw_losses(losses, runs, palette)
    draw_differences(gains, runs, palette)
    draw_probe(line, runs, palette)
    return drawing, "Validation loss, its difference to the base's, and the loss along the lookahead line."


def draw_losses(axes: Axes, runs: list[Run], palette: dict[int, str]) -> None:
    for run in runs:
        color = palette[id(run)]
        axes.plot(*run.curve("val/loss"), color=color, marker=".", label=run.label)
        if run.has_lookahead:
            axes.plot(*run.curve("val/lookahead_loss"), color=color, ls=":", lw=1, label="at the lookahead point")
    lows = [min(run.curve("val/loss")[1]) for run in runs]
    axes.set_ylim(min(lows) - 0.1, min(lows) + 2)
    axes.set(title="validation loss at x", xlabel="step", ylabel="nats per token")
    axes.legend()


def draw_differences(axes: Axes, runs: list[Run], palette: dict[int, str]) -> None:
    """Each run minus its base at the same step; below 0 the lookahead is ahead."""
    axes.axhline(0, color="black", lw=0.8)
    shown = False
    for run in runs:
        base = base_of(run, runs)
        if base is None:
            continue
        reference = dict(zip(*base.curve("val/loss"), strict=True))
        pairs = [(s, v - reference[s]) for s, v in zip(*run.curve("val/loss"), strict=True) if s in reference and s > 0]
        shown = shown or bool(pairs)
        axes.plot([s for s, _ in pairs], [v for _, v in pairs], color=palette[id(run)], marker=".", label=run.label)
        on = [s for s, a in zip(*run.curve("optim/alpha"), strict=True) if a > 0]
        if on:
            axes.axvspan(on[0], on[-1], color=palette[id(run)], alpha=0.08, label="alpha > 0")
    if shown:
        axes.legend()
    axes.set(title="validation loss minus the base's", xlabel="step", ylabel="nats (below 0: ahead)")


def draw_probe(axes: Axes, runs: list[Run], palette: dict[int, str]) -> None:
    """The loss along x + a d, relative to the loss at x, at each run's middle probe."""
    axes.axhline(0, color="black", lw=0.8)
    axes.axvline(0, color="black", lw=0.8)
    for run in runs:
        steps = sorted({line["step"] for line in run.metrics if "probe/loss" in line})
        if not steps:
            continue
        step = steps[(len(steps) - 1) // 2]
        for direction, style, name in (("ema", "-", "EMA"), ("step", ":", "last update")):
            losses = along(run, step, direction)
            if losses:
                heights = [loss - losses[0.0] for loss in losses.values()]
                label = f"{name} of {run.name.rpartition('/')[2]}, step {step}"
                axes.plot(list(losses), heights, color=palette[id(run)], ls=style, label=label)
    axes.set(title="loss along x + a d", xlabel="a", ylabel="nats above the loss at x")
    if len(axes.lines) > 2:
        axes.legend(loc="upper left")


def along(run: Run, step: int, direction: str) -> dict[float, float]:
    """Position: loss."""
    return {
        line["probe/position"]: line["probe/loss"]
        for line in run.metrics
        if line["step"] == step and line.get("probe/direction") == direction
    }
