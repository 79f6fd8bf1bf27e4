"""The comparison as tables: a row a run, a row a cell, and a row a pair by the public benchmark's rule."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .cells import Cell, Comparison, Statistic
from .published import Published
from .runs import Run, base_of

RUNS = (
    *("run", "seed", "steps", "ppl x", "bits/byte x", "ppl y", "bits/byte y"),
    *("ppl e", "bits/byte e", "loss - base", "steps saved"),
)
CELLS = (
    *("config", "seeds", "loss x", "95%", "ppl x", "ppl y", "ppl e", "loss - base", "95%", "steps saved"),
    *("tokens saved", "time saved", "loss - control", "95%", "published ppl x"),
)
SHORT = (0, 1, 2, 7, 8, 9, 12, 14)  # of these, what a terminal has room for
PAIRWISE = ("config", "base", "steps", "base's steps", "score", "0.004 or more")
LEGEND = (
    "Perplexity (ppl) and bits per byte at the end of each run, on its fixed validation tokens: at the iterate x, at "
    "the lookahead point y = x + alpha d "
    "with the run's full alpha, and at the weight EMA e. loss - base: nats per token at x, below 0 is ahead. "
    "steps saved: until the base's final loss is reached, interpolated between evaluations."
)
SEEDS = (
    "Mean and standard deviation over seeds, and the interval that holds the mean with 95% confidence. loss - base is "
    "the mean of paired differences, seed by seed. Saved is the mean over the seeds that reached their base's final "
    "loss; time is the clock's, evaluations included. (other length): the base took another number of steps. The "
    "control is the base alone with the learning rate times 1 / (1 - alpha): the difference to it is what the lookahead "
    "gains beyond a larger step."
)
RULE = (
    "The pairwise rule of modded-nanogpt's optimization track: (loss of the base - loss + 0.0045 (steps of the base - "
    "steps) / 100) / sqrt(1/n + 1/n of the base) is at least 0.004. Its constants were measured on NanoGPT 162M and "
    "mean little elsewhere."
)


@dataclass
class Table:
    name: str  # of its files
    title: str
    columns: Sequence[str]
    rows: list[list[str]]
    legend: str

    def write(self, folder: Path) -> None:
        """name.md and name.csv."""
        with open(folder / f"{self.name}.csv", "w", newline="") as f:
            csv.writer(f).writerows([self.columns, *self.rows])
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        (folder / f"{self.name}.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


# --- runs -----------------------------------------------------------------------------------------


def table_of_runs(runs: list[Run]) -> Table:
    """ "-" where a run has no such number."""
    return Table("table", "Runs", RUNS, [_run(run, base_of(run, runs)) for run in runs], LEGEND)


def _run(run: Run, base: Run | None) -> list[str]:
    last = run.final
    bits = last["val/bits_per_byte"] / last["val/loss"] if "val/bits_per_byte" in last else None
    cells = [run.name, str(run.config.seed), str(run.status["step"])]
    for key in ("val/loss", "val/lookahead_loss", "val/ema_loss"):
        loss = last.get(key)
        cells.append("-" if loss is None else f"{math.exp(loss):.2f}")
        cells.append("-" if loss is None or bits is None else f"{loss * bits:.4f}")
    if base is None:
        return [*cells, "-", "-"]
    reached = run.step_at(base.loss)
    saved = "not reached" if reached is None else share(base.status["step"] - reached, base.status["step"])
    return [*cells, f"{run.loss - base.loss:+.4f}", saved]


def share(saved: float, total: float) -> str:
    return f"{saved:.0f} ({saved / total:.1%})"


# --- cells ----------------------------------------------------------------------------------------


def table_of_cells(cells: list[Cell], comparisons: list[Comparison], published: dict[int, Published]) -> Table:
    rows = []
    for i, cell in enumerate(cells):
        mine = [c for c in comparisons if c.cell is cell]
        base, control = (next((c for c in mine if c.is_control == wanted), None) for wanted in (False, True))
        loss = cell.final("val/loss")
        assert loss is not None  # runs without one are not counted
        points = [cell.perplexity(key) for key in ("val/loss", "val/lookahead_loss", "val/ema_loss")]
        row = [cell.label, str(len(cell.runs)), spread(loss, 4), interval(loss), *(spread(p, 2) for p in points)]
        rows.append([*row, *_against(base), *_difference(control), str(published.get(i, "-"))])
    return Table("cells", "Over seeds", CELLS, rows, SEEDS)


def _against(comparison: Comparison | None) -> list[str]:
    told = _difference(comparison)
    if comparison is None or not comparison.pairs:
        return [*told, "-", "-", "-"]
    if not comparison.saved:
        return [*told, "not reached", "-", "-"]
    steps, tokens, seconds = (Statistic(values) for values in zip(*comparison.saved, strict=True))
    few = "" if steps.n == len(comparison.pairs) else f", {steps.n} of {len(comparison.pairs)} seeds"
    total = comparison.base.first.status["step"]
    return [*told, share(steps.mean, total) + few, f"{tokens.mean / 1e6:,.4g}M", duration(seconds.mean)]


def _difference(comparison: Comparison | None) -> list[str]:
    difference = comparison.difference if comparison else None
    if comparison is None or difference is None:
        return ["-", "-"]
    other = "" if comparison.same_length else " (other length)"
    return [spread(difference, 4, sign=True) + other, interval(difference, sign=True)]


def spread(statistic: Statistic | None, digits: int, sign: bool = False) -> str:
    if statistic is None:
        return "-"
    text = f"{statistic.mean:{'+' if sign else ''}.{digits}f}"
    return text if statistic.sd is None else f"{text} ± {statistic.sd:.{digits}f}"


def interval(statistic: Statistic, sign: bool = False) -> str:
    if statistic.interval is None:
        return "-"
    low, high = statistic.interval
    plus = "+" if sign else ""
    return f"{low:{plus}.4f} to {high:{plus}.4f}"


def duration(seconds: float) -> str:
    sign, seconds = "-" if seconds < 0 else "", abs(seconds)
    return f"{sign}{seconds:.0f} s" if seconds < 600 else f"{sign}{seconds / 60:.0f} min"


def table_of_pairs(comparisons: list[Comparison]) -> Table:
    """The pairwise rule, against each base that there is, of whatever length."""
    rows = []
    for c in comparisons:
        steps = [str(cell.first.status["step"]) for cell in (c.cell, c.base)]
        rows.append([c.cell.label, c.base.label, *steps, f"{c.pairwise:.4f}", "yes" if c.pairwise >= 0.004 else "no"])
    return Table("pairwise", "The pairwise rule", PAIRWISE, rows, RULE)


def verdicts(comparisons: list[Comparison]) -> list[str]:
    """What came out, in a sentence or two for each cell that has a base."""
    sentences, told = [], set[tuple[int, bool]]()
    for c in comparisons:
        if (id(c.cell), c.is_control) in told:  # another base, of another length
            continue
        told.add((id(c.cell), c.is_control))
        difference = c.difference
        if difference is None:
            sentences.append(f"{c.cell.label} has no seed in common with {c.base.label}: nothing can be said.")
            continue
        side = "ahead of" if difference.mean < 0 else "behind"
        its = "its control, " if c.is_control else ""
        text = f"{c.cell.label} ended {abs(difference.mean):.4f} nats {side} {its}{c.base.label}"
        if not c.same_length:
            text += f" of {c.base.first.status['step']} steps, with {c.cell.first.status['step']}"
        if difference.interval is None:
            text += f" (seed {c.pairs[0][0].config.seed}). One seed, so this may be chance; run more."
        else:
            low, high = difference.interval
            clear = "0 is outside" if low > 0 or high < 0 else "0 is inside, so it may be chance"
            text += f", the mean of {difference.n} seeds; 95% interval {low:+.4f} to {high:+.4f}: {clear}."
        sentences.append(text if c.is_control else f"{text} {_reached(c)}")
    return sentences


def _reached(c: Comparison) -> str:
    if not c.saved:
        return "It never reached the base's final loss: no steps are saved."
    total = c.base.first.status["step"]
    steps = Statistic(tuple(steps for steps, _, _ in c.saved)).mean
    seeds = "" if len(c.pairs) == 1 else f" in {len(c.saved)} of {len(c.pairs)} seeds"
    return (
        f"It reached the base's final loss{seeds}, at step {total - steps:.0f} of {total}: "
        f"{steps:.0f} steps ({steps / total:.1%}) saved."
    )
