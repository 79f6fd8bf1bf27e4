"""Seeds taken together: means, intervals, and each cell against its base.

A cell is what the seeds of one config have in common. Differences are paired: a run less the base of the same seed,
which begins with the same weights and reads the same data. Intervals hold the mean with 95% confidence (Student's t).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, stdev
from typing import Any

from .runs import Run

# The 97.5% quantile of Student's t for 1, 2, ... 30 degrees of freedom
T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


AHEAD, BEHIND, UNCLEAR = "ahead", "behind", "not told apart"


@dataclass(frozen=True)
class Statistic:
    values: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def sd(self) -> float | None:
        return stdev(self.values) if self.n > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """None for a single value."""
        if self.sd is None:
            return None
        half = (T[self.n - 2] if self.n - 2 < len(T) else 1.96) * self.sd / math.sqrt(self.n)
        return self.mean - half, self.mean + half

    @property
    def verdict(self) -> str:
        """Of differences to a base, by their 95% interval."""
        low, high = self.interval or (-math.inf, math.inf)
        return AHEAD if high < 0 else BEHIND if low > 0 else UNCLEAR


@dataclass
class Cell:
    """The finished seeds of one config."""

    runs: list[Run]
    label: str = ""

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def name(self) -> str:
        return self.first.name

    @property
    def is_base(self) -> bool:
        return self.first.is_base

    @property
    def settings(self) -> dict[str, Any]:
        """What its runs have in common, see Run."""
        return self.first.settings

    def final(self, key: str) -> Statistic | None:
        """Of the last validation; None where runs do not have it."""
        values = [run.final[key] for run in self.runs if key in run.final]
        return Statistic(tuple(values)) if values else None

    def perplexity(self, key: str) -> Statistic | None:
        losses = self.final(key)
        return losses and Statistic(tuple(math.exp(loss) for loss in losses.values))


@dataclass
class Comparison:
    """A cell against its base, or a lookahead against its control, the base at its learning rate."""

    cell: Cell
    base: Cell
    pairs: list[tuple[Run, Run]]  # of the same seed

    @property
    def is_control(self) -> bool:
        return not self.base.is_base

    @property
    def same_length(self) -> bool:
        """Whether nothing but the lookahead, or its control, differs."""
        return self.cell.first.conditions == self.base.first.conditions

    @property
    def difference(self) -> Statistic | None:
        """In nats at x at the end; below 0: ahead of the base."""
        return Statistic(tuple(run.loss - base.loss for run, base in self.pairs)) if self.pairs else None

    @cached_property
    def saved(self) -> list[tuple[float, float, float]]:
        """(steps, tokens, seconds) less than the base took to its final loss, for each pair that reached it."""
        found = []
        for run, base in self.pairs:
            step = run.step_at(base.loss)
            if step is not None:
                tokens = base.status["step"] * base.tokens_per_step - step * run.tokens_per_step
                seconds = base.final["time"] - run.seconds_at(step)
                found.append((base.status["step"] - step, tokens, seconds))
        return found

    @property
    def pairwise(self) -> float:
        """The score of the pairwise rule of modded-nanogpt's optimization track, which asks for 0.004:
        (loss of the base - loss + 0.0045 (steps of the base - steps) / 100) / sqrt(1/n + 1/n of the base)."""
        steps = self.base.first.status["step"] - self.cell.first.status["step"]
        gain = mean(r.loss for r in self.base.runs) - mean(r.loss for r in self.cell.runs) + 0.0045 * steps / 100
        return gain / math.sqrt(1 / len(self.cell.runs) + 1 / len(self.base.runs))


def cells_of(runs: Sequence[Run]) -> list[Cell]:
    """In the order of their first runs; labels tell those of one name apart."""
    cells: dict[str, Cell] = {}
    for run in runs:
        cells.setdefault(run.name + json.dumps(run.settings, sort_keys=True), Cell([])).runs.append(run)
    for cell in cells.values():
        alike = [other.settings for other in cells.values() if other.name == cell.name]
        keys = {key for other in alike for key in other if any(o.get(key) != other[key] for o in alike)}
        told = [f"{key.rpartition('.')[2]} {cell.settings.get(key)}" for key in sorted(keys)]
        cell.label = f"{cell.name} ({', '.join(told)})" if told else cell.name
    return list(cells.values())


def comparisons_of(cells: Sequence[Cell]) -> list[Comparison]:
    """Each cell that is no base against the one that differs in the lookahead alone; where there is none, or beside
    it, against those of another length; and a lookahead against its control."""
    found = []
    for cell in (cell for cell in cells if not cell.is_base):
        bases = [base for base in cells if base.is_base and problem(base) == problem(cell)]
        bases.sort(key=lambda base: base.first.conditions != cell.first.conditions)
        for base in [*bases, *(other for other in cells if controls(other, cell))]:
            pairs = [(run, other) for run in cell.runs for other in base.runs if run.config.seed == other.config.seed]
            found.append(Comparison(cell, base, pairs))
    return found


def controls(cell: Cell, lookahead: Cell) -> bool:
    """Whether this is the base at the learning rate of that lookahead."""
    alpha = lookahead.first.config.lookahead.get("alpha")
    same = cell.first.conditions == lookahead.first.conditions
    return same and alpha is not None and not cell.first.has_lookahead and cell.first.matched_alpha == alpha


def problem(cell: Cell) -> dict[str, Any]:
    """What is trained on what by which optimizer, however long and under whatever schedule."""
    return {key: value for key, value in cell.first.conditions.items() if key not in ("steps", "schedule")}


def paired_curves(comparison: Comparison) -> list[tuple[int, Statistic]]:
    """(step, differences of the validation loss) where both have been evaluated, after step 0."""
    values: dict[int, list[float]] = {}
    for run, base in comparison.pairs:
        reference = dict(zip(*base.curve("val/loss"), strict=True))
        for step, loss in zip(*run.curve("val/loss"), strict=True):
            if step in reference and step > 0:
                values.setdefault(step, []).append(loss - reference[step])
    return [(step, Statistic(tuple(found))) for step, found in sorted(values.items())]
