"""The comparison as rows, printed, and written as markdown and CSV."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from statistics import mean, stdev

from .runs import Run, base_of

COLUMNS = (
    *("run", "seed", "steps", "ppl x", "bits/byte x", "ppl y", "bits/byte y"),
    *("ppl e", "bits/byte e", "loss - base", "steps saved"),
)
LEGEND = (
    "Perplexity (ppl) and bits per byte at the end of each run, on its fixed validation tokens: at the iterate x, at "
    "the lookahead point y = x + alpha d "
    "with the run's full alpha, and at the weight EMA e. loss - base: nats per token at x, below 0 is ahead. "
    "steps saved: until the base's final loss is reached, interpolated between evaluations."
)


def rows(runs: list[Run]) -> list[list[str]]:
    """One row a run, under COLUMNS; "-" where a run has no such number."""
    return [_row(run, base_of(run, runs)) for run in runs]


def _row(run: Run, base: Run | None) -> list[str]:
    last = run.final
    bits = last["val/bits_per_byte"] / last["val/loss"] if "val/bits_per_byte" in last else None
    cells = [run.name, str(run.config.seed), str(run.status["step"])]
    for key in ("val/loss", "val/lookahead_loss", "val/ema_loss"):
        loss = last.get(key)
        cells.append("-" if loss is None else f"{math.exp(loss):.2f}")
        cells.append("-" if loss is None or bits is None else f"{loss * bits:.4f}")
    difference = None if base is None else last["val/loss"] - base.final["val/loss"]
    cells.append("-" if difference is None else f"{difference:+.4f}")
    return [*cells, "-" if base is None else _saved(run, base)]


def _saved(run: Run, base: Run) -> str:
    reached = run.step_at(base.final["val/loss"])
    if reached is None:
        return "not reached"
    saved = base.status["step"] - reached
    return f"{saved:.0f} ({saved / base.status['step']:.1%})"


def verdicts(runs: list[Run]) -> list[str]:
    """What came out, in a sentence for each run that has a base, and over the seeds of each name."""
    sentences = []
    differences: dict[str, list[float]] = {}
    for run in runs:
        base = base_of(run, runs)
        if base is None:
            continue
        difference = run.final["val/loss"] - base.final["val/loss"]
        differences.setdefault(run.name, []).append(difference)
        side = "ahead of" if difference < 0 else "behind"
        sentence = f"{run.name} ended {abs(difference):.4f} nats {side} {base.name} (seed {run.config.seed}). "
        reached = run.step_at(base.final["val/loss"])
        if reached is None:
            sentence += "It never reached the base's final loss: no steps are saved."
        else:
            saved = base.status["step"] - reached
            sentence += (
                f"It reached the base's final loss at step {reached:.0f} of {base.status['step']}: "
                f"{saved:.0f} steps ({saved / base.status['step']:.1%}) saved."
            )
        sentences.append(sentence)
    for name, values in differences.items():
        if len(values) == 1:
            sentences.append(f"{name}: one seed, so this difference may be chance; run it again with seed=1, 2, ...")
        else:
            sentences.append(
                f"{name}: {mean(values):+.4f} nats against its base, mean of {len(values)} paired runs, "
                f"standard deviation {stdev(values):.4f}."
            )
    return sentences


def write_table(runs: list[Run], folder: Path) -> None:
    """table.md and table.csv."""
    body = rows(runs)
    with open(folder / "table.csv", "w", newline="") as f:
        csv.writer(f).writerows([COLUMNS, *body])
    lines = [COLUMNS, ["---"] * len(COLUMNS), *body]
    (folder / "table.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))
