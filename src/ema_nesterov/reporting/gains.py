"""What a lookahead, and its control, gain over the base as something else changes: a learning rate, the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import mean, median

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .cells import AHEAD, BEHIND, UNCLEAR, Cell, Comparison, Statistic
from .layout import BASE, HEIGHT, WIDTH, Data, Drawn, colors, ticks_at, value

VERDICTS = {AHEAD: "C2", BEHIND: "C3", UNCLEAR: "0.45"}  # colours


def gains(data: Data, x: str, chooses: int | None = None) -> Drawn:
    """chooses: the seed that decides between bases which share a value of x, and is not shown; None: their means do."""
    counted = (counting(c, chooses) for c in data.comparisons if c.same_length and c.base.is_base)
    shown = [c for c in counted if c.pairs]
    if not shown:
        return None
    bases = measured_bases(data, chooses)
    with_noise = x == "batch_size" and bool(bases)
    drawing, axes = plt.subplots(
        1, 1 + with_noise, figsize=(WIDTH * (1 + with_noise), HEIGHT), layout="constrained", squeeze=False
    )
    draw_gains(axes[0][0], shown, x, chooses)
    if not with_noise:
        return drawing, f"Final loss less that of the base of the same seed, over {x}: mean and 95% interval."
    late = [median(noise(cell)) for cell in bases]
    axes[0][0].axvspan(min(late), max(late) * 1.001, color="0.5", alpha=0.15, lw=0, label="gradient noise scale")
    axes[0][0].legend()
    draw_noise(axes[0][1], bases)
    return drawing, (
        "Left: final loss less that of the base of the same seed, over the batch: mean and 95% interval; grey: the "
        "medians of the base's gradient noise scale. Right: that scale as training goes on. Batches below it are "
        "mostly noise."
    )


def forests(shown: Mapping[str, Mapping[str, Statistic]]) -> Figure:
    """By title and label: seeds, mean and 95% interval of differences. One axis a title: their scales differ."""
    rows = [len(differences) for differences in shown.values()]
    drawing, axes = plt.subplots(
        len(shown), 1, figsize=(2 * WIDTH, 0.3 * sum(rows) + len(rows)), height_ratios=rows, layout="constrained"
    )
    for ax, (title, differences) in zip(np.atleast_1d(axes), shown.items(), strict=True):
        for i, d in enumerate(differences.values()):
            low, high = d.interval or (d.mean, d.mean)
            color = VERDICTS[d.verdict]
            ax.plot(d.values, [i] * d.n, "|", color=color, ms=5, alpha=0.5)
            ax.errorbar(d.mean, i, xerr=[[d.mean - low], [high - d.mean]], color=color, marker="o", ms=4, capsize=3)
        ax.axvline(0, color=BASE, lw=0.8)
        ax.set_yticks(range(len(differences)), list(differences))
        ax.invert_yaxis()
        ax.margins(y=0.5 / len(differences))
        ax.set(title=title, xlabel="nats less the tuned base's (below 0: ahead)")
    return drawing


def counting(comparison: Comparison, chooses: int | None) -> Comparison:
    return replace(comparison, pairs=[pair for pair in comparison.pairs if pair[0].config.seed != chooses])


def draw_gains(ax: Axes, comparisons: list[Comparison], x: str, chooses: int | None) -> None:
    ax.axhline(0, color=BASE, lw=0.8)
    names = list(dict.fromkeys(c.cell.name for c in comparisons))
    firsts = [next(c.cell for c in comparisons if c.cell.name == name) for name in names]
    for first, color in colors(firsts):
        points = best_bases([c for c in comparisons if c.cell.name == first.name], x, chooses)
        spots = list(points)
        means = [d.mean for c in points.values() if (d := c.difference)]
        bars = [d.interval[1] - d.mean if (d := c.difference) and d.interval else 0.0 for c in points.values()]
        ax.errorbar(spots, means, bars, color=color, marker="o", ms=4, capsize=2, label=first.name)
    ticks_at(ax, {spot(c.cell, x) for c in comparisons})
    ax.set(xlabel="tokens of a batch" if x == "batch_size" else x, ylabel="nats less the base's (below 0: ahead)")
    ax.legend()


def best_bases(comparisons: list[Comparison], x: str, chooses: int | None) -> dict[float, Comparison]:
    """By the value of x; of several, the one whose base ended lowest: at its best learning rate, say."""
    found: dict[float, Comparison] = {}
    for c in sorted(comparisons, key=lambda c: (spot(c.cell, x), ending(c.base, chooses))):
        found.setdefault(spot(c.cell, x), c)
    return found


def ending(base: Cell, chooses: int | None) -> float:
    """The final loss that decides; inf where the seed that does has not run."""
    losses = [run.loss for run in base.runs if chooses is None or run.config.seed == chooses]
    return mean(losses) if losses else math.inf


def spot(cell: Cell, x: str) -> float:
    return cell.first.tokens_per_step if x == "batch_size" else value(cell.first.config, x)


def measured_bases(data: Data, chooses: int | None) -> list[Cell]:
    """By batch, the base whose gradient noise was measured; of several, the one that ended lowest."""
    found: dict[int, Cell] = {}
    measured = [cell for cell in data.cells if cell.is_base and noise(cell)]
    for cell in sorted(measured, key=lambda c: (c.first.tokens_per_step, ending(c, chooses))):
        found.setdefault(cell.first.tokens_per_step, cell)
    return list(found.values())


def draw_noise(ax: Axes, bases: list[Cell]) -> None:
    for i, cell in enumerate(bases):
        by_step: dict[int, list[float]] = {}
        for run in cell.runs:
            for step, scale in zip(*run.curve("noise/scale"), strict=True):
                by_step.setdefault(step, []).append(scale)
        means = {step: mean(by_step[step]) for step in sorted(by_step)}
        label = f"batches of {cell.first.tokens_per_step}"
        ax.plot(list(means), list(means.values()), color=f"C{i}", marker=".", label=label)
    ax.set_yscale("log")
    ax.set(xlabel="step", ylabel="gradient noise scale, tokens")
    ax.legend()


def noise(cell: Cell) -> list[float]:
    """Every measurement of the gradient noise scale of these runs, in tokens."""
    return [scale for run in cell.runs for scale in run.curve("noise/scale")[1]]
