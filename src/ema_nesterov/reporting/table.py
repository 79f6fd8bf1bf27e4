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
    *("config", "seeds", "loss x", "95%", "ppl x", "published", "loss - base", "95%", "steps saved"),
    *("loss - control", "95%", "tokens saved", "time saved", "ppl y", "ppl e"),
)
SHORT = (0, 1, 2, 4, 5, 6, 7, 8, 9)  # of these, what a terminal has room for
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
    "control is the base alone with the learning rate times 1 / (1 - alpha): the difference to it is what the "
    "lookahead gains beyond a larger step. published: perplexity at x, of the paper or the public benchmark."
)
RULE = (
    "The pairwise rule of modded-nanogpt's optimization track: (loss of the base - loss + 0.0045 (steps of the base - "
    "steps) / 100) / sqrt(1/n + 1/n of the base) is at least 0.004. Its constants were measured on NanoGPT 162M and "
    "mean little elsewhere."
)


POINTS = ("val/loss", "val/lookahead_loss", "val/ema_loss")  # at x, y and e


@dataclass
class Table:
    name: str  # of its files
    title: str
    columns: Sequence[str]
    rows: list[list[str]]
    legend: str
    data: list[dict[str, object]] | None = None  # what its CSV file holds instead: the same, unrounded

    def write(self, folder: Path) -> None:
        """name.md and name.csv."""
        with open(folder / f"{self.name}.csv", "w", encoding="utf-8", newline="") as f:
            if self.data is None:
                csv.writer(f).writerows([self.columns, *self.rows])
            else:
                writer = csv.DictWriter(f, list(dict.fromkeys(key for row in self.data for key in row)))
                writer.writeheader()
                writer.writerows(self.data)
        (folder / f"{self.name}.md").write_text(f"{self.markdown()}\n", encoding="utf-8")

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- runs -----------------------------------------------------------------------------------------


def table_of_runs(runs: list[Run]) -> Table:
    """ "-" where a run has no such number."""
    return Table("table", "Runs", RUNS, [_run(run, base_of(run, runs)) for run in runs], LEGEND)


def _run(run: Run, base: Run | None) -> list[str]:
    last = run.final
    bits = last["val/bits_per_byte"] / last["val/loss"] if "val/bits_per_byte" in last else None
    cells = [run.name, str(run.config.seed), str(run.status["step"])]
    for key in POINTS:
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
        at_x, at_y, at_e = (spread(cell.perplexity(key), 2) for key in POINTS)
        start = [cell.label, str(len(cell.runs)), spread(loss, 4), interval(loss), at_x, str(published.get(i, "-"))]
        steps, *saved = _saved(base)
        rows.append([*start, *_difference(base), steps, *_difference(control), *saved, at_y, at_e])
    data = [_numbers(cell, comparisons, published.get(i)) for i, cell in enumerate(cells)]
    return Table("cells", "Over seeds", CELLS, rows, SEEDS, data)


def _numbers(cell: Cell, comparisons: list[Comparison], entry: Published | None) -> dict[str, object]:
    """The same unrounded, for cells.csv."""
    numbers: dict[str, object] = {"config": cell.label, "seeds": len(cell.runs), "steps": cell.first.status["step"]}
    for name, key in zip(("loss_x", "loss_y", "loss_e"), POINTS, strict=True):
        numbers |= _spelt(name, cell.final(key))
        perplexity = cell.perplexity(key)
        numbers[name.replace("loss", "ppl")] = perplexity and perplexity.mean
    for name, wanted in (("base", False), ("control", True)):
        c = next((c for c in comparisons if c.cell is cell and c.is_control == wanted), None)
        numbers |= {name: c and c.base.label, f"{name}_pairs": c and len(c.pairs)}
        numbers |= _spelt(f"loss_less_{name}", c.difference if c else None)
        if c is not None and not wanted:
            means: list[float | None] = [Statistic(v).mean for v in zip(*c.saved, strict=True)] or [None] * 3
            numbers |= dict(zip(("steps_saved", "tokens_saved", "seconds_saved"), means, strict=True))
            numbers |= {"seeds_that_reached_base": len(c.saved), "pairwise_score": c.pairwise}
    if entry is not None:
        numbers |= {"published_loss": entry.loss, "published_ppl": entry.perplexity, "published_in": entry.source}
    return numbers


def _spelt(name: str, statistic: Statistic | None) -> dict[str, object]:
    low, high = (statistic and statistic.interval) or (None, None)
    mean, sd = (statistic.mean, statistic.sd) if statistic else (None, None)
    return {name: mean, f"{name}_sd": sd, f"{name}_low": low, f"{name}_high": high}


def _saved(comparison: Comparison | None) -> list[str]:
    """Steps, tokens, time."""
    if comparison is None or not comparison.pairs:
        return ["-", "-", "-"]
    if not comparison.saved:
        return ["not reached", "-", "-"]
    steps, tokens, seconds = (Statistic(values) for values in zip(*comparison.saved, strict=True))
    few = "" if steps.n == len(comparison.pairs) else f", {steps.n} of {len(comparison.pairs)} seeds"
    total = comparison.base.first.status["step"]
    return [share(steps.mean, total) + few, f"{tokens.mean / 1e6:,.4g}M", duration(seconds.mean)]


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
