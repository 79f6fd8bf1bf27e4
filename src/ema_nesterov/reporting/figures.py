"""The pictures: loss curves, the difference to the base, and the loss along the lookahead line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .runs import Run, base_of

STYLE: dict[Any, Any] = {
    "figure.figsize": (12, 3.8),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "font.size": 10,
    "svg.fonttype": "none",
}


def draw(runs: list[Run], folder: Path) -> list[Path]:
    """comparison.{png,svg}; returns the SVG files."""
    with plt.rc_context(STYLE):
        figure, (losses, differences, line) = plt.subplots(1, 3, layout="constrained")
        colors = {id(run): f"C{i}" for i, run in enumerate(runs)}
        draw_losses(losses, runs, colors)
        draw_differences(differences, runs, colors)
        draw_probe(line, runs, colors)
        paths = [folder / f"comparison.{kind}" for kind in ("png", "svg")]
        for path in paths:
            figure.savefig(path, dpi=150)
        plt.close(figure)
    return [path for path in paths if path.suffix == ".svg"]


def draw_losses(axes: Axes, runs: list[Run], colors: dict[int, str]) -> None:
    for run in runs:
        color = colors[id(run)]
        axes.plot(*run.curve("val/loss"), color=color, marker=".", label=run.label)
        if run.has_lookahead:
            axes.plot(*run.curve("val/lookahead_loss"), color=color, ls=":", lw=1, label="at the lookahead point")
    lows = [min(run.curve("val/loss")[1]) for run in runs]
    axes.set_ylim(min(lows) - 0.1, min(lows) + 2)
    axes.set(title="validation loss at x", xlabel="step", ylabel="nats per token")
    axes.legend(fontsize=8)


def draw_differences(axes: Axes, runs: list[Run], colors: dict[int, str]) -> None:
    """Each run minus its base at the same step; below 0 the lookahead is ahead."""
    axes.axhline(0, color="black", lw=0.8)
    values: list[float] = []
    for run in runs:
        base = base_of(run, runs)
        if base is None:
            continue
        reference = dict(zip(*base.curve("val/loss"), strict=True))
        pairs = [(s, v - reference[s]) for s, v in zip(*run.curve("val/loss"), strict=True) if s in reference and s > 0]
        values += [v for _, v in pairs]
        axes.plot([s for s, _ in pairs], [v for _, v in pairs], color=colors[id(run)], marker=".", label=run.label)
        on = [s for s, a in zip(*run.curve("optim/alpha"), strict=True) if a > 0]
        if on:
            axes.axvspan(on[0], on[-1], color=colors[id(run)], alpha=0.08, label="alpha > 0")
    if values:
        axes.legend(fontsize=8)
    axes.set(title="validation loss minus the base's", xlabel="step", ylabel="nats (below 0: ahead)")


def draw_probe(axes: Axes, runs: list[Run], colors: dict[int, str]) -> None:
    """The loss along x + a d, relative to the loss at x, at each run's middle probe."""
    axes.axhline(0, color="black", lw=0.8)
    axes.axvline(0, color="black", lw=0.8)
    for run in runs:
        steps = sorted({line["step"] for line in run.metrics if "probe/loss" in line})
        if not steps:
            continue
        step = steps[(len(steps) - 1) // 2]
        for direction, style, name in (("ema", "-", "EMA"), ("step", ":", "last update")):
            losses = {
                line["probe/position"]: line["probe/loss"]
                for line in run.metrics
                if line["step"] == step and line.get("probe/direction") == direction
            }
            if losses:
                heights = [loss - losses[0.0] for loss in losses.values()]
                label = f"{name} of {run.name.rpartition('/')[2]}, step {step}"
                axes.plot(list(losses), heights, color=colors[id(run)], ls=style, label=label)
    axes.set(title="loss along x + a d", xlabel="a", ylabel="nats above the loss at x")
    if len(axes.lines) > 2:
        axes.legend(fontsize=8, loc="upper left")
