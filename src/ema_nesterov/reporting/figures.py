"""The pictures of a report, as PNG and SVG, in the paper's form.

A sweep's file lists what it wants: {kind: ..., and what that kind asks for}; with where: {KEY: VALUE or [VALUES]}
of the runs that have these values alone, with title: ... under that heading.

    comparison   three panels for a few runs: losses, differences to the base, the loss along the lookahead line
    curves       validation loss over steps (x: step | tokens | time), mean and range over seeds, the published curve
    differences  paired differences to the base over steps, mean and 95% interval over seeds
    final        final perplexities: seeds, mean, 95% interval, the published number
    grid         final perplexity of the runs called `name` over two keys, `rows` and `columns`, and a third, `panels`
    scaling      final perplexity over the key `x`, a line for each name, and for each value of the key `series`
    gains        final losses less the base's over the key `x`, a line for each name, where several bases share a value
                 against the best, or the best of the seed `chooses`, which is not shown; with batch_size and runs that
                 measured the gradient noise, its scale beside them
    positions    the loss along x + a d while the learning rate is constant, and while it decays
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from ..derived import alpha_schedule, lr_schedule
from ..errors import ConfigError
from ..plotting import STYLE, save
from .cells import Cell, paired_curves
from .comparison import along, draw_comparison
from .gains import gains
from .layout import BASE, CONTROL, WIDTH, Data, Drawn, Figure, about, colors, families, panels, place, ticks_at, value
from .runs import Run


def draw_all(wanted: list[dict[str, Any]], data: Data, folder: Path, prefix: str = "") -> list[Figure]:
    """Raises ConfigError for a figure or an option that does not exist. One that has nothing to show is left out."""
    figures = []
    for i, spec in enumerate(wanted):
        options = dict(spec)
        kind, where, title = options.pop("kind", None), options.pop("where", {}), options.pop("title", "")
        if kind not in KINDS:
            raise ConfigError(f"figure kind={kind} must be one of {', '.join(KINDS)}")
        try:
            inspect.signature(KINDS[kind]).bind(data, **options)
        except TypeError as e:
            raise ConfigError(f"figure kind={kind}: {e}; mend the figures of the sweep") from None
        shown = data.where(where) if where else data
        if not shown.cells:
            continue
        with plt.rc_context({**STYLE, "axes.titlesize": 10}):
            drawn = KINDS[kind](shown, **options)
            if drawn is None:
                continue
            drawing, caption = drawn
            twice = [other for other in wanted if other.get("kind") == kind]
            stem = prefix + (kind if len(twice) == 1 else f"{kind}_{i}")
            save(drawing, folder, stem)
        figures.append(Figure(folder / f"{stem}.svg", f"{title}. {caption}" if title else caption))
    return figures


# --- curves ---------------------------------------------------------------------------------------


def curves(data: Data, x: str = "step", metric: str = "val/loss") -> Drawn:
    grouped = families(data.cells)
    drawing, axes = panels(len(grouped))
    for ax, family in zip(axes, grouped, strict=True):
        ends, lows = [], []
        for cell, color in colors(family):
            seeds = [{line["step"]: line for line in run.metrics if metric in line} for run in cell.runs]
            lines = [[seed[step] for seed in seeds] for step in seeds[0] if all(step in seed for seed in seeds)]
            places = np.array([mean(seed[x] for seed in line) for line in lines])
            values = np.array([[seed[metric] for seed in line] for line in lines])
            style = "--" if color == CONTROL else "-"
            ax.plot(places, values.mean(1), color=color, ls=style, lw=1.4, label=cell.label)
            ax.fill_between(places, values.min(1), values.max(1), color=color, alpha=0.2, lw=0)
            lows.append(values.min())
            ends.append(values.mean(1)[len(values) // 4])
            curve = data.published[i].curve if (i := data.cells.index(cell)) in data.published else {}
            if curve and x == "step":
                ax.plot(list(curve), list(curve.values()), color=color, ls=":", lw=1, label=f"{cell.name}, published")
        margin = (max(ends) - min(lows)) * 0.05 or 0.1
        ax.set_ylim(min(lows) - margin, max(ends) + margin)
        ax.set(title=about(family), xlabel=x, ylabel="validation loss at x, nats per token")
        ax.legend()
    dotted = " Dotted: published." if data.published else ""
    return drawing, f"Validation loss: mean over seeds, and their range.{dotted}"


def differences(data: Data) -> Drawn:
    shown = [c for c in data.comparisons if c.same_length and c.pairs and not c.is_control]
    grouped = [
        kept
        for family in families(data.cells)
        if (kept := [c for c in shown if any(c.cell is cell for cell in family)])
    ]
    if not grouped:
        return None
    drawing, axes = panels(len(grouped))
    for ax, comparisons in zip(axes, grouped, strict=True):
        ax.axhline(0, color=BASE, lw=0.8)
        palette = {id(cell): color for cell, color in colors([c.cell for c in comparisons])}
        late: list[float] = []
        for c in comparisons:
            points = paired_curves(c)
            steps = [step for step, _ in points]
            color = palette[id(c.cell)]
            ax.plot(steps, [s.mean for _, s in points], color=color, marker=".", ms=4, lw=1.2, label=c.cell.label)
            bands = [s.interval or (s.mean, s.mean) for _, s in points]
            ax.fill_between(steps, [low for low, _ in bands], [high for _, high in bands], color=color, alpha=0.2, lw=0)
            late += [value for _, s in points[len(points) // 4 :] for value in (s.mean, *(s.interval or ()))]
        span = max(map(abs, late), default=0.01) * 1.2 or 0.01
        ax.set_ylim(-span, span)
        shade(ax, comparisons[0].cell.first)
        title = about([comparisons[0].cell])
        ax.set(title=title, xlabel="step", ylabel="nats less the base's (below 0: ahead)")
        ax.legend()
    return drawing, "Validation loss less that of the base of the same seed: mean and 95% interval. Grey: alpha > 0."


def shade(ax: Axes, run: Run) -> None:
    alpha = alpha_schedule(run.config)
    on = [step for step in range(run.config.steps) if alpha(step) > 0]
    if on:
        ax.axvspan(on[0], on[-1] + 1, color="0.5", alpha=0.08, lw=0)


# --- final values ---------------------------------------------------------------------------------


def final(data: Data) -> Drawn:
    grouped = families(data.cells)
    drawing, axes = panels(len(grouped), height=1.2 + 0.35 * max(map(len, grouped)))
    for ax, family in zip(axes, grouped, strict=True):
        for y, (cell, color) in enumerate(colors(family)):
            perplexity = cell.perplexity("val/loss")
            assert perplexity is not None
            ax.plot(perplexity.values, [y] * perplexity.n, ".", color=color, alpha=0.5)
            if perplexity.interval is not None:
                ax.plot(perplexity.interval, [y, y], color=color, lw=2)
            ax.plot(perplexity.mean, y, "|", color=color, ms=14, mew=2)
            entry = data.published.get(data.cells.index(cell))
            value = entry and (entry.perplexity or (entry.loss and np.exp(entry.loss)))
            if value:
                ax.plot(value, y, "D", mfc="none", color="black", ms=6)
        ax.set_yticks(range(len(family)), [cell.label for cell in family], fontsize=8)
        ax.invert_yaxis()
        ax.set(title=about(family), xlabel="final perplexity at x")
    return drawing, "Final perplexity at x: seeds, mean, 95% interval; diamonds are published numbers."


def grid(data: Data, name: str, rows: str, columns: str, panels_: str | None = None) -> Drawn:
    held = [cell for cell in data.cells if cell.name == name]
    if not held:
        return None
    lost = [other.config for other in data.others if other.config is not None and other.config.name == name]
    every = [cell.first.config for cell in held] + lost
    slices = sorted({value(cfg, panels_) for cfg in every}) if panels_ else [None]
    ys, xs = (sorted({value(cfg, key) for cfg in every}) for key in (rows, columns))
    losses = {place(c.first.config, rows, columns, panels_): c.perplexity("val/loss") for c in held}
    means = {key: p.mean for key, p in losses.items() if p is not None}
    base = next((c.base.perplexity("val/loss") for c in data.comparisons if c.cell in held and not c.is_control), None)
    drawing, axes = panels(len(slices), height=1.4 + 0.45 * len(ys))
    low, high = min(means.values()), max(means.values())
    best = min(means, key=lambda key: means[key])
    for ax, part in zip(axes, slices, strict=True):
        image = np.array([[means.get((y, x, part), np.nan) for x in xs] for y in ys])
        ax.imshow(image, cmap="viridis_r", vmin=low, vmax=high, aspect="auto")
        for i, y in enumerate(ys):
            for j, x in enumerate(xs):
                known = means.get((y, x, part))
                text = "-" if known is None else f"{known:.2f}"
                dark = known is not None and known > (low + high) / 2
                weight = "bold" if (y, x, part) == best else "normal"
                ax.text(j, i, text, ha="center", va="center", color="white" if dark else "black", weight=weight, size=8)
        ax.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
        ax.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
        ax.grid(False)
        title = name if part is None else f"{name}, {panels_} = {part:g}"
        ax.set(title=title, xlabel=columns, ylabel=rows)
    beside = "" if base is None else f" The base alone: {base.mean:.2f}."
    return drawing, f"Final perplexity at x; the lowest is bold; - is not finished.{beside}"


def scaling(data: Data, x: str, series: str | None = None) -> Drawn:
    models = list(dict.fromkeys(cell.first.config.model.get("name", "model") for cell in data.cells))
    drawing, axes = panels(len(models))
    for ax, model in zip(axes, models, strict=True):
        held = [cell for cell in data.cells if cell.first.config.model.get("name", "model") == model]
        names = list(dict.fromkeys(cell.name for cell in held))
        for name in names:
            cells = [cell for cell in held if cell.name == name]
            color = next(iter(colors([cells[0]])))[1]
            by_place: dict[Any, list[Cell]] = {}
            for cell in cells:
                by_place.setdefault(value(cell.first.config, x), []).append(cell)
            rules = max(map(len, by_place.values())) if series else 1
            for rule in range(rules):
                chosen = [
                    sorted(found, key=lambda c: value(c.first.config, series or x))[min(rule, len(found) - 1)]
                    for _, found in sorted(by_place.items())
                ]
                spots = [value(cell.first.config, x) for cell in chosen]
                found = [cell.perplexity("val/loss") for cell in chosen]
                label = name if rules == 1 else f"{name}, {'larger' if rule else 'smaller'} {series}"
                centers = [p.mean for p in found if p]
                bars = [(p.interval[1] - p.mean) if p and p.interval else 0.0 for p in found]
                ax.errorbar(spots, centers, bars, color=color, marker="o", ms=4, ls="--" if rule else "-", label=label)
        ticks_at(ax, {value(cell.first.config, x) for cell in held})
        ax.set(title=model, xlabel=x, ylabel="final perplexity at x")
        ax.legend()
    return drawing, f"Final perplexity at x over {x}: mean and 95% interval over seeds."


# --- the loss along the lookahead line ------------------------------------------------------------


def positions(data: Data) -> Drawn:
    held = [cell for cell in data.cells if stages(cell)]
    if not held:
        return None
    size = (2 * WIDTH, 3 * len(held))
    drawing, axes = plt.subplots(len(held), 2, figsize=size, layout="constrained", squeeze=False)
    for row, cell in zip(axes, held, strict=True):
        found = list(stages(cell).items())
        for spare in row[len(found) :]:
            spare.set_axis_off()
        for ax, (stage, step) in zip(row, found, strict=False):
            ax.axhline(0, color="black", lw=0.8)
            ax.axvline(0, color="black", lw=0.8)
            for direction, color, style, name in (
                ("ema", "C2", "--", "EMA of the updates"),
                ("step", "C3", "-", "last update"),
            ):
                lines = [line for run in cell.runs if (line := along(run, step, direction))]
                if lines:
                    places = sorted(lines[0])
                    heights = [mean(line[a] - line[0.0] for line in lines) for a in places]
                    ax.plot(places, heights, color=color, ls=style, marker=".", ms=4, label=name)
            ax.set(title=f"{cell.label}\n{stage}, step {step}", xlabel="a", ylabel="nats above the loss at x")
            ax.legend()
    return drawing, "The loss at x + a d less that at x, along the EMA of the updates and along the last update."


def stages(cell: Cell) -> dict[str, int]:
    """The probed steps that stand for a constant and for a decaying learning rate: the last, and the middle one."""
    steps = sorted({line["step"] for run in cell.runs for line in run.metrics if "probe/loss" in line})
    if not steps:
        return {}
    cfg = cell.first.config
    rate = lr_schedule(cfg)
    full = max(rate(step) for step in range(0, cfg.steps, max(1, cfg.steps // 1000)))
    stable = [step for step in steps if rate(step - 1) >= 0.999 * full]
    decaying = [step for step in steps if step not in stable and step > max(stable, default=0)]
    found = {"constant learning rate": stable[-1:], "decaying learning rate": decaying[(len(decaying) - 1) // 2 :]}
    return {name: picked[0] for name, picked in found.items() if picked}


KINDS: dict[str, Callable[..., Drawn]] = {
    "comparison": lambda data: draw_comparison(data.runs),
    "curves": curves,
    "differences": differences,
    "final": final,
    "grid": lambda data, panels=None, **keys: grid(data, panels_=panels, **keys),
    "scaling": scaling,
    "gains": gains,
    "positions": positions,
}
